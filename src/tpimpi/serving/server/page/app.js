// The page of tpimpi: conversations with the model of this server, kept in this browser.
import { emptyAnswer, fill, requestOf } from "./answering.js";
import { Cluster } from "./machines.js";
import { keyDialog, keysDialog, settingsDialog, tuneDialog } from "./dialogs.js";
import { byId, copy, download, toast } from "./dom.js";
import { listen } from "./keyboard.js";
import { emptyState, Sidebar } from "./sidebar.js";
import { conversationsOf, fileOf, newConversation, newId, settings, Store } from "./store.js";
import { Thread } from "./thread.js";

const TITLE_LENGTH = 60;
const SUGGESTIONS = [
  "Explain how a heat pump works",
  "Write a Python function that reverses words",
  "Plan a weekend of walking in the hills",
];

const store = new Store();
const running = new Map(); // by conversation id, what stops its answer
const drafts = new Map(); // by conversation id, what was typed and not sent
let current = newConversation(settings.defaults);

const question = byId("question");
const wide = matchMedia("(min-width: 50rem)");

const thread = new Thread(
  { element: byId("thread"), scroll: byId("scroll"), jump: byId("jump"), spoken: byId("spoken") },
  { edit, retry },
);
const sidebar = new Sidebar(byId("list"), { open: show, rename, remove });
const askKey = keyDialog();
let keyRefused = false; // the person does not want to give one now
const cluster = new Cluster(
  { pill: byId("cluster-pill"), line: byId("cluster-line"), strip: byId("cluster") },
  { onState: () => current.messages.length || drawThread(), onKey: async () => keyRefused || wantKey() },
);
const openTune = tuneDialog({ current: () => current, save: keepTuned, exportOne: (one) => exportSome([one]) });
const openSettings = settingsDialog({
  changed: settingsChanged,
  exportAll: () => exportSome(store.list()),
  importFile,
  removeAll,
});
const openKeys = keysDialog();

// What is shown

function draw() {
  const search = byId("search").value;
  sidebar.show(store.list(search), current.id, running, search.trim() !== "");
  const title = current.title || "New conversation";
  byId("title").textContent = title;
  document.title = current.title ? `${title} · tpimpi` : "tpimpi";
  const answering = running.has(current.id);
  const send = byId("send");
  send.setAttribute("aria-label", answering ? "Stop" : "Send");
  send.title = answering ? "Stop (Esc)" : "Send (Enter)";
  send.querySelector("use").setAttribute("href", answering ? "#icon-stop" : "#icon-send");
  send.classList.toggle("stop", answering);
  send.disabled = !answering && !question.value.trim();
}

function drawThread() {
  const { reached, ready, line, model, hosts } = cluster.state;
  const empty = emptyState({
    model,
    line: ready ? (hosts ? ` on ${hosts}` : "") : reached === null ? "" : line,
    suggestions: SUGGESTIONS,
    onSuggestion: (text) => ask(text),
  });
  thread.show(current, empty);
}

/** Shows a conversation. */
function show(conversation) {
  drafts.set(current.id, question.value);
  current = conversation;
  question.value = drafts.get(current.id) ?? "";
  resize();
  const hash = store.all.has(current.id) ? `#${current.id}` : "";
  if (location.hash !== hash) history.pushState(null, "", hash || location.pathname + location.search);
  drawThread();
  draw();
  if (!wide.matches) openSide(false);
  if (wide.matches) question.focus();
}

function startNew() {
  byId("search").value = "";
  show(current.messages.length ? newConversation(settings.defaults) : current);
  question.focus();
}

// What is asked

function ask(text) {
  const words = text.trim();
  if (!words || running.has(current.id)) return;
  current.messages.push({ id: newId(), role: "user", content: words, at: Date.now() });
  if (!current.named && !current.title) current.title = titleOf(words);
  question.value = "";
  resize();
  answerNow(current);
}

function titleOf(words) {
  const [line] = words.split("\n");
  return line.length > TITLE_LENGTH ? `${line.slice(0, TITLE_LENGTH - 1).trimEnd()}…` : line;
}

/** Asks for an answer to all that the conversation has, at its end. */
async function answerNow(conversation) {
  const stopping = new AbortController();
  const message = emptyAnswer(newId());
  const body = requestOf(conversation, cluster.figures?.model ?? undefined);
  conversation.messages.push(message);
  conversation.updated = Date.now();
  running.set(conversation.id, stopping);
  const keep = () => store.all.has(conversation.id) && store.put(conversation);
  await Promise.all([store.put(conversation), refresh(conversation)]);
  cluster.busy = true;
  cluster.now();
  await fill({
    message,
    body,
    signal: stopping.signal,
    changed: () => conversation === current && thread.update(message),
    keep,
    wantKey,
  });
  if (running.get(conversation.id) === stopping) running.delete(conversation.id);
  cluster.busy = running.size > 0;
  draw();
  if (message.problem) cluster.now();
}

function refresh(conversation) {
  if (conversation !== current) return draw();
  if (location.hash !== `#${current.id}`) history.replaceState(null, "", `#${current.id}`);
  drawThread();
  draw();
  // What had the focus, a button to answer again say, is gone.
  if (document.activeElement === document.body && wide.matches) question.focus();
}

function stop() {
  running.get(current.id)?.abort();
  running.delete(current.id);
  draw();
}

/** Asks again from a message on; what came after it goes, and can be brought back. */
function from(message, change) {
  const conversation = current;
  stop();
  const before = structuredClone(conversation.messages);
  const at = conversation.messages.indexOf(message);
  conversation.messages.length = at;
  change(conversation);
  answerNow(conversation);
  if (before.length - at <= 1) return;
  toast("The conversation goes on from here", "Undo", () => {
    running.get(conversation.id)?.abort();
    running.delete(conversation.id);
    conversation.messages = before;
    store.put(conversation);
    refresh(conversation);
  });
}

function retry(message) {
  from(message, () => {});
}

function edit(message, text) {
  from(message, (conversation) => {
    conversation.messages.push({ id: newId(), role: "user", content: text, at: Date.now() });
    if (conversation.messages.length === 1 && !conversation.named) conversation.title = titleOf(text);
  });
}

async function wantKey() {
  const given = await askKey();
  keyRefused = !given;
  if (given) cluster.now();
  return given;
}

// What is kept

function rename(conversation, title) {
  if (title && title !== conversation.title) {
    Object.assign(conversation, { title, named: true });
    store.put(conversation);
  }
  draw();
}

async function remove(conversation) {
  running.get(conversation.id)?.abort();
  running.delete(conversation.id);
  await store.remove(conversation.id);
  if (conversation === current) show(newConversation(settings.defaults));
  else draw();
  if (document.activeElement === document.body) (byId("list").querySelector(".open") ?? byId("new")).focus();
  toast("Conversation deleted", "Undo", () => {
    store.put(conversation);
    show(conversation);
  });
}

async function removeAll() {
  const all = store.list();
  byId("settings").close();
  for (const one of all) {
    running.get(one.id)?.abort();
    running.delete(one.id);
    await store.remove(one.id);
  }
  show(newConversation(settings.defaults));
  toast(`${all.length} conversations deleted`, "Undo", () => {
    for (const one of all) store.put(one);
    draw();
  });
}

function exportSome(conversations) {
  const day = new Date().toISOString().slice(0, 10);
  download(`tpimpi-${day}.json`, fileOf(conversations));
}

async function importFile(file) {
  const found = conversationsOf(await file.text());
  for (const one of found) {
    if (running.has(one.id)) one.id = newId();
    await store.put(one);
    if (one.id === current.id) current = one;
  }
  drawThread();
  draw();
  toast(found.length === 1 ? "One conversation imported" : `${found.length} conversations imported`);
}

function keepTuned(conversation) {
  if (store.all.has(conversation.id)) store.put(conversation);
}

function settingsChanged() {
  if (!current.messages.length) Object.assign(current, settings.defaults);
  keyRefused = false;
  nameTheme();
  cluster.now();
}

// What is pressed

function resize() {
  question.style.height = "";
  if (!CSS.supports("field-sizing", "content")) question.style.height = `${question.scrollHeight}px`;
}

function openSide(open) {
  byId("layout").dataset.side = open ? "open" : "closed";
  byId("side").inert = !open;
  byId("main").inert = open && !wide.matches;
  byId("side-open").hidden = open && wide.matches;
  if (open && !wide.matches) byId("side-close").focus();
}

function openCluster(open) {
  byId("cluster").hidden = !open;
  byId("cluster-pill").setAttribute("aria-expanded", String(open));
  settings.choose("cluster", open ? "open" : "closed");
}

function nameTheme() {
  const next = { system: "light", light: "dark", dark: "system" }[settings.theme];
  const button = byId("theme");
  button.title = `Appearance: ${settings.theme}`;
  button.setAttribute("aria-label", `Appearance: ${settings.theme}; change to ${next}`);
  return next;
}

function step(by) {
  const all = store.list(byId("search").value);
  const next = all[all.findIndex((one) => one.id === current.id) + by];
  if (next) show(next);
}

function connect() {
  const on = (id, listener) => byId(id).addEventListener("click", listener);
  on("new", startNew);
  on("open-tune", openTune);
  on("open-settings", openSettings);
  on("open-keys", openKeys);
  on("side-open", () => openSide(true));
  on("side-close", () => {
    openSide(false);
    byId("side-open").focus();
  });
  on("shade", () => openSide(false));
  on("cluster-pill", () => openCluster(byId("cluster").hidden));
  on("theme", () => {
    settings.theme = nameTheme();
    nameTheme();
  });
  byId("search").addEventListener("input", draw);
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    if (running.has(current.id)) stop();
    else ask(question.value);
  });
  question.addEventListener("input", () => {
    resize();
    draw();
  });
  question.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      ask(question.value);
    } else if (event.key === "ArrowUp" && !question.value && !event.altKey && thread.editLast()) event.preventDefault();
  });
  wide.addEventListener("change", () => openSide(wide.matches));
  window.addEventListener("hashchange", () => {
    const wanted = store.all.get(location.hash.slice(1));
    if (wanted !== current && (wanted || current.messages.length)) show(wanted ?? newConversation(settings.defaults));
  });
  listen({
    stop: () => (running.has(current.id) ? stop() : !wide.matches && openSide(false)),
    newOne: startNew,
    search: () => {
      openSide(true);
      byId("search").focus();
    },
    step,
    copyLast: () => copyLast(),
    machines: () => openCluster(byId("cluster").hidden),
    write: () => question.focus(),
    keys: openKeys,
  });
}

function copyLast() {
  const buttons = document.querySelectorAll(".answer > .tools button");
  const last = current.messages.findLast((message) => message.role === "assistant");
  if (last && buttons.length) copy(last.content, [...buttons].at(-2)).then(() => toast("Copied"));
}

async function start() {
  connect();
  nameTheme();
  openSide(wide.matches);
  openCluster((settings.choice("cluster") ?? (wide.matches ? "open" : "closed")) === "open");
  await store.open((id) => {
    if (running.has(id)) return;
    if (id === current.id) show(store.all.get(id) ?? newConversation(settings.defaults));
    else draw();
  });
  if (!store.kept) toast("This browser keeps nothing: conversations go when the page is closed");
  show(store.all.get(location.hash.slice(1)) ?? current);
  cluster.now();
}

start();
