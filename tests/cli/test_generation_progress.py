"""All long work on texts says how far it is; `test_progress` says how."""

from __future__ import annotations

from pathlib import Path

import pytest

from consistentee import progress
from consistentee.cli.main import main
from consistentee.evaluation.generation import evaluate_generation
from consistentee.models.loaded import LoadedGenerator, load_model
from consistentee.progress import Pace
from consistentee.training.train import finetune, train
from saved_generators import generator_folder, plain_folder, tiny_rows
from tiny_training import quick_generation_config, tiny_decoder, tiny_instructions


@pytest.fixture(autouse=True)
def talkative(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TQDM_DISABLE")
    monkeypatch.setattr(progress, "PACE", Pace(0.0))  # every step says a line


def titles(capsys: pytest.CaptureFixture[str]) -> set[str]:
    return {line.split(":")[0].split(" >")[0] for line in capsys.readouterr().err.splitlines()}


def test_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backbone = tiny_decoder(tmp_path / "backbone", layers=2)
    for how, wanted in (
        (train, {"warm-up", "round 0 policy", "round 1 consistent", "round 1 policy"}),
        (finetune, {"epoch 1", "epoch 2", "validation"}),
    ):
        folder, config = tmp_path / how.__name__, quick_generation_config()
        how(backbone=backbone, train_data=tiny_instructions(), output_dir=folder, config=config)
        assert wanted <= titles(capsys)


def test_evaluation_and_generation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, plain = generator_folder(tmp_path / "model"), plain_folder(tmp_path / "plain")
    evaluate_generation(
        load_model(model, LoadedGenerator),
        tiny_rows(4),
        criteria=["policy", "static"],
        threshold=0.5,
        reference=load_model(plain, LoadedGenerator),
        text_speedups=[1.5],
        max_new_tokens=3,
        curve_thresholds=1,
        progress=True,
    )
    assert titles(capsys) >= {
        "full",
        "policy",
        "reference",
        "reference, its perplexity",
        "references, all layers",
        "references, policy",
        "references, scores of policy",
        "references, static",
    }
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Say this.\nSay that.\n", encoding="utf-8")
    arguments = ["generate", str(model), str(prompts), "--max-new-tokens", "3"]
    assert main([*arguments, "--output", str(tmp_path / "texts.jsonl")]) == 0
    assert titles(capsys) == {"texts generated"}
    assert main(arguments) == 0
    assert titles(capsys) == set()
