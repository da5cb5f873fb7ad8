// The memory map: one bar per device, in proportion, and the same as a table.
import { byId, bytes, el } from "./dom.js";

const KINDS = { weights: "weights", kv: "cache", workspace: "workspace", context: "context", foreign: "other programs", free: "free" };

function parts(device) {
  const known = device.segments.filter((part) => part.bytes > 0);
  return [
    ...known,
    { kind: "foreign", model: null, setting: null, bytes: device.foreign_bytes },
    { kind: "free", model: null, setting: null, bytes: device.free_bytes },
  ].filter((part) => part.bytes > 0);
}

const label = (part) => [part.model, KINDS[part.kind] ?? part.kind, part.setting && `at ${part.setting}`].filter(Boolean).join(" ");

function bar(device) {
  const all = parts(device);
  const said = all.map((part) => `${label(part)} ${bytes(part.bytes)}`).join(", ");
  const node = el("div", { class: "bar", role: "img", "aria-label": `${device.device}: ${said}` });
  for (const part of all) {
    const share = (100 * part.bytes) / device.total_bytes;
    const piece = el("div", { class: part.kind, title: `${label(part)}: ${bytes(part.bytes)}` });
    piece.style.width = `${share}%`;
    piece.dataset.kind = part.kind;
    if (part.model) piece.dataset.model = part.model;
    if (share > 8) piece.append(el("span", {}, label(part)));
    node.append(piece);
  }
  return node;
}

function table(device) {
  const rows = parts(device).map((part) => el("tr", {},
    el("td", {}, el("span", { class: `swatch ${part.kind}` }), label(part)),
    el("td", { class: "number" }, bytes(part.bytes)),
    el("td", { class: "number" }, `${((100 * part.bytes) / device.total_bytes).toFixed(1)} %`)));
  return el("details", {}, el("summary", {}, `${device.device} in figures`), el("div", { class: "scroll" }, el("table", {},
    el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "What"), el("th", { scope: "col", class: "number" }, "Bytes"),
      el("th", { scope: "col", class: "number" }, "Part"))),
    el("tbody", {}, ...rows))));
}

/** Draw all devices; tables that are open stay open. */
export function drawMemory(devices) {
  const box = byId("devices");
  const open = new Set([...box.querySelectorAll("article")].filter((node) => node.querySelector("details")?.open)
    .map((node) => node.dataset.device));
  const focused = document.activeElement?.closest?.("#devices article")?.dataset.device;
  box.replaceChildren(...devices.map((device) => {
    const details = table(device);
    details.open = open.has(device.device);
    const used = device.total_bytes - device.free_bytes;
    return el("article", { "data-device": device.device },
      el("h3", {}, `${device.device}: ${device.name}, ${bytes(used)} of ${bytes(device.total_bytes)} in use`), bar(device), details);
  }));
  if (focused) [...box.querySelectorAll("article")].find((node) => node.dataset.device === focused)?.querySelector("summary").focus();
}
