// Talking to the server that this page came from.

const KEY = "spectral-key";

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/** An answer that was no success; `status` is HTTP's. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function send(method, path, { body, signal, type } = {}) {
  const headers = {};
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  if (type) headers["Content-Type"] = type;
  let answer;
  try {
    answer = await fetch(path, { method, headers, body, signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The server does not answer.");
  }
  if (answer.ok) return answer;
  let message = `${method} ${path}: ${answer.status}`;
  try {
    const said = (await answer.json()).error;
    message = (typeof said === "string" ? said : said.message) || message;
  } catch { /* not every proxy answers with JSON */ }
  throw new Refused(answer.status, message);
}

export const get = async (path, signal) => (await send("GET", path, { signal })).json();

export async function post(path, data = {}) {
  return (await send("POST", path, { body: JSON.stringify(data), type: "application/json" })).json();
}

export const remove = async (path) => (await send("DELETE", path)).json();

/** Upload a file's bytes; the browser streams them. */
export async function upload(path, file) {
  return (await send("PUT", path, { body: file, type: "application/octet-stream" })).json();
}

/** A model's name as a part of a path: its slashes stay. */
export const named = (model) => model.split("/").map(encodeURIComponent).join("/");

/** Server-sent events of a response, as objects, until [DONE] or the end. */
export async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      held += value;
      const parts = held.split("\n\n");
      held = parts.pop();
      for (const part of parts) {
        const data = part.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim()).join("\n");
        if (data === "[DONE]") return;
        if (data) yield JSON.parse(data);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

export const follow = async (path, signal) => events(await send("GET", path, { signal }));

export async function stream(path, data, signal) {
  return send("POST", path, { body: JSON.stringify(data), type: "application/json", signal });
}
