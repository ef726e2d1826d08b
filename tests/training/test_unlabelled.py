"""Texts without labels beside labelled rows: what learns from them, what does not, and what is kept."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from consistentee.config import ClassificationTrainingConfig
from consistentee.data.rows import TextDataset
from consistentee.data.sketches import seen_rows
from consistentee.data.tokenization import encode_texts
from consistentee.errors import DataError, SettingError
from consistentee.models.loaded import load_model
from consistentee.training import policy_phase
from consistentee.training.methods import consistent
from consistentee.training.steps import OptimizerSteps
from consistentee.training.tasks.unlabelled import UnlabelledTraining
from consistentee.training.train import train
from quick import quick_config, read_record, read_weights, stop_at, weight_bytes
from tiny import tiny_backbone, tiny_dataset
from tiny_training import quick_generation_config, tiny_decoder, tiny_instructions

ROWS = tiny_dataset(96)  # half of them for validation
ROUND_STEPS = 8 * 3 + 3  # three batches an epoch
TEXTS = tiny_dataset(260, seed=5).texts[:240]
LAYERS = 3
LAST = f"classifiers.layers.{LAYERS - 1}."


def config(**changes: Any) -> ClassificationTrainingConfig:
    values = {
        "warmup_epochs": 8.0,
        "learning_rate": 3e-3,
        "reward_loss": "error",
        "head_learning_rate": 5e-3,
        "passes": 2,
        "exit_min_steps": 1,
        "max_cache_mb": 0.05,
        "policy_input": "auto",
        **changes,
    }
    return quick_config(**values)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_backbone(tmp_path_factory.mktemp("backbone"), layers=LAYERS)


@pytest.fixture(scope="module")
def without(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("without") / "m"
    return train(backbone=backbone, train_data=ROWS, output_dir=folder, config=config())


@pytest.fixture(scope="module")
def with_texts(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("with") / "m"
    return train(backbone=backbone, train_data=ROWS, output_dir=folder, config=config(), unlabelled=TEXTS)


def test_some_texts_at_a_time_give_other_exits(backbone: Path, with_texts: Path, tmp_path: Path) -> None:
    folder = train(
        backbone=backbone,
        train_data=ROWS,
        output_dir=tmp_path / "m",
        config=config(max_disk_mb=0.0),
        unlabelled=TEXTS,
    )
    assert read_record(folder) != read_record(with_texts)  # whose states were all in a file


def test_backbone_and_last_layer_stay_and_the_exits_below_move(without: Path, with_texts: Path) -> None:
    assert read_record(with_texts)["unlabelled"]["kept"]
    before, after = read_weights(without), read_weights(with_texts)
    assert before.keys() == after.keys()
    for name in before:
        if name.startswith(("backbone.", LAST)):
            assert torch.equal(before[name], after[name]), name
    for layer in range(LAYERS - 1):
        moved = [name for name in before if name.startswith(f"classifiers.layers.{layer}.")]
        assert any(not torch.equal(before[name], after[name]) for name in moved)


@torch.no_grad()
def test_exits_come_to_agree_with_the_last_layer(without: Path, with_texts: Path) -> None:
    saved = [load_model(folder) for folder in (without, with_texts)]
    texts = tiny_dataset(200, seed=9).texts
    batch = saved[0].tokenizer([text for (text,) in texts], padding=True, return_tensors="pt")
    divergence = []
    for one in saved:
        model: Any = one.model
        logits = model(**batch, all_layers=True).classifier_logits.log_softmax(-1)
        divergence.append((logits[:, -1:].exp() * (logits[:, -1:] - logits[:, :-1])).sum(-1).mean())
    assert divergence[1] < 0.7 * divergence[0]


def test_other_criteria_are_fitted_on_labelled_rows_alone(with_texts: Path) -> None:
    record, model = read_record(with_texts), load_model(with_texts).model
    assert record["unlabelled"]["kept"]
    assert model.config.layer_weights == pytest.approx(record["validation"]["per_layer_accuracy"])


def test_what_is_said_and_recorded(with_texts: Path, without: Path) -> None:
    record = read_record(with_texts)
    found = record["unlabelled"]
    assert (found["num_texts"], found["num_exit_texts"], found["num_policy_texts"]) == (240, 160, 80)
    # The rounds are those of the run without texts, and so is the score that they left.
    other = read_record(without)
    assert record["history"] == other["history"]
    assert found["score_before"] == other["policy"]["scores"]["policy"]
    assert found["score_after"] == record["policy"]["scores"]["policy"]
    assert record["validation"]["num_examples"] == 48  # labelled ones alone
    assert record["data"]["validation_rows"] == 48
    assert "unlabelled" not in other
    assert "unlabelled_fingerprint" not in other["data"]
    card = (with_texts / "README.md").read_text(encoding="utf-8")
    assert "240 texts without labels beside them: 160 for the exits and 80 for the policy" in card


@pytest.mark.parametrize("policy_data", ["held_out", "seen"])
def test_the_policy_learns_from_texts_and_is_judged_by_labelled_rows(
    policy_data: Any, backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Any, dict[str, Any]]] = []
    original = policy_phase.choose_policy

    def watched(instances: Any, search: Any, **options: Any) -> Any:
        seen.append((instances, options))
        return original(instances, search, **options)

    monkeypatch.setattr(policy_phase, "choose_policy", watched)
    train(
        backbone=backbone,
        train_data=ROWS,
        output_dir=tmp_path / "m",
        config=config(warmup_epochs=1.0, policy_data=policy_data, hardness="forgetting_events"),
        unlabelled=TEXTS,
    )
    (rounds, of_rounds), (instances, options) = seen[0], seen[-1]
    assert (len(rounds), len(instances)) == (48, 48 + 80)
    assert of_rounds["judged_groups"] is None
    if policy_data == "held_out":
        assert options["judged"] is None
        assert options["judged_groups"] == 48
    else:
        assert len(options["judged"]) == 48
    # On a text the last layer is right by definition, and on labelled rows it is not.
    assert instances.correct[48:, -1].all()
    assert not instances.correct[:48, -1].all()
    assert not instances.correct[48:, :-1].all()
    assert torch.equal(instances.exit_cost[48:], 1 - instances.correct[48:].float())
    streak = instances.correct[48:].flip(1).int().cumprod(1).sum(1)  # of agreeing layers, from the last up
    torch.testing.assert_close(instances.hardness[48:], (LAYERS - streak + 1) / LAYERS)
    assert instances.group.tolist() == list(range(128))
    assert len(instances.kept_states) == len(instances.features) == 128


@pytest.fixture
def hurting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let exits learn the opposite of what the last layer says, as from texts whose domain misleads them."""
    agreement = UnlabelledTraining.agreement

    def opposite(self: UnlabelledTraining) -> Any:
        objective = agreement(self)
        return lambda model, batch, labels: objective(model, batch, labels.flip(-1))

    monkeypatch.setattr(UnlabelledTraining, "agreement", opposite)


@pytest.mark.usefixtures("hurting")
def test_texts_that_hurt_change_nothing(without: Path, backbone: Path, tmp_path: Path) -> None:
    said: list[str] = []
    values: dict[str, Any] = {"backbone": backbone, "train_data": ROWS, "report": said.append}
    hurt = train(**values, output_dir=tmp_path / "m", config=config(), unlabelled=TEXTS)
    record, other = read_record(hurt), read_record(without)
    assert not record["unlabelled"]["kept"]
    assert record["unlabelled"]["score_after"] < record["unlabelled"]["score_before"] - 0.05
    assert weight_bytes(hurt) == weight_bytes(without)
    assert (hurt / "config.json").read_text() == (without / "config.json").read_text()
    for key in ("policy", "thresholds", "validation", "history"):
        assert record[key] == other[key], key
    assert any(line.endswith("exits and policy stay as they were.") for line in said)
    assert "were tried beside them and not used" in (hurt / "README.md").read_text(encoding="utf-8")


@pytest.mark.usefixtures("hurting")
def test_a_run_that_stopped_before_it_refused_texts_that_hurt(
    without: Path, backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values: dict[str, Any] = {
        "backbone": backbone,
        "train_data": ROWS,
        "output_dir": tmp_path / "m",
        "config": config(),
        "unlabelled": TEXTS,
    }
    with monkeypatch.context() as patched:
        stop_at(patched, consistent, "is_no_worse", 1)  # the rounds' own calls are policy_phase's
        with pytest.raises(KeyboardInterrupt):
            train(**values)
    assert weight_bytes(train(**values, resume=True)) == weight_bytes(without)
    assert read_record(tmp_path / "m")["validation"] == read_record(without)["validation"]


def test_a_run_that_stops_among_the_texts_goes_on_to_the_same_end(
    with_texts: Path, backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    values: dict[str, Any] = {
        "backbone": backbone,
        "train_data": ROWS,
        "output_dir": tmp_path / "m",
        "config": config(checkpoint_every=2),
        "report": said.append,
    }
    stop_at(monkeypatch, OptimizerSteps, "_step", ROUND_STEPS + 8)
    with pytest.raises(KeyboardInterrupt):
        train(**values, unlabelled=TEXTS)
    monkeypatch.undo()
    for texts, found in ((TEXTS[:-1], r"\w{16}"), (None, "none")):
        with pytest.raises(ValueError, match=rf"has unlabelled texts = \w{{16}}, this one {found}\."):
            train(**values, unlabelled=texts, resume=True)
    assert weight_bytes(train(**values, unlabelled=TEXTS, resume=True)) == weight_bytes(with_texts)
    assert read_record(tmp_path / "m") == read_record(with_texts)
    assert any(line.startswith("Resumed at step 6 of ") for line in said)
    # Once more: the finished model is of these texts.
    train(**values, unlabelled=TEXTS, resume=True)
    with pytest.raises(ValueError, match="has unlabelled texts"):
        train(**values, resume=True)


def test_a_disk_that_has_no_room_for_the_states_of_texts_costs_no_rounds(
    backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values: dict[str, Any] = {"backbone": backbone, "train_data": ROWS, "unlabelled": TEXTS}
    short = {"warmup_epochs": 1.0, "checkpoint_every": 2}
    less = {"config": config(**short, max_disk_mb=0.0)}
    alone = train(**values, **less, output_dir=tmp_path / "alone")
    values["output_dir"] = tmp_path / "m"

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full, raising=False)
        with pytest.raises(OSError, match=r"MB are free\. Make room, or give a lower max_disk_mb"):
            train(**values, config=config(**short))
    with pytest.raises(ValueError, match=r"has passes = 2, this one 3\."):
        train(**values, config=config(**short, max_disk_mb=0.0, passes=3), resume=True)
    with monkeypatch.context() as patched:
        stop_at(patched, OptimizerSteps, "_step", 4)
        with pytest.raises(KeyboardInterrupt):
            train(**values, **less, resume=True)
    with pytest.raises(
        ValueError, match=r"has max_disk_mb = 0\.0, this one 8192\.0\."
    ):  # it has learnt from texts
        train(**values, config=config(**short), resume=True)
    assert weight_bytes(train(**values, **less, resume=True)) == weight_bytes(alone)
    assert read_record(tmp_path / "m") == read_record(alone)


def test_texts_among_the_labelled_rows_and_duplicates_are_dropped(backbone: Path) -> None:
    texts = [*TEXTS, *ROWS.texts[:7], *TEXTS[:5], ROWS.texts[0]]
    task = UnlabelledTraining.read(config(), ROWS, texts, backbone)
    spooled = task.unlabelled
    assert [spooled.text(row) for row in range(len(spooled))] == TEXTS
    assert (spooled.num_known, spooled.num_duplicates) == (8, 5)
    parts = task.prepare(backbone, None, exits=True)
    assert parts.description.endswith(
        "160 unlabelled texts for the exits and 80 for the policy (5 duplicates and 8 of the labelled rows dropped)"
    )
    rows, _ = encode_texts(TEXTS, parts.tokenizer, parts.max_length)
    assert [spooled.item(row) for row in range(len(spooled))] == rows
    seen, told = seen_rows(parts.data["text_sketch"], [*TEXTS, *ROWS.texts])
    assert seen == told > 0
    few = UnlabelledTraining.read(config(policy_texts=11, max_length=6), ROWS, TEXTS, backbone)
    assert (len(few.parts.exits), len(few.parts.policy)) == (229, 11)
    assert few.unlabelled.lengths.max() == 6


def test_what_does_not_learn_from_texts_says_so(backbone: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {"backbone": backbone, "train_data": ROWS, "output_dir": tmp_path / "m"}
    for method in ("deebert", "plain"):
        with pytest.raises(SettingError, match=f'texts go with method consistent, got "{method}"'):
            train(**values, method=method, unlabelled=TEXTS)
    with pytest.raises(
        DataError, match="Unlabelled rows must be single texts as the labelled rows are, got pairs"
    ):
        train(**values, unlabelled=[("a", text) for (text,) in TEXTS])
    with pytest.raises(DataError, match="must be at least 40, got 39"):
        train(**values, unlabelled=TEXTS[:39])
    with pytest.raises(DataError, match=r"unlabelled file holds no text but 96 that are known already\."):
        train(**values, unlabelled=ROWS.texts)
    with pytest.raises(SettingError, match="go with rows to classify, got text to generate"):
        train(
            backbone=tiny_decoder(tmp_path / "decoder"),
            train_data=tiny_instructions(),
            output_dir=tmp_path / "m",
            config=quick_generation_config(),
            unlabelled=TEXTS,
        )
    assert not (tmp_path / "m").exists()


def test_pairs(tmp_path: Path) -> None:
    pairs = TextDataset([("film", *text) for text in ROWS.texts], ROWS.labels, ROWS.label_names, "pairs")
    folder = train(
        backbone=tiny_backbone(tmp_path / "backbone", layers=2),
        train_data=pairs,
        output_dir=tmp_path / "m",
        config=config(warmup_epochs=1.0, rounds=0, passes=1, head="shared_pooler"),
        unlabelled=(("plot", *text) for text in TEXTS),
    )
    assert read_record(folder)["unlabelled"]["num_texts"] == 240
