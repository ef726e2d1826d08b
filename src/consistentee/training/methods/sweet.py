"""SWEET: every layer learns from its own exit alone.

The losses of all exits are summed, but the gradient of an exit ends at the exit before it, so that no exit pulls at
layers which another one needs. The embeddings belong to the first exit; a shared pooler, where the heads have one,
learns from all of them.

It exits by confidence.

Source: SWEET (arXiv:2306.02307). Differences: an exit after every layer, where theirs stand after the layers 1, 4, 6
and 12, so that an exit trains one layer, and not up to six.
"""

from __future__ import annotations

from pathlib import Path

from consistentee.training.exit_objective import exit_objective
from consistentee.training.policy_phase import finish_exits
from consistentee.training.run import Run


def train_sweet(run: Run) -> Path:
    """Train every layer by its exit, and save."""
    run.model.separate_layers = True
    objective = exit_objective(lambda losses, output, labels: losses.sum(1))
    run.take_steps(run.steps.total_steps, objective, phase="separate layers")
    return finish_exits(run, "confidence")
