// What every page has: times in the reader's zone, copying, buttons that call the API, and lists that stay true.

const SECOND = 1000, MINUTE = 60 * SECOND, HOUR = 60 * MINUTE, DAY = 24 * HOUR;

export function ago(moment, now = Date.now()) {
  const passed = now - moment.getTime();
  if (passed < 5 * SECOND) return "just now";
  if (passed < MINUTE) return `${Math.floor(passed / SECOND)} s ago`;
  if (passed < HOUR) return `${Math.floor(passed / MINUTE)} min ago`;
  if (passed < DAY) return `${Math.floor(passed / HOUR)} h ago`;
  return moment.toLocaleDateString(undefined, { day: "numeric", month: "short", year: "numeric" });
}

export function lasted(milliseconds) {
  const seconds = Math.max(0, milliseconds / SECOND);
  if (seconds < 60) return `${Math.floor(seconds)} s`;
  const minutes = Math.floor(seconds / 60), rest = Math.floor(seconds % 60);
  if (minutes < 60) return `${minutes} min ${String(rest).padStart(2, "0")} s`;
  return `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, "0")} min`;
}

export function tick(root = document) {
  for (const element of root.querySelectorAll("time[datetime]")) {
    const moment = new Date(element.dateTime);
    element.textContent = ago(moment);
    element.title = moment.toLocaleString();
  }
  for (const element of root.querySelectorAll("time[data-since]"))
    element.textContent = lasted(Date.now() - new Date(element.dataset.since).getTime());
}

export function toast(text) {
  document.querySelector(".toast")?.remove();
  const box = Object.assign(document.createElement("div"), { className: "toast", textContent: text });
  box.setAttribute("role", "status");
  document.body.append(box);
  setTimeout(() => box.remove(), 6000);
}

// The parts of a page that can change are marked data-live="name"; they are fetched anew and put in place.
export async function refresh() {
  const answer = await fetch(location.href, { headers: { accept: "text/html" } });
  if (!answer.ok || answer.redirected) return;
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
  for (const part of document.querySelectorAll("[data-live]")) {
    const newer = fresh.querySelector(`[data-live="${part.dataset.live}"]`);
    if (newer && newer.innerHTML !== part.innerHTML) part.replaceChildren(...newer.childNodes);
  }
  tick();
}

export function soon(action, delay = 400) {
  let waiting = 0;
  return () => {
    if (waiting) return;
    waiting = setTimeout(() => { waiting = 0; action(); }, delay);
  };
}

// A stream of events that comes back. A browser does so by itself when the connection breaks, but gives up for good
// when the answer is an error, as it is while the gateway starts again. `address` gets the last id seen, or "".
export function follow(address, listeners) {
  let last = "", pause = SECOND, source;
  function open() {
    source = new EventSource(address(last));
    source.addEventListener("open", () => { pause = SECOND; });
    source.addEventListener("error", () => {
      if (source.readyState !== EventSource.CLOSED) return;
      setTimeout(open, pause);
      pause = Math.min(2 * pause, 30 * SECOND);
    });
    for (const [name, listener] of Object.entries(listeners))
      source.addEventListener(name, (event) => { last = event.lastEventId || last; listener(event); });
  }
  open();
  return { close: () => source.close() };
}

async function call(button) {
  if (button.dataset.confirm && !confirm(button.dataset.confirm)) return;
  button.disabled = true;
  try {
    const answer = await fetch(button.dataset.call, {
      method: button.dataset.method || "POST",
      headers: { "Idempotency-Key": crypto.randomUUID() },
    });
    if (!answer.ok) {
      const problem = await answer.json();
      toast(`${problem.detail} ${problem.remedy}`);
    }
    await refresh();
  } catch {
    toast("Nabla did not answer. Try again.");
  } finally {
    button.disabled = false;
  }
}

document.addEventListener("click", async (event) => {
  const button = event.target.closest("button");
  if (button?.dataset.call) await call(button);
  if (button?.dataset.copy !== undefined) {
    await navigator.clipboard.writeText(button.parentElement.querySelector("pre").textContent);
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  }
});

tick();
setInterval(tick, SECOND);

const types = document.body.dataset.follow;
if (types) {
  const later = soon(refresh);
  const names = document.body.dataset.events.split(" ");
  // What happened before the stream was open, for the first time or again, is on the page anew.
  const listeners = Object.fromEntries([...names, "open"].map((name) => [name, later]));
  follow(() => `/api/v1/events/stream?types=${encodeURIComponent(types)}`, listeners);
}
