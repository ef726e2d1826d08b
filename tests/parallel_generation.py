"""Both kinds of generation training, for one process or several: `python parallel_generation.py BACKBONE OUTPUT`."""

from __future__ import annotations

import sys
from pathlib import Path

from consistentee.training.train import finetune, train
from tiny_training import quick_generation_config, tiny_instructions


def runs(backbone: Path, output: Path) -> None:
    """Fine-tune, and train a warm-up of all layers and a policy: what does not depend on who draws which layers."""
    config = quick_generation_config(
        batch_size=7, gradient_accumulation_steps=1, layers_per_step=2, policy_dropout=0.0, rounds=0
    )
    for name, how in (("finetune", finetune), ("warmup", train)):
        how(backbone=backbone, train_data=tiny_instructions(), output_dir=output / name, config=config)
    drawing = quick_generation_config(batch_size=7, layers_per_step=1, backbone_training="lora")
    train(backbone=backbone, train_data=tiny_instructions(), output_dir=output / "train", config=drawing)


if __name__ == "__main__":
    runs(Path(sys.argv[1]), Path(sys.argv[2]))
