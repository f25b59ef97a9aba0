// One run: its log line by line as it comes, its states, its metrics.
import { drawCharts } from "./chart.js";
import { follow as followStream, refresh, soon } from "./nabla.js";

const KEPT = 5000;
const FIRST = 2000;
const TERMINAL = ["succeeded", "failed", "cancelled", "timed_out"];
const job = document.body.dataset.job;

const lines = document.getElementById("lines");
const follow = document.getElementById("follow");
const search = document.getElementById("search");
const count = document.getElementById("count");
const escapes = /\u001b\[[0-9;?]*[ -/]*[@-~]|\u001b[@-_]/g;

let total = 0;
let waiting = [];

function row(line) {
  const element = document.createElement("div");
  element.className = line.stream;
  const number = document.createElement("span");
  number.textContent = line.sequence;
  const text = document.createElement("span");
  text.dataset.text = line.text.replace(escapes, "");
  element.append(number, text);
  paint(element);
  return element;
}

function paint(element) {
  const cell = element.lastElementChild, text = cell.dataset.text, wanted = search.value;
  const at = wanted ? text.toLowerCase().indexOf(wanted.toLowerCase()) : -1;
  element.classList.toggle("hidden", Boolean(wanted) && at < 0);
  if (at < 0) { cell.textContent = text; return; }
  const mark = document.createElement("mark");
  mark.textContent = text.slice(at, at + wanted.length);
  cell.replaceChildren(text.slice(0, at), mark, text.slice(at + wanted.length));
}

function flush() {
  if (!waiting.length) return;
  total += waiting.length;
  lines.append(...waiting.slice(-KEPT).map(row));
  waiting = [];
  while (lines.childElementCount > KEPT) lines.firstElementChild.remove();
  count.textContent = total === 1 ? "1 line" : `${total.toLocaleString()} lines`;
  if (follow.checked) lines.scrollTop = lines.scrollHeight;
}

// At most one drawing per frame, however fast lines come.
let frame = 0;
function draw() {
  frame ||= requestAnimationFrame(() => { frame = 0; flush(); });
}

const later = soon(refresh, 150);
let state = document.body.dataset.state;

const log = followStream((last) => `/api/v1/jobs/${job}/logs/stream?after=${last || -FIRST}&skip_behind=${4 * KEPT}`, {
  line: (event) => { waiting.push(JSON.parse(event.data)); draw(); },
  state: (event) => {
    const now = JSON.parse(event.data).state;
    if (now !== state) later();
    state = now;
  },
  end: () => {
    log.close();
    document.getElementById("live").textContent = "whole";
    later();
    charts();
  },
});

// Scrolling up to read stops following; scrolling back to the end takes it up again.
lines.addEventListener("scroll", () => {
  follow.checked = lines.scrollHeight - lines.scrollTop - lines.clientHeight < 24;
});
follow.addEventListener("change", () => { if (follow.checked) lines.scrollTop = lines.scrollHeight; });
search.addEventListener("input", () => { for (const element of lines.children) paint(element); });

async function charts() {
  const answer = await fetch(`/api/v1/jobs/${job}/metrics?max_points=400`);
  if (!answer.ok) return;
  const { items } = await answer.json();
  document.getElementById("metrics").hidden = items.length === 0;
  drawCharts(document.getElementById("charts"), items);
}

charts();
setInterval(() => { if (!TERMINAL.includes(state)) charts(); }, 3000);
