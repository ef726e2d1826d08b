"""Weights that others than a model's own training laid a hand on: pruned by torch, or kept elsewhere by accelerate."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod


@torch.no_grad()
def apply_masks(model: nn.Module) -> None:
    """Bring pruned weights up to date; torch does so only when it calls their modules."""
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, BasePruningMethod):
                hook(module, None)


def masks_in(module: nn.Module) -> Iterator[Tensor]:
    """Buffers beside a module's own weights, such as the masks by which torch prunes them."""
    if module._parameters:
        yield from (buffer for buffer in module._buffers.values() if buffer is not None)


def weights_elsewhere(model: nn.Module) -> list[str]:
    """Names of the weights that are not in memory: accelerate offloaded them, or nothing gave them values yet.

    Empty where the whole model was opened without weights, for its shapes alone.
    """
    weights = dict(model.named_parameters())
    elsewhere = [name for name, weight in weights.items() if weight.is_meta]
    if len(elsewhere) < len(weights):
        return elsewhere
    from accelerate.utils import has_offloaded_params

    return elsewhere if any(has_offloaded_params(module) for module in model.modules()) else []
