"""A model's weights as plain functions, and how to tell that they have changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from consistentee.inference.other_weights import masks_in

Map = Callable[[Tensor], Tensor]


def norm_function(module: nn.Module, kind: str) -> Map:
    """A norm as a function of (..., size); raises ValueError for an adapter."""
    norm: Any = _plain_norm(module)
    if kind == "layer":
        shape, weight, bias, eps = norm.normalized_shape, norm.weight, norm.bias, norm.eps
        return lambda states: functional.layer_norm(states, shape, weight, bias, eps)
    weight, eps = rms_weight(norm, kind), norm_epsilon(norm)
    shape = tuple(weight.shape)
    return lambda states: functional.rms_norm(states, shape, weight, eps)


def norm_epsilon(norm: Any) -> float:
    """What a norm adds to the variance."""
    return float(getattr(norm, "variance_epsilon", None) or norm.eps)


def unit_norm(size: int, kind: str, epsilon: float) -> Map:
    """The part of a norm that has no weights."""
    shape = (size,)
    if kind == "layer":
        return lambda states: functional.layer_norm(states, shape, None, None, epsilon)
    return lambda states: functional.rms_norm(states, shape, None, epsilon)


def affine_norm(norm: Any, kind: str) -> tuple[Tensor, Tensor | None]:
    """The rest of a norm: factors and shift (None for RMS norms), each (size,); raises ValueError for an adapter."""
    norm = _plain_norm(norm)
    if kind == "layer":
        return norm.weight.detach(), norm.bias.detach()
    return rms_weight(norm, kind), None


def _plain_norm(norm: Any) -> Any:
    if hasattr(norm, "base_layer"):  # peft's mark
        raise ValueError(
            f"norms must be plain to generate with exits, got {type(norm).__name__}. "
            "Merge the adapter first: merge_and_unload()."
        )
    return norm


def rms_weight(norm: Any, kind: str) -> Tensor:
    """The factors of an RMS norm; stored minus one in gemma."""
    weight = norm.weight.detach()
    return weight if kind == "rms" else (weight.float() + 1).to(weight.dtype)


def linear_function(module: nn.Module) -> Map:
    """A linear map as a function of (tokens, inputs); a module of another kind (an adapter) stays what it is."""
    if type(module) is nn.Linear:
        weight, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()
        return lambda states: functional.linear(states, weight, bias)
    if type(module) is Conv1D:
        weight, bias = module.weight.detach(), module.bias.detach()
        return lambda states: torch.addmm(bias, states, weight)
    return cast(Map, module)


def adding_function(module: nn.Module) -> Callable[[Tensor | None, Tensor], Tensor]:
    """A linear map whose result is added to a first argument, in one call where there is no bias."""
    if type(module) is nn.Linear and module.bias is None:
        transposed = module.weight.detach().t()

        def add(residual: Tensor | None, states: Tensor) -> Tensor:
            if residual is None:
                return torch.mm(states, transposed)
            return torch.addmm(residual, states, transposed)

        return add
    run = linear_function(module)
    return lambda residual, states: run(states) if residual is None else residual + run(states)


def active_module(module: Any) -> Any:
    """The module that runs where peft keeps others beside it (`modules_to_save`); any other module itself."""
    kept = getattr(module, "modules_to_save", None)
    if not isinstance(kept, nn.ModuleDict):
        return module
    active: list[str] = [] if module.disable_adapters else module.active_adapters[:1]
    return kept[active[0]] if active and active[0] in kept else module.original_module


def weight_signature(model: nn.Module, copied: Sequence[Tensor] = ()) -> tuple[Any, ...]:
    """Tells whether weights or modules were replaced or weights changed in place since, or adapters switched.

    Args:
        model: whose weights.
        copied: those of which there are copies. They are read, as torch does not count what is written through `.data`.
            The 46 million of SmolLM2-135M take half to three quarters of the time of one token at full depth.
    """
    masks = [mask for module in model.modules() for mask in masks_in(module)]
    counted = tuple(
        (weight.data_ptr(), 0 if weight.is_inference() else weight._version, weight.dtype)
        for weight in (*model.parameters(), *masks)
    )
    read = [*copied, *masks]
    sums = torch.cat([_checksum(weight) for weight in read]).tolist() if read else []
    return (*counted, *_adapter_states(model), *map(type, model.modules()), *sums)


def _adapter_states(model: nn.Module) -> list[tuple[Any, ...]]:
    """Which adapters are switched on in each of peft's modules."""
    states: list[tuple[Any, ...]] = []
    for module in model.modules():
        if isinstance(getattr(type(module), "disable_adapters", None), property):  # a method of models
            own: Any = module
            states.append((own.disable_adapters, *own.active_adapters, None, *own.merged_adapters))
    return states


def _checksum(weight: Tensor) -> Tensor:
    """Two numbers, int64, each of which every changed bit changes: words count by their row, and by their column."""
    flat = weight.detach().reshape(-1)
    per_word = max(1, 8 // flat.element_size())
    if flat.storage_offset() % per_word:
        flat = flat.clone()
    whole = len(flat) - len(flat) % per_word
    words = flat[:whole].view(torch.int64)
    in_rows = weight.ndim > 1 and len(flat) > 0 and not len(flat) % (len(weight) * per_word)
    rows = len(weight) if in_rows else len(words)
    table = words.view(rows, len(words) // max(1, rows))

    def weighted(sums: Tensor) -> Tensor:
        return (sums * (2 * torch.arange(len(sums), device=flat.device) + 1)).sum()  # odd: no bit is lost

    rest = flat[whole:].view(torch.uint8).sum()
    return torch.stack([weighted(table.sum(1)) + rest, weighted(table.sum(0)) + rest])


def plain_weights(module: Any) -> tuple[Tensor, Tensor | None] | None:
    """Weight (outputs, inputs) and bias of a plain linear map; None for any other module."""
    if type(module) is nn.Linear:
        return module.weight.detach(), None if module.bias is None else module.bias.detach()
    if type(module) is Conv1D:
        return module.weight.detach().t(), module.bias.detach()
    return None
