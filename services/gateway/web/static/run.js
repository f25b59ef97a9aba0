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
const rank = document.getElementById("rank");
const count = document.getElementById("count");
const escapes = /\u001b\[[0-9;?]*[ -/]*[@-~]|\u001b[@-_]/g;

let total = 0;
let waiting = [];

function row(line) {
  const element = document.createElement("div");
  element.className = line.stream;
  element.dataset.rank = line.rank;
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
  const otherRank = rank.value !== "" && element.dataset.rank !== rank.value;
  element.classList.toggle("hidden", otherRank || (Boolean(wanted) && at < 0));
  if (at < 0) { cell.textContent = text; return; }
  const mark = document.createElement("mark");
  mark.textContent = text.slice(at, at + wanted.length);
  cell.replaceChildren(text.slice(0, at), mark, text.slice(at + wanted.length));
}

// Of a job of several processes: offers each that has said something.
const ranks = new Set([0]);
function offer(found) {
  if (ranks.has(found)) return;
  ranks.add(found);
  const options = [...ranks].sort((a, b) => a - b).map((each) => new Option(`Rank ${each}`, each, false, rank.value === String(each)));
  rank.replaceChildren(new Option("All ranks", "", false, rank.value === ""), ...options);
  rank.hidden = false;
}

function flush() {
  if (!waiting.length) return;
  for (const line of waiting) offer(line.rank);
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
for (const [control, event] of [[search, "input"], [rank, "change"]]) {
  control.addEventListener(event, () => { for (const element of lines.children) paint(element); });
}

async function show(query, section, place, wanted) {
  const answer = await fetch(`/api/v1/jobs/${job}/metrics?${query}`);
  if (!answer.ok) return;
  const items = (await answer.json()).items.filter(({ name }) => wanted(name));
  document.getElementById(section).hidden = items.length === 0;
  drawCharts(document.getElementById(place), items);
}

const SYSTEM = "system/";
const SHOWN = /^system\/(cpu|memory|gpu)/;

// What the job records of itself, and what its node sees it use in the last minutes.
async function charts() {
  await show("max_points=400", "metrics", "charts", (name) => !name.startsWith(SYSTEM));
  await show(`prefix=${SYSTEM}&newest=300`, "usage", "usage-charts", (name) => SHOWN.test(name));
}

charts();
setInterval(() => { if (!TERMINAL.includes(state)) charts(); }, 3000);
