// Draw a digit; the deployed model says what it is. The picture becomes 8 x 8 numbers from 0 to 16, made as
// scikit-learn's digits were: the digit fills a bitmap of 32 x 32, and each number counts the ink in a 4 x 4 block.

const FINE = 28, INK = 32, CELLS = 8, BLOCK = INK / CELLS;
const pad = document.getElementById("pad"), seen = document.getElementById("seen");
const answer = document.getElementById("answer"), bars = document.getElementById("bars"), said = document.getElementById("said");
const { url, token } = document.body.dataset;
const scale = pad.width / FINE;
const pen = pad.getContext("2d", { willReadFrequently: true });
const ink = getComputedStyle(document.body).color;

let last = null, asked = 0;

function at(event) {
  const area = pad.getBoundingClientRect();
  return [((event.clientX - area.left) / area.width) * pad.width, ((event.clientY - area.top) / area.height) * pad.height];
}

function stroke(event) {
  if (!last) return;
  const [x, y] = at(event);
  pen.strokeStyle = ink; pen.lineWidth = 2.9 * scale; pen.lineCap = pen.lineJoin = "round";
  pen.beginPath(); pen.moveTo(...last); pen.lineTo(x + 0.01, y); pen.stroke();
  last = [x, y];
}

function box() {
  const { data, width, height } = pen.getImageData(0, 0, pad.width, pad.height);
  let left = width, top = height, right = -1, bottom = -1;
  for (let y = 0; y < height; y++)
    for (let x = 0; x < width; x++)
      if (data[(y * width + x) * 4 + 3] > 60) {
        left = Math.min(left, x); right = Math.max(right, x); top = Math.min(top, y); bottom = Math.max(bottom, y);
      }
  return right < 0 ? null : { left, top, width: right - left + 1, height: bottom - top + 1 };
}

// The digit's own box, as tall as the bitmap and in its own proportion, but never wider than the bitmap.
export function cells() {
  const around = box();
  if (!around) return null;
  const factor = Math.min(INK / around.height, INK / around.width);
  const width = around.width * factor, height = around.height * factor;
  const small = new OffscreenCanvas(INK, INK).getContext("2d");
  small.drawImage(pad, around.left, around.top, around.width, around.height, (INK - width) / 2, (INK - height) / 2, width, height);
  const { data } = small.getImageData(0, 0, INK, INK);
  const found = new Array(CELLS * CELLS).fill(0);
  for (let y = 0; y < INK; y++)
    for (let x = 0; x < INK; x++)
      if (data[(y * INK + x) * 4 + 3] > 127) found[Math.floor(y / BLOCK) * CELLS + Math.floor(x / BLOCK)] += 1;
  return found;
}

function show(numbers) {
  const canvas = seen.getContext("2d");
  canvas.clearRect(0, 0, CELLS, CELLS);
  canvas.fillStyle = ink;
  numbers?.forEach((number, index) => {
    canvas.globalAlpha = number / 16;
    canvas.fillRect(index % CELLS, Math.floor(index / CELLS), 1, 1);
  });
  canvas.globalAlpha = 1;
}

function showShares(shares, best) {
  bars.replaceChildren(...shares.map((share, digit) => {
    const line = document.createElement("div");
    line.classList.toggle("best", digit === best);
    const name = Object.assign(document.createElement("span"), { textContent: digit });
    const bar = document.createElement("i");
    bar.style.setProperty("--share", share);
    line.append(name, bar, Object.assign(document.createElement("span"), { textContent: `${(share * 100).toFixed(1)} %` }));
    return line;
  }));
}

async function ask() {
  const numbers = cells();
  show(numbers);
  if (!numbers) return;
  const mine = ++asked, began = performance.now();
  try {
    const response = await fetch(url, {
      method: "POST",
      headers: { "Content-Type": "application/json", Authorization: `Bearer ${token}` },
      body: JSON.stringify({ inputs: [numbers] }),
    });
    if (mine !== asked) return;
    if (!response.ok) throw new Error(`status ${response.status}`);
    const { predictions, probabilities } = await response.json();
    answer.textContent = predictions[0];
    if (probabilities?.[0]) showShares(probabilities[0], probabilities[0].indexOf(Math.max(...probabilities[0])));
    said.textContent = `Answered in ${Math.round(performance.now() - began)} ms.`;
  } catch (error) {
    if (mine === asked) said.textContent = `The endpoint did not answer (${error.message.replace(/\.$/, "")}). Is the deployment ready?`;
  }
}

function clear() {
  asked += 1;
  pen.clearRect(0, 0, pad.width, pad.height);
  show(null);
  answer.textContent = "?";
  bars.replaceChildren();
  said.textContent = "Draw a digit from 0 to 9, large and in one go.";
}

pad.addEventListener("pointerdown", (event) => { pad.setPointerCapture(event.pointerId); last = at(event); stroke(event); });
pad.addEventListener("pointermove", stroke);
for (const end of ["pointerup", "pointercancel"])
  pad.addEventListener(end, () => { if (last) { last = null; ask(); } });
document.getElementById("clear").addEventListener("click", clear);
document.addEventListener("keydown", (event) => { if (event.key === "Escape") clear(); });
clear();
