// One card per model: its state, its ladder with predicted bytes and KL, and what can be done with it.
import { get, named, post } from "./api.js";
import { act, byId, bytes, compared, el, nats, notice } from "./dom.js";

const cards = new Map();

/** The ladder with "exact" in front: {name, bits, kl, perToken}. Bytes per token are all-in at the ladder's
 * context; the exact cache keeps the model's own dtype. */
export function rungs(model) {
  if (!model.setting) return [];
  const exact = model.setting.bytes_per_token_exact;
  const rows = (model.ladder ?? []).map((row) => ({ name: row.name, bits: row.bits_per_element, kl: row.kl_mean, perToken: exact / row.ratio }));
  return [{ name: "exact", bits: 16, kl: 0, perToken: exact * (model.dtype === "float32" ? 2 : 1) }, ...rows];
}

async function order(name, what, data = {}) {
  await post(`/admin/models/${named(name)}/${what}`, data);
}

function facts(model) {
  const rows = [];
  if (model.state === "loading") rows.push(["Loading", `${model.stage || "starting"}, ${Math.round(100 * (model.fraction ?? 0))} %`]);
  if (model.error) rows.push(["Error", model.error]);
  if (model.setting) {
    rows.push(["Setting", `${model.setting.setting} (${compared(model.setting.ratio)}, KL ${nats(model.setting.kl_mean)})`]);
    rows.push(["Cache", `${bytes(model.kv_bytes_used)} for ${model.kv_tokens} tokens`]);
    rows.push(["Requests", `${model.running} running, ${model.queued} waiting`]);
    rows.push(["Device", `${model.device}, weights ${bytes(model.weights_bytes)}, context ${model.context_length} tokens`]);
  }
  return rows.flatMap(([term, value]) => [el("dt", {}, term), el("dd", {}, value)]);
}

class Card {
  constructor(name) {
    this.name = name;
    this.state = el("span", { class: "state" });
    this.facts = el("dl");
    this.slider = el("input", { type: "range", min: 0, max: 0, step: 1, id: `ladder-${name}`, oninput: () => this.predict() });
    this.prediction = el("output", { for: `ladder-${name}` });
    this.apply = el("button", { type: "button", onclick: () => act(this.apply, () => this.choose()) }, "Apply");
    this.ladder = el("div", { class: "ladder" }, el("label", { for: `ladder-${name}` }, "Setting of the cache"), this.slider, this.prediction,
      el("div", { class: "row" }, this.apply));
    this.load = this.button("Load", () => order(name, "load"));
    this.unload = this.button("Unload", () => order(name, "unload"));
    this.sleep = this.button("Sleep", () => order(name, "sleep"));
    this.pin = this.button("Pin", () => order(name, this.model.pinned ? "unpin" : "pin"));
    this.node = el("article", { class: "card", "aria-label": name, "data-model": name },
      el("h3", {}, name, this.state), this.facts, this.ladder, el("div", { class: "row" }, this.load, this.sleep, this.unload, this.pin));
    this.chosen = false;
  }

  button(text, work) {
    const node = el("button", { type: "button", "aria-label": `${text} ${this.name}`, onclick: () => act(node, work) }, text);
    return node;
  }

  update(model) {
    this.model = model;
    this.state.textContent = model.state;
    this.state.className = `state ${model.state}`;
    this.facts.replaceChildren(...facts(model));
    const steps = rungs(model);
    this.ladder.hidden = steps.length < 2;
    if (steps.length) {
      this.slider.max = steps.length - 1;
      const now = steps.findIndex((step) => step.name === model.setting.setting);
      if (!this.chosen) this.slider.value = Math.max(0, now);
      this.apply.disabled = Number(this.slider.value) === now;
      this.predict(false);
    }
    this.load.hidden = ["hot", "loading"].includes(model.state);
    this.load.textContent = model.state === "asleep" ? "Wake" : "Load";
    this.load.setAttribute("aria-label", `${this.load.textContent} ${this.name}`);
    this.sleep.hidden = model.state !== "hot";
    this.unload.hidden = !["hot", "loading", "asleep"].includes(model.state);
    this.pin.textContent = model.pinned ? "Unpin" : "Pin";
    this.pin.setAttribute("aria-label", `${this.pin.textContent} ${this.name}`);
  }

  predict(moved = true) {
    if (moved) this.chosen = true;
    const step = rungs(this.model)[Number(this.slider.value)];
    if (!step) return;
    const held = this.model.kv_tokens ? `, ${bytes(step.perToken * this.model.kv_tokens)} for the ${this.model.kv_tokens} tokens held now` : "";
    const said = `${step.name}: ${step.bits.toFixed(2)} bits per element, KL ${nats(step.kl)}, ${bytes(step.perToken)} per token${held}`;
    if (this.prediction.textContent !== said) {
      this.prediction.textContent = said;
      this.slider.setAttribute("aria-valuetext", said);
    }
    this.apply.disabled = step.name === this.model.setting.setting;
  }

  async choose() {
    const step = rungs(this.model)[Number(this.slider.value)];
    await order(this.name, "setting", { setting: step.name, live: true });
    this.chosen = false;
    notice(`${this.name} uses ${step.name}.`, true);
  }
}

/** Draw all models; cards stay the same elements, so that focus and sliders stay. */
export function drawModels(models) {
  const box = byId("cards");
  for (const [name, model] of Object.entries(models)) {
    if (!cards.has(name)) {
      cards.set(name, new Card(name));
      box.append(cards.get(name).node);
    }
    cards.get(name).update(model);
  }
  for (const [name, card] of cards) {
    if (!(name in models)) {
      card.node.remove();
      cards.delete(name);
    }
  }
}


async function explain() {
  const { plan } = await get("/admin/plan?dry_run=1");
  const rows = Object.entries(plan.models).map(([name, choice]) => el("tr", {}, el("th", { scope: "row" }, name), el("td", {}, choice.residency),
    el("td", {}, choice.devices.join(", ")), el("td", {}, choice.setting ?? ""), el("td", { class: "number" }, bytes(choice.lease_bytes)),
    el("td", {}, choice.reason)));
  const heads = ["Model", "Would be", "On", "Setting", "Cache", "Because"].map((text) => el("th", { scope: "col" }, text));
  const free = Object.entries(plan.free).map(([device, size]) => `${bytes(size)} on ${device}`).join(", ");
  byId("plan").replaceChildren(el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, ...heads)), el("tbody", {}, ...rows))),
    el("p", { class: "hint" }, `Mean KL of the hot models ${nats(plan.kl)}; left: ${free || "nothing"}; found by: ${plan.solver}.`));
}

export function startModels() {
  byId("explain").addEventListener("click", (event) => act(event.target, explain));
}
