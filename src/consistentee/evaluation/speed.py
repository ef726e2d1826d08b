"""How fast exits are: competitors do the same work in one run, in turn, within a time. What counts is their ratio.

Shared by `speed_classification` and `speed_generation`, which say who competes: with exits (`engine`), the same at full
depth (`engine-full-depth`), with exits that nobody takes (`engine-nobody-leaves`: what looking costs), `transformers`.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from transformers import AutoConfig, PretrainedConfig

from consistentee.evaluation.time_budget import Planner, TimeBudget
from consistentee.inference.timing import paired_ratio, synchronised_seconds, time_in_turn

Steps = Sequence[Callable[[], object]]
Seconds = Mapping[str, list[list[float]]]
"""Seconds of each step, (repeats, steps), by competitor."""


@dataclass(frozen=True, kw_only=True)
class SpeedRow:
    """One competitor at one batch size.

    Args:
        name: the competitor.
        batch_size: inputs that start together; None in throughput mode.
        dtype: precision.
        mean_exit_layer: layers executed per row or new token; all of them where drafts are verified.
        layer_speedup: layers of the model / mean exit layer.
        wall_clock_speedup: against `engine-full-depth`, median of the repetitions' ratios.
        wall_clock_speedup_quartiles: first and third quartile of the same.
        efficiency: wall_clock_speedup / layer_speedup, of `engine`, and of `onnx-graph` beside an engine on ONNX
            Runtime: else it would tell runtimes apart, not exits. None of others.
        speedup_over_transformers: likewise against `transformers`.
        peak_memory_mb: of the device, on a GPU; None on CPU, where one process holds all competitors.
        repeats: timed repetitions.
    """

    name: str
    batch_size: int | None
    dtype: str
    mean_exit_layer: float
    layer_speedup: float
    wall_clock_speedup: float
    wall_clock_speedup_quartiles: tuple[float, float]
    efficiency: float | None
    speedup_over_transformers: float
    peak_memory_mb: float | None
    repeats: int


Row = TypeVar("Row", bound=SpeedRow, covariant=True)


@dataclass(frozen=True)
class SpeedResults(Generic[Row]):
    """What a benchmark found.

    Args:
        environment: hardware, versions, threads, seed.
        workload: model shape, inputs, how exits came about.
        rows: one for each competitor and batch size.
    """

    environment: dict[str, Any]
    workload: dict[str, Any]
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        rows = [asdict(row) for row in self.rows]
        return {"environment": self.environment, "workload": self.workload, "rows": rows}


@dataclass(frozen=True)
class Competitors(Generic[Row]):
    """Who competes on one set of inputs.

    Args:
        device: on which all of them run.
        work: the steps (batches) of each.
        row: what is said of one: from its name, the outputs of its steps, all seconds, and its peak memory.
    """

    device: torch.device
    work: Mapping[str, Steps]
    row: Callable[[str, list[Any], Seconds, float | None], Row]

    def race(self, repeats: int, tick: Callable[[], object]) -> list[Row]:
        """Time all of them, each repetition all in turn, after a pass that is not timed."""
        outputs: dict[str, list[Any]] = {}
        for name, steps in self.work.items():
            outputs[name] = [step() for step in steps]
            tick()
        memory = {name: _peak_memory(steps, self.device) for name, steps in self.work.items()}
        seconds = time_in_turn(self.work, self.device, repeats, tick, untimed=False)
        return [self.row(name, outputs[name], seconds, memory[name]) for name in self.work]

    def seconds_of_a_pass(self) -> float:
        """What all of them take together."""
        start = synchronised_seconds(self.device)
        for steps in self.work.values():
            for step in steps:
                step()
        return synchronised_seconds(self.device) - start


@dataclass(frozen=True)
class Amount:
    """How much is measured at a batch size, in rows or in new tokens.

    Args:
        least, most: where time decides, and where it does not.
        step: as much as comes at once.
        probes: small amounts from whose seconds the cost of one, and of a pass whatever the amount, is told.
    """

    least: int
    most: int
    step: int = 1
    probes: tuple[int, ...] = ()


def measure_in_turn(
    amounts: Mapping[int | None, Amount],
    competitors: Callable[[int | None, int], Competitors[Row]],
    *,
    repeats: int,
    budget: TimeBudget | None,
    announce: Callable[[float], object],
    tick: Callable[[str], object],
) -> tuple[tuple[Row, ...], dict[str, Any]]:
    """Let the competitors race at every batch size, as time allows.

    Args:
        amounts: by batch size; None is throughput mode.
        competitors: those of a batch size on so much.
        repeats: timed repetitions.
        budget: a time to keep to, and what may be left out for it; None: nothing.
        announce: with a budget, called before measuring with the seconds it will take, about.
        tick: called with what is being measured after each pass.

    Returns:
        The rows, and what the workload says of it: `repeats` (the fewest), `seconds` and the batch sizes `left_out`.
    """
    planner = Planner(budget, len(amounts), repeats)
    found: list[Row] = []
    left_out: list[str] = []
    cost, fixed = 0.0, 0.0  # seconds of a row or token, and of a pass whatever the amount
    for size, amount in amounts.items():
        title = "throughput mode" if size is None else f"batch size {size}"
        fits = not found or planner.fits(cost, amount.least, fixed)  # by what the size before cost
        if fits and budget is not None:
            tick(title if found else "trying it out")
            if not found:
                competitors(size, min(amount.probes)).seconds_of_a_pass()  # kernels are built
            cost, fixed = _costs(
                {part: competitors(size, part).seconds_of_a_pass() for part in amount.probes}
            )
            if not found:
                total = sum(each.most for each in amounts.values())
                announce(planner.expected(total, cost, fixed * len(amounts)))
            fits = not found or planner.fits(cost, amount.least, fixed)
        if fits:
            plan = planner.plan(cost, least=amount.least, most=amount.most, step=amount.step, fixed=fixed)
            found += competitors(size, plan[0]).race(plan[1], lambda title=title: tick(title))
        else:
            left_out.append(title)
        planner.next_size()
    return tuple(found), {
        "repeats": min((row.repeats for row in found), default=repeats),
        "seconds": None if budget is None or math.isinf(budget.seconds) else budget.seconds,
        "left_out": left_out,
    }


def shared_metrics(
    name: str, mean_exit_layer: float, num_hidden_layers: int, seconds: Seconds, memory: float | None
) -> dict[str, Any]:
    """The fields of a `SpeedRow` that follow from layers and seconds."""
    taken = seconds[name]
    ratio, first, third = paired_ratio(seconds["engine-full-depth"], taken)
    layer_speedup = num_hidden_layers / mean_exit_layer
    return {
        "name": name,
        "mean_exit_layer": mean_exit_layer,
        "layer_speedup": layer_speedup,
        "wall_clock_speedup": ratio,
        "wall_clock_speedup_quartiles": (first, third),
        "efficiency": ratio / layer_speedup if name == "engine" else None,
        "speedup_over_transformers": paired_ratio(seconds["transformers"], taken)[0],
        "peak_memory_mb": memory,
        "repeats": len(taken),
    }


def median_seconds(taken: Sequence[Sequence[float]]) -> float:
    """Of a repetition, all its steps together."""
    return statistics.median(sum(repetition) for repetition in taken)


def latencies(taken: Sequence[Sequence[float]], rows: int, batch_size: int) -> tuple[float, float]:
    """Median and 95th percentile of the milliseconds of a batch, over all repetitions.

    Rows that are left over for a smaller batch at the end do not count, unless there is no whole one.

    Args:
        taken: seconds of each batch, (repeats, batches).
        rows: in all batches.
        batch_size: of a whole one.

    Example:
        >>> latencies([[0.25, 0.125], [0.25, 0.125]], rows=192, batch_size=128)
        (250.0, 250.0)
    """
    whole = rows // batch_size or None
    median, high = np.percentile([1000 * value for each in taken for value in each[:whole]], [50, 95])
    return float(median), float(high)


def rounded_shares(shares: Sequence[float] | None) -> str | list[float]:
    """What the workload says of how exits came about: "model", or the share of each layer."""
    return "model" if shares is None else [round(share, 6) for share in shares]


def shape_config(shapes: Mapping[str, Mapping[str, Any]], config_name: str) -> PretrainedConfig:
    """The configuration of a named shape, for studying speed with random weights.

    Raises:
        ValueError: there is no such shape.
    """
    if config_name not in shapes:
        raise ValueError(f'config-name must be one of {", ".join(shapes)}, got "{config_name}".')
    values = dict(shapes[config_name])
    return AutoConfig.for_model(values.pop("model_type"), **values)


def random_token_ids(count: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Token ids, all rows of one length; small ids, which are special in real vocabularies, are left out."""
    rng = np.random.default_rng(seed)
    return rng.integers(min(1000, vocab_size // 2), vocab_size, (count, length)).tolist()


def exit_distribution_shares(
    text: str, num_layers: int, has_exit: Sequence[bool] | None = None
) -> list[float]:
    """The share of rows that exit at each layer, from `even`, `last` or `p1,p2,...`.

    Args:
        text: which.
        num_layers: of the model.
        has_exit: (layers,), which of them have an exit, the last one included; None for all.

    Raises:
        ValueError: it is none of these, has another number of entries than there are layers, does not sum to one, or
            has rows exit at a layer without an exit.
    """
    exits = [True] * num_layers if has_exit is None else list(has_exit)
    if text == "even":
        return [has_exit / sum(exits) for has_exit in exits]
    if text == "last":
        return [0.0] * (num_layers - 1) + [1.0]
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f'exit-distribution must be "even", "last" or shares such as 0.5,0.5, got "{text}".'
        ) from None
    if len(shares) != num_layers:
        raise ValueError(
            f"exit-distribution must have one share for each of {num_layers} layers, got {len(shares)}."
        )
    if min(shares) < 0 or abs(sum(shares) - 1) > 1e-3:
        raise ValueError(
            f"exit-distribution must be shares >= 0 that sum to 1, got a sum of {sum(shares):g}."
        )
    without = [layer for layer, share in enumerate(shares, start=1) if share > 0 and not exits[layer - 1]]
    if without:
        there = ", ".join(str(layer) for layer, has_exit in enumerate(exits, start=1) if has_exit)
        raise ValueError(
            f"exit-distribution must be shares of layers {there}, which have an exit, got one of layer {without[0]}."
        )
    return shares


def fixed_exit_layers(shares: Sequence[float], count: int, seed: int) -> list[int]:
    """Exit layers, 1-based, for so many rows: the shares as exactly as whole rows allow, shuffled.

    Args:
        shares: (layers,), summing to one.
        count: rows.
        seed: of the shuffle.
    """
    ends = np.round(np.cumsum(shares) / sum(shares) * count).astype(int)
    layers = np.repeat(np.arange(1, len(shares) + 1), np.diff(ends, prepend=0)).tolist()
    random.Random(seed).shuffle(layers)
    return layers


def _costs(seconds: Mapping[int, float]) -> tuple[float, float]:
    """Seconds of one row or token and of a pass whatever the amount, from the seconds of one amount or of two."""
    (short, least), *longer = sorted(seconds.items())
    if not longer:
        return least / short, 0.0
    cost = max(0.0, longer[0][1] - least) / (longer[0][0] - short)
    return cost, max(0.0, least - short * cost)


def _peak_memory(steps: Steps, device: torch.device) -> float | None:
    """MB that torch held on the GPU at most during one pass; None on CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    for step in steps:
        step()
    return torch.cuda.max_memory_allocated(device) / 2**20
