"""What some judged rows prove about all rows of their kind: exact bounds, and thresholds that keep a promise.

The promise: the expected loss of exiting by a threshold is at most `max_loss`. Rows are judged once and drawn
independently from what the model will see; then the promise is broken with probability 1 - `confidence` at most, over
the draw of the rows. Nothing is assumed about the model, its scores, or how the loss varies with the threshold.

**Learn then Test.** For each threshold `h` let `R(h)` be its expected loss, and the hypothesis of `h` be
`R(h) > max_loss`. A p-value `p(h)` of the judged rows is at most `a` with probability at most `a` where the hypothesis
holds. The thresholds are tested in one order, from the highest (no row exits early) down to the lowest, each at the
whole level `1 - confidence`, and the walk ends at the first that is not rejected. What was walked over is returned.

Why it holds. The order is "from high to low", fixed before any row is seen. Let `h*` be the supremum of the thresholds
whose hypothesis holds. If it is attained, a broken promise means that the walk went past `h*`, hence `p(h*)` was
rejected: probability at most `1 - confidence`. If it is not attained, take thresholds `h_1 < h_2 < ...` with limit `h*`
whose hypotheses hold: a broken promise is the union of the growing events "the walk went past `h_k`", each of
probability at most `1 - confidence`, and so is their limit. That is fixed-sequence testing with an interval in place of
a list.

Why there is no grid. On given rows the losses change only where the threshold passes a score, so the interval falls
into pieces `[lower score, higher score)` on which the test is the same; `certify` tests every piece and so every
threshold. The scores say where the pieces end, not which thresholds are tested or in which order. A grid of quantiles
of the same rows' scores would be another matter: which hypotheses are tested would then depend on the rows, and given
the scores the losses are no longer draws with mean `R(h)`. Thresholds of *other* rows may be handed in (`thresholds`).

**P-values.** Losses of 0 and 1: the exact binomial tail `P(Bin(n, max_loss) <= losses)`. Losses in [0, 1]:
Hoeffding-Bentkus, the smaller of Hoeffding's tail and e times the binomial one. Both are in `bounds.py`.

Source: Angelopoulos, Bates, Candès, Jordan, Lei, "Learn then Test" (arXiv:2110.01052), fixed-sequence testing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from consistentee.functional.bounds import (
    binomial_upper_bound,
    bounded_losses_allowed,
    check_promise,
    hoeffding_bentkus_upper_bound,
    losses_allowed,
)
from consistentee.functional.criteria import EXIT_CRITERIA, check_threshold

Array = NDArray[Any]


@dataclass(frozen=True)
class ThresholdPieces:
    """What exiting by a threshold gives on some rows, for every threshold, from the highest to the lowest.

    Attributes:
        low: (pieces,) float64, the threshold at which a piece begins, descending; the piece ends below the one before.
        losses: (pieces,) float64, the rows' summed losses.
        layers: (pieces,) float64, the rows' summed exit layers.
        num_rows, num_layers: of the scores.
        criterion: whose thresholds these are.
    """

    low: Array
    losses: Array
    layers: Array
    num_rows: int
    num_layers: int
    criterion: str

    def __len__(self) -> int:
        return len(self.low)

    def threshold(self, piece: int) -> float:
        """A threshold inside a piece: halfway, so that the last digits of a score do not move a row.

        It is a float32 number, as scores are; where there is none between the ends, the lower end.
        """
        known = EXIT_CRITERIA[self.criterion].thresholds
        low = float(self.low[piece])
        if known.layers:
            return low if piece == len(self) - 1 and not known.above_low else low + 0.5
        high = float(self.low[piece - 1]) if piece else known.high
        middle = float(np.float32((low + high) / 2))
        return middle if low < middle < high else low

    def piece_of(self, threshold: float) -> int:
        """The piece that a threshold lies in, compared as float32 like the scores."""
        return min(int(np.count_nonzero(self.low > np.float32(threshold))), len(self) - 1)

    def mean_exit_layer(self, piece: int) -> float:
        """The rows' mean exit layer."""
        return float(self.layers[piece]) / self.num_rows


def threshold_pieces(scores: Tensor, losses: Tensor, criterion: str = "policy") -> ThresholdPieces:
    """Losses and exit layers at every threshold of a criterion's range.

    A row exits at the first layer whose score exceeds the threshold, so it moves to an earlier layer where the
    threshold falls below a score that is higher than all before it. All such moves, sorted, give all pieces.

    Args:
        scores: (rows, layers), exit scores, taken as float32; the last layer's do not count.
        losses: (rows, layers), the loss of exiting at each layer, any finite numbers.
        criterion: whose scores they are.

    Raises:
        ValueError: there is no row, shapes differ, or a number is not finite.
    """
    if scores.shape != losses.shape or scores.ndim != 2 or not len(scores):
        raise ValueError(
            "scores and losses must both be (rows, layers) with at least one row, got "
            f"{tuple(scores.shape)} and {tuple(losses.shape)}."
        )
    values = scores.detach().cpu().float().double().numpy()
    costs = losses.detach().cpu().double().numpy()
    if not (np.isfinite(values[:, :-1]).all() and np.isfinite(costs).all()):
        raise ValueError("scores and losses must be finite numbers, got one that is not.")
    rows, num_layers = values.shape
    known = EXIT_CRITERIA[criterion].thresholds
    totals = [costs[:, -1].sum(), float(rows * num_layers)]
    if num_layers < 2:
        first, second = (np.array([total]) for total in totals)
        return ThresholdPieces(np.array([known.low]), first, second, rows, num_layers, criterion)
    highest = np.maximum.accumulate(values[:, :-1], axis=1)  # (rows, layers - 1)
    is_new = np.ones_like(highest, dtype=bool)
    is_new[:, 1:] = highest[:, 1:] > highest[:, :-1]
    is_new &= highest > known.low  # no threshold is below the lowest
    # Where a row exits before the threshold falls below this score: the next layer with a higher one, or the last.
    index = np.arange(num_layers - 1)
    following = np.full(highest.shape, num_layers - 1)
    after = np.where(is_new, index, num_layers - 1)
    following[:, :-1] = np.minimum.accumulate(after[:, :0:-1], axis=1)[:, ::-1]
    row, layer = np.nonzero(is_new)
    next_layer = following[row, layer]
    moved_at = highest[row, layer]
    order = np.argsort(-moved_at, kind="stable")
    row, layer, next_layer, moved_at = row[order], layer[order], next_layer[order], moved_at[order]
    last_of_tie = np.append(moved_at[1:] != moved_at[:-1], True) if len(moved_at) else np.zeros(0, bool)
    changes = (
        costs[row, layer] - costs[row, next_layer],
        (layer - next_layer).astype(np.float64),
    )
    sums = [
        np.concatenate([[total], total + np.cumsum(change)[last_of_tie]])
        for total, change in zip(totals, changes, strict=True)
    ]
    low = np.append(moved_at[last_of_tie], known.low)
    return ThresholdPieces(low, sums[0], sums[1], rows, num_layers, criterion)


@dataclass(frozen=True)
class Certified:
    """A threshold, and what the judged rows prove about it.

    Attributes:
        criterion, threshold: a row exits at the first layer whose score exceeds the threshold.
        max_loss: the promise; None where the threshold was given, and the bound is all that is claimed.
        confidence: of the promise, or of the bound.
        num_rows: judged rows.
        losses: their losses, summed; whole where they are 0 or 1.
        losses_allowed: the most with which the promise would still be certified; None without a promise.
        bound: upper confidence bound of the expected loss at the threshold, as if it had been named beforehand. After a
            walk it is the smallest promise that the last test would have passed; what is certified is `max_loss`.
        mean_exit_layer: of the judged rows.
        layer_speedup: layers over mean exit layer.
    """

    criterion: str
    threshold: float
    max_loss: float | None
    confidence: float
    num_rows: int
    losses: float
    losses_allowed: float | None
    bound: float
    mean_exit_layer: float
    layer_speedup: float


def certify(
    scores: Tensor,
    losses: Tensor,
    *,
    max_loss: float,
    confidence: float = 0.95,
    criterion: str = "policy",
    thresholds: Sequence[float] | None = None,
    bounded: bool = False,
) -> Certified | None:
    """The fastest threshold whose expected loss is certified to be at most `max_loss`, by Learn then Test.

    The module's docstring derives the guarantee. It is about rows like these on average: not about one input, not
    about a part of them such as a class, and not about rows of another kind. The rows must have had no part in choosing
    anything that the scores come from: weights, policy, criterion, thresholds.

    Args:
        scores: (rows, layers), exit scores.
        losses: (rows, layers), the loss of exiting at each layer, in [0, 1].
        max_loss: expected loss that is promised not to be exceeded, in (0, 1).
        confidence: in (0, 1), the least probability that the promise holds.
        criterion: whose scores they are.
        thresholds: tested from the highest down in place of the whole range. They must not come from these rows: which
            hypotheses are tested may not depend on what they are tested on.
        bounded: whether losses lie anywhere in [0, 1], and the test is Hoeffding-Bentkus; else they must be 0 or 1, and
            it is the binomial one. It must not be chosen by what the rows happen to show.

    Returns:
        The last threshold that passed; None where the first did not: too few rows.

    Raises:
        ValueError: shapes, a number out of its range, or a loss that is neither 0 nor 1 without `bounded`.

    Source: arXiv:2110.01052, fixed-sequence testing; their `lambda` is the threshold, `alpha` is `max_loss`, `delta` is
        1 - `confidence`. Difference: an interval in place of a list of thresholds.

    Example:
        >>> import torch
        >>> scores = torch.tensor([[0.9, 1.0]]).expand(400, 2)
        >>> found = certify(scores, torch.zeros(400, 2), max_loss=0.01)
        >>> found is not None and (found.mean_exit_layer, found.losses_allowed, round(found.bound, 4))
        (1.0, 0, 0.0075)
    """
    check_promise(max_loss, confidence)
    _check_losses(losses, bounded)
    pieces = threshold_pieces(scores, losses, criterion)
    num_allowed = bounded_losses_allowed if bounded else losses_allowed
    allowed = num_allowed(pieces.num_rows, max_loss, confidence)
    at: Callable[[int], float] = pieces.threshold
    walked = np.arange(len(pieces))
    if thresholds is not None:
        ordered = sorted((check_threshold(value, criterion) for value in thresholds), reverse=True)
        walked = np.array([pieces.piece_of(value) for value in ordered], dtype=np.int64)
        at = ordered.__getitem__
    # Sums of fractions differ in their last digits by the order of adding.
    passes = pieces.losses[walked] <= allowed + (1e-9 if bounded else 0.0)
    passed = len(passes) if passes.all() else int(np.argmin(passes))
    if not passed:
        return None
    return _certified(pieces, int(walked[passed - 1]), at(passed - 1), max_loss, confidence, allowed, bounded)


def bound_at(
    scores: Tensor,
    losses: Tensor,
    threshold: float,
    *,
    confidence: float = 0.95,
    criterion: str = "policy",
    bounded: bool = False,
) -> Certified:
    """The upper confidence bound of the expected loss at one threshold, which must not come from these rows.

    Arguments and errors as in `certify`.
    """
    _check_losses(losses, bounded)
    pieces = threshold_pieces(scores, losses, criterion)
    threshold = check_threshold(threshold, criterion)
    return _certified(pieces, pieces.piece_of(threshold), threshold, None, confidence, None, bounded)


def threshold_for_speedup(
    scores: Tensor,
    min_speedup: float,
    *,
    criterion: str = "policy",
    judged_rows: int | None = None,
    costs: Tensor | None = None,
    full_cost: float | None = None,
) -> float:
    """The safest threshold with which layers over mean exit layer, or other costs likewise, are at least so many.

    Args:
        scores: (rows, layers), exit scores of rows that only choose.
        min_speedup: in [1, layers].
        criterion: whose scores they are.
        judged_rows: where so many other rows are to keep to it as well: the mean exit layer then has a margin of 1.645
            standard errors of the difference between both, so that about 95 in 100 draws of them do.
        costs: (layers,), what an exit at each layer costs; None: as many as there are layers up to it.
        full_cost: what the speed-up is against; None takes the last layer's.

    Raises:
        ValueError: a speed-up out of its range.
    """
    num_rows, num_layers = scores.shape
    if not 1 <= min_speedup <= num_layers:
        raise ValueError(f"min_speedup must be in [1, {num_layers}] (layers), got {min_speedup:g}.")
    spent = torch.arange(1, num_layers + 1) if costs is None else costs
    spent = spent.double().expand(num_rows, -1)
    pieces, squares = (threshold_pieces(scores, values, criterion) for values in (spent, spent.square()))
    share = 0.0 if judged_rows is None else math.sqrt(1 / num_rows + 1 / judged_rows)
    aim = (float(spent[0, -1]) if full_cost is None else full_cost) / min_speedup
    for piece in range(len(pieces)):
        mean = float(pieces.losses[piece]) / num_rows
        deviation = math.sqrt(max(0.0, float(squares.losses[piece]) / num_rows - mean * mean))
        if mean + 1.645 * share * deviation <= aim + 1e-9:
            return pieces.threshold(piece)
    return pieces.threshold(len(pieces) - 1)


def _certified(
    pieces: ThresholdPieces,
    piece: int,
    threshold: float,
    max_loss: float | None,
    confidence: float,
    allowed: float | None,
    bounded: bool,
) -> Certified:
    losses = float(pieces.losses[piece])
    bound = hoeffding_bentkus_upper_bound if bounded else binomial_upper_bound
    mean = pieces.mean_exit_layer(piece)
    return Certified(
        criterion=pieces.criterion,
        threshold=threshold,
        max_loss=max_loss,
        confidence=confidence,
        num_rows=pieces.num_rows,
        losses=losses if bounded else round(losses),
        losses_allowed=allowed,
        bound=bound(losses if bounded else round(losses), pieces.num_rows, confidence),
        mean_exit_layer=mean,
        layer_speedup=pieces.num_layers / mean,
    )


def _check_losses(losses: Tensor, bounded: bool) -> None:
    if bounded:
        if not bool(((losses >= 0) & (losses <= 1)).all()):
            raise ValueError("losses must be in [0, 1].")
    elif not bool(((losses == 0) | (losses == 1)).all()):
        raise ValueError("losses must be 0 or 1; set bounded=True for losses between.")
