// Settings of a conversation and of the page, and the question for a key.
import { byId, make } from "./dom.js";
import { SAMPLING_FIELDS, settings } from "./store.js";

/** Puts a field for each number of sampling into the dialog. */
function addSampling(dialog) {
  const fields = SAMPLING_FIELDS.map(({ name, label }) =>
    make(
      "label",
      { className: "field" },
      label,
      make("input", { name, type: "text", inputMode: "decimal", autocomplete: "off", placeholder: "default" }),
    ),
  );
  dialog.querySelector("[data-sampling]").append(...fields);
}

const showSampling = (form, sampling) => {
  for (const { name } of SAMPLING_FIELDS) form.elements[name].value = sampling[name] ?? "";
};

/** The numbers of the form. Throws Error with a line for people; the field that is wrong is marked and focused. */
function readSampling(form) {
  const found = {};
  for (const { name, label, least, most, step } of SAMPLING_FIELDS) {
    const input = form.elements[name];
    const written = input.value.trim().replace(",", ".");
    const value = written === "" ? null : Number(written);
    const wrong = value !== null && (!(value >= least && value <= most) || (step === 1 && !Number.isInteger(value)));
    input.setAttribute("aria-invalid", String(wrong));
    if (wrong) {
      input.focus();
      const range = most >= 1e9 ? `from ${least} on` : `from ${least} to ${most}`;
      throw new Error(`${label} is ${step === 1 ? "a whole number" : "a number"} ${range}, or empty: the server's default.`);
    }
    found[name] = value;
  }
  return found;
}

/** A dialog with a form: `onSave` may throw an Error whose line is shown; else the dialog closes. */
function prepare(id, onSave, actions = {}) {
  const dialog = byId(id);
  const problem = dialog.querySelector(".problem");
  const say = (line) => {
    if (problem) [problem.textContent, problem.hidden] = [line, !line];
  };
  dialog.addEventListener("click", async (event) => {
    if (event.target === dialog) return dialog.close(); // beside it
    const action = event.target.closest("[data-do]")?.dataset.do;
    if (action === "close") return dialog.close();
    if (action) {
      say("");
      await actions[action]?.(say);
    }
  });
  dialog.querySelector("form")?.addEventListener("submit", async (event) => {
    event.preventDefault();
    try {
      say("");
      await onSave(event.target);
      dialog.close();
    } catch (error) {
      say(error.message);
    }
  });
  return () => {
    say("");
    for (const input of dialog.querySelectorAll("[aria-invalid]")) input.removeAttribute("aria-invalid");
    dialog.showModal();
  };
}

/** System prompt and sampling of the conversation. `actions`: current(), save(conversation), exportOne(conversation). */
export function tuneDialog(actions) {
  const form = byId("tune-form");
  addSampling(byId("tune"));
  const open = prepare(
    "tune",
    () => {
      const sampling = readSampling(form);
      actions.save(Object.assign(actions.current(), { sampling, system: form.elements.system.value }));
    },
    { export: () => actions.exportOne(actions.current()) },
  );
  return () => {
    const { system, sampling } = actions.current();
    form.elements.system.value = system;
    showSampling(form, sampling);
    open();
  };
}

/** Settings of the page. `actions`: changed(), exportAll(), importFile(file), removeAll(). */
export function settingsDialog(actions) {
  const form = byId("settings-form");
  const file = byId("import-file");
  addSampling(byId("settings"));
  let tell = () => {};
  const open = prepare(
    "settings",
    () => {
      settings.defaults = { system: form.elements.system.value, sampling: readSampling(form) };
      settings.theme = form.elements.theme.value;
      settings.key = form.elements.key.value.trim();
      actions.changed();
    },
    {
      export: () => actions.exportAll(),
      import: (say) => {
        tell = say;
        file.click();
      },
      delete: () => actions.removeAll(),
    },
  );
  file.addEventListener("change", async () => {
    const [chosen] = file.files;
    if (!chosen) return;
    try {
      await actions.importFile(chosen);
      byId("settings").close();
    } catch (error) {
      tell(error.message);
    }
    file.value = "";
  });
  return () => {
    const { system, sampling } = settings.defaults;
    form.elements.system.value = system;
    showSampling(form, sampling);
    form.elements.theme.value = settings.theme;
    form.elements.key.value = settings.key;
    open();
  };
}

/** Asks for the key. The returned function resolves to whether there is a new one; asked twice at once, it asks once. */
export function keyDialog() {
  const dialog = byId("key");
  let asked = null;
  const open = prepare("key", (form) => {
    const key = form.elements.key.value.trim();
    if (!key) throw new Error("empty");
    settings.key = key;
    dialog.returnValue = "saved";
  });
  return () => {
    asked ??= new Promise((resolve) => {
      const had = settings.key;
      byId("key-why").firstChild.textContent = had
        ? "It does not take the one that it was given. Its owner has another, in the file of "
        : "Its owner has it, in the file of ";
      byId("key-form").elements.key.value = "";
      dialog.returnValue = "";
      dialog.addEventListener(
        "close",
        () => {
          asked = null;
          resolve(settings.key !== had || dialog.returnValue === "saved");
        },
        { once: true },
      );
      open();
    });
    return asked;
  };
}

/** The list of shortcuts. */
export const keysDialog = () => prepare("keys", () => {});
