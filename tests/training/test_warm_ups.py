"""Warm-ups that trainings share: a training that takes one over ends where it would have ended alone."""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from consistentee.config import ClassificationTrainingConfig, GenerationTrainingConfig, TrainingConfig
from consistentee.data.rows import InstructionDataset, TextDataset
from consistentee.errors import SettingError
from consistentee.training import checkpoints, warm_ups
from consistentee.training.methods import consistent
from consistentee.training.run import Run
from consistentee.training.steps import OptimizerSteps
from consistentee.training.train import train
from quick import quick_config, read_record, stop_at, weight_bytes
from tiny import tiny_backbone, tiny_dataset
from tiny_training import quick_generation_config, tiny_decoder, tiny_instructions

ROWS: dict[str, Any] = {"head_dropout": 0.3, "policy_epochs": 1}
TOKENS: dict[str, Any] = {"policy_epochs": 1, "rounds": 1}

# A value for each later setting that is not the quick trainings'.
OTHER_ROWS: dict[str, Any] = {
    "consistent_learning_rate": 1e-4,
    "weighted_sum_share": 1.0,
    "estimator": "sampled",
    "num_rollouts": 3,
    "reward": "uniform",
    "reward_loss": "error",
    "hardness": "el2n",
    "layer_costs": (0.01, 0.5),
    "layer_cost_mode": "each",
    "policy_input": "state",
    "policy_data": "seen",
    "policy_hidden_size": 8,
    "policy_dropout": 0.0,
    "policy_epochs": 3,
    "policy_min_steps": 5,
    "policy_batch_size": 8,
    "policy_learning_rate": 1e-4,
    "policy_weight_decay": 0.5,
    "policy_folds": 3,
    "entropy_bonus": 1.0,
    "layer_cost_warmup": 0.0,
    "initial_exit_bias": 2.0,
    "patience": 1,
    "max_accuracy_loss": 0.5,
    "threshold_margin": 3.0,
    "threshold_metric": "f1",
    "ensemble_decay": 0.0,
    "passes": 2,
    "exit_min_steps": 7,
    "policy_texts": 100,
    "max_disk_mb": 1.0,
    "checkpoint_every": 1,
    "max_cache_mb": 1e-6,
    "tracker": "tensorboard",
}
OF_STEPS = {"rounds", "consistent_epochs"}
OTHER_TOKENS: dict[str, Any] = {
    **{
        name: value
        for name, value in OTHER_ROWS.items()
        if name in {field.name for field in dataclasses.fields(GenerationTrainingConfig)}
    },
    "reward": "hardness",
    "hardness": "final_loss",
    "policy_data": "held_out",
    "policy_tokens": 100,
    "reward_target": "last_layer",
}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_backbone(tmp_path_factory.mktemp("backbone"), layers=2, hidden_dropout_prob=0.1)


@pytest.fixture(scope="module")
def data() -> TextDataset:
    return tiny_dataset(50)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_decoder(tmp_path_factory.mktemp("decoder"), layers=2)


def kept(folder: Path) -> list[Path]:
    """Warm-ups in a folder."""
    return sorted(path for path in folder.iterdir() if checkpoints.is_claimed(path))


Train = Callable[..., list[str]]


def trainer(backbone: Path, data: TextDataset | InstructionDataset) -> Train:
    def run(folder: Path, config: TrainingConfig, warm_up_dir: Path | None = None, **more: Any) -> list[str]:
        said: list[str] = []
        train(
            backbone=backbone,
            train_data=data,
            output_dir=folder,
            config=config,
            warm_up_dir=warm_up_dir,
            report=said.append,
            **more,
        )
        return said

    return run


@pytest.fixture
def rows(backbone: Path, data: TextDataset) -> Train:
    return trainer(backbone, data)


@pytest.fixture
def tokens(decoder: Path) -> Train:
    return trainer(decoder, tiny_instructions())


def ends_alike(
    run: Train,
    first: TrainingConfig,
    second: TrainingConfig,
    folder: Path,
    methods: tuple[str, str] = ("consistent", "consistent"),
    *,
    moments: int = 1,
) -> list[str]:
    shared = folder / "warm-ups"
    run(folder / "first", first, shared, method=methods[0])
    said = run(folder / "second", second, shared, method=methods[1])
    run(folder / "alone", second, method=methods[1])
    assert any("steps are those of a training that began alike" in line for line in said)
    assert len(kept(shared)) == moments
    assert weight_bytes(folder / "second") == weight_bytes(folder / "alone")
    record, alone = read_record(folder / "second"), read_record(folder / "alone")
    assert record.pop("shared_warm_up")["seconds"] > 0
    assert record == alone
    assert "shared_warm_up" not in read_record(folder / "first")
    return said


TWO_AND_ONE: dict[str, Any] = {"warmup_epochs": 2.0, "rounds": 1, "consistent_epochs": 1.0}


@pytest.mark.parametrize(
    "methods, taken_over, moments",
    [
        (("consistent", "weighted_sum"), "4 of 6", 2),
        (("weighted_sum", "consistent"), "4 of 6", 2),
        (("weighted_sum", "beem"), "6 of 6", 2),
        (("deebert", "fastbert"), "4 of 6", 1),
        (("fastbert", "deebert"), "4 of 6", 1),
    ],
    ids=str,
)
def test_so_does_one_of_another_method(
    rows: Train, tmp_path: Path, methods: tuple[str, str], taken_over: str, moments: int
) -> None:
    config = quick_config(**ROWS | TWO_AND_ONE, batch_size=20)
    said = ends_alike(rows, config, config, tmp_path, methods, moments=moments)
    assert any(f"The first {taken_over} steps are those of" in line for line in said)


@pytest.mark.parametrize("method, stop", [("weighted_sum", 6), ("deebert", 4)])
def test_so_does_one_with_other_later_settings(rows: Train, tmp_path: Path, method: str, stop: int) -> None:
    one = quick_config(**ROWS | TWO_AND_ONE, batch_size=20)
    changed = {name: value for name, value in OTHER_ROWS.items() if name not in ("reward", "tracker")}
    said = ends_alike(
        rows,
        one,
        dataclasses.replace(one, **changed),
        tmp_path,
        (method, method),
        moments=2 if method == "weighted_sum" else 1,
    )
    assert any(f"The first {stop} of 6 steps are those of" in line for line in said)


@pytest.mark.parametrize("methods", [("consistent", "weighted_sum"), ("weighted_sum", "consistent")], ids=str)
def test_so_does_one_of_another_method_and_of_tokens(
    tokens: Train, tmp_path: Path, methods: tuple[str, str]
) -> None:
    config = quick_generation_config(**TOKENS)
    ends_alike(tokens, config, config, tmp_path, methods, moments=2)


def test_what_was_taken_over_and_gone_on_with_counts_all_its_seconds(rows: Train, tmp_path: Path) -> None:
    config, shared = quick_config(**ROWS | TWO_AND_ONE), tmp_path / "warm-ups"
    taken: list[float] = []
    for method in ("consistent", "weighted_sum", "beem"):
        rows(tmp_path / method, config, shared, method=method)
        taken.append(read_record(tmp_path / method).get("shared_warm_up", {"seconds": 0.0})["seconds"])
    assert 0 == taken[0] < taken[1] < taken[2]


def test_one_that_was_interrupted_leaves_its_moments_all_the_same(
    rows: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, shared = quick_config(**ROWS | TWO_AND_ONE, checkpoint_every=1), tmp_path / "warm-ups"
    with monkeypatch.context() as patch:
        stop_at(patch, OptimizerSteps, "_step", 3)
        with pytest.raises(KeyboardInterrupt):
            rows(tmp_path / "first", config, shared)
    kept_seconds = checkpoints.read_progress(_checkpoint(tmp_path / "first"))["seconds"]
    rows(tmp_path / "first", config, shared, resume=True)
    said = rows(tmp_path / "second", config, shared, method="weighted_sum")
    rows(tmp_path / "alone", config, method="weighted_sum")
    assert any("began alike" in line for line in said)
    assert weight_bytes(tmp_path / "second") == weight_bytes(tmp_path / "alone")
    assert read_record(tmp_path / "second")["shared_warm_up"]["seconds"] > kept_seconds > 0


def test_methods_that_begin_otherwise_share_nothing(rows: Train, tmp_path: Path) -> None:
    config, shared = quick_config(**ROWS | TWO_AND_ONE), tmp_path / "warm-ups"
    rows(tmp_path / "first", config, shared)
    said = rows(tmp_path / "second", config, shared, method="deebert")
    assert not any("began alike" in line for line in said)
    assert len(kept(shared)) == 2


def test_generators_whose_backbone_is_frozen_have_no_first_stage_to_share(
    tokens: Train, tmp_path: Path
) -> None:
    config = quick_generation_config(**TOKENS, backbone_training="frozen")
    tokens(tmp_path / "model", config, tmp_path / "warm-ups", method="deebert")
    assert not (tmp_path / "warm-ups").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"reward": "uniform", "estimator": "sampled"},
        {"policy_input": "state", "policy_hidden_size": 8, "policy_data": "seen"},
        {"rounds": 2, "consistent_epochs": 0.5, "weighted_sum_share": 1.0},
    ],
    ids=str,
)
def test_a_training_that_takes_over_ends_where_it_would_alone(
    rows: Train, tmp_path: Path, changes: dict[str, Any]
) -> None:
    ends_alike(rows, quick_config(**ROWS), quick_config(**ROWS, **changes), tmp_path)


def test_so_does_one_of_tokens(tokens: Train, tmp_path: Path) -> None:
    changes = {"reward": "hardness", "policy_hidden_size": 8}
    ends_alike(
        tokens, quick_generation_config(**TOKENS), quick_generation_config(**TOKENS, **changes), tmp_path
    )


def test_adapters_begin_alike_whatever_the_policy(tokens: Train, tmp_path: Path) -> None:
    one = quick_generation_config(**TOKENS, backbone_training="lora")
    ends_alike(tokens, one, dataclasses.replace(one, policy_hidden_size=8), tmp_path)


def test_unlabelled_texts_come_later(rows: Train, tmp_path: Path) -> None:
    texts = [(f"another word {number}",) for number in range(40)]
    rows(tmp_path / "first", quick_config(**ROWS), tmp_path / "warm-ups")
    said = rows(tmp_path / "second", quick_config(**ROWS), tmp_path / "warm-ups", unlabelled=texts)
    assert any("began alike" in line for line in said)


def test_values_for_all_later_settings() -> None:
    fields = {field.name for field in dataclasses.fields(ClassificationTrainingConfig)}
    assert OTHER_ROWS.keys() | OF_STEPS == fields & warm_ups.LATER
    fields = {field.name for field in dataclasses.fields(GenerationTrainingConfig)}
    assert OTHER_TOKENS.keys() | OF_STEPS == fields & warm_ups.LATER


def warm_up_of(
    run: Train, config: TrainingConfig, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, dict[str, torch.Tensor], dict[str, Any], int]:
    """Name, weights, optimizer and step of a training's warm-up, which is all that is run of it."""
    with monkeypatch.context() as patch:
        stop_at(patch, consistent, "run_policy_phase", 1)
        with pytest.raises(KeyboardInterrupt):
            run(folder / "run", config, folder / "warm-ups")
    (found,) = kept(folder / "warm-ups")
    weights, optimizer, progress = checkpoints.load_checkpoint(_checkpoint(found))
    weights = {name: value for name, value in weights.items() if not name.startswith("policy.")}
    return found.name, weights, optimizer["optimizer"]["state"], progress["step"]


def _checkpoint(folder: Path) -> Path:
    found = checkpoints.latest_checkpoint(folder)
    assert found is not None
    return found


def same_warm_up(
    run: Train, one: TrainingConfig, other: TrainingConfig, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, weights, optimizer, step = warm_up_of(run, one, folder / "one", monkeypatch)
    same_name, same_weights, same_optimizer, same_step = warm_up_of(run, other, folder / "other", monkeypatch)
    assert (name, step) == (same_name, same_step)
    torch.testing.assert_close(same_weights, weights, rtol=0, atol=0)
    torch.testing.assert_close(same_optimizer, optimizer, rtol=0, atol=0)


@pytest.mark.parametrize("setting", OTHER_ROWS)
def test_the_warm_up_does_not_feel_a_later_setting(
    rows: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    pytest.importorskip("tensorboard") if setting == "tracker" else None
    one = quick_config(**ROWS)
    other = dataclasses.replace(one, **{setting: OTHER_ROWS[setting]})
    assert getattr(one, setting) != getattr(other, setting)
    same_warm_up(rows, one, other, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "setting", ["policy_data", "policy_tokens", "reward", "hardness", "reward_target", "num_rollouts"]
)
def test_that_of_tokens_does_not_either(
    tokens: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    one = quick_generation_config(**TOKENS)
    other = dataclasses.replace(one, **{setting: OTHER_TOKENS[setting]})
    assert getattr(one, setting) != getattr(other, setting)
    same_warm_up(tokens, one, other, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "changes",
    [{"learning_rate": 2e-3}, {"seed": 1}, {"ensemble_decay": 0.0, "num_queries": 2}, {"rounds": 2}],
    ids=str,
)
def test_another_warm_up_is_another(
    rows: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    name, *_ = warm_up_of(rows, quick_config(**ROWS), tmp_path / "one", monkeypatch)
    other, *_ = warm_up_of(rows, quick_config(**ROWS, **changes), tmp_path / "other", monkeypatch)
    assert name != other


def test_so_is_that_of_other_rows(
    rows: Train, backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, *_ = warm_up_of(rows, quick_config(**ROWS), tmp_path / "one", monkeypatch)
    others = trainer(backbone, tiny_dataset(50, seed=5))
    other, *_ = warm_up_of(others, quick_config(**ROWS), tmp_path / "other", monkeypatch)
    assert name != other


def test_forgetting_is_counted_in_a_warm_up_of_its_own(rows: Train, tmp_path: Path) -> None:
    rows(tmp_path / "model", quick_config(**ROWS, hardness="forgetting_events"), tmp_path / "warm-ups")
    assert not (tmp_path / "warm-ups").exists()


def test_one_that_was_interrupted_takes_over_again(
    rows: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = quick_config(**ROWS, reward="uniform")
    shared = tmp_path / "warm-ups"
    rows(tmp_path / "first", quick_config(**ROWS), shared)
    with monkeypatch.context() as patch:
        stop_at(patch, consistent, "run_policy_phase", 1)
        with pytest.raises(KeyboardInterrupt):
            rows(tmp_path / "second", config, shared)
    said = rows(tmp_path / "second", config, shared, resume=True)
    rows(tmp_path / "alone", config)
    assert any("began alike" in line for line in said)
    assert weight_bytes(tmp_path / "second") == weight_bytes(tmp_path / "alone")


def test_who_comes_second_leaves_nothing(
    rows: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two trainings may end the same warm-up at the same time."""

    def taken(source: Path, target: Path) -> None:
        raise FileExistsError(target)

    monkeypatch.setattr(warm_ups.os, "rename", taken)
    rows(tmp_path / "model", quick_config(**ROWS), tmp_path / "warm-ups")
    assert list((tmp_path / "warm-ups").iterdir()) == []


def test_ctrl_c_while_a_warm_up_is_written_leaves_none(
    rows: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Run.write_checkpoint

    def stopped(run: Run, folder: Path, identity: dict[str, Any]) -> None:
        write(run, folder, identity)
        if folder.parent.name == "warm-ups":
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "write_checkpoint", stopped)
    with pytest.raises(KeyboardInterrupt):
        rows(tmp_path / "model", quick_config(**ROWS), tmp_path / "warm-ups")
    assert list((tmp_path / "warm-ups").iterdir()) == []


def test_only_warm_ups_are_discarded(rows: Train, tmp_path: Path) -> None:
    folder = tmp_path / "warm-ups"
    rows(tmp_path / "model", quick_config(**ROWS), folder)
    (warm_up,) = kept(folder)
    (folder / "somebody's").mkdir()
    (warm_up / "note.txt").write_text("mine")
    warm_ups.discard(folder)
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")) == [
        warm_up.name,
        f"{warm_up.name}/note.txt",
        "somebody's",
    ]
    warm_ups.discard(tmp_path / "nowhere")


def test_a_method_whose_first_steps_are_its_own_is_refused(rows: Train, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r'goes with method consistent, .*, beem, got "sweet"'):
        rows(tmp_path / "model", quick_config(), tmp_path / "warm-ups", method="sweet")
    assert not (tmp_path / "model").exists()


def test_no_room_for_what_others_could_take_over_ends_nothing(
    rows: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = checkpoints.save_file

    def full(weights: dict[str, torch.Tensor], path: Path) -> None:
        if "warm-ups" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        save(weights, path)

    monkeypatch.setattr(checkpoints, "save_file", full)
    config, shared = quick_config(**ROWS), tmp_path / "warm-ups"
    said = rows(tmp_path / "model", config, shared)
    assert any(line.startswith("What others could go on from was not kept: ") for line in said)
    assert list(shared.iterdir()) == []
    assert read_record(tmp_path / "model")["warmup"]


def test_moments_that_do_not_say_what_they_depend_on_are_discarded(tmp_path: Path) -> None:
    folder = tmp_path / "warm-ups"
    for name, identity in (("old", {"seconds": 1.0}), ("broken", {}), ("named", {"begins_with": "x"})):
        checkpoints.claim(folder / name)
        checkpoints.save_checkpoint(
            folder / name, 1, weights={}, optimizer={}, progress={"step": 1, "identity": identity}
        )
    (_checkpoint(folder / "broken") / checkpoints.PROGRESS).write_text("{")
    warm_ups.discard(folder, lambda moment: True)
    assert [path.name for path in folder.iterdir()] == ["named"]
