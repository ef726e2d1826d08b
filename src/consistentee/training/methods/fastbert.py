"""FastBERT: fine-tune the plain model, then its exits learn its distribution, without labels.

    stage 1   backbone and the last layer's classifier, for the epochs of the warm-up
    stage 2   the exits below, on their divergence from the last layer's distribution; nothing else moves

It exits by normalised entropy, their "speed".

Source: FastBERT (arXiv:2004.02178). Differences: the exits' heads are the configured ones, where theirs have a layer of
self-attention, 128 wide; labelled rows alone, where the second stage could take others. The last layer's distribution
is that without dropout, of a backbone in evaluation mode.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from consistentee.functional.losses import distillation_loss
from consistentee.heads.policy import exit_feature_map
from consistentee.training.exit_objective import exit_objective
from consistentee.training.methods.deebert import train_two_stages
from consistentee.training.run import Run


def train_fastbert(run: Run) -> Path:
    """Train by both stages and save."""

    def divergence(losses: Tensor, output: Any, labels: Tensor) -> Tensor:
        weight, bias = exit_feature_map(run.model.classifiers, None, run.model.num_layers - 1)
        teacher = output.pooled[:, -1].float() @ weight.T + bias
        return distillation_loss(output.classifier_logits[:, :-1], teacher).sum(1)

    return train_two_stages(run, exit_objective(divergence), "entropy")
