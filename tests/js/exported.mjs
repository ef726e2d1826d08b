// An exported folder at work in JavaScript, the same in Node and in a browser: labels and exit layers of some inputs.

/** Token ids of one input: a text, or a pair of texts. What is too long is cut, its last token kept. */
function encode(tokenizer, texts, longest) {
  const options = texts.length === 2 ? { text_pair: texts[1], return_token_type_ids: true } : {};
  const { ids, token_type_ids } = tokenizer.encode(texts[0], options);
  if (ids.length <= longest) return { ids, types: token_type_ids ?? ids.map(() => 0) };
  const kept = [...ids.slice(0, longest - 1), ids.at(-1)];
  return { ids: kept, types: kept.map(() => 0) };
}

/**
 * @param ort onnxruntime-web
 * @param Tokenizer of @huggingface/tokenizers
 * @param folder { graph: bytes, tokenizer, config: objects }
 * @param inputs lists of one text or two
 * @param batch rows that go together, padded with zeros
 * @returns [[label, exit layer], ...]
 */
export async function answers(ort, Tokenizer, folder, inputs, batch) {
  const tokenizer = new Tokenizer(folder.tokenizer, {});
  const session = await ort.InferenceSession.create(folder.graph, { logSeverityLevel: 3 });
  const found = [];
  for (let start = 0; start < inputs.length; start += batch) {
    const rows = inputs.slice(start, start + batch).map((texts) => encode(tokenizer, texts, folder.config.max_length));
    const width = Math.max(...rows.map(({ ids }) => ids.length));
    const tensor = (values) => {
      const flat = rows.flatMap((row) => { const own = values(row); return [...own, ...Array(width - own.length).fill(0)]; });
      return new ort.Tensor("int64", BigInt64Array.from(flat, BigInt), [rows.length, width]);
    };
    const feed = { input_ids: tensor((row) => row.ids), attention_mask: tensor((row) => row.ids.map(() => 1)) };
    if (session.inputNames.includes("token_type_ids")) feed.token_type_ids = tensor((row) => row.types);
    const { logits, exit_layer } = await session.run(feed);
    const classes = logits.dims[1];
    rows.forEach((_, row) => {
      const own = [...logits.data.slice(row * classes, (row + 1) * classes)];
      const label = folder.config.id2label[own.indexOf(Math.max(...own))];
      found.push([label, Number(exit_layer.data[row])]);
    });
  }
  return found;
}
