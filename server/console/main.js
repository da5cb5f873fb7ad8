// The console: asks for the state once a second while it is seen, and follows the event log.
import { get, key } from "./api.js";
import { startChat, updateChat } from "./chat.js";
import { byId, notice } from "./dom.js";
import { followLog, startLog } from "./log.js";
import { drawMemory } from "./memory.js";
import { drawModels, startModels } from "./models.js";
import { drawNodes } from "./nodes.js";
import { drawJobs, startProfiles, updateProfiles } from "./profiles.js";

const EVERY_MS = 1000, LATER_MS = 5000;
const THEME = "spectral-theme";
const wait = (ms) => new Promise((done) => { window.setTimeout(done, ms); });

function connection(text, good) {
  const node = byId("connection");
  if (node.textContent !== text) node.textContent = text;
  node.className = good ? "" : "bad";
}

function askForKey() {
  const dialog = byId("key-dialog");
  byId("key-input").value = key.get();
  if (!dialog.open) dialog.showModal();
}

async function poll() {
  let asked = false;
  for (;;) {
    if (document.hidden) {
      await wait(EVERY_MS);
      continue;
    }
    try {
      const now = await get("/admin/status");
      connection(now.durable ? "live" : "live, state is not durable", true);
      drawMemory(now.devices);
      drawNodes(now.nodes);
      drawModels(now.models);
      updateChat(now.models);
      updateProfiles(now.models);
      drawJobs(now.jobs);
      asked = false;
      await wait(EVERY_MS);
    } catch (error) {
      connection(error.status ? `refused (${error.status})` : "not connected", false);
      if ([401, 403].includes(error.status)) {
        if (!asked) notice(error.message);
        if (!asked && error.status === 401) askForKey();
        asked = true;
      }
      if (!("status" in error)) {
        console.error(error);
        notice(`The console failed: ${error.message}`);
      }
      await wait(asked ? LATER_MS : EVERY_MS);
    }
  }
}

async function events() {
  for (;;) {
    try {
      await followLog();
    } catch (error) {
      if (!("status" in error)) console.error(error);
    }
    await wait(LATER_MS);
  }
}

function theme() {
  const select = byId("theme");
  const set = (value) => (value ? document.documentElement.setAttribute("data-theme", value) : document.documentElement.removeAttribute("data-theme"));
  select.value = localStorage.getItem(THEME) ?? "";
  set(select.value);
  select.addEventListener("change", () => {
    localStorage.setItem(THEME, select.value);
    set(select.value);
  });
}

function start() {
  theme();
  byId("key").addEventListener("click", askForKey);
  byId("key-dialog").addEventListener("close", () => {
    if (byId("key-dialog").returnValue === "save") {
      key.set(byId("key-input").value.trim());
      notice("");
      window.location.reload();
    }
  });
  startChat();
  startModels();
  startProfiles();
  startLog();
  poll();
  events();
  get("/version").then((about) => { byId("version").textContent = about.version; }).catch(() => {});
}

start();
