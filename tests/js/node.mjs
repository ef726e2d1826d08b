// node node.mjs BATCH FOLDER ...: what exported folders say about the inputs.json in them, as JSON, a list for each.
import { readFileSync } from "node:fs";
import * as ort from "onnxruntime-web";
import { Tokenizer } from "@huggingface/tokenizers";
import { answers } from "./exported.mjs";

const [batch, ...places] = process.argv.slice(2);
const read = (name) => JSON.parse(readFileSync(name, "utf8"));
ort.env.wasm.numThreads = 1;
const found = [];
for (const place of places) {
  const folder = {
    graph: readFileSync(`${place}/model.onnx`),
    tokenizer: read(`${place}/tokenizer.json`),
    config: read(`${place}/config.json`),
  };
  found.push(await answers(ort, Tokenizer, folder, read(`${place}/inputs.json`), Number(batch)));
}
console.log(JSON.stringify(found));
