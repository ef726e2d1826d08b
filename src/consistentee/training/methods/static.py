"""A smaller model: plain fine-tuning of the backbone's first layers.

What every early exit has to beat, as it costs the same for each input. The layers above `num_layers` are gone before
the first step, and what is saved is a plain model of so many layers, which opens like any other.
"""

from __future__ import annotations

from pathlib import Path

from consistentee.training.methods.plain import train_plain
from consistentee.training.run import Run


def train_static(run: Run) -> Path:
    """Fine-tune the layers that are left, and save the best epoch."""
    return train_plain(run)
