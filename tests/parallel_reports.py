"""What every process of test_retrofit_processes runs: python parallel_reports.py OUTPUT.

First `retrofit`, as the command; then trainings whose processes have not been given the same.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from consistentee.cli.main import main
from consistentee.training.steps import OptimizerSteps
from consistentee.training.train import train
from quick import quick_config
from tiny import tiny_dataset

RETROFIT = (
    "--passes 1 --exit-min-steps 1 --policy-epochs 1 --policy-min-steps 1 --policy-folds 2 --policy-input log_odds "
    "--mixed-precision no"
)


def runs(output: Path) -> None:
    """A report, and refusals, of which each process leaves a file."""
    rank = int(os.environ["RANK"])
    texts = output / "texts.txt"
    command = ["retrofit", str(output / "classifier"), "--texts", str(texts), *RETROFIT.split()]
    assert (
        main([*command, "--output-dir", str(output / "exits"), "--json", str(output / "figures.json")]) == 0
    )
    assert main([*command[:3], "-", "--output-dir", str(output / "refused")]) == 2

    said: dict[str, str] = {}
    unlabelled = tiny_dataset(60 + 10 * rank, seed=5).texts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OptimizerSteps, "_step", lambda *_: pytest.fail("a step was taken"))
        for name, folder, more in (
            ("texts", output / "one", {"unlabelled": unlabelled}),
            ("folder", output / ("exits" if rank else "two"), {"resume": True}),
        ):
            with pytest.raises(ValueError, match=r"All processes|cannot begin|finished model") as error:
                train(
                    backbone=output / "backbone",
                    train_data=tiny_dataset(45),
                    output_dir=folder,
                    config=quick_config(),
                    **more,
                )
            said[name] = str(error.value)
    (output / f"said{rank}.txt").write_text("\n".join(said.values()) + "\n", encoding="utf-8")


if __name__ == "__main__":
    runs(Path(sys.argv[1]))
