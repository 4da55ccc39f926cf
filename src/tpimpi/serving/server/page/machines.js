// The machines that answer, live: one line in the head of the page, and a strip with a row for each rank.
import { cluster, health } from "./api.js";
import { progressLine } from "./answering.js";
import { make } from "./dom.js";

const QUICK_MS = 1000;
const SLOW_MS = 10_000;
const KEY_LINE = "a key is wanted";

const GIB = 2 ** 30;
const bytes = (value) => {
  if (value >= GIB) return `${(value / GIB).toFixed(value < 10 * GIB ? 1 : 0)} GiB`;
  if (value >= 2 ** 20) return `${Math.round(value / 2 ** 20)} MiB`;
  return `${Math.round(value / 1024)} KiB`;
};
/** "5.1 of 8.0 GiB": the unit once, where both have the same. */
function shareOfBytes(part, whole) {
  const [one, all] = [bytes(part), bytes(whole)];
  const unit = all.slice(-4);
  return `${one.endsWith(unit) ? one.slice(0, -4) : one} of ${all}`;
}
const percent = (share) => `${Math.round(100 * share)} %`;
const count = (value) => value.toLocaleString("en");

/** A model's name without the folders before it. */
export const shortName = (model) => (model ?? "").split("/").filter(Boolean).at(-1) ?? "";

/** A labelled bar; made once, then set. */
class Bar {
  constructor(name, label, title) {
    this._value = make("span", { className: "bar-value" });
    this._fill = make("span", { className: "bar-fill" });
    this.element = make(
      "div",
      { className: `bar ${name}`, title },
      make("span", { className: "bar-label" }, label),
      make("span", { className: "bar-track", "aria-hidden": "true" }, this._fill),
      this._value,
    );
  }

  set(share, text) {
    this._fill.style.setProperty("--share", Math.min(Math.max(share ?? 0, 0), 1));
    this._value.textContent = text;
  }
}

class RankRow {
  constructor(rank) {
    this._host = make("strong", {});
    this._bars = {
      memory: new Bar("memory", "Memory", "What the rank holds, of what it may"),
      disk: new Bar("disk", "Disk", "Reading layers that do not fit into memory"),
      star: new Bar("star", "Star", "Waiting for the sums over the network"),
      compute: new Bar("compute", "Compute", "Multiplying"),
    };
    const bars = Object.values(this._bars).map((bar) => bar.element);
    const name = make("div", { className: "rank-name" }, this._host, make("span", {}, `rank ${rank}`));
    this.element = make("div", { className: "rank", role: "listitem" }, name, ...bars);
  }

  /** What the figures were when something was last answered is not shown as if it still were. */
  update(rank, running) {
    this._host.textContent = rank.host;
    this._host.title = rank.host;
    const { memory_bytes: memory, promised_bytes: promised } = rank;
    this._bars.memory.set(promised ? memory / promised : 0, promised ? shareOfBytes(memory, promised) : bytes(memory));
    const disk = running ? rank.disk_bytes_per_s : 0;
    this._bars.disk.set(running ? rank.disk_share : 0, disk ? `${bytes(disk)}/s` : "idle");
    for (const name of ["star", "compute"]) {
      const share = running ? rank[`${name}_share`] : 0;
      this._bars[name].set(share, percent(share));
    }
  }
}

export class Cluster {
  /** `onState` is called with {reached, ready, line, model, hosts} when one of them changes, `onKey` where a key is wanted. */
  constructor({ pill, line, strip }, { onState, onKey }) {
    Object.assign(this, { _pill: pill, _line: line, _strip: strip, _onState: onState, _onKey: onKey });
    this.state = { reached: null, ready: false, line: "", model: "", hosts: "" };
    this.figures = null;
    this.busy = false; // something is answered in this page
    this._rows = new Map();
    this._summary = make("p", { className: "cluster-summary" });
    this._list = make("div", { className: "ranks", role: "list" });
    strip.append(this._summary, this._list);
    document.addEventListener("visibilitychange", () => document.hidden || this.now());
  }

  /** Asks now, and from then on by itself. */
  async now() {
    clearTimeout(this._timer);
    const asking = (this._asking = {});
    await this._ask();
    if (asking !== this._asking || document.hidden) return;
    const quick = this.busy || this._loading || (this.figures?.running ?? 0) > 0;
    this._timer = setTimeout(() => this.now(), quick ? QUICK_MS : SLOW_MS);
  }

  async _ask() {
    let [figures, line, reached, ready] = [null, "", true, false];
    try {
      figures = await cluster();
      ready = figures.state === "ready";
      if (!ready) line = progressLine(await health());
    } catch (problem) {
      if (problem.kind === "key") {
        line = KEY_LINE;
        this._onKey(problem.message);
      } else if (problem.kind === "loading") line = progressLine(await health().catch(() => ({})));
      else [reached, line] = [problem.kind !== "gone", problem.title ?? problem.message];
    }
    this.figures = figures;
    this._loading = !ready && line !== KEY_LINE;
    this._draw(line, reached, ready);
    const hosts = [...new Set((figures?.ranks ?? []).map((rank) => rank.host))];
    const state = {
      reached,
      ready,
      line,
      model: shortName(figures?.model) || this.state.model,
      hosts: hosts.length > 3 ? `${hosts.length} machines` : hosts.join(", "),
    };
    const changed = Object.keys(state).some((name) => state[name] !== this.state[name]);
    this.state = state;
    if (changed) this._onState(state);
  }

  _draw(line, reached, ready) {
    const figures = this.figures;
    this._pill.dataset.state = !reached ? "gone" : !ready ? "loading" : figures.running ? "busy" : "ready";
    this._strip.classList.toggle("stale", !ready);
    if (!ready) {
      this._line.textContent = line || "loading";
      return;
    }
    const { ranks, running, waiting, tokens_per_s: rate } = figures;
    const machines = new Set(ranks.map((rank) => rank.host)).size;
    const where = machines > 1 ? `${machines} machines` : ranks.length > 1 ? `${ranks.length} ranks` : "ready";
    this._line.textContent = running && rate ? `${where} · ${rate.toFixed(rate < 10 ? 1 : 0)} tokens/s` : where;
    const parts = [shortName(figures.model), `context ${count(figures.context)}`];
    parts.push(`${running} of ${figures.together} answering`);
    if (waiting) parts.push(`${waiting} waiting`);
    if (figures.pages) parts.push(`${count(figures.pages_used)} of ${count(figures.pages)} pages of KV cache`);
    this._summary.textContent = parts.join(" · ");
    this._drawRows(ranks, running > 0);
  }

  _drawRows(ranks, running) {
    const there = new Set(ranks.map((rank) => rank.rank));
    for (const [rank, row] of this._rows) {
      if (there.has(rank)) continue;
      row.element.remove();
      this._rows.delete(rank);
    }
    for (const rank of ranks) {
      if (!this._rows.has(rank.rank)) {
        const row = new RankRow(rank.rank);
        this._rows.set(rank.rank, row);
        this._list.append(row.element);
      }
      this._rows.get(rank.rank).update(rank, running);
    }
  }
}
