// What the energy chose from: {run, choices, step} of engine.py as `props.value`.
const root = element.querySelector(".edlm-inside");
let at = null; // index of the choice shown

function paint() {
  const value = props.value;
  if (!value) {
    root.replaceChildren(make("p", { class: "status" }, "Press the button to run this text and look at each choice."));
    return;
  }
  const { run, choices } = value;
  root.dataset.state = run.state;
  if (run.state === "running") {
    const bar = make("progress", { max: run.num_steps, value: run.done, "aria-label": "Steps taken" });
    root.replaceChildren(bar, make("p", { class: "status" }, `Step ${run.done} of ${run.num_steps}`));
    at = null;
    return;
  }
  if (!choices.length) {
    root.replaceChildren(make("p", { class: "status" }, "The energy chose at no step. Take two proposals or more, or a wider window."));
    return;
  }
  if (at === null || at >= choices.length) {
    at = choices.length >> 1;
  }
  const choice = choices[at];
  const best = choice.energies.map((energy, i) => i).sort((a, b) => choice.energies[a] - choice.energies[b]);
  const now = run.step.filter((step, i) => step === choice.step && run.tokens[i]).length; // without special tokens
  const masked = run.given.filter((given, i) => !given && (run.step[i] === null || run.step[i] >= choice.step)).length;
  const range = make("input", {
    type: "range", min: 0, max: choices.length - 1, step: 1, value: at, "aria-label": "Choice shown",
    "aria-valuetext": `step ${choice.step + 1}`,
    oninput: (event) => { at = Number(event.target.value); paint(); root.querySelector("input").focus(); },
  });
  root.dataset.step = choice.step;
  const ess = `Effective number of proposals: ${choice.ess.toFixed(2)}.`;
  const told = isRevision(choice)
    ? `The complete text is revised: as it was, or ${plural(choice.energies.length - 1, "new proposal")} for a few of ` +
      `its tokens (outlined where they differ). ${ess}`
    : `${plural(choice.energies.length, "proposal")} for ${plural(masked, "masked token")}. The text gets ` +
      `${plural(now, "token")} (outlined) of the one kept. ${ess}`;
  root.replaceChildren(
    plot(run, choices, choice),
    make("label", { class: "pick" }, make("span", {}, `Step ${choice.step + 1} of ${run.num_steps}, t = ${choice.t.toFixed(3)}`), range),
    make("p", { class: "status" }, told),
    make("ol", { class: "candidates" }, ...best.map((i) => candidate(run, choice, i))),
  );
}

// in a step of the sampler some tokens are masked, so t is above 0
const isRevision = (choice) => choice.t === 0;

function candidate(run, choice, i) {
  const share = choice.weights[i];
  const percent = share >= 0.0995 ? (100 * share).toFixed(0) : share >= 0.00095 ? (100 * share).toFixed(1) : "<0.1";
  const kept = i === choice.kept;
  const bar = make("span", { class: "bar", "aria-hidden": "true" });
  bar.style.setProperty("--share", share);
  const tokens = choice.candidates === null ? null : choice.candidates[i].map((piece, j) => {
    const step = run.step[j];
    const differs = isRevision(choice) && choice.candidates.some((other) => other[j] !== piece);
    const kind = differs ? "now" : run.given[j] ? "given" : step !== null && step < choice.step ? "before" : step === choice.step ? "now" : "away";
    return make("span", { class: piece === null ? "masked" : kind }, piece === null ? "\u00b7" : piece);
  });
  const words = tokens === null
    ? make("div", { class: "text away" }, "(left out of this answer: too many to show; run again with this step)")
    : make("div", { class: "text", role: "img", "aria-label": plain(choice.candidates[i]) }, ...tokens);
  return make("li", { class: kept ? "kept" : "" },
    make("div", { class: "head" },
      make("b", {}, kept ? "kept" : ""), make("span", {}, `energy ${choice.energies[i].toFixed(2)}`), bar,
      make("span", {}, `weight ${percent} %`)),
    words);
}

function plot(run, choices, chosen) {
  const [W, H, L, B, T] = [640, 150, 34, 30, 12];
  const k = chosen.energies.length;
  const x = (step) => L + ((W - L - 10) * step) / Math.max(1, run.num_steps - 1);
  const y = (ess) => H - B - ((H - B - T) * (ess - 1)) / Math.max(1, k - 1);
  const label = (px, py, words, anchor = "middle") => draw("text", { x: px, y: py, "text-anchor": anchor }, words);
  const lines = [1, k].map((v) => draw("line", { x1: L, x2: W - 10, y1: y(v), y2: y(v), class: "grid" }));
  const path = choices.map((c, i) => `${i ? "L" : "M"}${x(c.step).toFixed(1)} ${y(c.ess).toFixed(1)}`).join(" ");
  const dots = choices.map((c) => draw("circle", { cx: x(c.step), cy: y(c.ess), r: c === chosen ? 6 : 3, class: c === chosen ? "dot chosen" : "dot" }));
  const svg = draw("svg", { viewBox: `0 0 ${W} ${H}`, class: "plot", role: "img" },
    draw("title", {}, `Effective number of proposals over ${choices.length} steps`),
    ...lines, draw("path", { d: path, class: "line" }), ...dots,
    label(L - 6, y(1) + 4, "1", "end"), label(L - 6, y(k) + 4, `${k}`, "end"),
    label(x(0), H - 10, "1", "start"), label(x(run.num_steps - 1), H - 10, `${run.num_steps}`, "end"),
    label((L + W) / 2, H - 10, "step"));
  return make("figure", {}, svg, make("figcaption", {},
    `Effective number of proposals (ESS): ${k} if all have the same energy, 1 if one has all the weight.`));
}

watch("value", paint);
paint();
