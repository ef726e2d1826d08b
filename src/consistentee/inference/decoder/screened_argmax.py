"""The most probable token without reading the whole LM head in full precision, and without guessing.

In a small model the LM head weighs as much as several layers, and greedy decoding wants only its largest logit. All
logits are first computed in int8, with a bound on each one's error; the few that may be the largest are computed again
from the weights themselves. What is left open after that (too many candidates, or logits so close that
rounding decides) is settled by reading the whole head. So the token is the one that `argmax` finds in the whole head's
logits, the lowest index among equals included.

Inputs are shifted to be unsigned: x86 multiplies unsigned by signed bytes. For signed by signed oneDNN has no kernel
where there is AVX-512 and no AMX, but a plain loop, a hundred times slower than float32. The integers are so small that
no processor's product can saturate: without VNNI two products are added in 16 bits, and a pair is
`2 * (2 * INPUT_LEVELS) * WEIGHT_LEVELS` at most, below 2^15. Sums of pairs are kept in 32 bits everywhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

CANDIDATES = 32
"""Logits computed again, per token; where they do not settle it, `MORE` times as many, in float64."""
MORE = 16
LEAST_WEIGHTS = 1 << 22
"""Heads with fewer weights are read whole: nothing is gained."""
WEIGHT_LEVELS = 127
"""The largest integer that weights take."""
INPUT_LEVELS = 64
"""The largest integer that inputs take, in each of their two digits, before they are shifted to be unsigned."""
UNIT = 2.0**-24
"""Relative rounding error of one operation in float32; whole heads of every precision sum in float32."""
SLACK = 2.0**-20
"""Relative margin for softened logits: tanh in float32 may turn round logits that are next to each other."""
TRIALS = 3
"""How often each of two ways is timed, in turn."""
USUAL_SIZES = (1e-12, 1e12)
"""Norms of rows and states that are screened: their squares neither vanish nor overflow in float32."""


class ScreenedArgmax:
    """Arg max over the logits of a linear map.

    Args:
        head: the LM head. Its weights are kept a second time as int8, where that is of use: on CPUs with oneDNN.
        soften: what stands between the head's logits and the model's, such as a soft cap; must not change their order,
            but may round different ones to the same.
    """

    def __init__(self, head: nn.Linear, soften: Callable[[Tensor], Tensor] = lambda logits: logits) -> None:
        self._weight, self._bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
        self._soften = soften
        self._packed: Any = None
        self._ways = FasterWay()
        if (
            self._bias is not None
            or self._weight.numel() < LEAST_WEIGHTS
            or not has_int8_products(head.weight.device)
        ):
            return
        weight = self._weight.float()
        self._norms = torch.linalg.vector_norm(weight, dim=1)  # (vocabulary,)
        if not USUAL_SIZES[0] < float(self._norms.max()) < USUAL_SIZES[1]:
            return
        self._scales = (weight.abs().amax(1) / WEIGHT_LEVELS).clamp_min(1e-30)
        levels = (weight / self._scales[:, None]).round()
        lost = torch.linalg.vector_norm(weight - levels * self._scales[:, None], dim=1)
        # What rounding adds to the sums below and to these norms themselves: less than four times a sum's own error.
        self._errors = lost + 4 * sum_error(weight.shape[1]) * self._norms  # (vocabulary,)
        self._zeros = torch.zeros(len(weight), dtype=torch.int64)
        self._packed = prepack(levels.to(torch.int8))

    def __call__(self, states: Tensor) -> Tensor:
        """(tokens, hidden) -> (tokens,) int64."""
        if self._packed is None or not _sums_in_float32():
            return self._whole(states)
        return self._ways(states, self._settled, self._whole)

    def _settled(self, states: Tensor) -> Tensor:
        """By what is certain alone, or by the whole head for all: its rounding may depend on the number of rows."""
        tokens, certain = self._screened(states)
        return tokens if bool(certain.all()) else self._whole(states)

    def _whole(self, states: Tensor) -> Tensor:
        return self._soften(nn.functional.linear(states, self._weight, self._bias)).argmax(-1)

    def _screened(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (tokens,), and whether each is certain."""
        exact = states.float()
        step = exact.abs().amax(1, keepdim=True).clamp_min(1e-30) / INPUT_LEVELS
        levels = exact / step
        coarse = levels.round()
        half = 0.5 / INPUT_LEVELS
        fine = ((levels - coarse) / half).round()  # a second digit: the inputs' error becomes small
        digits = torch.cat([coarse, fine]).add_(INPUT_LEVELS).to(torch.uint8)
        scores = int8_product(digits, self._packed, self._scales, self._zeros)
        count = len(states)
        scores = scores[:count].add_(scores[count:], alpha=half)  # times step: the logits of what was kept
        kept = (coarse + fine * half) * step
        size = torch.linalg.vector_norm(kept, dim=1, keepdim=True)  # (tokens, 1)
        lost = torch.linalg.vector_norm(exact - kept, dim=1, keepdim=True)
        # w x = w' x' + (w - w') x' + w (x - x'), by Cauchy and Schwarz: no logit is above its bound.
        errors = self._errors + self._norms * (lost / size.clamp_min(USUAL_SIZES[0])).max()
        bounds = scores.addcmul_(errors, size / step)  # times step
        tokens, certain = self._decide(states, bounds, step, CANDIDATES, torch.float32)
        if not bool(certain.all()):
            rows = (~certain).nonzero().squeeze(1)
            count = min(MORE * CANDIDATES, bounds.shape[1])
            again, settled = self._decide(states[rows], bounds[rows], step[rows], count, torch.float64)
            tokens, certain = tokens.index_copy(0, rows, again), certain.index_copy(0, rows, settled)
        return tokens, certain & ((size > USUAL_SIZES[0]) & (size < USUAL_SIZES[1])).squeeze(1)

    def _decide(
        self, states: Tensor, bounds: Tensor, step: Tensor, count: int, precision: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Tokens and whether they are certain, from so many words with the highest bounds."""
        highest, words = bounds.topk(count, dim=1)
        tokens, least, certain = self._settle(states, words, precision)
        others = self._as_head(highest[:, -1:] * step, states.dtype)
        return tokens, certain & (others < least).squeeze(1)

    def _settle(
        self, states: Tensor, candidates: Tensor, precision: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The arg max over some words, (tokens, candidates), whose logits are computed in float32 or float64.

        Returns:
            The token (tokens,), a value (tokens, 1) that the other words' logits must stay below, and whether the
            token is certain (tokens,): it stands out by more than rounding, or equals others whatever the rounding.
        """
        rows, inputs = self._weight[candidates].to(precision), states.to(precision)[:, :, None]
        logits = torch.bmm(rows, inputs).squeeze(2)
        reach = torch.bmm(rows.abs_(), inputs.abs()).squeeze(2)
        sums = 2 if precision == torch.float32 else 1  # that round: these logits' and the whole head's
        error = reach.mul_(sums * sum_error(states.shape[1]))
        lowest, highest = (self._as_head(bound, states.dtype) for bound in (logits - error, logits + error))
        best = lowest.amax(1, keepdim=True)
        least = best - SLACK * best.abs()
        contends = highest >= least
        tokens = candidates.masked_fill(~contends, len(self._weight)).amin(1)
        fixed = (lowest == best) & (highest == best)
        certain = (contends.sum(1) == 1) | (fixed | ~contends).all(1)
        return tokens, least, certain

    def _as_head(self, logits: Tensor, dtype: torch.dtype) -> Tensor:
        """Logits as the model gives them: rounded to its precision, and softened."""
        return self._soften(logits.to(dtype)).float()


class FasterWay:
    """Calls whichever of two functions that give the same is faster here, for about so many rows.

    Which one is depends on the processor, on the precision and on the rows: many are read in bfloat16 as fast as in
    int8. So the first calls with each number of rows, up to the next power of two, time both in turn.
    """

    def __init__(self) -> None:
        self._times: dict[int, tuple[list[float], list[float]]] = {}

    def __call__(
        self, rows: Tensor, first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """What the one or the other gives for these rows."""
        firsts, seconds = self._times.setdefault((len(rows) - 1).bit_length(), ([], []))
        if len(seconds) >= TRIALS:
            return (first if median(firsts) <= median(seconds) else second)(rows)
        way, times = (first, firsts) if len(firsts) <= len(seconds) else (second, seconds)
        start = time.perf_counter()
        result = way(rows)
        times.append(time.perf_counter() - start)
        return result


def sum_error(terms: int) -> float:
    """How far a product of vectors can be off in float32, in any order: a share of the sum of its terms' sizes."""
    return 1.01 * terms * UNIT


def has_int8_products(device: torch.device) -> bool:
    """Whether oneDNN's int8 products run here, and faster than float32's."""
    return has_int8_operators(device) and _is_faster()


def has_int8_operators(device: torch.device) -> bool:
    """Whether torch can ask oneDNN for products of unsigned with signed bytes on this device, and they are right."""
    return device.type == "cpu" and torch.backends.mkldnn.is_available() and _multiplies_int8()


def _sums_in_float32() -> bool:
    """Whether torch was left to multiply float32 as float32; the bounds are for that."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set by torch's newer switches, which this question does not see
        return False


@cache
def _multiplies_int8() -> bool:
    """Tried with the largest integers of both signs."""
    weight = torch.full((64, 64), WEIGHT_LEVELS, dtype=torch.int8)
    weight[::2] = -WEIGHT_LEVELS
    levels = torch.full((2, 64), float(INPUT_LEVELS))
    levels[1] = -INPUT_LEVELS
    rows = (levels + INPUT_LEVELS).to(torch.uint8)
    try:
        found = int8_product(rows, prepack(weight), torch.ones(64), torch.zeros(64, dtype=torch.int64))
    except (AttributeError, RuntimeError):
        return False
    return bool((found == levels @ weight.float().T).all())


@cache
def _is_faster() -> bool:
    """Timed once, on one row: the least of some runs each, in turn.

    Without a kernel for this processor oneDNN takes a hundred times as long, too long to be tried on a whole head.
    """
    outputs, inputs = 8192, 512
    weight = torch.zeros(outputs, inputs)
    packed, scales = prepack(weight.to(torch.int8)), torch.ones(outputs)
    zeros, rows = torch.zeros(outputs, dtype=torch.int64), torch.zeros((2, inputs), dtype=torch.uint8)
    halves = torch.zeros(1, inputs)
    in_int8 = in_float32 = float("inf")
    for _ in range(TRIALS):
        start = time.perf_counter()
        int8_product(rows, packed, scales, zeros)
        between = time.perf_counter()
        nn.functional.linear(halves, weight)
        in_int8, in_float32 = min(in_int8, between - start), min(in_float32, time.perf_counter() - between)
    return in_int8 < in_float32


def prepack(weight: Tensor) -> Tensor:
    """Weights (outputs, inputs) int8, as oneDNN likes them for a few rows at a time."""
    return torch.ops.onednn.qlinear_prepack(weight, [2, weight.shape[1]])


def int8_product(rows: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Rows (rows, inputs) times packed int8 weights (outputs, inputs): (rows, outputs) float32.

    Args:
        rows: the inputs plus `INPUT_LEVELS`, uint8.
        packed: from `prepack`.
        scales: (outputs,) factors of the weights.
        zeros: (outputs,) int64, zero.
    """
    return torch.ops.onednn.qlinear_pointwise(
        rows, 1.0, INPUT_LEVELS, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
