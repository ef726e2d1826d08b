"""An exported folder at work without torch and this library: python exported_alone.py FOLDER INPUTS.json BATCH...

Prints labels and exit layers as JSON, a list for each batch size. Only onnxruntime, tokenizers and numpy are needed.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

BLOCKED = ("torch", "transformers", "consistentee", "onnx")


class _Nothing:
    """Finds none of the blocked packages."""

    def find_spec(self, name: str, *_: object) -> None:
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is blocked here", name=name)


if __name__ == "__main__":
    sys.meta_path.insert(0, _Nothing())
    import numpy as np
    import onnxruntime
    from tokenizers import Tokenizer

    folder, inputs = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    names = json.loads((folder / "config.json").read_text())["id2label"]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options)
    fields = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
    wanted = {given.name for given in session.get_inputs()} & fields.keys()
    answers: list[list[tuple[str, int]]] = []
    for batch in map(int, sys.argv[3:]):
        answers.append([])
        for start in range(0, len(inputs), batch):
            part = inputs[start : start + batch]
            rows = tokenizer.encode_batch([texts[0] if len(texts) == 1 else tuple(texts) for texts in part])
            feed = {name: np.array([getattr(row, fields[name]) for row in rows], np.int64) for name in wanted}
            logits, layers = session.run(["logits", "exit_layer"], feed)
            labels = [names[str(label)] for label in logits.argmax(1)]
            answers[-1] += zip(labels, layers.tolist(), strict=True)
    assert not any(name in sys.modules for name in BLOCKED)
    assert importlib.util.find_spec("numpy") is not None
    print(json.dumps(answers))  # noqa: T201
