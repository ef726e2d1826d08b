"""BERxiT's alternation: one batch for the last layer alone, the next for the sum of all exits' losses.

    even steps   the last layer's loss
    odd steps    the sum of the losses of all exits, the last layer's among them

It exits by what a linear map of the state, shared by all exits, says about being right ("learning to exit").

Source: BERxiT (EACL 2021, aclanthology.org/2021.eacl-main.8). Differences: that map is fitted on the finished
exits as the policy is, where theirs is trained beside them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from consistentee.training.exit_objective import exit_objective
from consistentee.training.policy_phase import finish_exits
from consistentee.training.run import Run


def train_berxit(run: Run) -> Path:
    """Train in turn and save."""

    def in_turn(losses: Tensor, output: Any, labels: Tensor) -> Tensor:
        return losses[:, -1] if run.steps.step % 2 == 0 else losses.sum(1)

    run.take_steps(run.steps.total_steps, exit_objective(in_turn), phase="alternating")
    return finish_exits(run, "learnt_to_exit")
