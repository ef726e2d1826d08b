"""Two processes on the CPU train what one does with the same batches, where neither draws layers or exits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import parallel_generation
from quick import read_record, read_weights
from tiny_training import tiny_decoder

LAUNCH = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")
DEFAULTS = ("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")


@pytest.mark.slow
@pytest.mark.skipif(torch.accelerator.is_available(), reason="two processes would want two GPUs")
def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    backbone, one, two = tiny_decoder(tmp_path / "backbone", layers=3), tmp_path / "one", tmp_path / "two"
    tests = Path(__file__).resolve().parents[1]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(
            [str(tests), str(tests / "generation"), os.environ.get("PYTHONPATH", "")]
        ),
    }
    command = [
        sys.executable,
        "-m",
        *LAUNCH,
        *DEFAULTS,
        parallel_generation.__file__,
        str(backbone),
        str(two),
    ]
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0, done.stderr
    parallel_generation.runs(backbone, one)
    for name in ("finetune", "warmup"):
        weights, other = read_weights(one / name), read_weights(two / name)
        trained = [key for key in weights if not key.startswith(("policy.", "confidence_classifier."))]
        assert max(float((weights[key] - other[key]).abs().max()) for key in trained) < 1e-4
        accuracies = [read_record(folder / name)["validation"] for folder in (one, two)]
        assert accuracies[0]["num_examples"] == accuracies[1]["num_examples"]
    assert read_record(two / "train")["thresholds"].keys() == read_record(one / "warmup")["thresholds"].keys()
