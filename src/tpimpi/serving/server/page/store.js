// What the browser keeps: conversations in IndexedDB, settings in localStorage. Nothing of it goes to a server by itself.

const SAMPLING = ["temperature", "top_p", "max_tokens", "seed"];
const FILE_FORMAT = "tpimpi-conversations";

/** Numbers that a person may set, with what the server takes. null is: as the server would have it. */
export const SAMPLING_FIELDS = [
  { name: "temperature", label: "Temperature", least: 0, most: 2, step: 0.05 },
  { name: "top_p", label: "Top p", least: 0, most: 1, step: 0.01 },
  { name: "max_tokens", label: "Max tokens", least: 1, most: 1e9, step: 1 },
  { name: "seed", label: "Seed", least: 0, most: 2 ** 53 - 1, step: 1 },
];

/** localStorage, or what does its work until the page is closed, in a browser that keeps nothing. */
const local = (() => {
  try {
    localStorage.getItem("tpimpi.theme");
    return localStorage;
  } catch {
    const kept = new Map();
    return {
      getItem: (name) => kept.get(name) ?? null,
      setItem: (name, value) => kept.set(name, value),
      removeItem: (name) => kept.delete(name),
    };
  }
})();

/** A new id; randomUUID is there on https and on this machine alone. */
export function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** A conversation that nobody has said anything in. */
export function newConversation(defaults) {
  const now = Date.now();
  return {
    id: newId(),
    title: "",
    named: false, // by a person; else the first question is the title
    created: now,
    updated: now,
    system: defaults.system,
    sampling: { ...defaults.sampling },
    messages: [],
  };
}

/** Settings of this browser. */
export const settings = {
  get key() {
    return local.getItem("tpimpi.key") ?? "";
  },
  set key(value) {
    if (value) local.setItem("tpimpi.key", value);
    else local.removeItem("tpimpi.key");
  },
  get theme() {
    return local.getItem("tpimpi.theme") ?? "system";
  },
  set theme(value) {
    if (value === "system") {
      local.removeItem("tpimpi.theme");
      delete document.documentElement.dataset.theme;
    } else {
      local.setItem("tpimpi.theme", value);
      document.documentElement.dataset.theme = value;
    }
  },
  get defaults() {
    try {
      const kept = JSON.parse(local.getItem("tpimpi.defaults") ?? "{}");
      return { system: text(kept.system), sampling: checkedSampling(kept.sampling) };
    } catch {
      return { system: "", sampling: checkedSampling(null) };
    }
  },
  set defaults(value) {
    local.setItem("tpimpi.defaults", JSON.stringify(value));
  },
  /** A choice about the page, such as whether the machines are shown. */
  choice: (name) => local.getItem(`tpimpi.${name}`),
  choose: (name, value) => local.setItem(`tpimpi.${name}`, value),
};

const text = (value) => (typeof value === "string" ? value : "");
const number = (value) => (Number.isFinite(value) ? value : null);

function checkedSampling(value) {
  return Object.fromEntries(SAMPLING.map((name) => [name, number(value?.[name])]));
}

function checkedMessage(value) {
  const role = value?.role === "user" ? "user" : "assistant";
  const message = { id: newId(), role, content: text(value?.content), at: number(value?.at) ?? Date.now() };
  if (role === "user") return message;
  const finished = value.state === "done" ? "done" : "stopped";
  return {
    ...message,
    reasoning: text(value.reasoning),
    state: finished,
    finish: text(value.finish),
    tokens: number(value.tokens),
    first_s: number(value.first_s),
    rate: number(value.rate),
  };
}

function checkedConversation(value) {
  if (typeof value !== "object" || value === null || !Array.isArray(value.messages)) {
    throw new Error("one of the conversations has no messages");
  }
  return {
    id: typeof value.id === "string" && /^[0-9a-f]{8,64}$/.test(value.id) ? value.id : newId(),
    title: text(value.title).slice(0, 200),
    named: value.named === true,
    created: number(value.created) ?? Date.now(),
    updated: number(value.updated) ?? Date.now(),
    system: text(value.system),
    sampling: checkedSampling(value.sampling),
    messages: value.messages.map(checkedMessage),
  };
}

/** What a file of conversations has in it. */
export function fileOf(conversations) {
  return { format: FILE_FORMAT, version: 1, conversations };
}

/** The conversations of such a file, each field as it has to be. Throws Error with a line for people. */
export function conversationsOf(source) {
  let value;
  try {
    value = JSON.parse(source);
  } catch {
    throw new Error("This file is not JSON.");
  }
  if (value?.format !== FILE_FORMAT || !Array.isArray(value.conversations)) {
    throw new Error("This file has no conversations of tpimpi: it was not exported by this page.");
  }
  if (value.version !== 1) throw new Error(`This file is of version ${value.version}; this page reads version 1.`);
  return value.conversations.map(checkedConversation);
}

const asked = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

/** All conversations, by id. They are in memory; what changes is written through. */
export class Store {
  constructor() {
    this.all = new Map();
    this.kept = false; // whether the browser lets us keep anything
    this._database = null;
    this._elsewhere = null;
  }

  /** Reads what is kept. `onChange` is called with an id when another tab has changed that conversation. */
  async open(onChange) {
    try {
      const request = indexedDB.open("tpimpi", 1);
      request.onupgradeneeded = () => request.result.createObjectStore("conversations", { keyPath: "id" });
      this._database = await asked(request);
      for (const value of await asked(this._table("readonly").getAll())) this.all.set(value.id, settled(value));
      this.kept = true;
    } catch {
      this.kept = false;
    }
    if (!("BroadcastChannel" in window)) return;
    this._elsewhere = new BroadcastChannel("tpimpi");
    this._elsewhere.onmessage = async ({ data: id }) => {
      const value = this._database ? await asked(this._table("readonly").get(id)) : undefined;
      if (value) this.all.set(id, value);
      else this.all.delete(id);
      onChange(id);
    };
  }

  _table(mode) {
    return this._database.transaction("conversations", mode).objectStore("conversations");
  }

  /** The latest first; those with all words of `search` in title or text. */
  list(search = "") {
    const words = search.toLowerCase().split(/\s+/).filter(Boolean);
    const has = ({ title, messages }) => {
      const whole = [title, ...messages.map((message) => message.content)].join("\n").toLowerCase();
      return words.every((word) => whole.includes(word));
    };
    return [...this.all.values()].filter((one) => !words.length || has(one)).sort((a, b) => b.updated - a.updated);
  }

  /** Keeps a conversation as it is now. */
  async put(conversation) {
    this.all.set(conversation.id, conversation);
    await this._write((table) => table.put(conversation), conversation.id);
  }

  async remove(id) {
    this.all.delete(id);
    await this._write((table) => table.delete(id), id);
  }

  async _write(change, id) {
    if (!this._database) return;
    try {
      await asked(change(this._table("readwrite")));
      this._elsewhere?.postMessage(id);
    } catch {
      this.kept = false; // the disk is full, or the browser forbids it
    }
  }
}

/** An answer that was under way when the page was left has ended. */
function settled(conversation) {
  for (const message of conversation.messages) {
    if (message.state === "waiting" || message.state === "answering") message.state = "stopped";
  }
  return conversation;
}
