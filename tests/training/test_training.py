"""Training end to end on tiny models: what it learns, what it leaves, and that every setting does something."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from consistentee.config import ClassificationTrainingConfig
from consistentee.data.rows import TextDataset
from consistentee.data.sketches import seen_rows
from consistentee.errors import MissingExtraError
from consistentee.functional.criteria import CRITERIA
from consistentee.functional.curves import effect_error, loss_error, trade_off_curve
from consistentee.heads.policy import PolicyNetwork
from consistentee.models import record as saved
from consistentee.models.loaded import LoadedClassifier, load_model
from consistentee.models.sequence_classification import (
    EarlyExitForSequenceClassification,
    FullDepthForSequenceClassification,
)
from consistentee.training import checkpoints, policy_phase
from consistentee.training.methods import METHODS, consistent
from consistentee.training.policy_choice import PolicyChoice, choose_policy
from consistentee.training.run import Run
from consistentee.training.states import LayerStates
from consistentee.training.steps import OptimizerSteps
from consistentee.training.tasks import classification as task_module
from consistentee.training.tasks.classification import FITTED, ClassificationTraining, row_instances
from consistentee.training.train import finetune, start_run, train
from quick import largest_difference, quick_config, read_record, read_weights, stop_at, weight_bytes
from tiny import LABEL_NAMES, POSITIVE, tiny_backbone, tiny_dataset

FINISHED = {
    "README.md",
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "training_record.json",
}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_backbone(tmp_path_factory.mktemp("backbone"), layers=2)


@pytest.fixture(scope="module")
def data() -> TextDataset:
    return tiny_dataset(50)


@pytest.fixture
def quick_train(backbone: Path, data: TextDataset, tmp_path: Path) -> Callable[..., Path]:
    """Train for a few steps with these settings into a folder of its own."""
    count = 0

    def run(
        report: Callable[[str], None] = lambda message: None, method: str = "consistent", **changes: Any
    ) -> Path:
        nonlocal count
        count += 1
        folder = tmp_path / f"run-{count}"
        return train(
            backbone=backbone,
            train_data=data,
            output_dir=folder,
            config=quick_config(**changes),
            method=method,
            report=report,
        )

    return run


def test_a_folder_of_the_users(
    backbone: Path, data: TextDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)

    def again(**how: Any) -> Path:
        return train(
            backbone=backbone,
            train_data=data,
            output_dir="~/model",
            warm_up_dir="~/shared",
            config=quick_config(rounds=0),
            report=lambda message: None,
            **how,
        )

    assert again() == again(resume=True) == tmp_path / "home" / "model"
    assert load_model("~/model", LoadedClassifier) is not None
    assert {path.name for path in (tmp_path / "home").iterdir()} == {"model", "shared"}
    assert not any(here.iterdir())


def run_for(backbone: Path, data: TextDataset, folder: Path, **changes: Any) -> Run:
    """A run that has not taken a step."""
    run = start_run(
        ClassificationTraining(quick_config(**changes), data),
        "consistent",
        backbone=backbone,
        output_dir=folder,
        task_name=None,
        resume=False,
        report=lambda message: None,
    )
    assert run is not None
    return run


# What a training leaves.


@pytest.fixture(scope="module")
def learned(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A model that had time to learn, and what the run said."""
    said: list[str] = []
    folder = train(
        backbone=backbone,
        train_data=tiny_dataset(240),
        output_dir=tmp_path_factory.mktemp("learned") / "model",
        config=quick_config(
            warmup_epochs=5,
            head_learning_rate=5e-3,
            validation_fraction=0.2,
            policy_epochs=5,
            reward_loss="error",
        ),
        task="tiny",
        report=said.append,
    )
    return folder, said


def test_training_learns_and_the_folder_predicts(learned: tuple[Path, list[str]]) -> None:
    folder, said = learned
    fresh = tiny_dataset(100, seed=1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert isinstance(model, EarlyExitForSequenceClassification)
    inputs = tokenizer([text for (text,) in fresh.texts], padding=True, return_tensors="pt")
    with torch.no_grad():
        output = model(**inputs)
    right = (output.logits.argmax(-1) == torch.tensor(fresh.labels)).float().mean()
    assert right > 0.8  # the classes are balanced
    assert not any("No better than a guess" in line for line in said)


def test_training_leaves_a_complete_folder(learned: tuple[Path, list[str]]) -> None:
    folder, said = learned
    assert {path.name for path in folder.iterdir()} == FINISHED
    model = EarlyExitForSequenceClassification.from_pretrained(folder)
    record = saved.read_record(folder)
    assert model.config.threshold == record["thresholds"]["policy"] != 0.5
    assert tuple(model.config.id2label.values()) == LABEL_NAMES
    assert (model.config.task, model.config.max_length) == ("tiny", 128)
    assert all(tensor.dtype == torch.float32 for tensor in read_weights(folder).values())
    assert said[-1] == f"Saved to {folder}"


def test_the_record_tells_the_whole_run(learned: tuple[Path, list[str]]) -> None:
    folder, said = learned
    record = saved.read_record(folder)
    assert record["kind"] == "early_exit"
    assert ClassificationTrainingConfig.from_dict(record["config"]).warmup_epochs == 5
    assert record["data"]["train_rows"] == 192
    assert record["data"]["validation_rows"] == 48
    assert record["environment"]["processes"] == 1
    assert len(record["warmup"]["per_layer_accuracy"]) == 2
    assert sum(record["warmup"]["memorized_layer_histogram"]) == 48
    assert [entry["round"] for entry in record["history"]] == [0, 1]
    assert [entry["step"] for entry in record["history"]] == [60, 72]  # the schedule ends with the run
    assert "72 steps" in said[0]
    assert list(record["thresholds"]) == list(CRITERIA)
    assert record["validation"]["num_examples"] == 48
    assert record["validation"]["accuracy"] > 0.8
    assert record["validation"]["layer_speedup"] == pytest.approx(2 / record["validation"]["mean_exit_layer"])
    loss = record["validation"]["loss"]
    lost = record["validation"]["full_depth_accuracy"] - record["validation"]["accuracy"]
    assert loss["loss"] == pytest.approx((loss["lost"] - loss["won"]) / 48) == pytest.approx(lost, abs=1e-6)
    low, high = loss["interval"]
    assert low < loss["loss"] < high
    (line,) = (line for line in said if "points (95 % interval" in line)
    assert line.startswith("On 48 validation rows the loss of policy against the last layer is ")
    seen, told = seen_rows(record["data"]["text_sketch"], tiny_dataset(240).texts)
    assert seen == told > 0


def test_finetuning_learns_and_leaves_a_complete_folder(backbone: Path, tmp_path: Path) -> None:
    said: list[str] = []
    folder = finetune(
        backbone=backbone,
        train_data=tiny_dataset(240),
        output_dir=tmp_path / "plain",
        config=quick_config(warmup_epochs=3, head_learning_rate=5e-3, validation_fraction=0.2),
        report=said.append,
    )
    assert {path.name for path in folder.iterdir()} == FINISHED
    assert "48 steps" in said[0]  # as many as `train` with the same settings
    record = saved.read_record(folder)
    assert record["kind"] == "full_depth"
    accuracies = [entry["accuracy"] for entry in record["history"]]
    assert len(accuracies) == 4
    assert record["validation"]["accuracy"] == max(accuracies)  # the best epoch is kept
    fresh = tiny_dataset(100, seed=1)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert isinstance(model, FullDepthForSequenceClassification)
    inputs = AutoTokenizer.from_pretrained(folder)(
        [text for (text,) in fresh.texts], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        right = (model(**inputs).logits.argmax(-1) == torch.tensor(fresh.labels)).float().mean()
    assert right > 0.8


def test_pairs_and_three_classes(backbone: Path, tmp_path: Path) -> None:
    single = tiny_dataset(60)
    pairs = TextDataset(
        [(text, "it was good") for (text,) in single.texts],
        [row % 3 for row in range(60)],
        ("a", "b", "c"),
        "pairs",
    )
    folder = train(backbone=backbone, train_data=pairs, output_dir=tmp_path / "m", config=quick_config())
    assert AutoModelForSequenceClassification.from_pretrained(folder).config.id2label == {
        0: "a",
        1: "b",
        2: "c",
    }


def test_a_rare_class_is_named_and_its_recall_recorded(backbone: Path, tmp_path: Path) -> None:
    common = tiny_dataset(194).texts
    data = TextDataset([*common, *[("warm",)] * 6], [0] * 194 + [1] * 6, ("common", "rare"), "97 to 3")
    said: list[str] = []
    folder = train(
        backbone=backbone,
        train_data=data,
        output_dir=tmp_path / "m",
        config=quick_config(),
        report=said.append,
    )
    (line,) = [line for line in said if "rare among" in line]
    assert line.startswith('Warning, on validation rows: rare among 100 rows: "rare" (3).')
    assert "--threshold-metric macro_f1" in line
    validation = read_record(folder)["validation"]
    classes = validation["class_recall"]
    assert [(found["label"], found["num_examples"]) for found in classes] == [("common", 97), ("rare", 3)]
    right = sum(found["num_examples"] * found["recall"] for found in classes)
    assert right / 100 == pytest.approx(validation["accuracy"])
    right = sum(found["num_examples"] * found["full_depth_recall"] for found in classes)
    assert right / 100 == pytest.approx(validation["full_depth_accuracy"])


def test_a_metric_for_two_classes_is_refused_for_three_before_the_work(
    backbone: Path, tmp_path: Path
) -> None:
    data = TextDataset([("good",)] * 9, [0, 1, 2] * 3, ("a", "b", "c"), "three")
    with pytest.raises(ValueError, match=r"threshold_metric f1 needs a task with two classes, got 3\."):
        train(
            backbone=backbone,
            train_data=data,
            output_dir=tmp_path / "m",
            config=quick_config(threshold_metric="f1"),
        )
    assert not (tmp_path / "m").exists()


def test_another_metric_of_thresholds_has_errors_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A margin in standard errors is one in those of the metric: a rare class's rows weigh more than one in all."""
    labels = (torch.arange(100) < 10).long()
    logits = torch.zeros(100, 2, 2)
    logits[:, 0, 0] = 1.0  # the first layer never says the rare class
    logits[torch.arange(100), 1, labels] = 1.0
    states = LayerStates(logits, logits, torch.zeros(100, 2), labels)
    found: dict[str, Any] = {}
    for metric in ("accuracy", "macro_f1"):
        task = ClassificationTraining(quick_config(threshold_metric=metric), tiny_dataset(50))
        monkeypatch.setattr(task, "_learnt", lambda run, description: (None, states))
        found[metric] = task.policy_data(cast(Any, None), "")
    assert (found["accuracy"].quality, found["accuracy"].effects) == (None, None)
    exit_layer = torch.ones(100, dtype=torch.int64)
    assert found["macro_f1"].quality(exit_layer) == pytest.approx(180 / 190 / 2)
    effects = found["macro_f1"].effects(exit_layer)
    one_found = (180 / 189 + 2 / 11) / 2
    assert effects.tolist() == pytest.approx([180 / 190 / 2 - one_found] * 10)
    assert effect_error(effects) > 9 * loss_error(10, 100)
    assert len(found["macro_f1"].effects(2 * exit_layer)) == 0


def test_accuracies_of_layers_are_those_of_the_curve() -> None:
    """In float32 full depth's would be a little off the curve's, and a loss of nothing one of -0.00 points."""
    correct = torch.arange(48)[:, None].expand(-1, 2) < torch.tensor([25, 28])
    data = SimpleNamespace(judged_instances=SimpleNamespace(correct=correct))
    phase = policy_phase.PolicyPhase(cast(Any, None), cast(Any, data), complete=True)
    assert phase.per_layer_accuracy == [25 / 48, 28 / 48]
    (*_, last) = trade_off_curve(torch.zeros(48, 2), correct)
    assert last.accuracy == phase.per_layer_accuracy[-1]


def test_what_may_be_lost_is_told_with_its_metric(quick_train: Callable[..., Path]) -> None:
    said: list[str] = []
    quick_train(said.append, threshold_metric="macro_f1")
    text = "\n".join(said)
    assert "at most 0.5 points of macro_f1 below the last layer:" in text
    assert "policy, fewer layers by the loss of macro_f1 that is allowed: 0 points" in text
    assert " points of accuracy (95 % interval" in text


@pytest.mark.parametrize("consistent_epochs", [0.0, 0.4, 0.6])
def test_the_planned_steps_are_the_steps_taken(
    quick_train: Callable[..., Path], consistent_epochs: float
) -> None:
    said: list[str] = []
    folder = quick_train(
        said.append, rounds=3, patience=9, warmup_epochs=0.6, consistent_epochs=consistent_epochs
    )
    steps = read_record(folder)["history"][-1]["step"]  # an epoch has 2
    assert f", {steps} steps," in said[0]
    assert steps == 1 + (3 if consistent_epochs else 0)


def test_too_few_rows_for_validation(backbone: Path, tmp_path: Path) -> None:
    data = TextDataset([("good",), ("fine",), ("bad",)], [1, 1, 0], LABEL_NAMES, "three")
    config = quick_config(validation_fraction=0.2)
    with pytest.raises(
        ValueError, match=r"validation rows must be at least 2, got 1 of 3 rows\. Give more rows"
    ):
        train(backbone=backbone, train_data=data, output_dir=tmp_path / "m", config=config)


# What each phase trains.


def parts_of(model: torch.nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return {
        part: {name: tensor for name, tensor in state.items() if name.startswith(f"{part}.")}
        for part in ("backbone", "classifiers", "policy")
    }


def test_each_phase_changes_only_what_it_trains(
    quick_train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    changed: list[tuple[str, set[str]]] = []

    def watched(name_of: Callable[..., str], original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            model = args[0].model  # of the run or of its steps
            before = parts_of(model)
            result = original(*args, **kwargs)
            after = parts_of(model)
            moved = {
                part
                for part in before
                if any(not before[part][k].equal(after[part][k]) for k in before[part])
            }
            changed.append((name_of(*args, **kwargs), moved))
            return result

        return call

    steps = watched(lambda *_, phase, **__: phase, OptimizerSteps.run)
    fits = watched(lambda _, description, **__: description, policy_phase.run_policy_phase)
    monkeypatch.setattr(OptimizerSteps, "run", steps)
    monkeypatch.setattr(consistent, "run_policy_phase", fits)
    quick_train()
    assert changed == [
        ("warm-up", {"backbone", "classifiers"}),
        ("round 0 policy", {"policy"}),
        ("round 1 consistent", {"backbone", "classifiers"}),
        ("round 1 policy", {"policy"}),
    ]  # it is the policy that is saved, as all inputs and prices were tried on the kept round's weights


@pytest.mark.parametrize("phase", ["warm-up", "consistent"])
def test_the_gradient_reaches_backbone_and_every_classifier_but_no_policy(backbone: Path, phase: str) -> None:
    model = EarlyExitForSequenceClassification.from_backbone(backbone, num_labels=2).train()
    labels = torch.tensor([0, 1, 1])
    task = ClassificationTraining(quick_config(weighted_sum_share=0.0), tiny_dataset(50))
    objective = task.weighted_sum() if phase == "warm-up" else task.consistent()
    losses, _ = objective(model, {"input_ids": torch.randint(4, 60, (3, 7))}, labels)
    losses.mean().backward()
    assert all(parameter.grad is None for parameter in model.policy.parameters())
    for name, parameter in model.named_parameters():
        if not name.startswith("policy."):
            assert parameter.grad is not None, name
            if not name.endswith("key.bias"):  # softmax does not see it
                assert parameter.grad.abs().max() > 0, name


# Every setting does something. Where a setting needs another to matter, that one is in `base`.

EFFECTS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"head": "shared_pooler"}, {}),
    ({"pooling": "cls"}, {"head": "shared_pooler", "pooling": "mean"}),
    ({"num_queries": 2}, {}),
    ({"classifier_hidden_size": 5}, {}),
    ({"head_dropout": 0.5}, {}),
    ({"ensemble_decay": 0.0}, {}),
    ({"policy_input": "state"}, {}),
    ({"policy_input": "log_odds"}, {}),
    ({"policy_input": "auto"}, {"policy_input": "state"}),
    ({"policy_hidden_size": 8}, {}),
    ({"policy_dropout": 0.0}, {}),
    ({"initial_exit_bias": 2.0}, {}),
    ({"max_length": 4}, {}),
    ({"validation_fraction": 0.4}, {}),
    ({"policy_data": "seen"}, {}),
    ({"batch_size": 8}, {}),
    ({"learning_rate": 1e-4}, {}),
    ({"consistent_learning_rate": 1e-4}, {}),
    ({"head_learning_rate": 1e-4}, {}),
    ({"weight_decay": 0.5}, {}),
    ({"schedule": "constant"}, {}),
    ({"warmup_ratio": 0.8}, {}),
    ({"max_grad_norm": 1e-6}, {}),
    ({"group_by_length": False}, {}),
    ({"warmup_epochs": 2.0}, {}),
    ({"rounds": 2}, {}),
    ({"consistent_epochs": 2.0}, {}),
    ({"weighted_sum_share": 1.0}, {}),
    ({"exit_gradient_scale": 0.3}, {}),
    ({"hardness": "forgetting_events"}, {}),
    ({"seed": 1}, {}),
]
POLICY_EFFECTS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"estimator": "sampled"}, {}),
    ({"num_rollouts": 2}, {"estimator": "sampled"}),
    ({"reward": "uniform"}, {}),
    ({"reward_loss": "error"}, {}),
    *(({"hardness": name}, {}) for name in ("final_loss", "entropy", "el2n", "uniform")),
    ({"layer_costs": (0.5,)}, {}),
    ({"layer_costs": (0.02, 0.5)}, {}),
    ({"layer_cost_mode": "each"}, {"layer_costs": (0.02, 0.5)}),
    ({"policy_epochs": 3}, {}),
    ({"policy_min_steps": 50}, {}),
    ({"policy_batch_size": 8}, {}),
    ({"policy_learning_rate": 1e-4}, {}),
    ({"policy_weight_decay": 0.5}, {}),
    ({"entropy_bonus": 1.0}, {}),
    ({"layer_cost_warmup": 0.0}, {}),
    ({"policy_folds": 3}, {}),
    ({"max_accuracy_loss": 0.5}, {}),
    ({"threshold_margin": 3.0}, {"max_accuracy_loss": 0.5}),
]
TESTED_ELSEWHERE = {
    "gradient_accumulation_steps",
    "mixed_precision",
    "patience",
    "threshold_metric",
    "passes",  # in test_unlabelled, as the next: they need texts without labels
    "exit_min_steps",
    "policy_texts",
    "max_disk_mb",
    "parse_special_tokens",  # in test_literal: it needs texts that spell them
    "num_layers",  # in test_rival_methods
    "checkpoint_every",
    "max_cache_mb",
    "tracker",
}

Outcome = tuple[bytes, dict[str, Any]]


@pytest.fixture(scope="module")
def outcome_of(
    backbone: Path, data: TextDataset, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[dict[str, Any]], Outcome]:
    """Weights and record of a training with these settings, kept for the next test that asks."""
    known: dict[str, Outcome] = {}

    def outcome(changes: dict[str, Any]) -> Outcome:
        if repr(changes) not in known:
            folder = tmp_path_factory.mktemp("effects") / "model"
            train(backbone=backbone, train_data=data, output_dir=folder, config=quick_config(**changes))
            known[repr(changes)] = weight_bytes(folder), read_record(folder)
        return known[repr(changes)]

    return outcome


def names_of(effects: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[str]:
    return [" ".join(f"{name}={value}" for name, value in change.items()) for change, _ in effects]


@pytest.mark.parametrize("change,base", EFFECTS, ids=names_of(EFFECTS))
def test_a_setting_has_an_effect(
    change: dict[str, Any], base: dict[str, Any], outcome_of: Callable[[dict[str, Any]], Outcome]
) -> None:
    _, record = outcome_of(base)
    _, changed_record = outcome_of({**base, **change})
    assert changed_record != record  # its rewards, losses in full precision, feel every change of the weights


def useless_first_layer(rows: int = 120) -> LayerStates:
    """Layer 1 says the majority class with little conviction, layers 2 and 3 are right."""
    generator = torch.Generator().manual_seed(0)
    labels = (torch.arange(rows) % 10 < 4).long()
    right = torch.nn.functional.one_hot(labels, 2) * (4 + torch.rand(rows, 1, generator=generator))
    logits = torch.stack([torch.tensor([0.3, 0.0]).expand(rows, 2), right, right], dim=1)
    pooled = torch.randn(rows, 3, 8, generator=generator).half()
    return LayerStates(logits, logits, torch.zeros(rows, 3), labels, pooled, torch.zeros(rows, 3))


def choice_for(**changes: Any) -> PolicyChoice:
    """Policies for `useless_first_layer`."""
    config = quick_config(**{"policy_batch_size": 60, "policy_learning_rate": 0.1, **changes})
    measure = config.hardness if config.reward == "hardness" else "uniform"
    return choose_policy(
        row_instances(useless_first_layer(), config.reward_loss, measure),
        policy_phase.policy_search(config, ("policy",), layer_costs=config.layer_costs),
        new_policy=partial(
            PolicyNetwork,
            num_layers=3,
            hidden_size=8,
            policy_input="state+log_odds",
            policy_hidden_size=8,
            dropout=0.1,
            initial_exit_bias=-1.0,
        ),
    )


@pytest.mark.parametrize("change,base", POLICY_EFFECTS, ids=names_of(POLICY_EFFECTS))
def test_a_setting_of_the_policy_has_an_effect(change: dict[str, Any], base: dict[str, Any]) -> None:
    assert choice_for(**base, **change).to_dict() != choice_for(**base).to_dict()


def test_every_setting_is_tested() -> None:
    tested = {name for change, _ in EFFECTS + POLICY_EFFECTS for name in change} | TESTED_ELSEWHERE
    assert tested == {field.name for field in dataclasses.fields(ClassificationTrainingConfig)}


@pytest.mark.parametrize("change", [{}, {"checkpoint_every": 1}, {"max_cache_mb": 1e-6}], ids=str)
def test_the_same_run_gives_the_same_weights(
    change: dict[str, Any], outcome_of: Callable[[dict[str, Any]], Outcome], quick_train: Callable[..., Path]
) -> None:
    weights, record = outcome_of({})
    folder = quick_train(**change)
    assert weight_bytes(folder) == weights
    assert read_record(folder) == record


def test_states_of_two_parts_in_memory_mapped_files(
    outcome_of: Callable[[dict[str, Any]], Outcome], quick_train: Callable[..., Path]
) -> None:
    """A policy on seen rows has two sets of states at a time: those it learns from and those it is judged by."""
    weights, record = outcome_of({"policy_data": "seen"})
    folder = quick_train(policy_data="seen", max_cache_mb=1e-6)
    assert weight_bytes(folder) == weights
    assert read_record(folder) == record
    assert {path.name for path in folder.iterdir()} == FINISHED


def test_criteria_are_fitted_on_validation_rows_whatever_the_policy_learns_from(
    quick_train: Callable[..., Path],
) -> None:
    found: list[dict[str, Any]] = []
    folders = [quick_train(rounds=0, policy_data=policy_data) for policy_data in ("held_out", "seen")]
    for folder in folders:
        config, record = json.loads((folder / "config.json").read_text()), read_record(folder)
        values = {name: config[name] for name in ("temperatures", "layer_weights")}
        found.append(values | {name: record["thresholds"][name] for name in FITTED})
        assert config["layer_weights"] == pytest.approx(record["validation"]["per_layer_accuracy"])
    assert found[0] == found[1]
    assert weight_bytes(folders[0]) != weight_bytes(folders[1])  # for the policy's


def test_gradient_accumulation_does_not_change_the_result(quick_train: Callable[..., Path]) -> None:
    whole, parts = quick_train(), quick_train(gradient_accumulation_steps=4)
    assert largest_difference(read_weights(whole), read_weights(parts)) < 1e-4


def test_finetuning_with_gradient_accumulation(backbone: Path, data: TextDataset, tmp_path: Path) -> None:
    whole, parts = (
        finetune(
            backbone=backbone,
            train_data=data,
            output_dir=tmp_path / str(steps),
            config=quick_config(gradient_accumulation_steps=steps),
        )
        for steps in (1, 4)
    )
    assert largest_difference(read_weights(whole), read_weights(parts)) < 1e-4


def test_bfloat16_after_full_precision_in_one_process(quick_train: Callable[..., Path]) -> None:
    full, mixed = quick_train(), quick_train(mixed_precision="bf16")
    assert saved.read_record(mixed)["environment"]["mixed_precision"] == "bf16"
    weights = read_weights(mixed)
    assert all(tensor.dtype == torch.float32 and bool(tensor.isfinite().all()) for tensor in weights.values())
    assert 0 < largest_difference(read_weights(full), weights) < 0.1
    assert all(math.isfinite(entry["reward"]) for entry in read_record(mixed)["history"])


@pytest.mark.gpu
@pytest.mark.parametrize("mixed_precision", ["bf16", "fp16"])
def test_mixed_precision_on_a_gpu(quick_train: Callable[..., Path], mixed_precision: str) -> None:
    folder = quick_train(mixed_precision=mixed_precision, checkpoint_every=1)
    assert all(bool(tensor.isfinite().all()) for tensor in read_weights(folder).values())


@pytest.mark.gpu
@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.labels and not row.needs])
def test_every_method_trains_on_a_gpu(quick_train: Callable[..., Path], method: str) -> None:
    folder = quick_train(method=method)
    assert saved.read_record(folder)["environment"]["device"].startswith("cuda")
    assert all(bool(tensor.isfinite().all()) for tensor in read_weights(folder).values())


def test_a_loss_that_is_not_finite_stops_the_run(quick_train: Callable[..., Path]) -> None:
    with pytest.raises(
        FloatingPointError, match=r"loss must be finite, got nan at step \d+\. Lower learning_rate"
    ):
        quick_train(learning_rate=1e30, warmup_epochs=4)


@pytest.mark.parametrize("method", ["consistent", "plain"])
@pytest.mark.parametrize(
    "rate, message",
    [(1e38, "weights must be finite, got .* at step 1"), (1e20, "logits must be finite, got nan")],
)
def test_a_model_that_the_last_step_broke_is_not_saved(
    method: str, rate: float, message: str, quick_train: Callable[..., Path], tmp_path: Path
) -> None:
    broken = {"learning_rate": rate, "head_learning_rate": rate, "warmup_epochs": 0.01, "rounds": 0}
    with pytest.raises(
        FloatingPointError, match=rf"^{message}.*\. Lower learning_rate or head_learning_rate"
    ):
        quick_train(method=method, **broken)
    assert not list(tmp_path.glob("*/*.safetensors"))


def test_the_tensorboard_tracker_writes_events(quick_train: Callable[..., Path]) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    folder = quick_train(tracker="tensorboard")
    events = EventAccumulator(str(folder / "consistentee"))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert {
        "warm-up/loss",
        "warm-up/accuracy",
        "round 1 consistent/reward",
        "round 1 consistent/exit_layer",
    } <= scalars
    assert [event.step for event in events.Scalars("warm-up/loss")] == [1, 2]


def test_a_tracker_that_is_not_installed(
    quick_train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(MissingExtraError, match=r'pip install "consistentee\[tensorboard\]"'):
        quick_train(tracker="tensorboard")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"tracker wandb is not installed\. Install it with: pip install wandb"
    ):
        quick_train(tracker="wandb")


# What the run tells.


def test_dead_layers_are_named(backbone: Path, tmp_path: Path) -> None:
    rows = tiny_dataset(200)
    positive = [row for row in range(200) if rows.labels[row] == 1]
    negative = [row for row in range(200) if rows.labels[row] == 0]
    data = rows.select([*positive[:80], *negative[:20]])  # the majority share is 0.8
    said: list[str] = []
    folder = train(
        backbone=backbone,
        train_data=data,
        output_dir=tmp_path / "m",
        config=quick_config(learning_rate=1e-12, head_learning_rate=1e-12),
        report=said.append,
    )
    assert read_record(folder)["warmup"]["dead_layers"] == [1, 2]
    assert "Majority share: 0.800" in said
    assert any(line.startswith("No better than a guess: layer 1, 2. ") for line in said)
    assert any(line.startswith("Accuracy by layer after warm-up: 0.") for line in said)


@pytest.mark.parametrize(
    "layer_costs,remedy",
    [((5.0, 0.001), "It is not used."), ((5.0, 6.0), "Try lower layer_costs.")],
)
def test_a_collapse_is_reported(
    quick_train: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    layer_costs: tuple[float, ...],
    remedy: str,
) -> None:
    collapsed = choice_for(
        layer_costs=layer_costs, layer_cost_mode="each", reward="uniform", policy_epochs=20
    )

    def choose(*args: Any, **kwargs: Any) -> PolicyChoice:
        reports = {"reports": collapsed.reports, "layer_cost": collapsed.layer_cost}
        return dataclasses.replace(choose_policy(*args, **kwargs), **reports)

    monkeypatch.setattr(policy_phase, "choose_policy", choose)
    said: list[str] = []
    folder = quick_train(said.append)
    line = f"Layer cost 5 collapsed: 100% exit at the first layer with accuracy 0.600. {remedy}"
    assert said.count(line) == 2  # rounds 0 and 1
    assert [price["collapsed"] for price in read_record(folder)["policy"]["prices"]] == [
        True,
        remedy.startswith("Try"),
    ]


def scored(scores: Iterator[float], hits: Iterator[list[int]] | None = None) -> Callable[..., PolicyChoice]:
    """`choose_policy` with these scores, and hits of the judged rows; by default none, hence without any error."""

    def choose(*args: Any, **kwargs: Any) -> PolicyChoice:
        choice, score = choose_policy(*args, **kwargs), next(scores)
        reports = tuple(dataclasses.replace(report, score=score) for report in choice.reports)
        of_rows = torch.zeros_like(choice.hits) if hits is None else torch.tensor(next(hits))
        counts = torch.ones_like(of_rows)
        return dataclasses.replace(choice, reports=reports, hits=of_rows, counts=counts)

    return choose


def test_rounds_stop_when_nothing_is_gained(
    quick_train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = [0.5, 0.7, 0.6, 0.65, 0.9, 0.9, 0.9]
    monkeypatch.setattr(policy_phase, "choose_policy", scored(iter(scores)))
    said: list[str] = []
    record = read_record(quick_train(said.append, rounds=6, patience=2, consistent_epochs=0.5))
    # and one more for the final choice
    assert [entry["score"] for entry in record["history"]] == [0.5, 0.7, 0.6, 0.65]
    assert record["best_round"] == 1
    assert "Stopped early: 2 rounds in turn with a worse validation score." in said


@pytest.mark.parametrize("last_score,kept", [(0.67, 1), (0.69, 3), (0.7, 3)])
def test_a_later_round_is_kept_if_it_is_no_worse_than_a_standard_error(
    quick_train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, last_score: float, kept: int
) -> None:
    rows = 30
    same, other = [3] * rows, [3, 3, 2] * (rows // 3)  # one row in three loses one budget of six
    error = (10 / rows * 20 / rows * rows / (rows - 1)) ** 0.5 / 6 / rows**0.5
    assert 0.01 < error < 0.03
    scores = iter([0.5, 0.7, 0.6, last_score, 0.9])
    monkeypatch.setattr(
        policy_phase, "choose_policy", scored(scores, iter([same, same, other, other, other]))
    )
    record = read_record(quick_train(rounds=3, patience=5, consistent_epochs=0.5))
    assert record["best_round"] == kept


def test_the_best_rounds_weights_are_saved(
    quick_train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy_phase, "choose_policy", scored(iter([0.9, 0.5, 0.5])))
    kept = read_weights(quick_train(schedule="constant"))
    monkeypatch.undo()
    without_rounds = read_weights(
        quick_train(schedule="constant", rounds=0, warmup_ratio=0.2)
    )  # the ramp is of 1 step
    assert largest_difference(kept, without_rounds) == 0


def test_seen_rows_for_the_policy_have_all_classes(
    backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where there are too many of them and the file is sorted by label."""
    monkeypatch.setattr(task_module, "MAX_SEEN_ROWS", 10)
    rows = tiny_dataset(60)
    data = rows.select(sorted(range(60), key=lambda row: rows.labels[row]))
    run = run_for(backbone, data, tmp_path, policy_data="seen")
    assert run.task._policy_rows.labels.bincount().tolist() == [5, 5]
    assert len(run.parts.validation) == 30


# Folders that hold something already; interruptions by signals are in test_training_resume.


def test_a_finished_model_is_not_overwritten(
    quick_train: Callable[..., Path], backbone: Path, data: TextDataset
) -> None:
    folder = quick_train()
    with pytest.raises(
        FileExistsError, match=r"run-1 holds a finished model\. Choose another, or remove it\.$"
    ):
        train(backbone=backbone, train_data=data, output_dir=folder, config=quick_config())


def test_resuming_a_finished_run_does_nothing(
    quick_train: Callable[..., Path], backbone: Path, data: TextDataset
) -> None:
    folder = quick_train()
    left = folder / checkpoints.FOLDER / "000000009"  # as if killed right after the model was in place
    left.mkdir(parents=True)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file()}
    said: list[str] = []
    again = train(
        backbone=backbone,
        train_data=data,
        output_dir=folder,
        config=quick_config(),
        resume=True,
        report=said.append,
    )
    assert again == folder
    assert said == [f"{folder} holds a finished model: nothing to resume."]
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_resuming_without_a_checkpoint_starts_at_the_beginning(
    backbone: Path, data: TextDataset, tmp_path: Path, outcome_of: Callable[[dict[str, Any]], Outcome]
) -> None:
    said: list[str] = []
    folder = tmp_path / "m"
    train(
        backbone=backbone,
        train_data=data,
        output_dir=folder,
        config=quick_config(),
        resume=True,
        report=said.append,
    )
    assert "No checkpoint to resume from: starting at the beginning." in said
    assert weight_bytes(folder) == outcome_of({})[0]


def test_an_unfinished_run_wants_the_same_settings_data_and_backbone(
    backbone: Path, data: TextDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, other_backbone = tmp_path / "m", tiny_backbone(tmp_path / "other", layers=2, seed=1)
    stop_at(monkeypatch, OptimizerSteps, "_step", 2)
    with pytest.raises(KeyboardInterrupt):
        train(backbone=backbone, train_data=data, output_dir=folder, config=quick_config(checkpoint_every=1))
    monkeypatch.undo()

    def resume(how: Callable[..., Path] = train, resume: bool = True, **changes: Any) -> Path:
        values = {
            "backbone": backbone,
            "train_data": data,
            "config": quick_config(checkpoint_every=1),
            **changes,
        }
        return how(output_dir=folder, resume=resume, **values)

    with pytest.raises(
        FileExistsError, match=r"holds an unfinished run\. Continue it with --resume, or remove it\.$"
    ):
        resume(resume=False)
    with pytest.raises(
        ValueError, match=r"has learning_rate = 0\.001, this one 0\.002\. Resume with the same"
    ):
        resume(config=quick_config(checkpoint_every=1, learning_rate=2e-3))
    with pytest.raises(ValueError, match=r"has layer_costs = \[0\.02\], this one \[0\.03\]\."):
        resume(config=quick_config(checkpoint_every=1, layer_costs=(0.03,)))
    swapped = TextDataset(data.texts, data.labels, data.label_names[::-1], data.source)
    for other in (tiny_dataset(50, seed=1), data.select(range(48)), swapped):
        with pytest.raises(ValueError, match=r"has data fingerprint = [0-9a-f]{16}, this one [0-9a-f]{16}\."):
            resume(train_data=other)
    with pytest.raises(ValueError, match=r"has backbone = .*, this one .*other \(content \w{8}\)\."):
        resume(backbone=other_backbone)
    with pytest.raises(ValueError, match=r"has kind = early_exit, this one full_depth\."):
        resume(finetune)
    moved = TextDataset(data.texts, data.labels, data.label_names, f"elsewhere/{POSITIVE[0]}.csv")
    assert (resume(train_data=moved) / "training_record.json").is_file()  # the same rows from another place


def test_a_run_goes_on_that_was_begun_with_a_settings_earlier_name(
    backbone: Path, data: TextDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, config = tmp_path / "m", quick_config(checkpoint_every=1, layer_cost_mode="each")
    stop_at(monkeypatch, OptimizerSteps, "_step", 2)
    with pytest.raises(KeyboardInterrupt):
        train(backbone=backbone, train_data=data, output_dir=folder, config=config)
    monkeypatch.undo()
    path = cast(Path, checkpoints.latest_checkpoint(folder)) / checkpoints.PROGRESS
    progress = json.loads(path.read_text())
    settings = progress["identity"]["config"]
    settings["prices"] = settings.pop("layer_cost_mode")
    settings["price_warmup"] = settings.pop("layer_cost_warmup")
    path.write_text(json.dumps(progress))

    def resume(**changes: Any) -> Path:
        changed = dataclasses.replace(config, **changes)
        return train(backbone=backbone, train_data=data, output_dir=folder, config=changed, resume=True)

    with pytest.raises(ValueError, match=r"has layer_cost_mode = each, this one range\."):
        resume(layer_cost_mode="range")
    assert (resume() / "training_record.json").is_file()
