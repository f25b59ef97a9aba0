// Line charts of a run's metrics, as SVG: one small chart a series, with the value under the pointer.

const NS = "http://www.w3.org/2000/svg";
const WIDTH = 340, HEIGHT = 170, LEFT = 44, RIGHT = 10, TOP = 14, BOTTOM = 24;

function node(name, attributes, text) {
  const element = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

// Round steps of 1, 2 or 5 times a power of ten that cover the range with about `wanted` lines.
export function ticks(low, high, wanted = 4) {
  if (!(high > low)) return [low];
  const raw = (high - low) / wanted, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= raw * 0.7);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-9; value += step) found.push(Number(value.toPrecision(12)));
  return found;
}

export function figure(value) {
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(1);
  return String(Number(value.toPrecision(4)));
}

function scale(low, high, from, to) {
  const span = high - low || 1;
  return (value) => from + ((value - low) / span) * (to - from);
}

function chart(series) {
  const points = series.points.filter((point) => Number.isFinite(point.value));
  const box = document.createElement("article");
  box.className = "chart";
  const header = document.createElement("header");
  const name = Object.assign(document.createElement("strong"), { textContent: series.name });
  const value = document.createElement("output");
  header.append(name, value);
  const svg = node("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" });
  box.append(header, svg);
  const rest = `${figure(series.last)}`;
  value.textContent = rest;
  svg.append(node("title", {}, `${series.name}: last ${figure(series.last)}, from ${figure(series.min)} to ${figure(series.max)}`));
  if (!points.length) return box;

  const steps = points.map((point) => point.step), values = points.map((point) => point.value);
  let low = Math.min(...values), high = Math.max(...values);
  if (low === high) { const room = Math.abs(low) * 0.1 || 1; low -= room; high += room; }
  const first = Math.min(...steps), last = Math.max(...steps);
  const x = scale(first, last, LEFT, WIDTH - RIGHT), y = scale(low, high, HEIGHT - BOTTOM, TOP);

  for (const line of ticks(low, high)) {
    svg.append(node("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y(line), y2: y(line) }));
    svg.append(node("text", { x: LEFT - 8, y: y(line) + 4, "text-anchor": "end" }, figure(line)));
  }
  for (const line of ticks(first, last, 5).filter(Number.isInteger))
    svg.append(node("text", { x: x(line), y: HEIGHT - 6, "text-anchor": "middle" }, figure(line)));
  if (points.length > 1)
    svg.append(node("polyline", { class: "curve", points: points.map((point) => `${x(point.step).toFixed(1)},${y(point.value).toFixed(1)}`).join(" ") }));
  const cross = node("line", { class: "cross", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
  const spot = node("circle", { class: "spot", r: 4.5, cx: x(points.at(-1).step), cy: y(points.at(-1).value) });
  svg.append(cross, spot);

  svg.addEventListener("pointermove", (event) => {
    const area = svg.getBoundingClientRect(), at = ((event.clientX - area.left) / area.width) * WIDTH;
    const near = points.reduce((best, point) => (Math.abs(x(point.step) - at) < Math.abs(x(best.step) - at) ? point : best));
    spot.setAttribute("cx", x(near.step)); spot.setAttribute("cy", y(near.value));
    cross.setAttribute("x1", x(near.step)); cross.setAttribute("x2", x(near.step)); cross.setAttribute("visibility", "visible");
    value.textContent = `step ${near.step}: ${figure(near.value)}`;
  });
  svg.addEventListener("pointerleave", () => {
    cross.setAttribute("visibility", "hidden");
    spot.setAttribute("cx", x(points.at(-1).step)); spot.setAttribute("cy", y(points.at(-1).value));
    value.textContent = rest;
  });
  return box;
}

export function drawCharts(place, items) {
  // While the reader points at a chart, it stays as it is.
  if (place.matches(":hover")) return;
  place.replaceChildren(...items.map(chart));
}
