"""What every process of test_training_processes runs: python parallel_runs.py BACKBONE OUTPUT."""

from __future__ import annotations

import sys
from pathlib import Path

from consistentee.data.rows import TextDataset
from consistentee.training.train import finetune, train
from quick import quick_config
from tiny import tiny_dataset

CONFIG = quick_config(
    gradient_accumulation_steps=2, tracker="tensorboard", max_cache_mb=1e-6, policy_input="auto"
)
RIVALS = ("fastbert", "berxit", "palbert", "sweet")
"""Methods that leave parameters out of some steps, or train others than ours does."""
ROWS = 66  # 33 to train on: batches of 16, 16 and 1, of which the second process gets none


def runs(backbone: Path, output: Path) -> None:
    """A training, a fine-tuning, and a resumption of what has ended, with rows for two processes."""
    data: TextDataset = tiny_dataset(ROWS)
    said: list[str] = []
    texts = {"unlabelled": tiny_dataset(100, seed=5).texts}
    for name, how, more in (("train", train, {}), ("finetune", finetune, {}), ("unlabelled", train, texts)):
        for resume in (False, True):
            how(
                backbone=backbone,
                train_data=data,
                output_dir=output / name,
                config=CONFIG,
                resume=resume,
                report=said.append,
                **more,
            )
    for name in RIVALS:
        train(
            backbone=backbone,
            train_data=data,
            output_dir=output / name,
            config=quick_config(policy_dropout=0.0),
            method=name,
            report=said.append,
        )
    if said:
        with (output / "said.txt").open("a", encoding="utf-8") as stream:
            stream.write("\n".join(said) + "\n")


if __name__ == "__main__":
    runs(Path(sys.argv[1]), Path(sys.argv[2]))
