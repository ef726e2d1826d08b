"""Exit scores: the formula of every exit criterion, each a pure function of tensors; `criteria.py` has the table.

A score is higher where an instance is readier to exit. What reads all layers up to one never looks ahead: a prefix of
the layers gives the same scores for those layers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from consistentee.functional.exits import prediction_streak

SURE_LAYERS = 2
"""Layers in a row that must be sure for `confident_patience`."""

SIMILAR_LAYERS = 1
"""Layers in a row that must be like the one before for `similar_patience`."""

CAP_SCALE = 0.1
"""Of the logit that `cap` adds."""

COST_WEIGHT = 0.1
"""What a layer's weight in `expert_sum` grows by with every layer, where weights go by cost."""


def policy_scores(exit_probs: Tensor) -> Tensor:
    """Exit score of the trained policy: its exit probability, (...) in [0, 1].

    Source: ConsistentEE (arXiv:2312.11882); the paper's threshold is 0.5.
    """
    return exit_probs


def confidence_scores(logits: Tensor) -> Tensor:
    """Largest class probability of an exit: (..., classes) -> (...), in [1 / classes, 1]."""
    return logits.float().softmax(-1).amax(-1)


def entropy_scores(logits: Tensor) -> Tensor:
    """One minus the normalised entropy of an exit, so that higher means surer: (..., classes) -> (...), in [0, 1].

    Source: DeeBERT (arXiv:2004.12993) and FastBERT (arXiv:2004.02178); ours is 1 - FastBERT's "speed" uncertainty.
    """
    log_probs = logits.float().log_softmax(-1)
    negative_entropy = (log_probs.exp() * log_probs).sum(-1)
    return (1 + negative_entropy / math.log(logits.shape[-1])).clamp(0, 1)  # rounding goes beyond


def patience_scores(layer_logits: Tensor) -> Tensor:
    """Length of the run of equal predictions; a threshold of p - 0.5 waits for a run of p layers.

    Args:
        layer_logits: (batch, layers, classes), from the first layer on.

    Returns:
        (batch, layers), floats from 1 to layers.

    Source: PABEE (arXiv:2006.04152). Their counter starts at 0 with the first prediction, ours at 1.
    """
    return prediction_streak(layer_logits.argmax(-1)).float()


def confident_patience_scores(layer_logits: Tensor) -> Tensor:
    """How sure the least sure of this layer and the one before it is, by `entropy_scores`; 0 at the first layer.

    A row exits once `SURE_LAYERS` layers in a row are surer than the threshold, whatever they predict.

    Args:
        layer_logits: (batch, layers, classes), from the first layer on.

    Returns:
        (batch, layers), in [0, 1].

    Source: PCEE-BERT (Findings of NAACL 2022, 2022.findings-naacl.25). Theirs has two dials, the entropy below which a
        layer is sure and the number of such layers in a row; ours keeps the number at 2, as in their script, and the
        threshold is the other one, which is the finer.

    Example:
        >>> sure, unsure = [9.0, -9.0], [0.0, 0.0]
        >>> confident_patience_scores(torch.tensor([[sure, unsure, sure, sure]])).round()
        tensor([[0., 0., 0., 1.]])
    """
    return _least_of(entropy_scores(layer_logits), SURE_LAYERS)


def similar_patience_scores(layer_logits: Tensor) -> Tensor:
    """How like the layer before it a layer is; 0 at the first.

    Likeness is 1 minus the Jensen-Shannon divergence of the two predicted distributions in bits. A row exits once
    `SIMILAR_LAYERS` layers in a row are more like the one before them than the threshold.

    Args:
        layer_logits: (batch, layers, classes), from the first layer on.

    Returns:
        (batch, layers), in [0, 1].

    Source: F-PABEE (arXiv:2305.11916), with the divergence that they found best. Theirs has two dials, the divergence
        and the number of layers in a row; ours keeps the number at 1, the best of 1 to 3 on rows that nothing is
        reported on, and the threshold is the other one.

    Example:
        >>> one, other = [9.0, -9.0], [-9.0, 9.0]
        >>> similar_patience_scores(torch.tensor([[one, one, one, other]])).round()
        tensor([[0., 1., 1., 0.]])
    """
    log_probs = layer_logits.float().log_softmax(-1)
    likeness = 1 - jensen_shannon(log_probs[:, 1:], log_probs[:, :-1])
    return _least_of(functional.pad(likeness, (1, 0)), SIMILAR_LAYERS)


def jensen_shannon(log_probs: Tensor, other_log_probs: Tensor) -> Tensor:
    """Jensen-Shannon divergence of distributions, (..., classes) twice -> (...), in bits, hence in [0, 1].

    Example:
        >>> certain = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).log().clamp_min(-1e4)
        >>> jensen_shannon(certain, certain.flip(0)), jensen_shannon(certain, certain)
        (tensor([1., 1.]), tensor([0., 0.]))
    """
    mixture = torch.logaddexp(log_probs, other_log_probs) - math.log(2)
    first, second = (each.exp() * (each - mixture) for each in (log_probs, other_log_probs))
    return ((first + second).sum(-1) / (2 * math.log(2))).clamp(0, 1)  # rounding goes beyond


def expert_sum_scores(layer_logits: Tensor, layer_weights: Tensor) -> Tensor:
    """Weighted sum of the confidences of the layers in a row that agree up to this one, squashed to [0, 1).

    S_t = w_t c_t + (S_{t-1} if layers t - 1 and t predict the same class), with confidence c; the score is
    S / (1 + S), so that a threshold h stands for h / (1 - h) of theirs.

    Args:
        layer_logits: (batch, layers, classes), from the first layer on.
        layer_weights: (batch, layers), w: a layer's accuracy on validation rows.

    Returns:
        (batch, layers), in [0, 1).

    Source: BEEM (arXiv:2502.00745), weights by accuracy (BEEM-A), which did better than by cost (BEEM-C, `COST_WEIGHT`
        times the layer), what models take that were saved without. Theirs has a threshold of its own for every exit,
        from the exits' error rates; ours has one for all, as all criteria here.

    Example:
        >>> sure, other = [99.0, 0.0], [0.0, 99.0]
        >>> weights = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
        >>> scores = expert_sum_scores(torch.tensor([[sure, sure, other, other]]), weights)
        >>> scores / (1 - scores)
        tensor([[0.1000, 0.3000, 0.3000, 0.7000]])
    """
    layers = torch.arange(1, layer_logits.shape[1] + 1, device=layer_logits.device)
    sums = (layer_weights * confidence_scores(layer_logits)).cumsum(1)  # of all layers
    before = layers - prediction_streak(layer_logits.argmax(-1))  # layers before those in agreement
    sums = sums - functional.pad(sums, (1, 0)).gather(1, before)
    return sums / (1 + sums)


def energy_scores(classifier_logits: Tensor) -> Tensor:
    """Sigmoid of the log-sum-exp of a classifier's own logits: (..., classes) -> (...), in [0, 1].

    Source: COSEE (arXiv:2412.13236), normalised energy; ours is 1 minus theirs, which is 1 / (1 + sum(exp(logits))) at
        their temperature of 1. Their exits have no ensemble: the logits are a classifier's own, since a mixture of
        log-probabilities has no scale.

    Example:
        >>> energy_scores(torch.tensor([1.0, 2.0]).log())
        tensor(0.7500)
    """
    return classifier_logits.float().logsumexp(-1).sigmoid()


def calibrated_confidence_scores(logits: Tensor, temperatures: Tensor) -> Tensor:
    """Largest class probability at a layer's own temperature: (..., classes) and (...) -> (...).

    Source: "The Right Tool" (arXiv:2004.07453): a temperature a layer, of the least cross-entropy on validation rows.

    Example:
        >>> calibrated_confidence_scores(torch.tensor([4.0, 1.0]).log(), torch.tensor(2.0))
        tensor(0.6667)
    """
    return confidence_scores(logits.float() / temperatures[..., None])


def learnt_to_exit_scores(right_probs: Tensor) -> Tensor:
    """What a linear map of the pooled state, shared by all layers, says about whether the exit is right, (...).

    Source: BERxiT (2021.eacl-main.8), "learning to exit". Theirs is trained along with the exits, by squared error;
        ours afterwards, on rows that the exits did not learn from, by cross-entropy, so that it is a probability.
    """
    return right_probs


def cap_scores(classifier_logits: Tensor, null_shares: Tensor) -> Tensor:
    """One minus the probability of one more class, whose logit grows with what the classifier does not see.

    Args:
        classifier_logits: (..., classes), a classifier's own.
        null_shares: (...), in [0, 1], share of the state outside the space that its weights span (`exit_signals.py`).

    Returns:
        (...), in [0, 1].

    Source: NSP (arXiv:2506.17249), "certainty-aware probability"; ours is 1 minus theirs, at the scale of the new logit
        that their script has, `CAP_SCALE`.

    Example:
        >>> cap_scores(torch.tensor([1.0, 2.0]).log(), torch.tensor(0.0))
        tensor(0.7500)
    """
    return (classifier_logits.float().logsumexp(-1) - CAP_SCALE * null_shares).sigmoid()


def quantile_scores(layer_exit_probs: Tensor) -> Tensor:
    """Probability of having exited by each layer, 1 - prod(1 - e): conditional (batch, layers) -> same, in [0, 1].

    It never falls with depth, and a threshold q takes the first layer beyond the q-quantile of the exit distribution.

    Args:
        layer_exit_probs: exit probabilities given that the layer was reached, from the first layer on.

    Source: PALBERT (arXiv:2204.03276), "Q-exit"; the paper's threshold is 0.5. Their exit probabilities are trained as
        a variational distribution, ours are those of whatever policy the model has.

    Example:
        >>> quantile_scores(torch.tensor([[0.5, 0.5, 0.0]]))
        tensor([[0.5000, 0.7500, 0.7500]])
    """
    return 1 - (1 - layer_exit_probs.float()).cumprod(1)


def _least_of(scores: Tensor, layers: int) -> Tensor:
    """The least score of so many layers up to each, (batch, layers); 0 where there are not so many."""
    return functional.pad(scores, (layers - 1, 0)).unfold(1, layers, 1).amin(-1)


def softmax_margin_scores(logits: Tensor) -> Tensor:
    """Difference of the two largest probabilities: (..., vocabulary) -> (...), in [0, 1].

    Needs the LM head at every layer, which in a small model costs as much as several layers.

    Source: CALM (arXiv:2207.07061), "softmax response".

    Example:
        >>> softmax_margin_scores(torch.tensor([[0.0, 0.0, -100.0]]))
        tensor([0.])
    """
    top = logits.float().topk(2, dim=-1).values
    normaliser = logits.float().logsumexp(-1)
    return (top[..., 0] - normaliser).exp() - (top[..., 1] - normaliser).exp()


def state_similarity_scores(before: Tensor, after: Tensor) -> Tensor:
    """Cosine of the states before and after a layer: (..., hidden) twice -> (...), in [-1, 1].

    Source: CALM (arXiv:2207.07061), "hidden-state saturation"; the ConsistentEE release uses 0.975 as its threshold.
    """
    cosine = functional.cosine_similarity(before.float(), after.float(), dim=-1)
    return cosine.clamp(-1, 1)  # rounding goes beyond


def agreement_scores(agreement_probs: Tensor) -> Tensor:
    """What a linear classifier of its own says about whether an exit gives the last layer's token, (...) in [0, 1].

    Source: CALM (arXiv:2207.07061), "early-exit classifier".
    """
    return agreement_probs


def static_scores(layers: Any) -> Any:
    """Half a layer more than the number of layers executed, a number or (...), so that `>` means "at least"."""
    return layers + 0.5
