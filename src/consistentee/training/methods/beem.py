"""The layer-weighted sum of all exits' losses, for exits that are read as experts which agree or do not.

It exits by the running sum of the experts' weighted confidences, which begins anew where two neighbours disagree.

Source: BEEM (ICLR 2025, arXiv:2502.00745). Differences: none for `shared_pooler` heads with `ensemble_decay: 0`.
"""

from __future__ import annotations

from pathlib import Path

from consistentee.training import warm_ups
from consistentee.training.policy_phase import finish_exits
from consistentee.training.run import Run


def train_beem(run: Run) -> Path:
    """Train on the weighted sum and save."""
    stops = [run.steps_of(run.config.warmup_epochs), run.steps.total_steps]
    warm_ups.take_steps(run, run.task.weighted_sum(), stops, phase="weighted sum")
    return finish_exits(run, "expert_sum")
