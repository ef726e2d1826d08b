"""Two processes on the CPU train what one trains with the same batches.

`accelerate launch --cpu --num_processes 2` starts one process unless MPI is there. What starts several without it is
`--multi_gpu` (or torchrun); where there is no GPU they run on the CPU and talk through gloo.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import parallel_runs
from consistentee.models.record import read_record as read_whole_record
from quick import largest_difference, read_record, read_weights
from tiny import tiny_backbone

TWO_PROCESSES = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")
DEFAULTS = ("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")


@pytest.mark.slow
@pytest.mark.skipif(torch.accelerator.is_available(), reason="two processes would want two GPUs")
def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    backbone, one, two = tiny_backbone(tmp_path / "backbone", layers=2), tmp_path / "one", tmp_path / "two"
    two.mkdir()
    command = [
        sys.executable,
        "-m",
        *TWO_PROCESSES,
        *DEFAULTS,
        parallel_runs.__file__,
        str(backbone),
        str(two),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0, done.stderr
    one.mkdir()
    parallel_runs.runs(backbone, one)

    for name in parallel_runs.RIVALS:
        assert largest_difference(read_weights(one / name), read_weights(two / name)) < 1e-4
    for name in ("train", "finetune", "unlabelled"):
        assert [read_whole_record(folder / name)["environment"]["processes"] for folder in (one, two)] == [
            1,
            2,
        ]
        assert largest_difference(read_weights(one / name), read_weights(two / name)) < 1e-4
        figures, others = (read_record(folder / name)["validation"] for folder in (one, two))
        for found in (figures, others):  # thresholds are scores, which sums in another order move a little
            within = (at for points in found.get("tolerances", {}).values() for at in points)
            for at in (*found.get("criteria", {}).values(), *within):
                at["threshold"] = pytest.approx(at["threshold"], abs=1e-5)
            for point in found.get("curve", ()):
                point[0] = pytest.approx(point[0], abs=1e-5)
        assert others == figures
        assert len(list((two / name / "consistentee").glob("events*"))) == 1  # one process tracks
    said = (two / "said.txt").read_text().replace("cpu:0", "cpu").replace(str(two), str(one))
    assert said == (one / "said.txt").read_text()  # one process speaks
