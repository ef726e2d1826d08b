"""What draws tokens: a generator of the call's own, or torch's."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import RLock
from typing import Any

import torch
from torch import Tensor

NO_TOKEN = -1
"""In place of a token that cannot be taken, as its logits are no numbers: the row cannot go on."""

_drawing = RLock()
"""Held by who draws from torch's generator as if it were another."""


def _new_lock() -> None:
    """In a forked process: leave what another thread held."""
    global _drawing
    _drawing = RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)


def tokens_from(logits: Tensor, *, do_sample: bool, generator: torch.Generator | None) -> Tensor:
    """The likeliest token of each row, or one that is drawn: (rows, words) -> (rows,); `NO_TOKEN` of no numbers."""
    broken = ~logits.amax(-1).isfinite()  # (rows,)
    logits = logits.masked_fill(broken[:, None], 0.0)
    if do_sample:
        tokens = torch.multinomial(logits.softmax(-1), num_samples=1, generator=generator).squeeze(1)
    else:
        tokens = logits.argmax(-1)
    return tokens.masked_fill(broken, NO_TOKEN)


def no_numbers(exit_layer: int) -> FloatingPointError:
    """The error for a token that is none (`NO_TOKEN`), by the 1-based layer of its exit."""
    return FloatingPointError(
        f"logits must be numbers to take a token from, got NaN at layer {exit_layer}. Check the model's weights, or "
        "load it in float32."
    )


def require_tokens(tokens: Tensor, exit_layers: Sequence[int]) -> None:
    """Raise FloatingPointError where one of the tokens, (rows,), is `NO_TOKEN`; the layers are those of their exits."""
    broken = (tokens == NO_TOKEN).nonzero()
    if len(broken):
        raise no_numbers(exit_layers[int(broken[0])])


def require_numbers(normed: Tensor, exit_layers: Sequence[int]) -> None:
    """Raise FloatingPointError where one of the states, (tokens, hidden), is no numbers, of which no token comes."""
    broken = (~normed.isfinite().all(-1)).nonzero()
    if len(broken):
        raise no_numbers(exit_layers[int(broken[0])])


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
