"""Retrofitting: the model stays what it is, exits come to agree with it, and a run that stops goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from consistentee.errors import DataError, SettingError
from consistentee.evaluation.agreement import evaluate_agreement
from consistentee.functional.bounds import binomial_interval
from consistentee.models.loaded import LoadedClassifier, load_model
from consistentee.training.cached_states import CachedStates, ExitsOnStates
from consistentee.training.states import run_all_layers
from consistentee.training.steps import OptimizerSteps
from consistentee.training.tasks import retrofit as retrofit_task
from consistentee.training.tasks.retrofit import part_texts
from consistentee.training.train import finetune, retrofit, train
from consistentee.training.train import retrofit_task as exits_task
from quick import quick_config, quick_retrofit, read_weights, stop_at, weight_bytes
from tiny import tiny_backbone, tiny_classifier, tiny_dataset, tiny_full_depth_model, tiny_tokenizer

TEXTS = tiny_dataset(400, seed=5).texts


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain Hugging Face classifier that can tell its classes: ours, said in Hugging Face's words."""
    root = tmp_path_factory.mktemp("plain")
    backbone = tiny_backbone(root / "backbone")
    config = quick_config(warmup_epochs=6.0, learning_rate=3e-3, rounds=0)
    return finetune(backbone=backbone, train_data=tiny_dataset(200), output_dir=root / "m", config=config)


@pytest.fixture(scope="module")
def retrofitted(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("retrofitted") / "m"
    return retrofit(model=plain, texts=TEXTS, output_dir=folder, config=quick_retrofit())


@torch.no_grad()
def test_full_depth_is_the_model_still(plain: Path, retrofitted: Path) -> None:
    batch = AutoTokenizer.from_pretrained(plain)(
        [text for (text,) in TEXTS[:40]], padding=True, return_tensors="pt"
    )
    expected = AutoModelForSequenceClassification.from_pretrained(plain)(**batch).logits
    model: Any = load_model(retrofitted).model
    assert torch.equal(model(**batch, criterion="confidence", threshold=1.0).logits, expected)
    before, after = read_weights(plain), read_weights(retrofitted)
    for name, weight in before.items():
        if name.startswith("backbone."):
            assert torch.equal(after[name], weight), name


@torch.no_grad()
def test_exits_come_to_agree_with_it(plain: Path, retrofitted: Path) -> None:
    texts = [text for (text,) in tiny_dataset(200, seed=9).texts]
    batch = AutoTokenizer.from_pretrained(plain)(texts, padding=True, return_tensors="pt")
    model: Any = load_model(retrofitted).model
    output = model(**batch, all_layers=True)
    answers = output.layer_logits.argmax(-1)
    agreement = (answers == answers[:, -1:]).float().mean(0)
    guess = max(answers[:, -1].float().mean(), 1 - answers[:, -1].float().mean())
    assert agreement[:-1].min() > guess + 0.1
    divergence = (output.layer_logits[:, :-1].softmax(-1) - output.logits.softmax(-1)[:, None]).abs().mean()
    assert divergence < 0.25  # its distribution, not its answers alone


@pytest.mark.parametrize(
    "kind, parse", [("Hugging Face", None), ("Hugging Face", False), ("parsing", None), ("literal", None)]
)
def test_special_tokens_in_texts_are_what_they_are_to_the_model(
    kind: str, parse: bool | None, tmp_path: Path
) -> None:
    if kind == "Hugging Face":
        original = tiny_classifier(tmp_path / "original", layers=3)
    else:
        values = {"parse_special_tokens": kind == "parsing", "text_pairs": False}
        original = tiny_full_depth_model(
            tmp_path / "original", tiny_backbone(tmp_path / "backbone"), **values
        )
        load_model(original).tokenizer.save_pretrained(original)  # as training saves it
    texts = [(f"good film {row} [SEP] bad plot",) for row in range(60)]
    config = quick_retrofit(parse_special_tokens=parse)
    folder = retrofit(model=original, texts=texts, output_dir=tmp_path / "m", config=config)
    parsed = kind != "literal" and parse is None
    saved: Any = load_model(folder)
    assert saved.model.config.parse_special_tokens is parsed
    record = json.loads((folder / "training_record.json").read_text())
    assert record["config"]["parse_special_tokens"] is parsed

    questions = [text for (text,) in texts[:4]]
    batch = AutoTokenizer.from_pretrained(original)(questions, padding=True, return_tensors="pt")
    for tokenizer in (saved.tokenizer, AutoTokenizer.from_pretrained(folder)):
        rows = tokenizer(questions, padding=True, return_tensors="pt")
        assert torch.equal(rows["input_ids"], batch["input_ids"]) == (parse is None)
        assert (rows["input_ids"][0] == tokenizer.sep_token_id).sum() == 1 + parsed
    with torch.no_grad():
        expected = AutoModelForSequenceClassification.from_pretrained(original)(**batch).logits
        logits = saved.model(**rows, criterion="confidence", threshold=1.0).logits
    assert torch.equal(logits, expected) == (parse is None)


def test_strings_are_texts(plain: Path) -> None:
    config = quick_retrofit()
    of_tuples = exits_task(plain, TEXTS, config, source="texts")
    of_strings = exits_task(plain, [text for (text,) in TEXTS], config, source="texts")
    assert of_strings.data.fingerprint() == of_tuples.data.fingerprint()


def test_a_plain_model_reads_texts_as_its_tokenizer_does(tmp_path: Path) -> None:
    folder = tiny_classifier(tmp_path)
    saved = load_model(folder, LoadedClassifier)
    assert saved.parse_special_tokens
    its_own = AutoTokenizer.from_pretrained(folder)
    assert saved.tokenizer("good [SEP] film")["input_ids"] == its_own("good [SEP] film")["input_ids"]
    its_own.split_special_tokens = its_own.init_kwargs["split_special_tokens"] = True  # what is saved
    its_own.save_pretrained(folder)
    assert not load_model(folder, LoadedClassifier).parse_special_tokens


@pytest.mark.parametrize("model_type, longest", [("modernbert", 700), ("bert", 600), ("deberta-v2", 2048)])
def test_inputs_are_as_long_as_the_model_takes(model_type: str, longest: int, tmp_path: Path) -> None:
    values = {"max_position_embeddings": longest, "position_biased_input": False}
    original = tiny_classifier(tmp_path / "original", model_type, layers=2, **values)
    tiny_tokenizer(model_type, 2048).save_pretrained(original)
    texts = [(" ".join(["film"] * 750) + f" {row}",) for row in range(42)]
    lengths = []
    for asked in (100, 650, 4096):
        task = exits_task(original, texts, quick_retrofit(max_length=asked), source="texts")
        lengths.append(int(task.data.lengths.max()))
    assert lengths == [100, min(650, longest), min(longest, 750 + 2 + 2)]
    assert load_model(original, LoadedClassifier).max_length == 512


def test_a_model_is_compared_at_the_length_of_its_exits(tmp_path: Path) -> None:
    original = tiny_classifier(tmp_path / "original", "modernbert", layers=2, max_position_embeddings=700)
    tiny_tokenizer("modernbert", 2048).save_pretrained(original)
    texts = [(" ".join([("good", "bad")[row % 2]] * 600) + f" {row}",) for row in range(42)]
    config = quick_retrofit(max_length=640)
    folder = retrofit(model=original, texts=texts, output_dir=tmp_path / "m", config=config)
    saved, reference = load_model(folder, LoadedClassifier), load_model(original, LoadedClassifier)
    assert saved.max_length == 640
    assert reference.length_beside(saved) == 640
    assert saved.length_beside(reference) == 640
    seen: list[int] = []
    reference.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    evaluation = evaluate_agreement(
        saved, texts[:4], criteria=["confidence"], threshold=1.0, reference=reference
    )
    assert evaluation.agreement == 1.0
    assert max(seen) == 602 + 1


def test_the_record_and_the_card_name_the_original(plain: Path, retrofitted: Path) -> None:
    record = json.loads((retrofitted / "training_record.json").read_text())
    assert record["method"] == "retrofit"
    assert record["original"]["name"] == str(plain)
    assert record["original"]["fingerprint"] == record["backbone_fingerprint"]
    loss = record["validation"]["loss"]  # against the model itself, which nothing can be better than
    exact = binomial_interval(loss["lost"], record["validation"]["num_examples"])
    assert (loss["won"], loss["interval"]) == (0, pytest.approx(exact))
    config = json.loads((retrofitted / "config.json").read_text())
    assert config["original"] == record["original"]
    assert config["original_head"]["model_type"] == "consistentee_full_depth"


def test_validation_decides_whether_the_policy_reads_the_state(plain: Path, tmp_path: Path) -> None:
    scores: dict[str, float] = {}
    for name, given in (
        ("default", {}),
        ("alone", {"policy_input": "log_odds"}),
        ("both", {"policy_input": "state+log_odds"}),
    ):
        config = quick_retrofit(policy_learning_rate=0.05, policy_epochs=10, **given)
        folder = retrofit(model=plain, texts=TEXTS, output_dir=tmp_path / name, config=config)
        record = json.loads((folder / "training_record.json").read_text())
        scores[name] = record["history"][-1]["score"]
    assert scores["alone"] != scores["both"]
    assert scores["default"] == max(scores["alone"], scores["both"])


def test_a_run_that_stops_goes_on_to_the_same_end(
    plain: Path, retrofitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"model": plain, "texts": TEXTS, "output_dir": tmp_path / "m"}
    config = quick_retrofit(checkpoint_every=2)
    stop_at(monkeypatch, OptimizerSteps, "_step", 7)
    with pytest.raises(KeyboardInterrupt):
        retrofit(**values, config=config)
    monkeypatch.undo()
    with pytest.raises(FileExistsError, match="holds an unfinished run"):
        retrofit(**values, config=config)
    with pytest.raises(ValueError, match="has data fingerprint"):
        retrofit(**{**values, "texts": TEXTS[:-1]}, config=config, resume=True)
    assert weight_bytes(retrofit(**values, config=config, resume=True)) == weight_bytes(retrofitted)


def test_every_step_has_dropout_and_a_run_goes_on_from_the_end_of_a_chunk(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step behind it loads the next chunk in its middle, that of a resumed run finds it loaded."""
    config = quick_retrofit(head_dropout=0.1, checkpoint_every=1)
    task = exits_task(plain, TEXTS, config, source="texts")
    batches = task.prepare(plain, None, exits=True).train_rows.batches
    ends = np.cumsum([batches._passes * len(part) for part in batches._batches])
    assert len(ends) > 2
    values = {"model": plain, "texts": TEXTS, "config": config}
    modes, forward = list[bool](), ExitsOnStates.forward

    def followed(self: ExitsOnStates, **inputs: Any) -> Any:
        modes.append(self.classifiers.layers[0].training)
        return forward(self, **inputs)

    monkeypatch.setattr(ExitsOnStates, "forward", followed)
    whole = retrofit(**values, output_dir=tmp_path / "whole")
    assert modes == [True] * int(ends[-1])
    monkeypatch.undo()
    stop_at(monkeypatch, OptimizerSteps, "_step", int(ends[0]) + 1)
    with pytest.raises(KeyboardInterrupt):
        retrofit(**values, output_dir=tmp_path / "cut")
    monkeypatch.undo()
    said: list[str] = []
    cut = retrofit(**values, output_dir=tmp_path / "cut", resume=True, report=said.append)
    assert f"Resumed at step {ends[0]} of {ends[-1]}." in said
    assert weight_bytes(cut) == weight_bytes(whole)


def test_a_file_is_as_good_as_memory_for_all_texts(
    plain: Path, retrofitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_memory = retrofit(
        model=plain, texts=TEXTS, output_dir=tmp_path / "memory", config=quick_retrofit(max_cache_mb=100.0)
    )
    values = {"model": plain, "texts": TEXTS, "output_dir": tmp_path / "file"}
    config = quick_retrofit(max_disk_mb=100.0, checkpoint_every=2)
    stop_at(monkeypatch, OptimizerSteps, "_step", 7)
    with pytest.raises(KeyboardInterrupt):
        retrofit(**values, config=config)
    monkeypatch.undo()
    assert weight_bytes(retrofit(**values, config=config, resume=True)) == weight_bytes(in_memory)
    assert weight_bytes(in_memory) != weight_bytes(retrofitted)  # of some texts at a time


def test_the_policys_states_do_not_lie_beside_those_of_the_exits(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, held = list[CachedStates](), list[int | None]()

    class Followed(CachedStates):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    def run(*args: Any, **kwargs: Any) -> Any:
        held.extend(rows._loaded for rows in made)
        return run_all_layers(*args, **kwargs)

    monkeypatch.setattr(retrofit_task, "CachedStates", Followed)
    monkeypatch.setattr(retrofit_task, "run_all_layers", run)
    retrofit(model=plain, texts=TEXTS[:100], output_dir=tmp_path / "m", config=quick_retrofit())
    assert held
    assert not any(number is not None for number in held)


def test_no_text_is_for_two_things() -> None:
    parts = part_texts(1000, policy_texts=200, calibration_texts=70, report_texts=5000, seed=0)
    together = [*parts.exits, *parts.policy, *parts.calibration, *parts.report]
    assert sorted(together) == list(range(1000))
    assert [len(part) for part in (parts.policy, parts.calibration, parts.report)] == [200, 70, 100]
    other = part_texts(1000, policy_texts=200, calibration_texts=70, report_texts=5000, seed=1)
    assert set(other.report) != set(parts.report)


def test_few_texts_are_learnt_more_often(plain: Path, tmp_path: Path) -> None:
    said: list[str] = []
    config = quick_retrofit(exit_min_steps=50, max_cache_mb=256.0)
    retrofit(model=plain, texts=TEXTS, output_dir=tmp_path / "m", config=config, report=said.append)
    assert ", 54 steps, " in said[0]  # 187 texts in batches of 32: 6 a pass, 9 passes in place of 2


@pytest.mark.parametrize(
    "changes, got",
    [({"warmup_epochs": 2.0}, "2 and 0"), ({"rounds": 1, "consistent_epochs": 0.5}, "1 and 1")],
)
def test_there_is_one_epoch(changes: dict[str, Any], got: str) -> None:
    with pytest.raises(
        ValueError, match=rf"warmup_epochs must be at most 1 .*, got {got}\. Give more passes\."
    ):
        quick_retrofit(**changes)
    assert quick_retrofit(warmup_epochs=0.5, rounds=1).rounds == 1  # of no epochs


def test_forgetting_events_have_no_warm_up_to_be_counted_in() -> None:
    with pytest.raises(ValueError, match=r"hardness must be one of .*got \"forgetting_events\""):
        quick_retrofit(hardness="forgetting_events")
    assert quick_retrofit(hardness="el2n").hardness == "el2n"


def test_what_cannot_be_retrofitted_says_so(plain: Path, retrofitted: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must be at least 40, got 39"):
        retrofit(model=plain, texts=TEXTS[:39], output_dir=tmp_path / "few")
    with pytest.raises(ValueError, match="has exits already"):
        retrofit(model=retrofitted, texts=TEXTS, output_dir=tmp_path / "twice", config=quick_retrofit())
    reranker = tiny_classifier(tmp_path / "reranker", num_labels=1)
    with pytest.raises(ValueError, match="or a reranker such as a CrossEncoder"):
        retrofit(model=reranker, texts=TEXTS, output_dir=tmp_path / "reranked")
    shallow = tiny_classifier(tmp_path / "shallow", layers=1)
    with pytest.raises(SettingError, match="Layers of a model with exits must be at least 2, got 1"):
        retrofit(model=shallow, texts=TEXTS, output_dir=tmp_path / "shallow exits", config=quick_retrofit())
    with pytest.raises(ValueError, match=r'method must be one of consistent, .*, got "retrofit"'):
        train(backbone=plain, train_data=tiny_dataset(50), output_dir=tmp_path / "t", method="retrofit")
    with pytest.raises(ValueError, match="takes single texts, and each row of texts is a pair"):
        retrofit(model=plain, texts=[("a", "b")] * 2, output_dir=tmp_path / "pairs")
