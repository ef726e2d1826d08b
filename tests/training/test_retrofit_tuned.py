"""Retrofitting with a tuned backbone: what is trained, whose answers it learns, and what its figures are about."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from consistentee.config import RetrofitConfig
from consistentee.evaluation.retrofit import report_retrofit
from consistentee.functional.exits import choose_exit_layer
from consistentee.models.configuration import EarlyExitConfig
from consistentee.models.loaded import LoadedClassifier, load_model
from consistentee.training import adapters
from consistentee.training.policy_phase import run_policy_phase
from consistentee.training.run import Run
from consistentee.training.steps import OptimizerSteps
from consistentee.training.tasks.retrofit import RetrofitTraining
from consistentee.training.train import finetune, retrofit, retrofit_task, start_retrofit
from quick import quick_config, quick_retrofit, read_weights, stop_at, weight_bytes
from tiny import tiny_backbone, tiny_dataset

TEXTS = tiny_dataset(400, seed=5).texts
HOW = ("lora", "full")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("plain")
    backbone = tiny_backbone(root / "backbone", attention_probs_dropout_prob=0.1)
    config = quick_config(warmup_epochs=6.0, learning_rate=3e-3, rounds=0)
    return finetune(backbone=backbone, train_data=tiny_dataset(200), output_dir=root / "m", config=config)


def tuning(how: str, **changes: Any) -> RetrofitConfig:
    values = {"tune_backbone": how, "learning_rate": 2e-3, "lora_rank": 2, "lora_dropout": 0.1, **changes}
    return quick_retrofit(**values)


@pytest.fixture(scope="module", params=HOW)
def tuned(request: pytest.FixtureRequest, plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuned") / request.param
    return retrofit(model=plain, texts=TEXTS, output_dir=folder, config=tuning(request.param))


@torch.no_grad()
def answers(folder: Path, texts: list[tuple[str, ...]]) -> Tensor:
    """Logits of a Hugging Face classifier, one text at a time: (rows, classes)."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    return torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for (text,) in texts])


@torch.no_grad()
def run_all(model: Any, batch: Any) -> Any:
    """What all layers give for a batch."""
    return model(**batch, all_layers=True)


def texts_of(task: RetrofitTraining, part: str) -> list[tuple[str, ...]]:
    return [task.data.text(int(row)) for row in getattr(task.parts, part)]


def test_what_is_trained(plain: Path, tuned: Path) -> None:
    before, after = read_weights(plain), read_weights(tuned)
    changes = {name: after[name] - value for name, value in before.items() if name.startswith("backbone.")}
    head = {name: value for name, value in before.items() if name.startswith("classifiers.")}
    head_changed = [
        not torch.equal(
            after[name.replace("classifiers.", "classifiers.layers.2.parts.classifiers.", 1)], value
        )
        for name, value in head.items()
    ]
    assert {name for name in after if name.startswith("backbone.")} == changes.keys()  # adapters are merged
    if tuned.name == "full":
        unseen = ("position_embeddings", "token_type_embeddings", "word_embeddings", "key.bias")
        assert not [name for name, change in changes.items() if not change.any() and unseen[3] not in name]
        assert all(head_changed)
        return
    linear = {
        name for name in changes if "encoder" in name and name.endswith("weight") and "Norm" not in name
    }
    assert not [name for name in changes.keys() - linear if changes[name].any()]
    assert not any(head_changed)
    for name in linear:  # a product of two matrices of rank 2
        values = torch.linalg.svdvals(changes[name])
        assert values[1] > 0
        assert values[2] < 1e-4 * values[0]


def test_every_layer_comes_to_agree_with_the_original(plain: Path, tuned: Path) -> None:
    texts = tiny_dataset(200, seed=9).texts
    wanted = answers(plain, texts).argmax(-1)
    batch = AutoTokenizer.from_pretrained(plain)(
        [text for (text,) in texts], padding=True, return_tensors="pt"
    )
    output = run_all(load_model(tuned).model, batch)
    agreement = (output.layer_logits.argmax(-1) == wanted[:, None]).float().mean(0)
    assert agreement[:-1].min() > 0.75
    assert agreement[-1] > 0.9


def started(plain: Path, folder: Path, **changes: Any) -> tuple[RetrofitTraining, Run]:
    task = retrofit_task(plain, TEXTS, tuning("full", **changes), source="texts")
    run = start_retrofit(task, folder, report=lambda line: None)
    assert run is not None
    return task, run


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_what_is_learnt_is_what_the_original_says(plain: Path, tmp_path: Path, precision: str) -> None:
    task, run = started(plain, tmp_path / "m", mixed_precision=precision)
    expected = answers(plain, texts_of(task, "exits"))
    given = torch.stack([run.parts.train_rows[row]["labels"] for row in range(len(expected))])
    torch.testing.assert_close(
        given, expected, rtol=0, atol=1e-5
    )  # in full precision, whatever the training's is
    assert run.steps.total_steps == 2 * -(-len(expected) // task.config.batch_size)
    run.take_steps(2, task.weighted_sum(), phase="exits")
    again = torch.stack([run.parts.train_rows[row]["labels"] for row in range(len(expected))])
    assert torch.equal(again, given)


def test_a_step_is_on_the_divergence_of_all_layers_from_it(plain: Path, tmp_path: Path) -> None:
    task, run = started(plain, tmp_path / "m")
    rows = [3, 1, 4]
    batch = run.parts.collate([run.parts.train_rows[row] for row in rows])
    del batch["index"]
    labels = batch.pop("labels")
    model = run.model.eval()
    losses, _ = task.weighted_sum()(cast(Any, partial(model, all_layers=True)), batch, labels)
    wanted = answers(plain, [texts_of(task, "exits")[row] for row in rows]).softmax(-1)
    logits = model(**batch, all_layers=True).classifier_logits
    expected = torch.zeros(3)
    for layer in range(3):
        divergence = (wanted * (wanted.log() - logits[:, layer].log_softmax(-1))).sum(-1)
        expected += (layer + 1) / 6 * divergence
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-6)
    # The last layer is still the original, so that its divergence is zero.
    torch.testing.assert_close(logits[:, -1].softmax(-1), wanted, rtol=1e-4, atol=1e-6)


def test_the_policy_errs_where_an_exit_is_not_the_original(plain: Path, tmp_path: Path) -> None:
    task, run = started(plain, tmp_path / "m", learning_rate=0.05)  # which spoils the last layer
    run.take_steps(3, task.weighted_sum(), phase="exits")
    data = task.policy_data(run, "policy")
    texts = texts_of(task, "policy")
    wanted = answers(plain, texts).argmax(-1)
    assert torch.equal(data.states.labels, wanted)
    batch = task.original.tokenizer([text for (text,) in texts], padding=True, return_tensors="pt")
    agrees = run_all(run.model.eval(), batch).layer_logits.argmax(-1) == wanted[:, None]
    assert torch.equal(data.learnt.correct, agrees)
    assert not agrees[:, -1].all()
    lost = 1 - float(agrees[:, -1].double().mean())
    assert data.max_loss == pytest.approx(max(0.0, 0.01 - lost))
    # Thresholds are held to the original: what full depth has lost already is no longer theirs to lose.
    generous = task.config.__class__(**{**task.config.to_dict(), "max_accuracy_loss": lost + 0.1})
    task.config = run.config = generous
    phase = run_policy_phase(run, "policy")
    assert phase.data.max_loss == pytest.approx(0.1)
    for point in phase.choice.at_thresholds.values():
        assert point.accuracy >= 1 - generous.max_accuracy_loss - 1e-6


def test_the_report_counts_agreement_with_the_original(plain: Path, tuned: Path, tmp_path: Path) -> None:
    task = retrofit_task(plain, TEXTS, tuning("full"), source="texts")
    # Another model in the original's place, so that full depth disagrees with it.
    other = finetune(
        backbone=tiny_backbone(tmp_path / "backbone", seed=1),
        train_data=tiny_dataset(60, seed=3),
        output_dir=tmp_path / "other",
        config=quick_config(warmup_epochs=3.0, learning_rate=3e-3, rounds=0),
    )
    calibration, reported = task.held_rows()
    saved = load_model(tuned, LoadedClassifier)
    truth = {text: row % 2 for row, text in enumerate(texts_of(task, "report"))}

    def report(max_disagreement: float) -> Any:
        return report_retrofit(
            saved,
            calibration=calibration,
            reported=reported,
            num_train_texts=1,
            num_policy_texts=1,
            max_disagreement=max_disagreement,
            confidence=0.5,
            original=load_model(other, LoadedClassifier),
            labels=truth,
            speed_seconds=None,
        )

    found = report(0.6)
    texts = texts_of(task, "report")
    logits = answers(other, texts)
    batch = saved.tokenizer([text for (text,) in texts], padding=True, return_tensors="pt")
    output = run_all(saved.model, batch)
    predictions = output.layer_logits.argmax(-1)
    exits = choose_exit_layer(output.exit_probs, found.evaluation.threshold)
    at_exit = predictions[torch.arange(len(texts)), exits - 1]
    agreeing = int((at_exit == logits.argmax(-1)).sum())
    full = int((predictions[:, -1] == logits.argmax(-1)).sum())
    assert full < len(texts)
    assert found.evaluation.agreement == pytest.approx(agreeing / len(texts))
    assert found.full_depth_agreement == pytest.approx(full / len(texts))
    assert found.evaluation.curve[-1].agreement == pytest.approx(full / len(texts))
    assert found.evaluation.agreement_with == str(other)
    low, high = found.agreement_interval
    assert low < agreeing / len(texts) < high
    assert len(found.disagreements) == min(20, len(texts) - agreeing)
    for one in found.disagreements:
        row = texts.index(one.texts)
        assert one.label == saved.label_names[int(logits[row].argmax())]
        assert one.score == pytest.approx(float(logits[row].softmax(-1).max()), abs=1e-5)
        assert one.exit_label == saved.label_names[int(at_exit[row])]
    labels = torch.arange(len(texts)) % 2
    assert found.original_accuracy == pytest.approx(float((logits.argmax(-1) == labels).double().mean()))
    assert found.full_depth_accuracy == pytest.approx(float((predictions[:, -1] == labels).double().mean()))
    # What is certified is counted likewise, on the other rows.
    assert found.calibration.certified
    assert found.calibration.reference == str(other)
    texts = texts_of(task, "calibration")
    batch = saved.tokenizer([text for (text,) in texts], padding=True, return_tensors="pt")
    output, wanted = run_all(saved.model, batch), answers(other, texts).argmax(-1)
    exits = choose_exit_layer(output.exit_probs, found.calibration.threshold)
    at_exit = output.layer_logits.argmax(-1)[torch.arange(len(texts)), exits - 1]
    assert found.calibration.losses == int((at_exit != wanted).sum())
    lost = int((output.layer_logits[:, -1].argmax(-1) != wanted).sum())
    assert found.calibration.full_depth_losses == lost
    assert report(lost / len(texts) / 4).calibration.threshold is None  # not even full depth


def test_a_run_that_stops_goes_on_to_the_same_end(
    plain: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tuning(tuned.name, checkpoint_every=2)
    values: dict[str, Any] = {"model": plain, "texts": TEXTS, "output_dir": tmp_path / "m", "config": config}
    stop_at(monkeypatch, OptimizerSteps, "_step", 8)
    with pytest.raises(KeyboardInterrupt):
        retrofit(**values)
    monkeypatch.undo()
    said: list[str] = []
    assert weight_bytes(retrofit(**values, resume=True, report=said.append)) == weight_bytes(tuned)
    assert "Resumed at step 6 of 12." in said


def test_the_folder_says_that_it_was_tuned(plain: Path, tuned: Path, tmp_path: Path) -> None:
    record = json.loads((tuned / "training_record.json").read_text())
    config = json.loads((tuned / "config.json").read_text())
    assert config["original"] == record["original"]
    assert config["original"]["tuned"] == tuned.name
    assert config["original"]["name"] == str(plain)
    assert record["config"]["passes"] == 2
    assert f"--tune-backbone {tuned.name}" in (tuned / "README.md").read_text()
    assert "Tuned from `m`" in (tuned / "README.md").read_text()
    # The original may change or go: the folder is a model of its own.
    changed = shutil.copytree(tuned, tmp_path / "changed")
    path = changed / "config.json"
    path.write_text(path.read_text().replace(str(plain), str(tmp_path / "nowhere")))
    save_file(read_weights(changed), changed / "model.safetensors", {"format": "pt"})
    assert load_model(changed).has_exits


def test_exits_alone_are_refused() -> None:
    with pytest.raises(ValueError, match="exits_only must be false for tune_backbone lora, got true"):
        RetrofitConfig(tune_backbone="lora", exits_only=True)
    head: dict[str, Any] = {"original_head": {"model_type": "bert"}, "original": {"tuned": "full"}}
    with pytest.raises(ValueError, match="exits_only must be False for exits of a backbone that was tuned"):
        EarlyExitConfig(exits_only=True, **head)
    with pytest.raises(ValueError, match="tune_backbone must be one of none, lora, full"):
        RetrofitConfig.from_dict({"tune_backbone": "some"})


def test_how_often_texts_are_learnt_by_default() -> None:
    assert (RetrofitConfig().passes, RetrofitConfig(tune_backbone="lora").passes) == (5, 2)
    assert RetrofitConfig(tune_backbone="full", passes=1).passes == 1


def test_missing_peft_is_named_before_anything_is_run(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(extra: str, module: str) -> None:
        raise ImportError(f"{module} of {extra}")

    monkeypatch.setattr(adapters, "require_extra", missing)
    with pytest.raises(ImportError, match="peft of lora"):
        retrofit(model=plain, texts=TEXTS, output_dir=tmp_path / "m", config=tuning("lora"))
    assert not (tmp_path / "m").exists()
