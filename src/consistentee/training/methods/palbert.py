"""PALBERT: the exit layer is a latent variable, whose distribution is trained together with everything else.

The loss is the expected loss at the exit plus the divergence of the exit distribution from a geometric prior: the
policy learns where exits are good while they learn where it exits, and the prior is what makes exits early.

It exits where the probability of having exited passes a threshold (Q-exit), by the policy that was trained: none is
fitted afterwards.

Source: PALBERT (arXiv:2204.03276), after PonderNet (arXiv:2107.05407), with the weight and prior of its release.
Differences: the exit probabilities come from our policy network, which has weights of its own for each layer and may
read the log-odds, where theirs is one network for all layers, on the pooled states of a layer and of the one before;
KL(exit distribution || prior) as in the paper, where their release has it the other way round.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from consistentee.functional.losses import geometric_prior, variational_exit_loss
from consistentee.training.exit_objective import exit_objective
from consistentee.training.policy_phase import finish_exits
from consistentee.training.run import Run

PRIOR_RATE = 0.1
"""Of reached layers the prior exits at this share."""
PRIOR_WEIGHT = 0.5


def train_palbert(run: Run) -> Path:
    """Train exits and policy together and save."""
    run.model.joint_policy = True
    log_prior = geometric_prior(run.model.num_layers, PRIOR_RATE).log().to(run.accelerator.device)

    def variational(losses: Tensor, output: Any, labels: Tensor) -> Tensor:
        exit_logits = output.exit_probs.logit(eps=1e-6)
        return variational_exit_loss(losses, exit_logits, log_prior, PRIOR_WEIGHT)

    run.take_steps(run.steps.total_steps, exit_objective(variational), phase="exit distribution")
    return finish_exits(run, "quantile", keep_policy=True)
