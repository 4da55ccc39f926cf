// The server's HTTP, and its problems in words.
import { settings } from "./store.js";

/** What went wrong, for people: a title, a line, and what the page may do about it. */
export class Problem extends Error {
  constructor(title, detail, { kind = "other", wait_s = null } = {}) {
    super(detail);
    this.title = title;
    this.kind = kind; // key, busy, loading, gone, other
    this.wait_s = wait_s;
  }
}

async function request(path, { body, signal } = {}) {
  const headers = { Accept: "application/json" };
  if (settings.key) headers.Authorization = `Bearer ${settings.key}`;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    // By the page's own address, so that a proxy may put it below a path.
    response = await fetch(new URL(path, document.baseURI), {
      method: body ? "POST" : "GET",
      headers,
      body: body && JSON.stringify(body),
      signal,
      cache: "no-store",
      credentials: "omit",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The server cannot be reached", "It may have ended, or the network is gone.", { kind: "gone" });
  }
  if (!response.ok) throw await problemOf(response);
  return response;
}

async function problemOf(response) {
  const error = (await response.json().catch(() => null))?.error;
  const said = typeof error === "string" ? error : (error?.message ?? "");
  const wait_s = Number.parseFloat(response.headers.get("Retry-After")) || null;
  switch (response.status) {
    case 401:
      return new Problem("This server asks for a key", said, { kind: "key" });
    case 403:
      return new Problem("The server refuses this page", said);
    case 413:
      return new Problem("The conversation is too large for the server", said);
    case 429:
      return new Problem("The server is busy", said || "Too many requests wait already.", { kind: "busy", wait_s });
    case 503:
      return new Problem("The server is not ready", said, { kind: "loading", wait_s });
    default:
      return response.status >= 500
        ? new Problem("The server could not answer", said || `It said: error ${response.status}.`)
        : new Problem("The server did not take this", said || `It said: error ${response.status}.`);
  }
}

const json = async (path, signal) => (await request(path, { signal })).json();

/** Where the run stands: loading with progress, or ready. A server that is loading may say so by status 503. */
export async function health(signal) {
  let response;
  try {
    response = await fetch(new URL("health", document.baseURI), { signal, cache: "no-store", credentials: "omit" });
  } catch {
    throw new Problem("The server cannot be reached", "It may have ended, or the network is gone.", { kind: "gone" });
  }
  return (await response.json().catch(() => null)) ?? {};
}

/** Model, ranks and their load. */
export const cluster = (signal) => json("cluster", signal);

/** The data of server-sent events, one string each. */
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let left = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const events = (left + value).replaceAll("\r\n", "\n").split("\n\n");
      left = events.pop();
      for (const event of events) {
        const lines = event.split("\n").filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Chunks of an answer to `body`, as they come. Throws Problem, or AbortError when `signal` says so. */
export async function* answer(body, signal) {
  const response = await request("v1/chat/completions", {
    body: { ...body, stream: true, stream_options: { include_usage: true } },
    signal,
  });
  let finished = false;
  try {
    for await (const data of eventsOf(response)) {
      if (data === "[DONE]") {
        finished = true;
        continue; // to the end of the stream, else the browser calls it a failed one
      }
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Problem("The answer broke off", chunk.error.message ?? String(chunk.error));
      finished ||= Boolean(chunk.choices?.[0]?.finish_reason);
      yield chunk;
    }
  } catch (error) {
    if (error instanceof Problem || error.name === "AbortError") throw error;
    throw new Problem("The answer broke off", "The connection to the server was lost.", { kind: "gone" });
  }
  if (!finished) throw new Problem("The answer broke off", "The server ended before the answer did.", { kind: "gone" });
}
