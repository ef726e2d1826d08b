"""DeeBERT's two stages: first the plain model, then its exits with everything else frozen.

    stage 1   backbone and the last layer's classifier, or head, for the epochs of the warm-up; left out of a generator
              whose backbone is frozen: that is the plain model
    stage 2   the exits below, each on its own loss, for the epochs of all consistent phases; nothing else moves

Without an ensemble the full-depth model is thus exactly a fine-tuned one, and exits can be added to a model that serves
already; they know only what its layers happen to know. It exits by entropy (tokens: by the margin of their
probabilities). Thresholds of all criteria are chosen as after any method, for which a policy is fitted on the finished
exits.

Source: DeeBERT (arXiv:2004.12993). Differences: the exits' losses are summed with weights by depth, where theirs are
equal; as no two exits share a parameter that is trained, AdamW makes nearly nothing of that. For tokens, exits of the
`shared` kind train the norms of their layers alone.
"""

from __future__ import annotations

from pathlib import Path

from consistentee.errors import SettingError
from consistentee.training import warm_ups
from consistentee.training.policy_phase import finish_exits
from consistentee.training.run import Run
from consistentee.training.steps import Objective


def train_deebert(run: Run) -> Path:
    """Train by both stages and save."""
    return train_two_stages(run, run.task.weighted_sum(), run.task.confidence)


def train_two_stages(run: Run, objective: Objective, criterion: str) -> Path:
    """Train the plain model, then its exits on an objective with everything else frozen, and save.

    Raises:
        SettingError: there are no epochs for the second stage.
    """
    first_stage = run.steps_of(run.config.warmup_epochs)
    if first_stage == run.steps.total_steps:
        raise SettingError(
            f"rounds and consistent_epochs must be above 0 for the method {run.identity['method']}, which trains the "
            f"exits in those epochs, got {run.config.rounds} and {run.config.consistent_epochs:g}."
        )
    exits = run.task.exit_modules(run.model)
    for module in exits:
        module.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in run.model.parameters()):
        run.steps.total_steps, first_stage = run.steps.total_steps - first_stage, 0
        run.say(f"The backbone is frozen: stage 1 is left out, stage 2 has {run.steps.total_steps} steps")
    warm_ups.take_steps(run, run.task.last_layer(), [first_stage], phase="stage 1", at_stop=run.checkpoint)
    run.model.requires_grad_(False)
    for module in exits:
        module.requires_grad_(True)
    run.take_steps(run.steps.total_steps, objective, phase="stage 2")
    return finish_exits(run, criterion)
