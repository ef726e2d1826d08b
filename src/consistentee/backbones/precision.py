"""Other precisions of a model's weights, without what transformers keeps in float32."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def cast_parameters(model: Module, dtype: torch.dtype) -> Module:
    """Put a model's floating point weights into another precision, in place, as opening it in that precision does.

    Buffers that are not saved, such as the frequencies of rotary positions, stay as they are: in bfloat16 a position of
    some thousands would be off by several.

    Args:
        model: to change.
        dtype: a floating point one.

    Returns:
        The same model.
    """
    saved = model.state_dict().keys()
    kept = [(name, buffer) for name, buffer in model.named_buffers() if name not in saved]
    model.to(dtype)
    for path, buffer in kept:
        module, _, name = path.rpartition(".")
        setattr(model.get_submodule(module), name, buffer)
    return model
