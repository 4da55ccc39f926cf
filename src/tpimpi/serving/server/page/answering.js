// One answer: asks, waits where the server has to be waited for, and fills a message of the conversation.
import { answer, health, Problem } from "./api.js";

const MOST_BUSY = 8; // times that a busy server is asked again by itself
const KEEP_EVERY_MS = 1000;
const BUSY_NOTE = "The server is busy";

const pause = (milliseconds, signal) =>
  new Promise((resolve, reject) => {
    const stop = () => {
      clearTimeout(timer);
      reject(new DOMException("stopped", "AbortError"));
    };
    const timer = setTimeout(() => {
      signal.removeEventListener("abort", stop);
      resolve();
    }, milliseconds);
    if (signal.aborted) stop();
    else signal.addEventListener("abort", stop, { once: true });
  });

/** A message that an answer will fill. */
export const emptyAnswer = (id) => ({
  id,
  role: "assistant",
  content: "",
  reasoning: "",
  state: "waiting", // then answering, and done, stopped or failed
  note: "", // what is waited for
  finish: "",
  tokens: null,
  first_s: null,
  rate: null, // tokens a second after the first
  problem: null, // {title, detail}
  at: Date.now(),
});

/**
 * What is sent of a conversation. Fields that nobody set are left to the server; questions that had no answer go with the
 * next one, as many models want turns to alternate.
 */
export function requestOf(conversation, model) {
  const messages = conversation.system.trim() ? [{ role: "system", content: conversation.system }] : [];
  for (const { role, content } of conversation.messages) {
    const last = messages.at(-1);
    if (role === "user" && last?.role === "user") last.content += `\n\n${content}`;
    else if (content) messages.push({ role, content });
  }
  const set = Object.entries(conversation.sampling).filter(([, value]) => value !== null);
  return { model, messages, ...Object.fromEntries(set) };
}

/** What /health says, in a line; none where the server is ready. */
export function progressLine({ status, text, progress }) {
  if (status === "ready") return "";
  if (status === "ending") return "The server is ending";
  const percent = Number.isFinite(progress) ? ` ${Math.floor(progress * 100)} %` : "";
  return `The model is loading${text ? `: ${text}` : ""}${percent}`;
}

/**
 * Fills `message` until it is whole. `changed` is called after every change, `keep` now and then and at the end, and
 * `wantKey` where the server asks for a key: it resolves to whether there is one now.
 */
export async function fill({ message, body, signal, changed, keep, wantKey }) {
  const watch = new AbortController();
  signal.addEventListener("abort", () => watch.abort(), { once: true });
  watchStart(message, changed, watch.signal);
  for (let busy = 0; ; ) {
    try {
      await stream(message, body, signal, changed, keep);
      message.state = "done";
      break;
    } catch (error) {
      if (signal.aborted) {
        message.state = "stopped";
        break;
      }
      const begun = message.content || message.reasoning;
      const again = error instanceof Problem && !begun && (await mayAskAgain(error, busy, message, changed, signal, wantKey));
      if (again) {
        busy += error.kind === "busy" ? 1 : 0;
        continue;
      }
      message.state = signal.aborted ? "stopped" : "failed";
      if (!signal.aborted) message.problem = { title: error.title ?? "Something went wrong", detail: error.message };
      break;
    }
  }
  watch.abort();
  message.note = "";
  changed();
  keep();
}

async function mayAskAgain(error, busy, message, changed, signal, wantKey) {
  try {
    if (error.kind === "key") return await wantKey(error.message);
    if (error.kind === "busy" && busy < MOST_BUSY) {
      for (let left = Math.min(Math.ceil(error.wait_s ?? 2 ** busy), 60); left > 0; left--) {
        message.note = `${BUSY_NOTE}; asking again in ${left} s`;
        changed();
        await pause(1000, signal);
      }
      return true;
    }
    if (error.kind === "loading") {
      await pause(1000, signal);
      return true;
    }
  } catch (stopped) {
    if (!signal.aborted) throw stopped;
  }
  return false;
}

/** As long as nothing has come, says what /health says, or how long the model has been reading. */
async function watchStart(message, changed, signal) {
  const began = performance.now();
  try {
    for (;;) {
      await pause(1000, signal);
      if (message.state !== "waiting") return;
      const line = progressLine(await health(signal).catch(() => ({ status: "ready" })));
      if (message.state !== "waiting" || message.note.startsWith(BUSY_NOTE)) continue;
      message.note = line || `Reading the conversation · ${Math.round((performance.now() - began) / 1000)} s`;
      changed();
    }
  } catch {
    // The answer has ended.
  }
}

async function stream(message, body, signal, changed, keep) {
  const began = performance.now();
  let [first, last, parts, kept] = [0, 0, 0, began];
  for await (const { choices, usage } of answer(body, signal)) {
    const now = performance.now();
    const delta = choices?.[0]?.delta;
    if (delta?.content || delta?.reasoning_content) {
      message.state = "answering";
      message.note = "";
      message.content += delta.content ?? "";
      message.reasoning += delta.reasoning_content ?? "";
      parts += 1;
      first ||= now;
      last = now;
      message.first_s = (first - began) / 1000;
    }
    message.finish = choices?.[0]?.finish_reason ?? message.finish;
    message.tokens = usage?.completion_tokens ?? Math.max(parts, message.tokens ?? 0);
    // Of a few tokens in a few milliseconds nothing can be said.
    if (message.tokens > 2 && last - first > 50) message.rate = ((message.tokens - 1) * 1000) / (last - first);
    if (now - kept > KEEP_EVERY_MS) {
      kept = now;
      keep();
    }
    changed();
  }
}
