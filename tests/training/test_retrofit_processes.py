"""Two processes on the CPU: one report of a retrofit, and no training of what they have not both been given."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import parallel_reports
from tiny import tiny_backbone, tiny_classifier, tiny_dataset

LAUNCH = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.mark.slow
@pytest.mark.skipif(torch.accelerator.is_available(), reason="two processes would want two GPUs")
def test_two_processes_report_once_and_train_only_what_both_have(tmp_path: Path) -> None:
    tiny_classifier(tmp_path / "classifier", "distilbert", layers=2)
    tiny_backbone(tmp_path / "backbone", layers=2)
    lines = [text for (text,) in tiny_dataset(200, seed=5).texts]
    (tmp_path / "texts.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    command = [sys.executable, "-m", *LAUNCH, parallel_reports.__file__, str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    for line in ("different texts", "Agrees with your model on", "The model lies in"):
        assert done.stdout.count(line) == 1, done.stdout
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert {row["name"] for row in figures["speed"]} >= {"engine", "transformers"}
    assert "Standard input can be read by one process only, and there are 2." in done.stderr

    said = [(tmp_path / f"said{rank}.txt").read_text(encoding="utf-8").splitlines() for rank in (0, 1)]
    assert said[0][0] == said[1][0]
    assert said[0][0].startswith(
        "All processes must be given the same settings, backbone and data, got in process 0 "
    )
    assert "unlabelled texts = " in said[0][0]
    assert said[0][1] == f"Process 1 cannot begin: {said[1][1]}"
    assert not (tmp_path / "one").exists()
    assert not (tmp_path / "two").exists()
