// Elements without markup in strings: nothing here parses HTML.

/** The element with this id. */
export const byId = (id) => document.getElementById(id);

/** A new element. Properties are set as such, `dataset`, `aria-*`, `role` and `on` (listeners by event) for what they are. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined) continue;
    if (name === "on") for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    else if (name === "dataset") Object.assign(element.dataset, value);
    else if (name.startsWith("aria-") || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== undefined && child !== null));
  return element;
}

/** An icon of the page's sprite, which screen readers pass over. */
export function icon(name) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  const use = document.createElementNS(space, "use");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

/** A button with an icon, named by `label` for the mouse and for screen readers. */
export function iconButton(name, label, onClick) {
  return make(
    "button",
    { type: "button", className: "plain icon-only", title: label, "aria-label": label, on: { click: onClick } },
    icon(name),
  );
}

/** Copies text, by the old way where the page did not come by https or from this machine; says so by a check mark. */
export async function copy(text, button) {
  try {
    if (navigator.clipboard) await navigator.clipboard.writeText(text);
    else copyBySelection(text);
  } catch {
    copyBySelection(text);
  }
  const [use, label] = [button.querySelector("use"), button.getAttribute("aria-label")];
  use.setAttribute("href", "#icon-check");
  button.setAttribute("aria-label", "Copied");
  setTimeout(() => {
    use.setAttribute("href", "#icon-copy");
    button.setAttribute("aria-label", label === "Copied" ? "Copy" : label);
  }, 1500);
}

function copyBySelection(text) {
  const before = document.activeElement;
  const area = make("textarea", { value: text, className: "unseen" });
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
  before?.focus();
}

/** Offers a JSON file to be saved. */
export function download(name, value) {
  const url = URL.createObjectURL(new Blob([JSON.stringify(value, null, 1)], { type: "application/json" }));
  make("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** A line at the foot of the page for some seconds, with something to do about it or without. */
export function toast(text, action, onAction) {
  const line = make("div", { className: "toast" }, make("span", {}, text));
  const leave = () => line.remove();
  if (action) {
    const act = () => {
      leave();
      onAction();
    };
    line.append(make("button", { type: "button", className: "link", on: { click: act } }, action));
  }
  document.getElementById("toasts").replaceChildren(line);
  setTimeout(leave, action ? 9000 : 4000);
}
