/** The generator's page: a text with exits, token by token in the colours of their exit layers, and at full depth. */
const RANGES = 6; // of layers, at most, in the legend
let about = null;
let texts = {}; // by column: {pieces, layers, times, start, reason}
let stopping = null; // ends the text that is being written
let asked = 0;

const hasExits = () => about.modes.length > 1;
const setText = (name, text) => { at(name).textContent = text; };

// --- Tokens ---------------------------------------------------------------------------------------

/** Events of a stream of the server, one after another. */
const eventsOf = async function* (body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (waiting + value).split("\n\n");
    waiting = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
};

const share = (layer) => about.num_layers > 1 ? (layer - 1) / (about.num_layers - 1) : 0;

const put = (column, piece, layer) => {
  const token = make("span", { className: "token" }, piece);
  token.dataset.layer = layer;
  token.title = `exit layer ${layer}`;
  token.style.setProperty("--share", `${100 * share(layer)}%`);
  at(`${column}-text`).append(token);
};

const write = async (column, how) => {
  const text = { pieces: [], layers: [], times: [], start: performance.now(), reason: null };
  texts[column] = text;
  at(`${column}-text`).replaceChildren();
  at(`${column}-text`).setAttribute("aria-busy", "true");
  figures(column);
  const asks = at("form").value === "instruction";
  const prompt = at("text").value;
  const body = {
    model: about.model,
    max_tokens: Number(at("length").value),
    stream: true,
    ...how,
    ...(asks ? { messages: [{ role: "user", content: prompt }] } : { prompt }),
  };
  stopping = new AbortController();
  try {
    const found = await send(asks ? "v1/chat/completions" : "v1/completions", body, { signal: stopping.signal });
    for await (const { choices: [choice] } of eventsOf(found.body)) {
      const piece = choice.text ?? choice.delta.content ?? "";
      text.pieces.push(piece);
      for (const layer of choice.exit_layers) {
        text.layers.push(layer);
        text.times.push(performance.now() - text.start);
        put(column, piece, layer);
      }
      if (!choice.exit_layers.length && piece) at(`${column}-text`).append(piece);
      text.reason = choice.finish_reason ?? text.reason;
      figures(column);
    }
  } catch (error) {
    if (error.name !== "AbortError") throw error;
    text.reason = "stopped";
  } finally {
    at(`${column}-text`).setAttribute("aria-busy", "false");
  }
};

// --- Figures --------------------------------------------------------------------------------------

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

/** Tokens a second behind the first one, for which the prompt is read. */
const pace = ({ times }) => times.length > 1 ? 1000 * (times.length - 1) / (times.at(-1) - times[0]) : null;

const figures = (column) => {
  const text = texts[column];
  const some = text.layers.length > 0;
  const rate = pace(text);
  setText(`${column}-tokens`, String(text.layers.length));
  setText(`${column}-layer`, some ? `${mean(text.layers).toFixed(2)} of ${about.num_layers}` : "\u2026");
  setText(`${column}-pace`, rate === null ? "\u2026" : rate.toFixed(1));
  setText(`${column}-first`, some ? ms(text.times[0]) : "\u2026");
  setText(`${column}-time`, some ? ms(text.times.at(-1)) : "\u2026");
  if (column === "exits") legend();
};

const legend = () => {
  const count = Math.min(RANGES, about.num_layers);
  const ends = Array.from({ length: count }, (_, part) => Math.floor((part + 1) * about.num_layers / count));
  const layers = texts.exits?.layers ?? [];
  const items = ends.map((end, part) => {
    const first = part ? ends[part - 1] + 1 : 1;
    const held = layers.filter((layer) => first <= layer && layer <= end).length;
    const swatch = make("span", { className: "swatch" });
    swatch.style.setProperty("--share", `${100 * share((first + end) / 2)}%`);
    swatch.setAttribute("aria-hidden", "true");
    const name = first === end ? `${first}` : `${first}\u2013${end}`;
    return make("li", {}, swatch, `${name}: ${layers.length ? percent(held / layers.length) : "\u2026"}`);
  });
  at("legend").replaceChildren(...items);
};

const sum = (column) => {
  const { layers, reason } = texts[column];
  const cut = { length: " It was cut at the most tokens.", stopped: " It was stopped." }[reason] ?? "";
  return `${layers.length} tokens, mean exit layer ${layers.length ? mean(layers).toFixed(2) : "unknown"} of ${about.num_layers}.${cut}`;
};

/** What both texts say together. */
const compare = () => {
  const [one, full] = [texts.exits, texts.full];
  const [written, wanted] = [one.pieces.join(""), full.pieces.join("")];
  const stopped = [one, full].some(({ reason }) => reason === "stopped");
  let same = "writes the same text";
  if (written !== wanted) {
    const place = [...written].findIndex((character, index) => character !== [...wanted][index]);
    same = stopped && wanted.startsWith(written) ? "begins in the same way"
      : `writes another text from character ${(place < 0 ? [...written].length : place) + 1} on`;
  }
  const [fast, slow] = [pace(one), pace(full)];
  const times = fast === null || slow === null ? "" : `, ${(fast / slow).toFixed(2)} times the pace of full depth`;
  at("lead").replaceChildren(
    make("strong", {}, `${one.layers.length ? mean(one.layers).toFixed(2) : "\u2026"} of ${about.num_layers} layers`),
    ` a token${times}. Full depth ${same}.`,
  );
};

// --- The dial, and writing ------------------------------------------------------------------------

const threshold = () => about.thresholds[Number(at("threshold").value)];

/** The dial at what the model has saved for the chosen mode. */
const resetDial = () => {
  const saved = at("mode").value === "lossless" ? about.draft_threshold : about.threshold;
  const known = about.thresholds.indexOf(saved); // one above all that matter is not among them
  at("threshold").value = String(known < 0 ? about.thresholds.length - 1 : known);
  showDial();
};

const showDial = () => {
  setText("threshold-value", short(threshold()));
  at("threshold").setAttribute("aria-valuetext", short(threshold()));
  setText("rule", at("mode").value === "lossless"
    ? "Exits draft tokens and all layers verify them: the text is that of full depth. Colours show where a token was drafted, the last layer where it was not."
    : "A token exits at the first layer whose exit score exceeds the threshold, at the last one in any case. The text at full depth is written after the other one, so that they do not share the processor.");
};

const run = async () => {
  if (!at("text").value.trim() || !at("ask").reportValidity()) return;
  const number = ++asked;
  complain("");
  at("run").disabled = true;
  at("stop").disabled = false;
  at("result").hidden = false;
  texts = {};
  setText("lead", "");
  try {
    if (hasExits()) {
      at("full-text").replaceChildren();
      for (const name of ["tokens", "layer", "pace", "first", "time"]) setText(`full-${name}`, "\u2026");
      setText("said", "Writing with exits.");
      await write("exits", { mode: at("mode").value, threshold: threshold() });
      setText("said", `With exits: ${sum("exits")}`);
    }
    if (number !== asked) return;
    if (texts.exits?.reason !== "stopped") {
      await write("full", hasExits() ? { mode: "full" } : {});
      setText("said", `${hasExits() ? `With exits: ${sum("exits")} ` : ""}Full depth: ${sum("full")}`);
      if (hasExits()) compare();
    }
  } catch (error) {
    if (number === asked) complain(error.message);
  } finally {
    if (number === asked) {
      at("run").disabled = false;
      at("stop").disabled = true;
    }
  }
};

at("ask").addEventListener("submit", (event) => { event.preventDefault(); run(); });
runsByKey(at("ask"), at("text"));
at("stop").addEventListener("click", () => { stopping?.abort(); at("text").focus(); });
at("threshold").addEventListener("input", showDial);
at("mode").addEventListener("change", resetDial);
at("numbers").addEventListener("change", () => {
  for (const column of ["exits", "full"]) at(`${column}-text`).classList.toggle("numbered", at("numbers").checked);
});

beginWithToken(async () => {
  about = await (await send("layers")).json();
  setText("model", `: ${about.model}`);
  at("form").value = about.has_template ? "instruction" : "text";
  at("length").value = String(Math.min(about.max_tokens, 64));
  at("length").max = String(about.context_length - 1);
  for (const part of document.querySelectorAll(".exits-only")) part.hidden = !hasExits();
  at("exits").hidden = !hasExits();
  if (!hasExits()) return;
  at("mode").value = about.mode === "lossless" ? "lossless" : "early-exit";
  setText("criterion", about.criterion);
  at("threshold").max = String(about.thresholds.length - 1);
  resetDial();
});
