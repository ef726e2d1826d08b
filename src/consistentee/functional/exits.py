"""Where an instance exits: the exit distribution, what a policy may look at, and the layer that scores choose.

Everything here is a pure function of tensors. `exit_probs` are conditional probabilities (exit at layer t *given* that
t was reached); `exit_distribution` is the probability that t is the exit layer, and its rows sum to one. What gives a
layer its score is in `criteria.py`. Exit layers are 1-based: the exit layer is the number of layers executed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LOG_ODDS_SCALE = 5.0
SIGNAL_NAMES = (
    "log_odds",
    "margin",
    "entropy",
    "energy",
    "agreement",
    "streak",
    "previous_probability",
    "mean_probability",
    "depth",
)
NUM_SIGNALS = len(SIGNAL_NAMES)


def exit_distribution(exit_probs: Tensor) -> Tensor:
    """Probability that each layer is the exit layer.

    Args:
        exit_probs: (batch, layers), conditional exit probabilities in [0, 1]. The last column is ignored: whoever
            reaches the last layer exits there.

    Returns:
        (batch, layers), rows sum to 1.

    Source: ConsistentEE (arXiv:2312.11882), policy network section; their `pi(exit | h_t)` is `exit_probs[:, t]`.

    Example:
        >>> exit_distribution(torch.tensor([[0.5, 0.5, 0.1]]))
        tensor([[0.5000, 0.2500, 0.2500]])
    """
    exits = torch.cat([exit_probs[:, :-1], torch.ones_like(exit_probs[:, -1:])], dim=1)
    reached = torch.cumprod(1 - exit_probs[:, :-1], dim=1)
    reached = torch.cat([torch.ones_like(exits[:, :1]), reached], dim=1)
    return exits * reached


def log_exit_distribution(exit_logits: Tensor) -> Tensor:
    """Logarithm of the exit distribution, computed from logits so that it stays finite.

    Args:
        exit_logits: (batch, layers), logits of the conditional exit probabilities; the last column is ignored.

    Returns:
        (batch, layers), `log(exit_distribution(sigmoid(exit_logits)))`.
    """
    log_exit = torch.nn.functional.logsigmoid(exit_logits[:, :-1])
    log_stay = torch.nn.functional.logsigmoid(-exit_logits[:, :-1])
    zeros = torch.zeros_like(exit_logits[:, :1])
    log_reached = torch.cat([zeros, torch.cumsum(log_stay, dim=1)], dim=1)
    return torch.cat([log_exit, zeros], dim=1) + log_reached


def log_odds(logits: Tensor) -> Tensor:
    """Log-odds of the predicted class, clipped to +-10: (..., classes) -> (...), float32.

    Example:
        >>> log_odds(torch.tensor([0.0, 0.0]))
        tensor(0.)
    """
    probability = logits.float().log_softmax(-1).exp().amax(-1)
    rest = (1 - probability).clamp_min(1e-7)
    return (probability.clamp_min(1e-7).log() - rest.log()).clamp(-10, 10)


def classifier_signals(layer_logits: Tensor) -> Tensor:
    """What policies of 0.1.0 read beside the state. The eight that came with the log-odds bought nothing.

    Args:
        layer_logits: (batch, layers, classes), the classifiers' logits from the first layer on. A prefix of the
            layers gives the same figures for those layers: nothing looks ahead.

    Returns:
        (batch, layers, NUM_SIGNALS), in the order of `SIGNAL_NAMES`: log-odds of the top class (clipped to +-10,
        divided by 5), margin of the top two probabilities, entropy over log(classes), log-sum-exp of the logits
        divided by 10 (energy), share of the earlier layers that agree with this prediction (1 at the first layer),
        length of the current run of equal predictions over the layers seen, the previous layer's and the mean
        earlier probability of the class predicted here, and the layer number over 12.

    Raises:
        ValueError: if there are fewer than 2 classes.
    """
    if layer_logits.shape[-1] < 2:
        raise ValueError(f"layer_logits must have at least 2 classes, got {layer_logits.shape[-1]}.")
    logits = layer_logits.float()
    num_layers, num_classes = logits.shape[1:]
    log_probs = logits.log_softmax(-1)  # (batch, layers, classes)
    probs = log_probs.exp()
    top = probs.topk(2, dim=-1)
    top_probability, prediction = top.values[..., 0], top.indices[..., 0]  # (batch, layers)
    margin = top_probability - top.values[..., 1]
    entropy = -(probs * log_probs).sum(-1) / torch.log(torch.tensor(float(num_classes)))
    energy = logits.logsumexp(-1) / 10

    # [b, t, s]: what layer s says about the class that layer t predicts, for s < t.
    steps = torch.arange(num_layers, device=logits.device)
    earlier = (steps[None, :] < steps[:, None]).float()  # (layers, layers)
    count = earlier.sum(1).clamp_min(1)
    seen = probs.gather(2, prediction[:, None, :].expand(-1, num_layers, -1)).transpose(1, 2)  # (batch, t, s)
    mean_probability = (seen * earlier).sum(-1) / count
    same = (prediction[:, :, None] == prediction[:, None, :]).float()
    agreement = (same * earlier).sum(-1) / count
    previous_probability = torch.cat(
        [top_probability[:, :1], torch.diagonal(seen, offset=-1, dim1=1, dim2=2)], dim=1
    )
    first = steps == 0
    agreement = torch.where(first, torch.ones_like(agreement), agreement)
    mean_probability = torch.where(first, top_probability, mean_probability)
    streak = prediction_streak(prediction).float() / (steps + 1)
    depth = ((steps + 1) / 12).expand_as(margin)
    return torch.stack(
        [
            log_odds(logits) / LOG_ODDS_SCALE,
            margin,
            entropy,
            energy,
            agreement,
            streak,
            previous_probability,
            mean_probability,
            depth.to(margin.dtype),
        ],
        dim=-1,
    )


def prediction_streak(predictions: Tensor) -> Tensor:
    """How many layers in a row, up to and including this one, predict the same class.

    Args:
        predictions: (batch, layers), integer classes.

    Returns:
        (batch, layers), int64, at least 1.

    Example:
        >>> prediction_streak(torch.tensor([[1, 1, 0, 0, 0]]))
        tensor([[1, 2, 1, 2, 3]])
    """
    layers = torch.arange(1, predictions.shape[1], device=predictions.device)
    start = (layers * (predictions[:, 1:] != predictions[:, :-1])).cummax(dim=1).values  # of the run, from 0
    return torch.nn.functional.pad(layers - start + 1, (1, 0), value=1)


def choose_exit_layer(scores: Tensor, threshold: float) -> Tensor:
    """Exit layer of every instance: the first layer whose score exceeds the threshold, else the last.

    Args:
        scores: (batch, layers), exit scores.
        threshold: compared with `>`.

    Returns:
        (batch,), int64, 1-based: the number of layers executed.

    Source: ConsistentEE (arXiv:2312.11882), inference; the first t with pi(exit | h_t) > 0.5.

    Example:
        >>> choose_exit_layer(torch.tensor([[0.2, 0.7, 0.9], [0.1, 0.1, 0.1]]), 0.5)
        tensor([2, 3])
    """
    exits = scores > threshold
    exits[:, -1] = True
    return exits.int().argmax(dim=1) + 1


def ensemble_step(running: Tensor | None, classifier_logits: Tensor, decay: float) -> Tensor:
    """The prediction of one layer: its classifier's, mixed with the running prediction of the layers before.

    A decaying geometric ensemble: `log p_t <- decay * log p_{t-1} + (1 - decay) * log_softmax(f_t)`.

    Args:
        running: (batch, classes), what this function gave for the layer before; None at the first layer.
        classifier_logits: (batch, classes), this layer's own logits.
        decay: in [0, 1); 0 returns the layer's own logits.

    Returns:
        (batch, classes), float32 (unnormalised) log-probabilities.

    Source: ours; ensembling over the layers passed comes from Zero Time Waste (arXiv:2106.05409), which learns it.
    """
    if decay == 0:
        return classifier_logits.float()
    log_probs = classifier_logits.float().log_softmax(-1)
    return log_probs if running is None else decay * running + (1 - decay) * log_probs


def ensemble_layers(
    classifier_logits: Tensor,
    decay: float,
    *,
    last_alone: bool = False,
    has_exit: Sequence[bool] | None = None,
) -> Tensor:
    """`ensemble_step` over all layers: (batch, layers, classes) -> (batch, layers, classes).

    Args:
        classifier_logits: each layer's own.
        decay: of `ensemble_step`.
        last_alone: the last layer speaks for itself alone, its logits as they are.
        has_exit: (layers,), which layers have an exit; None: all. A layer without one says what was said before it,
            and its own logits where nothing was.
    """
    running: Tensor | None = None
    columns: list[Tensor] = []
    for index, logits in enumerate(classifier_logits.unbind(1)):
        if has_exit is not None and not has_exit[index]:
            columns.append(logits.float() if running is None else running)
            continue
        running = ensemble_step(running, logits, decay)
        columns.append(running)
    if last_alone:
        columns[-1] = classifier_logits[:, -1].float()
    return torch.stack(columns, dim=1)
