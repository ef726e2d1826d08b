"""What computing without training means for torch: no gradients, and the precision that was asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import ParamSpec, TypeVar

import torch

Given = ParamSpec("Given")
Result = TypeVar("Result")

_DEVICES = ("cpu", "cuda", "mps")


@contextmanager
def inference_without_autocast() -> Iterator[None]:
    """Torch's inference mode, outside of a `torch.autocast` around it.

    Weights are laid out for one precision, states are kept in it and products written into them in place: what autocast
    turned to another one would not fit together.
    """
    with torch.inference_mode(), ExitStack() as stack:
        for device in _DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def inference_only(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """The function under `inference_without_autocast`."""

    @functools.wraps(function)
    def run(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        with inference_without_autocast():
            return function(*args, **kwargs)

    return run
