"""The layer-weighted sum of all exits' losses from the first step to the last: PABEE's training, and BEEM's.

It exits by patience (tokens: by the margin of their probabilities).

Source: PABEE (arXiv:2006.04152), whose exits PCEE and F-PABEE read by criteria of their own. Differences: none for
`shared_pooler` heads with `ensemble_decay: 0`.
"""

from __future__ import annotations

from pathlib import Path

from consistentee.training import warm_ups
from consistentee.training.policy_phase import finish_exits
from consistentee.training.run import Run


def train_weighted_sum(run: Run) -> Path:
    """Train on the weighted sum and save."""
    stops = [run.steps_of(run.config.warmup_epochs), run.steps.total_steps]
    warm_ups.take_steps(run, run.task.weighted_sum(), stops, phase="weighted sum")
    return finish_exits(run, "patience" if "patience" in run.task.criteria else run.task.confidence)
