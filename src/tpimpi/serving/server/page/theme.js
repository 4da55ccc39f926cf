// Before the page is drawn, so that it never flashes in the other colours.
(() => {
  try {
    const kept = localStorage.getItem("tpimpi.theme");
    if (kept === "light" || kept === "dark") document.documentElement.dataset.theme = kept;
  } catch {
    // A browser that keeps nothing: the system's colours.
  }
})();
