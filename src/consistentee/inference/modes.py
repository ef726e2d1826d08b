"""What computing without training means for torch: no gradients, and the precision that was asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import ParamSpec, TypeVar

import torch

Given = ParamSpec("Given")
Result = TypeVar("Result")

_DEVICES = ("cpu", "cuda", "mps")


def inference_only(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """The function in torch's inference mode, outside of a `torch.autocast` around its call.

    Weights are laid out for one precision, and states kept in it: operations that autocast turned to another one would
    not fit together.
    """

    @functools.wraps(function)
    def run(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        with torch.inference_mode():
            casting = [device for device in _DEVICES if torch.is_autocast_enabled(device)]
            if not casting:
                return function(*args, **kwargs)
            with ExitStack() as stack:
                for device in casting:
                    stack.enter_context(torch.autocast(device, enabled=False))
                return function(*args, **kwargs)

    return run
