// The text while it is written: a run of engine.py as `props.value`, with a scrubber that goes back through its steps.
const root = element.querySelector(".edlm-canvas");
const title = root.dataset.title;
const text = make("div", { class: "text", role: "img" });
const strip = make("div", { class: "strip", "aria-hidden": "true" });
const range = make("input", { type: "range", min: 0, value: 0, step: 1, "aria-label": `Step shown, ${title}` });
const play = make("button", { type: "button", class: "small" }, "Replay");
const copy = make("button", { type: "button", class: "small" }, "Copy text");
const status = make("div", { class: "status" });
const said = make("div", { class: "unseen", role: "status" });
const controls = make("div", { class: "controls" }, range, play, copy);
root.append(make("h3", {}, title), text, strip, controls, status, said);

let at = 0; // the step shown: that many have been taken
let follows = true; // the newest one, while it runs
let stopped = false;
let timer = null;

const run = () => props.value;
const shown = (i) => run().given[i] || (run().step[i] !== null && run().step[i] < at);

// the pieces of text as they were after the step shown, and the places that it revised
function revision() {
  const pieces = [...run().tokens];
  for (const [step, i, before] of [...run().revised].reverse()) if (step >= at) pieces[i] = before;
  return [pieces, new Set(run().revised.filter(([step]) => step === at - 1).map(([, i]) => i))];
}

function paint() {
  const value = run();
  root.classList.toggle("empty", !value);
  if (!value) {
    text.replaceChildren("Press the button. The text appears here while it is written.");
    return;
  }
  const steps = value.num_steps;
  if (follows) at = value.done;
  while (text.children.length > value.tokens.length) text.lastChild.remove();
  if (text.children.length === 0) text.replaceChildren();
  let masked = 0;
  const [pieces, now] = revision();
  pieces.forEach((piece, i) => {
    const span = text.children[i] ?? text.appendChild(document.createElement("span"));
    const visible = shown(i);
    masked += !visible;
    const content = visible ? piece : "\u00b7";
    if (span.textContent !== content) span.textContent = content;
    const kind = value.given[i] ? "given" : !visible ? "masked" : value.step[i] === at - 1 || now.has(i) ? "new" : "written";
    if (span.className !== kind) span.className = kind;
    if (visible && !value.given[i]) {
      span.style.setProperty("--hue", hue(value.step[i], steps));
      span.style.setProperty("--sure", value.p[i]);
      span.title = `step ${value.step[i] + 1} of ${steps}, probability ${value.p[i].toFixed(2)}`;
    } else span.removeAttribute("title");
  });
  text.setAttribute("aria-label", plain(pieces.map((piece, i) => (shown(i) ? piece : null))));
  root.dataset.masked = masked;
  root.dataset.step = at;
  const running = value.state === "running" && !stopped;
  root.dataset.state = stopped && value.state === "running" ? "stopped" : value.state;
  root.classList.toggle("running", running);
  if (strip.children.length !== steps)
    strip.replaceChildren(...Array.from({ length: steps }, (_, i) => {
      const cell = document.createElement("i");
      cell.style.setProperty("--hue", hue(i, steps));
      return cell;
    }));
  const acted = new Set(value.acted);
  [...strip.children].forEach((cell, i) => {
    cell.className = (i < at ? "past" : "") + (acted.has(i) ? " acted" : "");
  });
  range.max = value.done;
  range.value = at;
  range.setAttribute("aria-valuetext", `step ${at} of ${steps}, ${masked} masked`);
  const cost = `${plural(value.nfe, "denoiser call")}, ${plural(value.energy_nfe, "energy call")}`;
  const left = masked ? `${masked} of ${value.tokens.length} masked` : "complete";
  const end = { stopped: "Stopped. ", time: "Stopped at this Space's time limit. " }[root.dataset.state] ?? "";
  status.textContent =
    `${end}Step ${at} of ${steps}, ${left}. ${cost}, ${value.seconds.toFixed(1)} s, seed ${value.seed}.`;
  if (!running && said.dataset.run !== String(value.seed) + root.dataset.state + value.done) {
    said.dataset.run = String(value.seed) + root.dataset.state + value.done;
    said.textContent = `${title}: ${end || "finished. "}${plain(value.tokens)}`;
  }
}

range.oninput = () => {
  clearInterval(timer);
  follows = Number(range.value) === run().done && run().state === "running";
  at = Number(range.value);
  paint();
};
play.onclick = () => {
  if (!run()) return;
  clearInterval(timer);
  follows = false;
  at = 0;
  paint();
  timer = setInterval(() => {
    if (at >= run().done || !root.isConnected) return clearInterval(timer);
    at += 1;
    paint();
  }, Math.max(30, 3000 / Math.max(1, run().done)));
};
copy.onclick = async () => {
  if (!run()) return;
  await navigator.clipboard.writeText(plain(run().tokens));
  copy.textContent = "Copied";
  setTimeout(() => (copy.textContent = "Copy text"), 1500);
};
document.addEventListener("edlm-stop", () => {
  stopped = true;
  paint();
});
document.addEventListener("edlm-start", () => {
  stopped = false;
  follows = true;
  clearInterval(timer);
});
watch("value", () => {
  const starts = run() && run().done === 0;
  if (starts) follows = true;
  paint();
  if (starts && root.offsetParent) root.scrollIntoView({ block: "nearest" }); // on a phone it begins below the fold
});
paint();
