"""The mean of all exits' losses, for exits that tell how sure they are by features outside of their weights' space.

It exits by the CAP score: the probability of one more class, whose logit is the share of an exit's features that its
classifier's weights do not see.

Source: NSP/CAP (IJCAI 2025, arXiv:2506.17249). Differences: none for `shared_pooler` heads with `ensemble_decay: 0`;
other heads are read by the last linear map of each.
"""

from __future__ import annotations

from pathlib import Path

from consistentee.training.exit_objective import exit_objective
from consistentee.training.policy_phase import finish_exits
from consistentee.training.run import Run


def train_nsp(run: Run) -> Path:
    """Train on the mean and save."""
    objective = exit_objective(lambda losses, output, labels: losses.mean(1))
    run.take_steps(run.steps.total_steps, objective, phase="mean")
    return finish_exits(run, "cap")
