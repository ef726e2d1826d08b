"""What exits, as one table for both tasks: rows, or response tokens, after one pass of all layers over a data set.

From here on everything is written once: fits, cross-fitting, curves, thresholds, standard errors, the choice of rounds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Instances:
    """Instances of a data set in its order, on the CPU; with frozen classifiers all of it is constant.

    Attributes:
        correct: (instances, layers), bool, whether an exit gives the target.
        exit_cost: (instances, layers), float32, what exiting at a layer costs in quality, without the layers'.
        hardness: (instances,), float32 in [0, 1]: 0 pays the full cost per layer, 1 has layers for nothing; 0 for all
            under the uniform reward.
        group: (instances,), int64 from 0, ascending: what is not independent, hence in one fold: a row itself, or the
            text of a token.
        states: (instances, layers, hidden), float16, what a policy reads; None where they were not kept, and on
            processes other than the main one. May be memory-mapped.
        features: (instances, layers, features), what a policy reads beside it, if it does.
        layer_logits: (instances, layers, classes), what temperatures are fitted on; None where none are.
        labels: (instances,), int64, likewise.
        scores: by criterion, (instances, layers), exit scores that nothing has to be fitted for.
        targets: by criterion, (instances, layers), bool, what a network of its own learns to foretell.
    """

    correct: Tensor
    exit_cost: Tensor
    hardness: Tensor
    group: Tensor
    states: Tensor | None = None
    features: Tensor | None = None
    layer_logits: Tensor | None = None
    labels: Tensor | None = None
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    targets: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.correct)

    @property
    def kept_states(self) -> Tensor:
        """The states.

        Raises:
            ValueError: they were not kept.
        """
        if self.states is None:
            raise ValueError("states must be kept to fit on them, got None. Run with keep_pooled=True.")
        return self.states

    def first_groups(self, count: int) -> Instances:
        """The instances of the first so many groups."""
        end = int(torch.searchsorted(self.group, count))

        def cut(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {name: tensor[:end] for name, tensor in value.items()}
            return None if value is None else value[:end]

        return Instances(**{name: cut(value) for name, value in vars(self).items()})

    def and_more(self, more: Instances, states: Tensor | None) -> Instances:
        """These instances and others behind them, in groups of their own.

        Args:
            more: of the same layers and criteria.
            states: of all of them, as for one pass over both; None where they were not kept.
        """

        def joined(name: str) -> Any:
            one, other = getattr(self, name), getattr(more, name)
            if isinstance(one, Mapping):
                return {key: torch.cat([one[key], other[key]]) for key in one}
            return None if one is None else torch.cat([one, other])

        names = set(vars(self)) - {"group", "states"}
        group = torch.cat([self.group, more.group + int(self.group[-1]) + 1])
        return Instances(**{name: joined(name) for name in names}, group=group, states=states)


def cross_fitting(count: int, folds: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """For each fold, the indices of what is outside it, to fit on, and of what is in it, to be judged."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    fold_of = torch.empty_like(order)
    fold_of[order] = torch.arange(count) % min(folds, count)
    for fold in range(int(fold_of.max()) + 1):
        yield (fold_of != fold).nonzero().squeeze(1), (fold_of == fold).nonzero().squeeze(1)


def group_folds(
    group: Tensor, folds: int, seed: int, num_judged: int | None = None
) -> list[tuple[Tensor, Tensor]]:
    """For each fold, indices of the instances to fit on and of those to judge; a group stays together.

    Args:
        group: (instances,), ascending.
        folds: how many.
        seed: of the groups' order.
        num_judged: instances behind so many are fitted on in every fold and never judged; none if missing.

    Raises:
        ValueError: there is one group only.
    """
    count = len(group) if num_judged is None else num_judged
    names, group_of = group[:count].unique(return_inverse=True)
    more = torch.arange(count, len(group))
    if len(names) < 2:
        raise ValueError(
            f"validation rows to learn from must be at least 2, got {len(names)}. "
            "Give more rows, a higher validation_fraction, or for a text generator more policy_tokens."
        )
    pairs: list[tuple[Tensor, Tensor]] = []
    for _, judged in cross_fitting(len(names), folds, seed):
        inside = torch.isin(group_of, judged)
        pairs.append((torch.cat([(~inside).nonzero().squeeze(1), more]), inside.nonzero().squeeze(1)))
    return pairs
