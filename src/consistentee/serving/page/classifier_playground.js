(() => {
  "use strict";
  const at = (id) => document.getElementById(id);
  const OWN = "";
  const FULL = "full-depth";
  let bearer = null;
  let about = null;
  let answer = null; // of the last text
  let steps = []; // thresholds of the slider
  let chosen = null; // {name, threshold}
  let trip = 0;
  let asked = 0;
  let telling = 0;

  const percent = (share) => `${(100 * share).toFixed(1)}\u00a0%`;
  const ms = (time) => `${time.toFixed(time < 10 ? 2 : 1)}\u00a0ms`;
  const short = (value) => String(Number(value.toPrecision(4)));
  const make = (tag, values = {}, ...inside) => {
    const made = Object.assign(document.createElement(tag), values);
    made.append(...inside);
    return made;
  };
  const complain = (text) => { at("error").textContent = text; };

  const fetchJson = async (body) => {
    const headers = bearer === null ? {} : { authorization: `Bearer ${bearer}` };
    if (body) headers["content-type"] = "application/json";
    const how = { headers, credentials: "omit", cache: "no-store", ...(body && { method: "POST", body: JSON.stringify(body) }) };
    let found;
    try {
      found = await fetch("layers", how);
    } catch {
      throw new Error("The server does not answer.");
    }
    if (found.status === 401) {
      const was = bearer;
      bearer = null;
      at("all").hidden = true;
      document.querySelector("nav").hidden = true; // a link bears no token
      at("token-form").hidden = false;
      at("token").focus();
      throw new Error(was === null ? "" : "The server does not take this token.");
    }
    const values = await found.json().catch(() => ({ error: `The server answered with status ${found.status}.` }));
    if (!found.ok) throw new Error(values.error);
    return values;
  };

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
      row.append(make("td", { className: "n" }, ms(one.elapsed_ms)));
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
    at("figure-trip").textContent = ms(trip);
    drawRows();
    [...at("layers").rows].forEach((row, index) => {
      const layer = answer.layers[index].layer;
      row.classList.toggle("exit", layer === found.layer);
      row.classList.toggle("beyond", layer > found.layer);
      const mark = layer === found.layer ? make("span", { className: "mark" }, " exit") : "";
      row.cells[0].replaceChildren(String(layer), layer > found.layer ? make("span", { className: "unseen" }, " not needed") : mark);
    });
    const scored = answer.criterion !== null;
    const isPolicy = answer.criterion === "policy";
    at("control").hidden = !scored;
    at("rule").textContent = scored
      ? `A text exits at the first layer whose ${isPolicy ? "exit probability" : "exit score"} exceeds the threshold (the line across its bar), at the last one in any case. Grey layers would not be computed. Times are of this run through all layers.`
      : "The model has no exits: its only classifier is behind the last layer.";
    if (!scored) return;
    at("threshold-value").textContent = short(chosen.threshold);
    at("threshold").setAttribute("aria-valuetext", `${short(chosen.threshold)}: ${found.label}, ${after}`);
    at("point").value = chosen.name;
    at("known").textContent = known();
    clearTimeout(telling); // a reader hears where the slider stops, not every step
    telling = setTimeout(() => { at("said").textContent = `${found.label}, ${percent(found.score)}, ${after}. ${deep}${cut}`; }, 300);
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
      const body = { inputs: pair === null ? text : [text, pair] };
      if (chosen.name === OWN) body.operating_point = chosen.from;
      else body.operating_point = chosen.name;
      const found = await fetchJson(body);
      if (number !== asked) return;
      trip = performance.now() - start;
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
  for (const id of ["text", "pair"]) {
    at(id).addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("ask").requestSubmit();
    });
  }
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

  // --- The token, and the beginning ---------------------------------------------------------------

  const begin = async () => {
    try {
      about = await fetchJson();
    } catch (error) {
      complain(error.message);
      return;
    }
    complain("");
    at("token-form").hidden = true;
    at("all").hidden = false;
    at("model").textContent = `: ${about.model}`;
    at("second").hidden = about.text_pairs === false;
    at("pair").required = about.text_pairs === true;
    if (about.text_pairs === true) at("text-label").textContent = "First text";
    listPoints();
    if (bearer !== null) at("text").focus();
  };
  at("token-form").addEventListener("submit", (event) => {
    event.preventDefault();
    bearer = at("token").value.trim();
    at("token").value = "";
    begin();
  });
  begin();
})();
