// Two small plots as SVG: logarithmic or linear axes, lines and points. What they show is in a table beside them as well.
const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 480, HEIGHT = 300, LEFT = 58, RIGHT = 24, TOP = 12, BOTTOM = 40;

function node(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

const said = (value) => (value !== 0 && (Math.abs(value) < 0.01 || Math.abs(value) >= 10000) ? value.toExponential(0) : String(Number(value.toPrecision(Math.abs(value) < 1 ? 2 : 3))));

function scale(values, log, from, to) {
  const turned = log ? values.filter((value) => value > 0).map(Math.log10) : values;
  let low = Math.min(...turned), high = Math.max(...turned);
  if (!Number.isFinite(low)) [low, high] = [0, 1];
  if (log) [low, high] = [Math.floor(low * 4) / 4, Math.ceil(high * 4) / 4];
  if (low === high) high = low + 1;
  const at = (value) => from + (((log ? Math.log10(Math.max(value, 10 ** low)) : value) - low) / (high - low)) * (to - from);
  const steps = Array.from({ length: 5 }, (_, i) => low + ((high - low) * i) / 4);
  return { at, ticks: steps.map((step) => (log ? 10 ** step : step)) };
}

/** series: [{points: [[x, y], ...], thin}], marks: [{x, y, text, now}]. */
export function plot({ series, marks = [], x, y, title }) {
  const points = [...series.flatMap((line) => line.points), ...marks.map((mark) => [mark.x, mark.y])];
  const across = scale(points.map((point) => point[0]), x.log, LEFT, WIDTH - RIGHT);
  const up = scale(points.map((point) => point[1]), y.log, HEIGHT - BOTTOM, TOP);
  const svg = node("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "plot", role: "img", "aria-label": title });
  for (const tick of across.ticks) {
    svg.append(node("line", { x1: across.at(tick), x2: across.at(tick), y1: TOP, y2: HEIGHT - BOTTOM, class: "grid" }));
    svg.append(node("text", { x: across.at(tick), y: HEIGHT - BOTTOM + 15, "text-anchor": "middle" }, said(tick)));
  }
  for (const tick of up.ticks) {
    svg.append(node("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: up.at(tick), y2: up.at(tick), class: "grid" }));
    svg.append(node("text", { x: LEFT - 5, y: up.at(tick) + 4, "text-anchor": "end" }, said(tick)));
  }
  svg.append(node("text", { x: (LEFT + WIDTH - RIGHT) / 2, y: HEIGHT - 6, "text-anchor": "middle" }, x.name));
  svg.append(node("text", { x: 12, y: (TOP + HEIGHT - BOTTOM) / 2, "text-anchor": "middle", transform: `rotate(-90 12 ${(TOP + HEIGHT - BOTTOM) / 2})` }, y.name));
  for (const line of series) {
    const path = line.points.map(([px, py]) => `${across.at(px).toFixed(1)},${up.at(py).toFixed(1)}`).join(" ");
    svg.append(node("polyline", { points: path, class: line.thin ? "line thin" : "line" }));
  }
  for (const mark of marks) {
    svg.append(node("circle", { cx: across.at(mark.x), cy: up.at(mark.y), r: mark.now ? 6 : 4, class: mark.now ? "now" : "" }));
    const left = across.at(mark.x) > WIDTH - 40; // no room on its right
    svg.append(node("text", { x: across.at(mark.x) + (left ? -8 : 8), y: Math.max(16, up.at(mark.y) - 6), "text-anchor": left ? "end" : "start" }, mark.text));
  }
  return svg;
}
