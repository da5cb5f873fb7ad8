// The machines of a cluster: what each serves, and emptying one. A machine alone has no such section.
import { post } from "./api.js";
import { act, byId, bytes, el, notice } from "./dom.js";

const state = (node) => (!node.connected ? "not connected" : node.draining ? "is being emptied" : "serves");

function served(replica) {
  const streams = replica.streams ? `, ${replica.streams} ${replica.streams === 1 ? "stream" : "streams"}` : "";
  return el("li", {}, `${replica.model} on ${replica.device}: ${replica.retiring ? "ends" : replica.state}${streams}`);
}

function row(node) {
  const order = node.draining ? "undrain" : "drain", said = node.draining ? "Use again" : "Empty";
  const ask = (event) => act(event.currentTarget, async () => {
    await post(`/admin/nodes/${encodeURIComponent(node.node)}/${order}`);
    notice(node.draining ? `${node.node.slice(0, 12)} is used again.` : `${node.node.slice(0, 12)} gets nothing new; its models move.`, true);
  });
  return el("tr", { "data-node": node.node },
    el("th", { scope: "row" }, el("code", {}, node.node.slice(0, 12)), el("br"), node.address),
    el("td", {}, state(node)),
    el("td", {}, node.devices.map((device) => `${device.device} ${bytes(device.budget_bytes)}`).join(", ")),
    el("td", {}, node.replicas.length ? el("ul", {}, ...node.replicas.map(served)) : "nothing"),
    el("td", {}, el("button", { type: "button", "aria-label": `${said}: ${node.node.slice(0, 12)}`, onclick: ask }, said)));
}

let shown = "";
/** Draw all nodes where something changed; the button that has the focus keeps it. */
export function drawNodes(nodes) {
  byId("nodes").hidden = byId("to-nodes").hidden = nodes.length === 0;
  const now = JSON.stringify(nodes);
  if (now === shown) return;
  shown = now;
  const focused = document.activeElement?.closest?.("#nodes tr")?.dataset.node;
  const rows = nodes.map(row);
  byId("node-rows").replaceChildren(...rows);
  if (focused) rows.find((one) => one.dataset.node === focused)?.querySelector("button").focus();
}
