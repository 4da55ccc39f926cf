// Answers as Markdown. What an answer contains is never trusted: HTML in it is shown as text, what the renderer makes goes
// through DOMPurify, and neither images nor anything else is loaded.
import DOMPurify from "./vendor/dompurify.js";
import MarkdownIt from "./vendor/markdown-it.js";
import { copy, iconButton, make } from "./dom.js";

const MOST_COLOURED = 40_000; // characters of a code block
const LINKS = /^(?:https?|mailto):/i;

const ALLOWED = {
  ALLOWED_TAGS: [
    ..."a blockquote br code del em h1 h2 h3 h4 h5 h6 hr li ol p pre s strong table tbody td th thead tr ul span".split(" "),
  ],
  ALLOWED_ATTR: ["href", "title", "align", "start", "class"],
  ALLOWED_URI_REGEXP: LINKS,
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

const markdown = new MarkdownIt({ html: false, linkify: true, breaks: false, typographer: false });
// "file.py" or "e.g." is no link: only what has a scheme.
markdown.linkify.set({ fuzzyLink: false, fuzzyEmail: false, fuzzyIP: false });
markdown.validateLink = (url) => LINKS.test(url.trim());
// An image would tell its host that the answer was read: its address is shown instead.
markdown.renderer.rules.image = (tokens, index) => {
  const token = tokens[index];
  const address = token.attrGet("src") ?? "";
  const { escapeHtml } = markdown.utils;
  return `<a href="${escapeHtml(address)}">${escapeHtml(token.content || "image")}: ${escapeHtml(address)}</a>`;
};
// Columns are aligned by an attribute: the page's policy allows no styles in markup.
for (const name of ["th_open", "td_open"]) {
  markdown.renderer.rules[name] = (tokens, index) => {
    const align = /text-align:(left|center|right)/.exec(tokens[index].attrGet("style") ?? "")?.[1];
    return align ? `<${tokens[index].tag} align="${align}">` : `<${tokens[index].tag}>`;
  };
}

let [library, loading] = [null, null]; // what colours code, from the first code block on

/** The source as top-level blocks, each with its tokens and a key by which an unchanged one is known. */
function blocksOf(source) {
  const environment = {};
  const tokens = markdown.parse(source, environment);
  const lines = source.split("\n");
  const references = Object.keys(environment.references ?? {}).length;
  const blocks = [];
  let begun = 0;
  tokens.forEach((token, index) => {
    if (token.level !== 0 || token.nesting === 1) return;
    const map = tokens[begun].map ?? [0, lines.length];
    const key = `${references}|${tokens[begun].type}|${lines.slice(map[0], map[1]).join("\n")}`;
    blocks.push({ tokens: tokens.slice(begun, index + 1), key, environment });
    begun = index + 1;
  });
  return blocks;
}

function nodesOf(block) {
  const html = markdown.renderer.render(block.tokens, markdown.options, block.environment);
  const fragment = DOMPurify.sanitize(html, ALLOWED);
  for (const link of fragment.querySelectorAll("a")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer nofollow";
  }
  for (const table of fragment.querySelectorAll("table")) {
    const frame = make("div", { className: "wide", tabIndex: 0, role: "region", "aria-label": "Table" });
    table.replaceWith(frame);
    frame.append(table);
  }
  for (const pre of fragment.querySelectorAll("pre")) pre.replaceWith(codeBlock(pre));
  return [...fragment.childNodes];
}

function codeBlock(pre) {
  const code = pre.querySelector("code") ?? pre;
  const source = code.textContent;
  const language = /(?:^|\s)language-(\S+)/.exec(code.className)?.[1] ?? "";
  const shown = make("code", {}, source);
  colour(shown, source, language);
  const button = iconButton("copy", "Copy code", () => copy(source, button));
  return make(
    "figure",
    { className: "code" },
    make("figcaption", {}, make("span", {}, language || "text"), button),
    make("pre", { tabIndex: 0 }, shown),
  );
}

function colour(element, source, language) {
  if (!language || source.length > MOST_COLOURED) return;
  if (!library) {
    loading ??= import("./vendor/highlight.js").then((module) => (library = module.default));
    loading.then(() => colour(element, source, language)).catch(() => {});
    return;
  }
  if (!library.getLanguage(language)) return;
  const html = library.highlight(source, { language, ignoreIllegals: true }).value;
  element.replaceChildren(DOMPurify.sanitize(html, { ...ALLOWED, ALLOWED_TAGS: ["span"], ALLOWED_ATTR: ["class"] }));
}

/** A source that is still growing, so that what is begun at its end looks as it will: bold and code that are not closed yet. */
function closed(source) {
  if (source.split("\n").filter((line) => /^\s*(?:```|~~~)/.test(line)).length % 2) return source;
  const whole = source.replace(/(?:\*{1,2}|`)$/, "");
  const tail = whole.slice(whole.lastIndexOf("\n") + 1);
  if ((tail.match(/`/g) ?? []).length % 2) return `${whole}\``;
  return (tail.match(/\*\*/g) ?? []).length % 2 && !/\*\*\s*$/.test(tail) ? `${whole}**` : whole;
}

/** Markdown in an element, which may grow: only the blocks that have changed are made again. */
export class Rendered {
  constructor(element) {
    this.element = element;
    this._blocks = []; // {key, nodes}
  }

  /** Shows `source`, of which more may come where it is `growing`. */
  show(source, growing = false) {
    const blocks = blocksOf(growing ? closed(source) : source);
    let same = 0;
    while (same < blocks.length && blocks[same].key === this._blocks[same]?.key) same++;
    const gone = this._blocks.splice(same);
    for (const { nodes } of gone) for (const node of nodes) node.remove();
    for (const block of blocks.slice(same)) {
      const nodes = nodesOf(block);
      this.element.append(...nodes);
      this._blocks.push({ key: block.key, nodes });
    }
  }

  /** The text of the blocks from `from` on, but for the last `open` ones. */
  textOf(from, open) {
    const whole = this._blocks.slice(from, Math.max(from, this._blocks.length - open));
    return whole.map(({ nodes }) => nodes.map((node) => node.textContent).join("")).filter((text) => text.trim());
  }

  get length() {
    return this._blocks.length;
  }
}
