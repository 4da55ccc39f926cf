// The conversation as it is seen: questions, answers, and what can be done with them.
import { copy, icon, iconButton, make } from "./dom.js";
import { Rendered } from "./markdown.js";

const NEAR_END_PX = 48; // the reader is at the end, and stays there
const SLOW_SHARE = 2; // a render of d ms is followed by one after 2 d ms at the earliest
const LONGEST_WAIT_MS = 250;

const FINISHED = {
  length: "Ended at the limit of tokens",
  stopped: "Stopped",
};

function figuresOf({ first_s, rate, tokens, state, finish }) {
  const parts = [];
  if (state === "stopped") parts.push(FINISHED.stopped);
  else if (finish === "length") parts.push(FINISHED.length);
  if (tokens) parts.push(`${tokens.toLocaleString("en")} ${tokens === 1 ? "token" : "tokens"}`);
  if (rate) parts.push(`${rate.toPrecision(rate < 100 ? 3 : 4)} tokens/s`);
  if (first_s !== null && first_s !== undefined) parts.push(`first after ${first_s.toFixed(first_s < 10 ? 2 : 0)} s`);
  return parts.join(" · ");
}

/** A person's message; it can be edited, and asked again from there. */
class Question {
  constructor(message, actions) {
    this.message = message;
    this._actions = actions;
    this._text = make("div", { className: "bubble" }, message.content);
    const copying = iconButton("copy", "Copy", () => copy(message.content, copying));
    this._tools = make("footer", { className: "tools" }, copying, iconButton("edit", "Edit", () => this.edit()));
    this.element = make("article", { className: "message question", "aria-label": "You" }, this._text, this._tools);
  }

  update() {}

  edit() {
    const area = make("textarea", { value: this.message.content, dir: "auto", rows: 3, "aria-label": "Edit your message" });
    const leave = () => {
      form.replaceWith(this._text, this._tools);
      this._tools.lastChild.focus();
    };
    const send = () => {
      const text = area.value.trim();
      if (text) this._actions.edit(this.message, text);
    };
    const form = make(
      "form",
      {
        className: "edit",
        on: {
          submit: (event) => {
            event.preventDefault();
            send();
          },
          keydown: (event) => {
            if (event.key === "Escape") {
              event.stopPropagation();
              leave();
            } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.target === area) {
              event.preventDefault();
              send();
            }
          },
        },
      },
      area,
      make(
        "div",
        { className: "buttons" },
        make("span", { className: "gap" }),
        make("button", { type: "button", className: "quiet", on: { click: leave } }, "Cancel"),
        make("button", { type: "submit", className: "accent" }, "Send"),
      ),
    );
    this._text.replaceWith(form);
    this._tools.remove();
    area.focus();
    area.setSelectionRange(area.value.length, area.value.length);
    form.scrollIntoView({ block: "nearest" });
  }
}

/** The model's message, whole or growing. */
class Answer {
  constructor(message, actions) {
    this.message = message;
    this._body = make("div", { className: "prose" });
    this._rendered = new Rendered(this._body);
    this._spoken = 0; // blocks that were read out
    this._thought = make("div", { className: "prose" });
    this._thoughts = new Rendered(this._thought);
    this._summary = make("span", {}, "Reasoning");
    this._reasoning = make(
      "details",
      { className: "reasoning", hidden: true, on: { toggle: () => this._showReasoning() } },
      make("summary", {}, icon("down"), this._summary),
      this._thought,
    );
    this._waiting = make("p", { className: "waiting" }, make("span", { className: "pulse", "aria-hidden": "true" }));
    this._note = make("span", {});
    this._waiting.append(this._note);
    this._problem = make("div", { className: "failed", role: "alert", hidden: true });
    this._figures = make("span", { className: "figures" });
    const copying = iconButton("copy", "Copy answer", () => copy(message.content, copying));
    this._tools = make(
      "footer",
      { className: "tools" },
      copying,
      iconButton("retry", "Answer again", () => actions.retry(message)),
      this._figures,
    );
    this._retry = () => actions.retry(message);
    this.element = make(
      "article",
      { className: "message answer", "aria-label": "Answer" },
      this._reasoning,
      this._body,
      this._waiting,
      this._problem,
      this._tools,
    );
    this.update();
  }

  get open() {
    return this.message.state === "waiting" || this.message.state === "answering";
  }

  _showReasoning() {
    if (this._reasoning.open) this._thoughts.show(this.message.reasoning, this.open);
  }

  update() {
    const { content, reasoning, state, note, problem } = this.message;
    this.element.dataset.state = state;
    this.element.setAttribute("aria-busy", String(this.open));
    this._rendered.show(content, this.open);
    this._reasoning.hidden = !reasoning;
    this._summary.textContent = this.open && !content ? "Reasoning…" : "Reasoning";
    this._reasoning.classList.toggle("now", this.open && !content);
    this._showReasoning();
    this._waiting.hidden = !this.open || Boolean(content) || (Boolean(reasoning) && !note);
    this._note.textContent = note;
    this._tools.hidden = this.open;
    this._figures.textContent = figuresOf(this.message);
    if (this._shownProblem === problem) return;
    this._shownProblem = problem;
    this._problem.hidden = !problem;
    if (problem) this._showProblem(problem);
  }

  _showProblem({ title, detail }) {
    this._problem.replaceChildren(
      icon("alert"),
      make("div", {}, make("strong", {}, title), make("p", {}, detail)),
      make("button", { type: "button", className: "quiet", on: { click: this._retry } }, icon("retry"), "Try again"),
    );
  }

  /** The text of blocks that are whole and were not read out yet. */
  unspoken() {
    const whole = this._rendered.textOf(this._spoken, this.open ? 1 : 0);
    this._spoken = Math.max(this._spoken, this._rendered.length - (this.open ? 1 : 0));
    return whole;
  }

  /** What is there already is not read out. */
  skipSpoken() {
    this._spoken = this._rendered.length;
  }
}

/** The messages of one conversation, in an element that scrolls. */
export class Thread {
  constructor({ element, scroll, jump, spoken }, actions) {
    Object.assign(this, { _element: element, _scroll: scroll, _jump: jump, _spoken: spoken, _actions: actions });
    this._views = new Map(); // by message id
    this._changed = new Set(); // messages to be drawn with the next frame
    this._atEnd = true;
    this._lastTop = 0;
    scroll.addEventListener("scroll", () => this._scrolled(), { passive: true });
    jump.addEventListener("click", () => this.toEnd(true));
    new ResizeObserver(() => this._follow()).observe(scroll);
  }

  /** Shows a conversation, with what is there already as it is; `empty` where it has no message. */
  show(conversation, empty) {
    const before = this._views;
    this._views = new Map();
    this._changed.clear();
    this._spoken.replaceChildren();
    for (const message of conversation.messages) {
      const there = before.get(message.id);
      const view = there?.message === message ? there : this._viewOf(message);
      this._views.set(message.id, view);
    }
    this._element.replaceChildren(...(this._views.size ? [...this._views.values()].map((view) => view.element) : [empty]));
    this._element.classList.toggle("empty", !this._views.size);
    this.toEnd();
  }

  _viewOf(message) {
    if (message.role === "user") return new Question(message, this._actions);
    const view = new Answer(message, this._actions);
    view.skipSpoken();
    return view;
  }

  /** A message has changed: it is drawn again with the next frame. */
  update(message) {
    if (!this._views.has(message.id)) return;
    this._changed.add(message.id);
    if (this._frame) return;
    this._frame = true;
    const draw = () => requestAnimationFrame(() => this._draw());
    const wait = Math.min((this._drawn ?? 0) * SLOW_SHARE, LONGEST_WAIT_MS);
    if (wait > 16) setTimeout(draw, wait);
    else draw();
  }

  _draw() {
    this._frame = false;
    const began = performance.now();
    for (const id of this._changed) {
      const view = this._views.get(id);
      view?.update();
      for (const text of view?.unspoken?.() ?? []) this._spoken.append(make("p", {}, text));
    }
    this._changed.clear();
    this._follow();
    this._drawn = performance.now() - began;
  }

  /** Opens the last question for editing, if there is one. */
  editLast() {
    const questions = [...this._views.values()].filter((view) => view instanceof Question);
    questions.at(-1)?.edit();
    return questions.length > 0;
  }

  toEnd(smooth = false) {
    this._atEnd = true;
    this._jump.hidden = true;
    const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
    this._scroll.scrollTo({ top: this._scroll.scrollHeight, behavior: smooth && !calm ? "smooth" : "instant" });
  }

  _follow() {
    if (this._atEnd) this._scroll.scrollTop = this._scroll.scrollHeight;
    else this._jump.hidden = this._distance() < NEAR_END_PX;
  }

  _distance() {
    return this._scroll.scrollHeight - this._scroll.scrollTop - this._scroll.clientHeight;
  }

  /** Who scrolls up reads there, whatever comes; who comes back to the end follows again. */
  _scrolled() {
    const top = this._scroll.scrollTop;
    if (top < this._lastTop - 2 && this._distance() > 4) this._atEnd = false;
    else if (this._distance() < NEAR_END_PX) this._atEnd = true;
    this._lastTop = top;
    this._jump.hidden = this._atEnd || this._distance() < NEAR_END_PX;
  }
}
