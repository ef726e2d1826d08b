"""Folders that 0.1.0 saved open, and answer as they answered then.

`tests/saved_0_1_0` holds tiny models, trained on texts of `tiny.tiny_dataset` and `tiny_training.tiny_instructions`.
`early_exit` and `full_depth` are of revision 83242df, which 0.1.0's section of the changelog ends with; the others are
of fea598f, the last one that calls itself 0.1.0. `expected.json` holds what the saving revision answered.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from consistentee import Engine, TextGenerator
from consistentee.models.loaded import LoadedClassifier, LoadedGenerator, load_model
from consistentee.models.record import read_record

SAVED = Path(__file__).parents[1] / "saved_0_1_0"
CLASSIFIERS = ("early_exit", "early_exit_later", "full_depth")
GENERATORS = ("early_exit_generation", "full_depth_generation")


def expected(name: str) -> dict[str, Any]:
    """What the model answered when it was saved."""
    return json.loads((SAVED / name / "expected.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers_predict_as_they_did(name: str) -> None:
    then = expected(name)
    engine = Engine(load_model(SAVED / name, LoadedClassifier, device="cpu"))
    for run in then["predictions"]:
        now = engine.predict(then["texts"], batch_size=8, **run["options"])
        assert [prediction.label for prediction in now] == run["labels"]
        assert [prediction.exit_layer for prediction in now] == run["exit_layers"]
        scores = torch.tensor([prediction.score for prediction in now])
        torch.testing.assert_close(scores, torch.tensor(run["scores"]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", GENERATORS)
def test_generators_write_as_they_did(name: str) -> None:
    then = expected(name)
    saved = load_model(SAVED / name, LoadedGenerator, device="cpu")
    generator = TextGenerator(saved)
    prompts = [(instruction, text) for instruction, text in then["prompts"]]
    for run in then["generated"]:
        now = list(generator.generate_texts(prompts, max_new_tokens=16, **run["options"]))
        assert [text.text for text in now] == run["texts"]
        assert [text.exit_layers for text in now] == run["exit_layers"]
    input_ids = saved.tokenizer("".join(prompts[0]), return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = saved.model(input_ids).logits[0, -1, :32]
    torch.testing.assert_close(logits, torch.tensor(then["last_logits"]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", [*CLASSIFIERS, *GENERATORS])
def test_records_are_read(name: str) -> None:
    record = read_record(SAVED / name)
    assert record["kind"] == name.removesuffix("_later")
    assert record["environment"]["consistentee"] == "0.1.0"
    exits = name.startswith("early_exit")
    assert exits == ("policy" in record.get("thresholds", {}))
    assert "accuracy" in record["validation"]
