"""What draws tokens: a generator of the call's own, or torch's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any

import torch
from torch import Tensor

_drawing = RLock()
"""Held by who draws from torch's generator as if it were another."""


def _new_lock() -> None:
    """In a forked process: leave what another thread held."""
    global _drawing
    _drawing = RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)


def tokens_from(logits: Tensor, *, do_sample: bool, generator: torch.Generator | None) -> Tensor:
    """The likeliest token of each row, or one that is drawn: (rows, words) -> (rows,)."""
    if do_sample:
        return torch.multinomial(logits.softmax(-1), num_samples=1, generator=generator).squeeze(1)
    return logits.argmax(-1)


@contextmanager
def drawing_from(generator: torch.Generator | None) -> Iterator[None]:
    """Let torch's own draws, on the generator's device, be this one's; afterwards torch's go on as if nothing had been.

    One thread does so at a time; others that would wait for it. Draws of threads that do not ask are mixed in.

    Args:
        generator: for loops that cannot be handed one, such as Hugging Face's; None changes nothing.
    """
    if generator is None:
        yield
        return
    device = generator.device
    module: Any = torch if device.type == "cpu" else torch.get_device_module(device)
    where = () if device.type in ("cpu", "mps") else (device,)  # those have one each
    with _drawing:
        kept = module.get_rng_state(*where)
        module.set_rng_state(generator.get_state(), *where)
        try:
            yield
        finally:
            generator.set_state(module.get_rng_state(*where))
            module.set_rng_state(kept, *where)
