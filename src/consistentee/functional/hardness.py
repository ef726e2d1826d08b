"""How hard an instance is, row or token: the memorized layer of ConsistentEE and other measures, a table at the end.

Every measure maps to a hardness in [0, 1], (instances,): 0 = pay the full cost per layer, 1 = layers are free. The
hardness-guided reward multiplies the cost by one minus it. To add a measure, write its function and its row, and put
its name into `config.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from consistentee.functional.tables import (
    CLASSIFICATION,
    GENERATION,
    Formula,
    names_of,
    row_of,
    value_of,
)


def memorized_layer(right: Tensor) -> Tensor:
    """The lowest layer from which every layer up to the last is right; the last layer where that is wrong.

    Args:
        right: (instances, layers), bool, whether an exit gives the label, or for tokens the reference token.

    Returns:
        (instances,), int64 in 1..layers.

    Source: ConsistentEE (arXiv:2312.11882), "memorized layer"; their ML -> ours, no difference.

    Example:
        >>> memorized_layer(torch.tensor([[True, False, True]]))
        tensor([3])
    """
    tail = right.flip(1).int().cumprod(1).sum(1)  # how many layers at the end are right without a gap
    return (right.shape[1] - tail + 1).clamp(max=right.shape[1])


def memorized_layer_hardness(right: Tensor) -> Tensor:
    """The memorized layer over the number of layers, the paper's ML / L."""
    return memorized_layer(right).float() / right.shape[1]


def forgetting_hardness(forgetting_counts: Tensor) -> Tensor:
    """How often an instance went from right to wrong in the warm-up, over the largest count.

    Args:
        forgetting_counts: (instances,), right-to-wrong changes of the last layer; an instance that was never right
            counts as forgotten most often.

    Source: Toneva et al. (arXiv:1812.05159).
    """
    return forgetting_counts.float() / forgetting_counts.max().clamp_min(1)


def final_loss_hardness(losses: Tensor) -> Tensor:
    """The probability that the last layer does not give to the label, from (instances, layers) cross-entropies."""
    return 1 - (-losses[:, -1]).exp()


def entropy_hardness(last_logits: Tensor) -> Tensor:
    """The last layer's normalised entropy, from (instances, classes) logits."""
    log_probs = last_logits.float().log_softmax(-1)
    limit = torch.log(torch.tensor(float(last_logits.shape[-1])))
    return (-(log_probs.exp() * log_probs).sum(-1) / limit).clamp(0, 1)


def el2n_hardness(last_logits: Tensor, labels: Tensor) -> Tensor:
    """The last layer's L2 distance to the one-hot label over sqrt(2).

    Source: Paul et al. (arXiv:2107.07075), EL2N.
    """
    error = last_logits.float().softmax(-1) - torch.nn.functional.one_hot(labels, last_logits.shape[-1])
    return (error.square().sum(-1) / 2).sqrt().clamp(0, 1)


def no_hardness(losses: Tensor) -> Tensor:
    """0 for all: the plain reward."""
    return torch.zeros(len(losses), device=losses.device)


HARDNESS: dict[str, Formula] = {
    "memorized_layer": Formula(
        function=memorized_layer_hardness,
        reads=("right",),
        source="ConsistentEE (arXiv:2312.11882)",
        relation="The only one that looks at all layers.",
    ),
    "forgetting_events": Formula(
        function=forgetting_hardness,
        reads=("forgetting_counts",),
        tasks=(CLASSIFICATION,),
        source="Toneva et al. (arXiv:1812.05159)",
        relation="Looks at the course of the warm-up, not at its end.",
    ),
    "final_loss": Formula(
        function=final_loss_hardness,
        reads=("losses",),
        source="the usual sense of a hard instance",
        relation="Hard is what the last layer gets wrong, at whichever layer the others get it right.",
    ),
    "entropy": Formula(
        function=entropy_hardness,
        reads=("last_logits",),
        tasks=(CLASSIFICATION,),
        source="ours: needs no label",
        relation="As `final_loss`, but what the last layer is sure of is easy even where it is wrong.",
    ),
    "el2n": Formula(
        function=el2n_hardness,
        reads=("last_logits", "labels"),
        tasks=(CLASSIFICATION,),
        source="Paul et al. (arXiv:2107.07075)",
        relation="For two classes the same as `final_loss`.",
    ),
    "uniform": Formula(
        function=no_hardness,
        reads=("losses",),
        source="the plain reward",
        relation="All instances pay the same.",
    ),
}
HARDNESS_MEASURES = names_of(HARDNESS, CLASSIFICATION)
TOKEN_HARDNESS_MEASURES = names_of(HARDNESS, GENERATION)


def hardness(measure: str, **known: Tensor | None) -> Tensor:
    """Hardness of every instance under a measure, (instances,), float32 in [0, 1].

    Args:
        measure: one of `HARDNESS`.
        known: what the row may read: `right` and `losses`, (instances, layers), whether exits give the target and their
            cross-entropies of the label; `last_logits`, (instances, classes); `labels` and `forgetting_counts`,
            (instances,).

    Raises:
        ValueError: the measure is unknown, or what it reads is missing.
    """
    return value_of(row_of(HARDNESS, measure, "hardness"), f'hardness "{measure}"', known)
