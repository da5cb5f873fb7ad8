// The playground: one answer, or the same prompt at two settings side by side. A model's text is shown as text.
import { events, stream } from "./api.js";
import { byId, bytes, compared, el, nats, notice, options } from "./dom.js";
import { rungs } from "./models.js";

let history = [];
let running = null;
let models = {};

function answerBox(title) {
  const text = el("p", { class: "text" });
  const thoughts = el("p");
  const thinking = el("details", { class: "thoughts", open: "" }, el("summary", {}, "Thoughts"), thoughts);
  const figures = el("dl");
  return { node: el("div", { class: "answer" }, title ? el("h3", {}, title) : null, text, figures), thinking, thoughts, text, figures };
}

function figure(box, term, value) {
  let place = [...box.figures.children].find((node) => node.dataset.term === term);
  if (!place) {
    place = el("dd", { "data-term": term });
    box.figures.append(el("dt", {}, term), place);
  }
  place.textContent = value;
}

/** Read one answer into its box. Returns its text. */
async function read(answer, box, began) {
  let text = "", tokens = 0, first = 0;
  figure(box, "setting", answer.headers.get("X-Spectral-Setting") ?? "");
  for await (const chunk of events(answer)) {
    if (chunk.error) throw new Error(chunk.error.message);
    const delta = chunk.choices?.[0]?.delta ?? {};
    const thought = delta.reasoning_content;
    const piece = delta.content;
    if (piece || thought) {
      first ||= performance.now();
      tokens += 1;
    }
    if (thought) {
      if (!box.thinking.isConnected) box.text.before(box.thinking);
      box.thoughts.append(thought);
    }
    if (piece) {
      text += piece;
      box.text.textContent = text;
    }
    if (piece || thought) {
      const seconds = (performance.now() - first) / 1000;
      if (seconds > 0.2) figure(box, "speed", `${((tokens - 1) / seconds).toFixed(1)} pieces/s`);
    }
    if (chunk.usage) {
      const seconds = (performance.now() - first) / 1000;
      const count = chunk.usage.completion_tokens;
      if (first && seconds > 0) figure(box, "speed", `${((count - 1) / seconds).toFixed(1)} tokens/s`);
      figure(box, "tokens", `${chunk.usage.prompt_tokens} + ${count}`);
    }
    if (chunk.spectral) {
      const { cache_bytes, ratio, reference_context } = chunk.spectral;
      figure(box, "cache", `${bytes(cache_bytes)}; at ${reference_context} tokens ${compared(ratio)}`);
      figure(box, "KL", nats(chunk.spectral.kl_mean));
    }
  }
  if (first) figure(box, "first token", `${((first - began) / 1000).toFixed(2)} s`);
  return text;
}

function request(messages) {
  return {
    model: byId("chat-model").value,
    messages,
    stream: true,
    stream_options: { include_usage: true },
    max_tokens: Number(byId("max-tokens").value),
    temperature: Number(byId("temperature").value),
  };
}

async function ask(messages, box, signal, extra = {}) {
  const began = performance.now();
  return read(await stream("/v1/chat/completions", { ...request(messages), ...extra }, signal), box, began);
}

/** The same prompt at two settings, at the same time; the model itself stays as it is. Both are awaited, so that one
 * that fails does not hide the other. */
async function compare(messages, boxes, settings, signal) {
  const both = settings.map((setting, index) => ask(messages, boxes[index], signal, { kv_quality: { setting } }));
  const [first, second] = await Promise.allSettled(both);
  const failed = [first, second].find((answer) => answer.status === "rejected");
  if (failed) throw failed.reason;
  return first.value;
}

async function submit(event) {
  event.preventDefault();
  if (running) return;
  const prompt = byId("prompt").value.trim();
  if (!prompt) return;
  const both = byId("compare").checked;
  const settings = [byId("first").value, byId("second").value];
  const boxes = both ? settings.map(answerBox) : [answerBox()];
  const messages = [...history, { role: "user", content: prompt }];
  byId("transcript").append(el("p", { class: "turn user" }, prompt), el("div", { class: "turn answers" }, ...boxes.map((box) => box.node)));
  running = new AbortController();
  byId("send").disabled = true;
  byId("stop").disabled = false;
  try {
    const text = both ? await compare(messages, boxes, settings, running.signal) : await ask(messages, boxes[0], running.signal);
    history = [...messages, { role: "assistant", content: text }];
    byId("prompt").value = "";
  } catch (error) {
    const said = error.name === "AbortError" ? "stopped" : error.message;
    boxes.forEach((box) => box.node.append(el("p", { class: "bad" }, said)));
  } finally {
    running = null;
    byId("send").disabled = false;
    byId("stop").disabled = true;
  }
}

function choices() {
  const model = models[byId("chat-model").value];
  const names = model ? rungs(model).map((step) => step.name) : [];
  for (const select of [byId("first"), byId("second")]) options(select, names);
  const possible = names.length > 1;
  byId("compare").disabled = !possible;
  if (!possible) byId("compare").checked = false;
  for (const node of document.querySelectorAll(".compared")) node.hidden = !byId("compare").checked;
  byId("compare-note").hidden = !byId("compare").checked;
}

/** The models that can be asked, as they are now. */
export function updateChat(now) {
  models = now;
  options(byId("chat-model"), Object.keys(models));
  choices();
}

export function startChat() {
  byId("ask").addEventListener("submit", submit);
  byId("stop").addEventListener("click", () => running?.abort());
  byId("compare").addEventListener("change", () => {
    choices();
    if (byId("compare").checked && byId("first").value === byId("second").value) byId("second").selectedIndex = byId("second").options.length - 1;
  });
  byId("chat-model").addEventListener("change", choices);
  byId("clear").addEventListener("click", () => {
    running?.abort();
    history = [];
    byId("transcript").replaceChildren();
    notice("");
    byId("prompt").focus();
  });
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("ask").requestSubmit();
  });
}
