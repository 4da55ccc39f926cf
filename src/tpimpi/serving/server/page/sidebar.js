// The list of conversations.
import { iconButton, make } from "./dom.js";

const DAY_MS = 86_400_000;

function ageOf(time) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  if (time >= midnight) return "Today";
  if (time >= midnight - DAY_MS) return "Yesterday";
  if (time >= midnight - 7 * DAY_MS) return "Last seven days";
  return "Older";
}

export class Sidebar {
  /** `actions`: open, rename, remove, each given a conversation. */
  constructor(element, actions) {
    this._element = element;
    this._actions = actions;
    element.addEventListener("keydown", (event) => this._arrows(event));
  }

  /** Shows these conversations; `running` are the ids of those that are being answered. */
  show(conversations, current, running, searching) {
    const focused = document.activeElement?.closest?.("[data-id]")?.dataset.id;
    const groups = Map.groupBy
      ? Map.groupBy(conversations, (one) => ageOf(one.updated))
      : conversations.reduce((map, one) => {
          const age = ageOf(one.updated);
          return map.set(age, [...(map.get(age) ?? []), one]);
        }, new Map());
    const sections = [...groups].map(([age, some]) =>
      make(
        "section",
        {},
        make("h2", {}, age),
        make("ul", {}, ...some.map((one) => this._row(one, one.id === current, running.has(one.id)))),
      ),
    );
    const nothing = searching ? "Nothing found" : "Conversations appear here, and stay in this browser.";
    this._element.replaceChildren(...(sections.length ? sections : [make("p", { className: "nothing" }, nothing)]));
    if (focused) this._element.querySelector(`[data-id="${focused}"] .open`)?.focus();
  }

  _row(conversation, current, running) {
    const open = make(
      "button",
      {
        type: "button",
        className: "open",
        title: conversation.title,
        "aria-current": current ? "page" : undefined,
        on: { click: () => this._actions.open(conversation) },
      },
      make("span", { className: "name" }, conversation.title || "New conversation"),
      running ? make("span", { className: "dot", role: "img", "aria-label": "being answered" }) : null,
    );
    const row = make(
      "li",
      { className: current ? "row current" : "row", dataset: { id: conversation.id } },
      open,
      make(
        "span",
        { className: "row-tools" },
        iconButton("edit", "Rename", () => this._rename(row, conversation)),
        iconButton("trash", "Delete", () => this._actions.remove(conversation)),
      ),
    );
    return row;
  }

  _rename(row, conversation) {
    let done = false;
    const input = make("input", { className: "rename", value: conversation.title, "aria-label": "Name", maxLength: 200 });
    const leave = (keep) => {
      if (done) return;
      done = true;
      this._actions.rename(conversation, keep ? input.value.trim() : "");
    };
    input.addEventListener("blur", () => leave(true));
    input.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.isComposing) leave(true);
      if (event.key === "Escape") leave(false);
      event.stopPropagation();
    });
    row.replaceChildren(input);
    input.focus();
    input.select();
  }

  _arrows(event) {
    if (event.altKey || !["ArrowUp", "ArrowDown"].includes(event.key)) return;
    const all = [...this._element.querySelectorAll(".open")];
    const at = all.indexOf(document.activeElement?.closest(".row")?.querySelector(".open"));
    if (at < 0) return;
    event.preventDefault();
    all[at + (event.key === "ArrowUp" ? -1 : 1)]?.focus();
  }
}

/** The mark in the middle of a conversation that has not begun. */
export function emptyState({ model, line, suggestions, onSuggestion }) {
  const mark = make("img", { src: "icon.svg", alt: "", width: 56, height: 56 });
  return make(
    "div",
    { className: "welcome" },
    mark,
    make("h2", {}, "What would you like to know?"),
    make("p", {}, model ? make("strong", {}, model) : "", line),
    make(
      "div",
      { className: "suggestions" },
      ...suggestions.map((text) => make("button", { type: "button", on: { click: () => onSuggestion(text) } }, text)),
    ),
  );
}
