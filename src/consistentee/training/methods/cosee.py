"""COSEE: an exit learns most from rows that would exit near it, at thresholds drawn anew for every batch.

For each of a few thresholds, drawn from the range of the batch's exit scores, it is simulated where each row would
exit; its loss at a layer weighs the less the further that layer is from there, first all layers alike, at the end
nearly the exit layer alone. Beside that, scores of right rows are to exceed those of wrong ones at every exit by a
margin.

It exits by energy.

Source: COSEE (arXiv:2412.13236), with the constants of its release. Differences: thresholds are drawn from the range of
the scores of the batch, where theirs is that of the epoch before, so that a step follows from its seed and number
alone; a batch is here what a process computes at once of it, within which right and wrong rows are compared, too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from consistentee.functional.exits import choose_exit_layer
from consistentee.functional.losses import layer_weights_around, score_margin_loss
from consistentee.functional.signals import energy_scores
from consistentee.training.exit_objective import exit_objective
from consistentee.training.policy_phase import finish_exits
from consistentee.training.run import Run

NUM_THRESHOLDS = 5
FINAL_SHARPNESS = 10.0
SCORE_MARGIN, MARGIN_WEIGHT = 0.3, 0.1


def train_cosee(run: Run) -> Path:
    """Train on simulated exits and save."""

    def simulated(losses: Tensor, output: Any, labels: Tensor) -> Tensor:
        num_layers = losses.shape[1]
        scores = energy_scores(output.classifier_logits)  # (rows, layers)
        below = scores[:, :-1].detach()  # at the last layer all exit
        drawn = torch.rand(NUM_THRESHOLDS, device=losses.device)
        thresholds = below.min() + drawn * (below.max() - below.min())
        sharpness = FINAL_SHARPNESS * run.steps.step / run.steps.total_steps
        weights = torch.stack(
            [
                layer_weights_around(choose_exit_layer(scores.detach(), threshold), num_layers, sharpness)
                for threshold in thresholds.tolist()
            ]
        ).mean(0)  # (rows, layers)
        correct = output.classifier_logits.argmax(-1) == labels[:, None]
        margin = score_margin_loss(scores[:, :-1], correct[:, :-1], SCORE_MARGIN)
        return (weights * losses).sum(1) + MARGIN_WEIGHT * margin

    run.take_steps(run.steps.total_steps, exit_objective(simulated), phase="simulated exits")
    return finish_exits(run, "energy")
