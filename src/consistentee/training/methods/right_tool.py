"""The plain sum of all exits' losses: every exit counts the same.

It exits by the largest probability, calibrated with a temperature of each exit.

Source: The Right Tool for the Job (Schwartz et al., arXiv:2004.07453). Differences: an exit after every layer, where
theirs stand after four; an exit reads its own layer, where theirs read a learnt mean of all layers up to it.
"""

from __future__ import annotations

from pathlib import Path

from consistentee.training.exit_objective import exit_objective
from consistentee.training.policy_phase import finish_exits
from consistentee.training.run import Run


def train_right_tool(run: Run) -> Path:
    """Train on the sum and save."""
    objective = exit_objective(lambda losses, output, labels: losses.sum(1))
    run.take_steps(run.steps.total_steps, objective, phase="sum")
    return finish_exits(run, "calibrated_confidence")
