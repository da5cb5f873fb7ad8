// The event log, live.
import { follow } from "./api.js";
import { byId, el, options } from "./dom.js";

const KEPT = 500;
const kinds = new Set();
let seen = 0;

function line(event) {
  const node = el("p", { "data-kind": event.kind }, el("time", { datetime: new Date(event.at * 1000).toISOString() }, new Date(event.at * 1000).toLocaleTimeString()),
    el("b", {}, event.kind), [event.model, event.reason].filter(Boolean).join(": "));
  node.hidden = Boolean(byId("kind").value) && byId("kind").value !== event.kind;
  return node;
}

function add(event) {
  seen = event.id;
  kinds.add(event.kind);
  options(byId("kind"), ["", ...[...kinds].sort()], { "": "all" });
  const box = byId("log");
  box.prepend(line(event));
  while (box.children.length > KEPT) box.lastChild.remove();
}

/** Follow events from the last one seen on, until the connection ends. */
export async function followLog(signal) {
  for await (const event of await follow(`/admin/events/stream?after=${seen}`, signal)) add(event);
}

export function startLog() {
  byId("kind").addEventListener("change", () => {
    for (const node of byId("log").children) node.hidden = Boolean(byId("kind").value) && byId("kind").value !== node.dataset.kind;
  });
}
