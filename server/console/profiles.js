// Profiles of a model: what there is, what is in use, upload, build, compare, and the plots of one of them.
import { follow, get, named, post, remove, upload } from "./api.js";
import { act, byId, bytes, el, moment, nats, notice, options } from "./dom.js";
import { plot } from "./plot.js";

const REFERENCE = "2048";
let listing = null;
let shown = "";
const following = new Set();
const turns = { list: 0, facts: 0, differences: 0 };

const path = (rest = "") => `/admin/profiles/${named(byId("profile-model").value)}${rest}`;
const short = (sha) => (sha ? sha.slice(0, 12) : "");

/** What was asked for, or null where more of the same was asked for meanwhile: answers come in any order. */
async function newest(what, asked) {
  const turn = ++turns[what];
  const answer = await asked;
  return turn === turns[what] ? answer : null;
}

/** Read the list again; shows the profile in use the first time. */
export async function refresh() {
  if (!byId("profile-model").value) return;
  const found = await newest("list", get(path()));
  if (!found) return;
  listing = found;
  drawVersions();
  const wanted = listing.active ?? (listing.shipped ? "shipped" : "");
  if (!shown && wanted) await show(wanted);
}

function button(text, label, work) {
  const node = el("button", { type: "button", "aria-label": `${text} ${label}`, onclick: () => act(node, work) }, text);
  return node;
}

async function activate(profile) {
  await post(path("/activate"), { profile });
  notice("New requests use this profile.", true);
  await refresh();
}

function versionRow(row, name, origin) {
  const active = name === "shipped" ? listing.active === null : listing.active === row.sha256;
  const label = `${origin} profile ${short(row.sha256)}`;
  const what = [button("Show", label, () => show(name))];
  if (!active) what.push(button("Use", label, () => activate(name)), button("Compare", label, () => compare(name)));
  if (!active && name !== "shipped") what.push(button("Delete", label, async () => { await remove(path(`/versions/${name}`)); await refresh(); }));
  return el("tr", {}, el("td", {}, el("code", {}, short(row.sha256))), el("td", {}, origin), el("td", {}, row.created ? moment(row.created) : ""),
    el("td", { class: "number" }, bytes(row.nbytes)), el("td", {}, active ? "in use" : ""), el("td", {}, el("div", { class: "row" }, ...what)));
}

function drawVersions() {
  const rows = listing.profiles.map((row) => versionRow(row, row.sha256, row.origin));
  if (listing.shipped) rows.push(versionRow(listing.shipped, "shipped", "shipped"));
  const heads = ["Profile", "Origin", "Since", "Bytes", "State", "Actions"].map((text) => el("th", { scope: "col" }, text));
  byId("versions").replaceChildren(rows.length
    ? el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, ...heads)), el("tbody", {}, ...rows)))
    : el("p", { class: "hint" }, "This model has no profile; its cache is not compressed. Build one, or drop one here."));
  byId("rollback").disabled = listing.history.length === 0;
}

async function compare(name) {
  const active = listing.active ?? "shipped";
  const found = await newest("differences", get(path(`/diff?a=${active}&b=${name}`)));
  if (!found) return;
  const rows = found.differences.map((row) => el("tr", {}, el("th", { scope: "row" }, row.field),
    el("td", {}, JSON.stringify(row.old)), el("td", {}, JSON.stringify(row.new))));
  byId("facts").replaceChildren(el("h3", {}, `In use against ${short(found.b)}`), el("div", { class: "scroll" }, el("table", {},
    el("thead", {}, el("tr", {}, ...["Field", "In use", "Other"].map((text) => el("th", { scope: "col" }, text)))), el("tbody", {}, ...rows))));
}

async function show(name) {
  shown = name;
  const facts = await newest("facts", get(path(`/versions/${name}`)));
  if (!facts) return;
  const marks = facts.ladder.map((row) => ({ x: row.bytes_per_token[REFERENCE], y: row.kl_mean, text: row.name, now: row.name === facts.default }))
    .filter((mark) => mark.y > 0);
  byId("rd-title").textContent = `Quality against bytes: ${facts.model}`;
  byId("rd").replaceChildren(plot({
    series: [{ points: marks.map((mark) => [mark.x, mark.y]) }], marks, title: `KL against bytes per token of ${facts.model}; the table has the figures`,
    x: { name: `bytes per token at ${REFERENCE} tokens`, log: true }, y: { name: "KL (nats)", log: true },
  }), ladderTable(facts));
  const series = facts.spectrum.filter(Boolean).flatMap((layer) => Object.values(layer).map((unit) => ({
    thin: true, points: unit.shares.map((share, index) => [index * unit.step + 1, share]).filter((point) => point[1] > 0),
  })));
  byId("spectrum-title").textContent = `Spectrum: ${series.length} units`;
  byId("spectrum").replaceChildren(plot({ series, title: "Share of the importance by latent channel, one line for every unit",
    x: { name: "latent channel", log: false }, y: { name: "share of importance", log: true } }));
}

function ladderTable(facts) {
  const rows = facts.ladder.map((row) => el("tr", {}, el("th", { scope: "row" }, row.name + (row.name === facts.default ? " (default)" : "")),
    el("td", { class: "number" }, bytes(row.bytes_per_token[REFERENCE])), el("td", { class: "number" }, row.bits_per_element.toFixed(2)),
    el("td", { class: "number" }, nats(row.kl_mean)), el("td", { class: "number" }, row.top1 === null ? "" : `${(100 * row.top1).toFixed(1)} %`)));
  const heads = ["Setting", "Bytes/token", "Bits", "KL", "Top-1"].map((text) => el("th", { scope: "col" }, text));
  return el("details", {}, el("summary", {}, "The ladder in figures"), el("div", { class: "scroll" },
    el("table", {}, el("thead", {}, el("tr", {}, ...heads)), el("tbody", {}, ...rows))));
}

async function send(file) {
  const box = byId("upload");
  box.className = "";
  box.textContent = `${file.name}: uploading ${bytes(file.size)}`;
  try {
    const stored = await upload(path(byId("activate").checked ? "?activate=true" : ""), file);
    box.textContent = `${file.name}: ${stored.new ? "published" : "was here already"} as ${short(stored.sha256)}`;
    await refresh();
    await show(stored.sha256);
  } catch (error) {
    box.className = "bad";
    box.textContent = `${file.name}: ${error.message}`;
  }
}

/** Builds under way, with their progress. */
export function drawJobs(jobs) {
  byId("jobs").replaceChildren(...jobs.map((job) => el("div", { class: "row" },
    el("label", {}, `Building for ${job.model}: ${job.stage || job.state} `, el("progress", { max: 1, value: job.fraction })),
    button("Cancel", `the build for ${job.model}`, () => post(`/admin/jobs/${job.id}/cancel`)))));
  for (const job of jobs) watch(job.id);
}

async function watch(id) {
  if (following.has(id)) return;
  following.add(id);
  try {
    let last = null;
    for await (const job of await follow(`/admin/jobs/${id}/events`)) last = job;
    if (last) notice(`The build for ${last.model}: ${last.state}${last.message ? `, ${last.message}` : ""}`, last.state === "done");
    await refresh();
  } catch (error) {
    notice(error.message);
  }
}

/** The models that there are. */
export function updateProfiles(models) {
  const before = byId("profile-model").value;
  options(byId("profile-model"), Object.keys(models));
  if (byId("profile-model").value !== before) another();
}

function another() {
  shown = "";
  for (const what of Object.keys(turns)) turns[what] += 1; // what is under way is the model's before
  byId("facts").replaceChildren();
  act(null, refresh);
}

export function startProfiles() {
  byId("profile-model").addEventListener("change", another);
  byId("rollback").addEventListener("click", (event) => act(event.target, async () => { await post(path("/rollback")); await refresh(); }));
  byId("build").addEventListener("click", (event) => act(event.target, async () => { watch((await post(path("/build"))).id); }));
  byId("file").addEventListener("change", async (event) => {
    for (const file of event.target.files) await send(file);
    event.target.value = "";
  });
  const drop = byId("drop");
  for (const name of ["dragenter", "dragover"]) drop.addEventListener(name, (event) => { event.preventDefault(); drop.classList.add("over"); });
  for (const name of ["dragleave", "drop"]) drop.addEventListener(name, () => drop.classList.remove("over"));
  drop.addEventListener("drop", async (event) => {
    event.preventDefault();
    for (const file of event.dataTransfer.files) await send(file);
  });
}
