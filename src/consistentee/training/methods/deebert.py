"""DeeBERT's two stages: first the plain model, then its exits with everything else frozen.

    stage 1   backbone and the last layer's classifier, or head, for the epochs of the warm-up
    stage 2   the exits below, each on its own loss, for the epochs of all consistent phases; nothing else moves

The full-depth model is thus exactly a fine-tuned one, and exits can be added to a model that serves already; they know
only what its layers happen to know. It exits by entropy (tokens: by the margin of their probabilities). Thresholds of
all criteria are chosen as after any method, for which a policy is fitted on the finished exits.

Source: DeeBERT (arXiv:2004.12993). Differences: the exits' losses are summed with weights by depth, where theirs are
equal; as no two exits share a parameter that is trained, AdamW makes nearly nothing of that. For tokens, exits of the
`shared` kind train the norms of their layers alone.
"""

from __future__ import annotations

from pathlib import Path

from consistentee.training.policy_phase import finish_run, record_round, run_policy_phase
from consistentee.training.run import Run


def train_deebert(run: Run) -> Path:
    """Train by both stages and save."""
    task, config = run.task, run.config
    first_stage = run.steps_of(config.warmup_epochs)
    run.model.config.ensemble_decay = 0.0  # an exit speaks for itself alone
    exits = task.exit_modules(run.model)
    if run.steps.step < first_stage:
        for module in exits:
            module.requires_grad_(False)
        run.take_steps(first_stage, task.last_layer(), phase="stage 1")
        run.checkpoint()
    run.model.requires_grad_(False)
    for module in exits:
        module.requires_grad_(True)
    run.take_steps(run.steps.total_steps, task.weighted_sum(), phase="stage 2")
    phase = run_policy_phase(run, "thresholds", try_all=True)
    record_round(run, 0, phase)
    return finish_run(run, phase, task.confidence)
