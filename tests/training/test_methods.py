"""The table of training methods, and DeeBERT's two stages for rows and for tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from consistentee import Engine, LoadedGenerator, TextGenerator, load_model
from consistentee.cli.main import main
from consistentee.config import ClassificationTrainingConfig
from consistentee.errors import SettingError
from consistentee.functional.criteria import EXIT_CRITERIA
from consistentee.functional.tables import CLASSIFICATION
from consistentee.training.methods import METHODS, PUBLISHED_NAMES, check_method, method_of
from consistentee.training.run_folders import check_same_run, run_identity
from consistentee.training.steps import OptimizerSteps
from consistentee.training.train import train
from quick import quick_config, read_record, weight_bytes
from tiny import tiny_backbone, tiny_dataset
from tiny_training import quick_generation_config, tiny_decoder, tiny_instructions

ROWS, TOKENS = "rows", "tokens"


def test_every_method_is_there_and_says_where_it_comes_from() -> None:
    for name, method in METHODS.items():
        assert callable(method.load())
        assert not method.labels or method_of(name) is method
        assert method.source


def test_runs_of_before_had_whole_gradients() -> None:
    def identity(method: str, **settings: Any) -> dict[str, Any]:
        return run_identity("early_exit", method, "b", settings, "d")

    defaults = ClassificationTrainingConfig().to_dict()
    for method in ("consistent", "weighted_sum"):
        check_same_run("It", identity(method), identity(method, exit_gradient_scale=1.0), defaults)
    with pytest.raises(ValueError, match=r"It has exit_gradient_scale = 1.0, this one 0.3\."):
        check_same_run(
            "It", identity("consistent"), identity("consistent", exit_gradient_scale=0.3), defaults
        )
    for method in ("sweet", "deebert", "fastbert", "plain", "retrofit"):
        check_same_run("It", identity(method), identity(method, exit_gradient_scale=0.3), defaults)


@pytest.mark.parametrize(
    "name, meant",
    [
        ("pabee", " It is weighted_sum with the exit criterion patience."),
        ("F-PABEE", " It is weighted_sum with the exit criterion similar_patience."),
        ("ConsistentEE", " It is consistent with the exit criterion policy."),
        (
            "entropy",
            " That is an exit criterion, and no training: the exits of several methods can be read by it.",
        ),
        ("retrofit", " It learns from texts alone: consistentee retrofit."),
        ("DeeBERT", ' Did you mean "deebert"?'),
        ("consistant", ' Did you mean "consistent"?'),
        ("something", ""),
    ],
)
def test_a_name_that_is_no_methods(name: str, meant: str) -> None:
    with pytest.raises(ValueError, match="method must be one of") as caught:
        method_of(name)
    *_, told = str(caught.value).partition(
        f"consistent, deebert, weighted_sum, right_tool, fastbert, berxit, palbert, "
        f'sweet, cosee, nsp, beem, plain, static, got "{name}".'
    )
    assert told == meant


def test_names_of_papers_mean_methods_and_criteria() -> None:
    for method, criterion in PUBLISHED_NAMES.values():
        assert method_of(method).exits
        assert criterion in EXIT_CRITERIA


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("backbones")
    return {ROWS: tiny_backbone(root / ROWS, layers=3), TOKENS: tiny_decoder(root / TOKENS, layers=3)}


def run(
    task: str, backbones: dict[str, Path], folder: Path, *, resume: bool = False, **changes: Any
) -> list[str]:
    said: list[str] = []
    settings: dict[str, Any] = {"warmup_epochs": 2.0, "rounds": 2, "consistent_epochs": 1.0, **changes}
    train(
        backbone=backbones[task],
        train_data=tiny_dataset(50) if task == ROWS else tiny_instructions(),
        output_dir=folder,
        config=(quick_config if task == ROWS else quick_generation_config)(**settings),
        method="deebert",
        resume=resume,
        report=said.append,
    )
    return said


def parts(model: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Weights of the full-depth model, and of the exits below the last layer."""
    last = f"classifiers.layers.{model.num_layers - 1}." if hasattr(model, "classifiers") else "none"
    state = {name: value.clone() for name, value in model.state_dict().items()}
    exits = {
        name
        for name in state
        if name.startswith(("classifiers.", "exit_heads."))
        and not name.startswith((last, "classifiers.pooler"))
    }
    full = {name for name in state if name.startswith(("backbone.", "classifiers.pooler", last))}
    return {kind: {name: state[name] for name in names} for kind, names in (("exits", exits), ("full", full))}


@pytest.mark.parametrize(
    "task, changes",
    [(ROWS, {}), (ROWS, {"head": "shared_pooler"}), (TOKENS, {"backbone_training": "full"}), (TOKENS, {})],
)
def test_the_second_stage_trains_the_exits_and_nothing_else(
    task: str,
    changes: dict[str, Any],
    backbones: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changed: list[tuple[str, set[str]]] = []
    original = OptimizerSteps.run

    def watched(self: OptimizerSteps, *args: Any, **options: Any) -> None:
        before = parts(self.model)
        original(self, *args, **options)
        after = parts(self.model)
        moved = {
            kind for kind in before if any(not before[kind][n].equal(after[kind][n]) for n in before[kind])
        }
        changed.append((options["phase"], moved))

    monkeypatch.setattr(OptimizerSteps, "run", watched)
    said = run(task, backbones, tmp_path / "m", **changes)
    assert changed == [("stage 1", {"full"}), ("stage 2", {"exits"})]
    record = read_record(tmp_path / "m")
    assert record["method"] == "deebert"
    assert record["kind"] == ("early_exit" if task == ROWS else "early_exit_generation")
    assert len(record["history"]) == 1
    criterion = "entropy" if task == ROWS else "softmax_margin"
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["criterion"] == criterion
    assert config["threshold"] == record["thresholds"][criterion]
    assert any(line.lstrip().startswith(f"{criterion}: threshold ") for line in said)
    # Tokens of a text are not independent: no interval is stated.
    assert ("loss" in record["validation"]) == (task == ROWS)
    assert record["validation"].get("loss", {}).get("criterion", criterion) == criterion


def test_what_it_makes_predicts_and_generates(backbones: dict[str, Path], tmp_path: Path) -> None:
    run(ROWS, backbones, tmp_path / "rows")
    engine = Engine.from_pretrained(tmp_path / "rows")
    (prediction,) = engine.predict(["good"])
    assert 1 <= prediction.exit_layer <= 3
    run(TOKENS, backbones, tmp_path / "tokens")
    generator = TextGenerator(load_model(tmp_path / "tokens", LoadedGenerator))
    (text,) = generator.generate_texts([("one", "")], max_new_tokens=3)
    assert all(1 <= layer <= 3 for layer in text.exit_layers)


@pytest.mark.parametrize("at", [2, 5])
def test_an_interrupted_run_goes_on(
    at: int, backbones: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(ROWS, backbones, tmp_path / "whole", checkpoint_every=1)
    original: Callable[..., None] = OptimizerSteps._step
    calls = 0

    def interrupting(*args: Any, **options: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise KeyboardInterrupt
        original(*args, **options)

    monkeypatch.setattr(OptimizerSteps, "_step", interrupting)
    with pytest.raises(KeyboardInterrupt):
        run(ROWS, backbones, tmp_path / "parts", checkpoint_every=1)
    monkeypatch.setattr(OptimizerSteps, "_step", original)
    run(ROWS, backbones, tmp_path / "parts", resume=True, checkpoint_every=1)
    assert weight_bytes(tmp_path / "parts") == weight_bytes(tmp_path / "whole")
    with pytest.raises(ValueError, match="has method = deebert, this one consistent"):
        train(
            backbone=backbones[ROWS],
            train_data=tiny_dataset(50),
            output_dir=tmp_path / "whole",
            config=quick_config(warmup_epochs=2.0, rounds=2, consistent_epochs=1.0, checkpoint_every=1),
            resume=True,
        )


@pytest.mark.parametrize("name", [name for name, row in METHODS.items() if row.labels])
def test_forgetting_is_counted_by_methods_that_warm_up_alone(name: str) -> None:
    settings = ClassificationTrainingConfig(hardness="forgetting_events", num_layers=2)
    if name in ("consistent", "plain", "static"):
        check_method(name, CLASSIFICATION, settings)
        return
    with pytest.raises(
        SettingError, match=rf"^hardness must be another one than .* for the method {name}, which"
    ):
        check_method(name, CLASSIFICATION, settings)
    check_method(name, CLASSIFICATION, ClassificationTrainingConfig(hardness="el2n"))
    uniform = ClassificationTrainingConfig(hardness="forgetting_events", reward="uniform")
    check_method(name, CLASSIFICATION, uniform)


def test_the_command_line_offers_the_methods_that_learn_from_labels(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", "--help"]) == 0
    told = " ".join(re.sub("[│─╭╮╰╯]", " ", capsys.readouterr().out).split())
    assert f"[choices: {', '.join(name for name, row in METHODS.items() if row.labels)}]" in told
