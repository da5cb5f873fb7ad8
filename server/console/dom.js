// Building the page. Text is only ever set as text: nothing that a model or a file says is read as HTML.

/** An element with attributes and children; `on...` attributes are listeners, strings become text nodes. */
export function el(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key === "class") node.className = value;
    else node.setAttribute(key, value === true ? "" : String(value));
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

export const byId = (id) => document.getElementById(id);

/** 1536 -> "1.5 KiB". */
export function bytes(count) {
  if (count === null || count === undefined) return "";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let size = count, unit = 0;
  while (Math.abs(size) >= 1024 && unit < units.length - 1) { size /= 1024; unit += 1; }
  return unit === 0 ? `${Math.round(size)} B` : `${size.toFixed(1)} ${units[unit]}`;
}

/** A KL in nats, in as many digits as matter. */
export const nats = (value) => (value === null || value === undefined ? "" : value === 0 ? "0" : Number(value).toPrecision(2));

/** How a cache compares with one in bf16. A float32 model's exact cache is larger. */
export const compared = (ratio) => (Math.abs(ratio - 1) < 0.05 ? "as large as bf16" : ratio >= 1 ? `${ratio.toFixed(1)} times smaller than bf16` : `${(1 / ratio).toFixed(1)} times larger than bf16`);

export const moment = (seconds) => new Date(seconds * 1000).toLocaleString();

/** Replace a select's options where they changed; keeps the choice where it is still there. */
export function options(select, values, labels = {}) {
  const before = [...select.options].map((option) => option.value);
  if (before.join("\n") === values.join("\n")) return;
  const chosen = select.value;
  select.replaceChildren(...values.map((value) => el("option", { value }, labels[value] ?? value)));
  if (values.includes(chosen)) select.value = chosen;
}

let timer = 0;
/** Tell the person something, until something else is told. */
export function notice(text, fine = false) {
  const box = byId("notice");
  window.clearTimeout(timer);
  box.textContent = text;
  box.hidden = !text;
  box.classList.toggle("fine", fine);
  if (fine) timer = window.setTimeout(() => { box.hidden = true; }, 6000);
}

/** Run what a button asks for; it is off meanwhile, and a failure is told. */
export async function act(button, work) {
  if (button) button.disabled = true;
  try {
    await work();
  } catch (error) {
    notice(error.message);
  } finally {
    if (button) button.disabled = false;
  }
}
