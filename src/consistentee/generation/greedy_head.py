"""The most probable token without reading the whole LM head in full precision, and without guessing.

In a small model the LM head weighs as much as several layers, and greedy decoding wants only its largest logit. All
logits are first computed in int8, with a bound on each one's error; the few that may be the largest are computed again
from the weights themselves. The bound is strict, so the token is the one that the whole head would have given; where
too many candidates remain, the whole head is read.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

CANDIDATES = 64
"""Logits computed again, per token."""
LEAST_WEIGHTS = 1 << 22
"""Heads with fewer weights are read whole: nothing is gained."""
LEVELS = 63
"""The largest integer that inputs take: 7 bits, so that processors without VNNI do not overflow."""
ROUNDING = 2.0**-20
"""Relative error that is granted to sums in float32, many times what they have."""


class GreedyHead:
    """Arg max over the logits of a linear map.

    Args:
        head: the LM head. Its weights are kept a second time as int8, where that is of use: on CPUs with oneDNN.
    """

    def __init__(self, head: nn.Linear) -> None:
        self._weight, self._bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
        self._packed: Tensor | None = None
        if (
            self._bias is not None
            or self._weight.numel() < LEAST_WEIGHTS
            or not has_int8_products(head.weight.device)
        ):
            return
        weight = self._weight.float()
        self._scales = (weight.abs().amax(1) / 127).clamp_min(1e-30)
        levels = (weight / self._scales[:, None]).round()
        norms = torch.linalg.vector_norm(weight, dim=1)
        self._errors = torch.linalg.vector_norm(
            weight - levels * self._scales[:, None], dim=1
        )  # (vocabulary,)
        self._largest_norm = float(norms.max())
        self._zeros = torch.zeros(len(weight), dtype=torch.int64)
        self._packed = torch.ops.onednn.qlinear_prepack(levels.to(torch.int8), [2, weight.shape[1]])

    def __call__(self, states: Tensor) -> Tensor:
        """(tokens, hidden) -> (tokens,) int64."""
        if self._packed is None:
            return self._whole(states)
        tokens, certain = self._screened(states)
        if bool(certain.all()):
            return tokens
        open_rows = (~certain).nonzero().squeeze(1)
        return tokens.index_copy(0, open_rows, self._whole(states[open_rows]))

    def _whole(self, states: Tensor) -> Tensor:
        return nn.functional.linear(states, self._weight, self._bias).max(-1).indices

    def _screened(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (tokens,), and whether each is certain."""
        exact = states.float()
        step = exact.abs().amax(1, keepdim=True).clamp_min(1e-30) / LEVELS
        levels = exact / step
        coarse = levels.round()
        fine = (
            (levels - coarse) * (2 * LEVELS)
        ).round()  # a second digit: the inputs' error becomes negligible
        digits = torch.cat([coarse, fine]).to(torch.int8)
        scores = torch.ops.onednn.qlinear_pointwise(
            digits,
            1.0,
            0,
            self._packed,
            self._scales,
            self._zeros,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        count = len(states)
        scores = torch.add(scores[:count], scores[count:], alpha=0.5 / LEVELS).mul_(step)
        kept = (coarse + fine * (0.5 / LEVELS)) * step
        size = torch.linalg.vector_norm(kept, dim=1)  # (tokens,)
        lost = torch.linalg.vector_norm(exact - kept, dim=1)
        constant = self._largest_norm * (lost + ROUNDING * size)
        bounds = torch.addcmul(
            scores, self._errors, size[:, None]
        )  # no logit is above its bound plus the constant
        top = bounds.topk(CANDIDATES, dim=1)
        # (tokens, candidates): in the model's own precision, as the whole head computes them
        logits = torch.bmm(self._weight[top.indices], states[:, :, None]).squeeze(2).float()
        best, place = logits.max(1)
        others = top.values[:, -1] + constant
        if states.dtype != torch.float32:  # the whole head's rounded logits may tie
            others = others + 2 * torch.finfo(states.dtype).eps * best.abs()
        return top.indices.gather(1, place[:, None]).squeeze(1), others < best


def has_int8_products(device: torch.device) -> bool:
    """Whether oneDNN's int8 products run here."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    try:
        return bool(torch.ops.onednn.qlinear_prepack and torch.ops.onednn.qlinear_pointwise)
    except AttributeError:
        return False
