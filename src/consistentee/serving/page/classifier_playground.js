/** The classifier's page: a text at every layer, and what it would be under another threshold. `source` answers. */
const OWN = "";
const FULL = "full-depth";
let about = null;
let answer = null; // of the last text
let steps = []; // thresholds of the slider
let chosen = null; // {name, threshold}
let trip = 0;
let asked = 0;
let telling = 0;
let timing = 0;

// --- What the answer says under a threshold -----------------------------------------------------

const exitOf = (threshold) => {
  const limit = Math.fround(threshold);
  const before = answer.layers.slice(0, -1);
  return before.find((one) => one.exit_score !== null && one.exit_score > limit) || answer.layers.at(-1);
};
const place = (value) => {
  const { low, high } = about.criteria[answer.criterion];
  return high > low ? Math.min(1, Math.max(0, (value - low) / (high - low))) : 0;
};
const bar = (share, limit) => {
  const fill = make("span", { className: "fill" });
  fill.style.width = `${100 * share}%`;
  const whole = make("span", { className: "bar" }, fill);
  whole.setAttribute("aria-hidden", "true");
  if (limit !== undefined) {
    const mark = make("span", { className: "limit" });
    mark.style.left = `${100 * limit}%`;
    whole.append(mark);
  }
  return whole;
};

const drawRows = () => {
  const scored = answer.criterion !== null;
  document.querySelectorAll("thead .scored").forEach((cell) => { cell.hidden = !scored; });
  const isPolicy = answer.criterion === "policy";
  document.querySelector("thead .probs").hidden = !scored || isPolicy;
  at("score-head").textContent = isPolicy ? "Exit probability" : `Exit score (${answer.criterion})`;
  const limit = scored ? place(chosen.threshold) : 0;
  const none = () => make("td", {}, "always exits");
  const rows = answer.layers.map((one, index) => {
    const row = make("tr", {}, make("th", { scope: "row" }, String(one.layer)));
    row.append(
      make("td", { className: "label" }, one.label),
      make("td", {}, percent(one.score), bar(one.score)),
    );
    if (scored) {
      const isLast = index === answer.layers.length - 1;
      row.append(
        isLast || one.exit_score === null
          ? none()
          : make("td", {}, short(one.exit_score), bar(place(one.exit_score), limit)),
      );
      if (!isPolicy) row.append(isLast || one.exit_prob === null ? none() : make("td", {}, short(one.exit_prob), bar(one.exit_prob)));
    }
    if (!source.timesOf) row.append(make("td", { className: "n" }, ms(one.elapsed_ms)));
    row.style.setProperty("--i", index);
    return row;
  });
  at("layers").replaceChildren(...rows);
};

const said = () => {
  const found = exitOf(chosen.threshold);
  const full = answer.layers.at(-1);
  const total = about.num_layers;
  const same = found.label === full.label;
  const after = found.layer === total ? `after all ${total} layers` : `after layer ${found.layer} of ${total}`;
  const deep = found === full ? "" : same
    ? `Full depth says the same (${percent(full.score)}).`
    : `Full depth says ${full.label} (${percent(full.score)}).`;
  return { found, full, total, after, deep };
};

const show = () => {
  if (!answer) return;
  const { found, full, total, after, deep } = said();
  const cut = answer.truncated ? ` The text was cut after ${about.max_length} tokens.` : "";
  at("lead").replaceChildren(make("strong", {}, found.label), ` (${percent(found.score)}), ${after}. ${deep}${cut}`);
  at("figure-layer").textContent = `${found.layer} of ${total}`;
  at("figure-saved").textContent = percent(1 - found.layer / total);
  at("figure-exit").textContent = ms(found.elapsed_ms);
  at("figure-full").textContent = ms(full.elapsed_ms);
  if (found.elapsed_ms === null || full.elapsed_ms === null) measure();
  at("figure-trip").textContent = ms(trip);
  drawRows();
  [...at("layers").rows].forEach((row, index) => {
    const layer = answer.layers[index].layer;
    row.classList.toggle("exit", layer === found.layer);
    row.classList.toggle("beyond", layer > found.layer);
    const mark = layer === found.layer ? make("span", { className: "mark" }, " exit") : "";
    row.cells[0].replaceChildren(String(layer), layer > found.layer ? make("span", { className: "unseen" }, " not needed") : mark);
  });
  clearTimeout(telling); // a reader hears where the slider stops, not every step
  telling = setTimeout(() => { at("said").textContent = `${found.label}, ${percent(found.score)}, ${after}. ${deep}${cut}`; }, 300);
  const scored = answer.criterion !== null;
  const isPolicy = answer.criterion === "policy";
  at("control").hidden = !scored;
  at("rule").textContent = scored
    ? `A text exits at the first layer whose ${isPolicy ? "exit probability" : "exit score"} exceeds the threshold (the line across its bar), at the last one in any case. Grey layers would not be computed. ${source.times}`
    : "The model has no exits: its only classifier is behind the last layer.";
  if (!scored) return;
  at("threshold-value").textContent = short(chosen.threshold);
  at("threshold").setAttribute("aria-valuetext", `${short(chosen.threshold)}: ${found.label}, ${after}`);
  at("point").value = chosen.name;
  at("known").textContent = known();
};

/** Let a source that has no times of layers measure those that are shown, once the slider stops. */
const measure = () => {
  const of = answer;
  clearTimeout(timing);
  timing = setTimeout(async () => {
    const { found, full } = said();
    try {
      [full.elapsed_ms, found.elapsed_ms] = await source.timesOf(of, [[full, null], [found, chosen.threshold]]);
      if (answer === of) show();
    } catch (error) {
      complain(error.message);
    }
  }, 150);
};

const known = () => {
  const point = about.operating_points.find((one) => one.name === chosen.name);
  if (!point) return "A threshold of your own: nothing was measured at it.";
  if (point.name === FULL) return "Nobody exits before the last layer.";
  const parts = [];
  const v = point.validation;
  if (v && v.accuracy !== null && v.mean_exit_layer !== null) {
    const full = v.full_depth_accuracy === null ? "" : ` (full depth ${percent(v.full_depth_accuracy)})`;
    parts.push(`On ${v.num_examples} validation texts: ${percent(v.accuracy)} right${full}, ${v.mean_exit_layer.toFixed(2)} of ${about.num_layers} layers on average.`);
  }
  if (point.max_disagreement !== null) {
    parts.push(`Certificate: at most ${percent(point.max_disagreement)} of texts like those it was made on get another label than at full depth, with confidence ${percent(point.confidence)}.`);
  }
  return parts.join(" ") || "Nothing was measured at this point.";
};

// --- The slider and the points ------------------------------------------------------------------

const setSteps = () => {
  steps = answer.criterion === null ? [] : about.criteria[answer.criterion].thresholds;
  at("threshold").max = String(Math.max(0, steps.length - 1));
  toSlider();
};
const toSlider = () => {
  const index = steps.findIndex((value) => value >= chosen.threshold);
  at("threshold").value = String(index < 0 ? steps.length - 1 : index);
};

const listPoints = () => {
  const options = about.operating_points.map((one) => make(
    "option",
    { value: one.name },
    one.name === FULL || one.criterion === null ? `${one.name} (all layers)` : `${one.name} (${one.criterion} > ${short(one.threshold)})`,
  ));
  at("point").replaceChildren(...options, make("option", { value: OWN }, "threshold of your own"));
  chosen = { name: about.operating_point, threshold: null };
};

const run = async () => {
  const text = at("text").value;
  if (!text.trim()) return;
  const pair = at("second").hidden || !at("pair").value.trim() ? null : at("pair").value;
  const number = ++asked;
  complain("");
  at("run").disabled = true;
  const start = performance.now();
  try {
    const found = await source.layers(pair === null ? text : [text, pair], chosen.name === OWN ? chosen.from : chosen.name);
    if (number !== asked) return;
    trip = found.tokenizing_ms ?? performance.now() - start;
    answer = found;
    if (chosen.name !== OWN) chosen.threshold = answer.threshold;
    at("result").hidden = false;
    setSteps();
    show();
    at("layers").classList.remove("climb");
    void at("layers").offsetWidth; // begin anew
    at("layers").classList.add("climb");
  } catch (error) {
    if (number === asked) complain(error.message);
  } finally {
    if (number === asked) at("run").disabled = false;
  }
};

at("ask").addEventListener("submit", (event) => { event.preventDefault(); run(); });
runsByKey(at("ask"), at("text"), at("pair"));
at("threshold").addEventListener("input", () => {
  const threshold = steps[Number(at("threshold").value)];
  const same = about.operating_points.find((one) => one.criterion === answer.criterion && one.threshold === threshold);
  const from = chosen.name === OWN ? chosen.from : chosen.name;
  chosen = { name: same ? same.name : OWN, threshold, from };
  at("layers").classList.remove("climb");
  show();
});
at("point").addEventListener("change", () => {
  const point = about.operating_points.find((one) => one.name === at("point").value);
  const from = chosen.name === OWN ? chosen.from : chosen.name;
  if (!point) {
    chosen = { name: OWN, threshold: chosen.threshold, from };
    show();
  } else if (point.criterion === answer.criterion) {
    chosen = { name: point.name, threshold: point.threshold };
    toSlider();
    at("layers").classList.remove("climb");
    show();
  } else {
    chosen = { name: point.name, threshold: point.threshold };
    run();
  }
});

// --- The beginning ------------------------------------------------------------------------------

source.begin(async () => {
  about = await source.about();
  at("model").textContent = `: ${about.model}`;
  at("second").hidden = about.text_pairs === false;
  at("pair").required = about.text_pairs === true;
  if (about.text_pairs === true) at("text-label").textContent = "First text";
  listPoints();
});
