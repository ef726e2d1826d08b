"""How hard an instance is: the memorized layer of ConsistentEE and five other measures behind one interface.

Every measure maps to a hardness in [0, 1], (instances,): 0 = pay the full price per layer, 1 = layers are free. The
hardness-guided reward multiplies the price by one minus it.
"""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from consistentee.config import HardnessMeasure

HARDNESS_MEASURES: tuple[str, ...] = get_args(HardnessMeasure)


def memorized_layer(layer_logits: Tensor, labels: Tensor) -> Tensor:
    """The lowest layer from which every layer up to the last predicts the label; the last layer where it is wrong.

    Args:
        layer_logits: (batch, layers, classes).
        labels: (batch,), int64.

    Returns:
        (batch,), int64 in 1..layers.

    Source: ConsistentEE (arXiv:2312.11882), "memorized layer"; their ML -> ours, no difference.

    Example:
        >>> logits = torch.tensor([[[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]])
        >>> memorized_layer(logits, torch.tensor([1]))
        tensor([3])
    """
    right = layer_logits.argmax(-1) == labels[:, None]  # (batch, layers)
    tail = right.flip(1).int().cumprod(1).sum(1)  # how many layers at the end are right without a gap
    return (right.shape[1] - tail + 1).clamp(max=right.shape[1])


def hardness(
    measure: str,
    layer_logits: Tensor,
    labels: Tensor,
    *,
    forgetting_counts: Tensor | None = None,
) -> Tensor:
    """Hardness of every instance under a measure.

    Args:
        measure: one of `HARDNESS_MEASURES`. `memorized_layer`: ML / L, the paper's. `forgetting_events`: how often
            the instance went from right to wrong during warm-up, over the largest count. `final_loss`: the last
            layer's cross-entropy. `entropy`: the last layer's normalised entropy. `el2n`: the last layer's L2
            distance to the one-hot label over sqrt(2). `uniform`: 0 for all (the plain reward).
        layer_logits: (batch, layers, classes).
        labels: (batch,), int64.
        forgetting_counts: (batch,), counts of right-to-wrong changes of the last layer; needed by
            `forgetting_events` only. An instance that was never right counts as forgotten most often (Toneva et al.).

    Returns:
        (batch,), float32 in [0, 1]. `final_loss` is 1 - exp(-loss), the probability the label did not get.

    Raises:
        ValueError: if the measure is unknown, or lacks what it needs.

    Source: ConsistentEE (arXiv:2312.11882); forgetting events arXiv:1812.05159; EL2N arXiv:2107.07075.
    """
    num_layers = layer_logits.shape[1]
    last = layer_logits[:, -1].float()
    if measure == "memorized_layer":
        return memorized_layer(layer_logits, labels).float() / num_layers
    if measure == "uniform":
        return torch.zeros(len(labels), device=layer_logits.device)
    if measure == "final_loss":
        return 1 - last.softmax(-1).gather(1, labels[:, None]).squeeze(1)
    if measure == "entropy":
        log_probs = last.log_softmax(-1)
        limit = torch.log(torch.tensor(float(last.shape[-1])))
        return (-(log_probs.exp() * log_probs).sum(-1) / limit).clamp(0, 1)
    if measure == "el2n":
        error = last.softmax(-1) - torch.nn.functional.one_hot(labels, last.shape[-1])
        return (error.square().sum(-1) / 2).sqrt().clamp(0, 1)
    if measure == "forgetting_events":
        if forgetting_counts is None:
            raise ValueError(
                'hardness "forgetting_events" needs forgetting_counts from the warm-up, got None.'
            )
        return forgetting_counts.float() / forgetting_counts.max().clamp_min(1)
    raise ValueError(f'hardness must be one of {", ".join(HARDNESS_MEASURES)}, got "{measure}".')
