/** Where the classifier's page has its answers from without a server: the exported graph, run in the browser. */
const source = (() => {
  const RUNTIME = new URL("onnxruntime-web.js", location.href).href;
  const TOKENIZERS = new URL("tokenizers.js", location.href).href;
  const SMALLEST = "CAk6NwoQCgFhEgFiIghJZGVudGl0eRIBZ1oPCgFhEgoKCAgBEgQKAggBYg8KAWISCgoICAESBAoCCAFCBAoAEBE="; // a graph of one operator
  const ROUNDS = 3;
  let about = null;
  let opened = null; // a promise: { ort, session, tokenizer, cutsLeft }
  let turn = Promise.resolve();

  const got = async (name) => {
    const found = await fetch(name, { credentials: "omit" }).catch(() => null);
    if (!found?.ok) throw new Error(`${name} cannot be read. This folder must be served: python -m http.server --bind 127.0.0.1`);
    return found;
  };

  /** The bytes of a file; the page shows how many of them are there. */
  const bytesOf = async (name, size) => {
    const reader = (await got(name)).body.getReader();
    const bytes = new Uint8Array(size);
    let count = 0;
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      if (count + value.length > size) throw new Error(`${name} is longer than it was written. Export it again.`);
      bytes.set(value, count);
      count += value.length;
      at("loaded").value = count / size;
    }
    if (count < size) throw new Error(`${name} is shorter than it was written. Export it again.`);
    return bytes;
  };

  /** ONNX Runtime, its WebAssembly compiled: that is done once there is a first session. */
  const runtime = async () => {
    const ort = await import(RUNTIME);
    ort.env.wasm.numThreads = 1; // more need headers that a plain file server does not send
    ort.env.wasm.wasmPaths = { wasm: new URL("onnxruntime-web.wasm", location.href).href };
    await ort.InferenceSession.create(Uint8Array.from(atob(SMALLEST), (one) => one.charCodeAt(0)));
    return ort;
  };

  const open = async () => {
    at("loading").hidden = false;
    const parts = [runtime(), import(TOKENIZERS), bytesOf("model.onnx", about.graph.bytes), got("tokenizer.json").then((found) => found.json())];
    const [ort, { Tokenizer }, graph, values] = await Promise.all(parts);
    // The graph is written with the fused operators that an optimiser would look for.
    const options = { executionProviders: ["wasm"], graphOptimizationLevel: "disabled", logSeverityLevel: 3 };
    const session = await ort.InferenceSession.create(graph, options);
    const tokenizer = new Tokenizer(values, {});
    at("loading").hidden = true;
    return { ort, session, tokenizer, cutsLeft: values.truncation.direction === "Left" };
  };

  /** Token ids of a text or a pair, and whether something was cut: the longer text of a pair first, as the engine does. */
  const encode = ({ tokenizer, cutsLeft }, texts) => {
    const all = tokenizer.encode(texts[0], texts.length === 2 ? { text_pair: texts[1], return_token_type_ids: true } : {});
    const types = all.token_type_ids ?? all.ids.map(() => 0);
    const lengths = texts.map((text) => tokenizer.encode(text, { add_special_tokens: false }).ids.length);
    const room = about.max_length - (all.ids.length - lengths.reduce((sum, length) => sum + length));
    const kept = [...lengths];
    if (texts.length === 1) kept[0] = Math.min(lengths[0], room);
    else if (lengths[0] + lengths[1] > room) {
      const [short, long] = lengths[0] > lengths[1] ? [1, 0] : [0, 1];
      kept[long] = Math.max(kept[short], room - kept[short]);
      if (kept[0] + kept[1] > room) {
        kept[short] = Math.floor(room / 2);
        kept[long] = room - kept[short];
      }
    }
    const isKept = (index, which) => cutsLeft ? index >= lengths[which] - kept[which] : index < kept[which];
    const inside = (place) => { // behind the first special token stands the first text, before the last one the second
      if (place < 1 || place === all.ids.length - 1) return true;
      if (place <= lengths[0]) return isKept(place - 1, 0);
      const second = place - (all.ids.length - 1 - (lengths[1] ?? 0));
      return second < 0 || isKept(second, 1);
    };
    const keep = (values) => values.filter((_, place) => inside(place));
    return { ids: keep(all.ids), types: keep(types), isCut: kept.some((length, which) => length < lengths[which]) };
  };

  const runNow = async ({ ort, session }, { ids, types }, threshold) => {
    const int64 = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
    const feed = { input_ids: int64(ids), attention_mask: int64(ids.map(() => 1)) };
    if (session.inputNames.includes("token_type_ids")) feed.token_type_ids = int64(types);
    if (session.inputNames.includes("threshold")) feed.threshold = new ort.Tensor("float32", [threshold], []);
    const start = performance.now();
    const found = await session.run(feed);
    return { found, time: performance.now() - start };
  };

  /** One run behind another: a session takes one at a time. `threshold` null: nobody exits. */
  const run = (parts, row, threshold, criterion) => {
    const limit = threshold ?? about.criteria[criterion]?.high;
    const done = turn.then(() => runNow(parts, row, limit));
    turn = done.catch(() => {});
    return done;
  };

  const softmax = (logits) => {
    const most = Math.max(...logits);
    const powers = logits.map((logit) => Math.exp(logit - most));
    const sum = powers.reduce((total, power) => total + power);
    return powers.map((power) => power / sum);
  };

  /** What every layer says, from a run in which nobody exits; of a graph without exits the last one alone. */
  const layersOf = (found) => {
    const classes = about.labels.length;
    const shown = found.layer_logits;
    const count = shown ? about.num_layers : 1;
    const all = [...(shown ?? found.logits).data];
    return Array.from({ length: count }, (_, index) => {
      const scores = softmax(all.slice(index * classes, (index + 1) * classes));
      const score = Math.max(...scores);
      if (Number.isNaN(score)) throw new Error("The model's logits are no numbers: its weights are broken, or too large for its dtype.");
      return {
        layer: shown ? index + 1 : about.num_layers,
        label: about.labels[scores.indexOf(score)],
        score,
        scores,
        exit_score: shown ? found.exit_scores.data[index] : null,
        exit_prob: found.exit_probs ? found.exit_probs.data[index] : null,
        elapsed_ms: null, // a first run takes longer than the next ones
      };
    }).filter(({ layer }) => !shown || (about.exit_layers ?? [layer]).includes(layer));
  };

  return {
    times: "Times are the least of three runs that end there, in this browser.",
    about: async () => {
      about = await (await got("playground.json")).json();
      opened = open();
      opened.catch((error) => { at("loading").hidden = true; complain(error.message); });
      return about;
    },
    layers: async (inputs, name) => {
      const parts = await opened;
      const start = performance.now();
      const row = encode(parts, typeof inputs === "string" ? [inputs] : inputs);
      const tokenizing = performance.now() - start;
      const { criterion, threshold } = about.operating_points.find((one) => one.name === name);
      const { found } = await run(parts, row, null, criterion);
      return { criterion, threshold, layers: layersOf(found), row, tokenizing_ms: tokenizing, truncated: row.isCut };
    },
    /** Times of layers, those that are not known measured in turn; each with a threshold by which the text exits there. */
    timesOf: async (answer, wanted) => {
      const times = wanted.map(([{ elapsed_ms }]) => [elapsed_ms ?? Infinity]);
      for (let round = 0; round < ROUNDS; round += 1) {
        for (const [which, [layer, threshold]] of wanted.entries()) {
          if (layer.elapsed_ms !== null) continue;
          times[which].push((await run(await opened, answer.row, threshold, answer.criterion)).time);
        }
      }
      return times.map((each) => Math.min(...each));
    },
    begin: async (begin) => {
      try {
        await begin();
        at("all").hidden = false;
      } catch (error) {
        complain(error.message);
      }
    },
  };
})();
