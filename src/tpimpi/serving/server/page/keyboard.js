// Shortcuts of the whole page. Those with letters take Alt, so that they are free in a text and in browsers.

/** Calls an action for each shortcut: stop, newOne, search, step(±1), copyLast, machines, write, keys. */
export function listen(actions) {
  const withAlt = {
    KeyN: actions.newOne,
    KeyK: actions.search,
    KeyC: actions.copyLast,
    KeyM: actions.machines,
    ArrowUp: () => actions.step(-1),
    ArrowDown: () => actions.step(1),
  };
  document.addEventListener("keydown", (event) => {
    if (event.defaultPrevented || document.querySelector("dialog[open]")) return;
    if (event.ctrlKey || event.metaKey) return;
    let action;
    if (event.key === "Escape") action = actions.stop;
    else if (event.altKey) action = withAlt[event.code];
    else if (!event.target.closest("input, textarea")) action = { "/": actions.write, "?": actions.keys }[event.key];
    if (!action) return;
    event.preventDefault();
    action();
  });
}
