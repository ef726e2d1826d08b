"""A text generator with exits under torch's `fully_shard`, on two processes of the CPU; what training refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import parallel_sharded
from consistentee.errors import SettingError
from consistentee.models.causal_lm import EarlyExitForCausalLM
from consistentee.training.steps import make_accelerator
from saved_generators import generator_folder


@pytest.mark.slow
def test_two_processes_hold_half_of_the_weights_each(tmp_path: Path) -> None:
    folder, output = generator_folder(tmp_path / "model"), tmp_path / "sharded.pt"
    tests = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, parallel_sharded.__file__, str(folder), str(output)],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join([str(tests), os.environ.get("PYTHONPATH", "")]),
        },
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = torch.load(output, weights_only=True)
    assert found["held"] == 0.5

    model = EarlyExitForCausalLM.from_pretrained(folder).train()
    loss = parallel_sharded.step(model, parallel_sharded.rows_of_all())
    assert float(found["loss"]) == pytest.approx(float(loss), abs=1e-5)
    expected = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    assert found["gradients"].keys() == expected.keys()
    assert len(expected) > 20
    for name, gradient in expected.items():
        torch.testing.assert_close(found["gradients"][name], gradient, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("what", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_training_shares_rows_not_weights(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{what}", "true")
    with pytest.raises(SettingError, match=f"share rows, not weights, and ACCELERATE_USE_{what} is set"):
        make_accelerator(str(tmp_path))
