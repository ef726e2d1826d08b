"""A simulated fleet whose replicas are started and ended while traffic gets harder; see `simulate_fleet.py`."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
import simpy
from simulate_fleet import Request, Stage, StepTimes, drawn_exits, poisson, work_ms


def autoscaled(
    policy: str,
    times: StepTimes,
    easy: Sequence[int],
    hard: Sequence[int],
    *,
    rate: float,
    slo_ms: float,
    target: float = 0.5,
    seconds: float = 180.0,
    window_s: float = 5.0,
    start_s: float = 10.0,
    seed: int = 0,
) -> dict[str, float]:
    """Traffic that gets harder at the same rate (from a third to two thirds of the time), on replicas that are scaled.

    Args:
        policy: `rate`, by the requests of the last window, each as hard as the easy ones; or `exits`, by the layers
            that the answers of the last window took.
        times: of steps.
        easy, hard: histograms of exit layers before and after.
        rate: requests per second.
        slo_ms: within which an answer counts.
        target: busy share that is aimed at.
        seconds, window_s, start_s: of the simulation, between two decisions, until a new replica serves.
        seed: of all draws.

    Returns:
        Replicas in the first and in the last window, core seconds, and of those who came since it gets harder: the
        share that was answered in time, and percentiles, -1 where that one was never answered.
    """
    rng, env = np.random.default_rng(seed), simpy.Environment()
    number = int(rate * seconds)
    arrivals = poisson(rate, number, rng)
    mix = np.clip(3 * arrivals / arrivals[-1] - 1, 0, 1)
    is_hard = rng.random(number) < mix
    exits = np.where(is_hard, drawn_exits(hard, number, rng), drawn_exits(easy, number, rng))
    num_layers, latency = len(easy), np.full(number, np.inf)
    layer_ms, entry_ms = times.layer_ms.tolist(), times.entry_ms.tolist()
    arrived = 0
    seen: list[int] = []
    positions: dict[int, int] = {}

    def answered(request: Request) -> None:
        latency[positions[id(request)]] = env.now - request.arrival
        seen.append(request.exit_layer)

    def step(layer: int, rows: int) -> float:
        return layer_ms[rows] + (entry_ms[rows] if layer == 0 else 0.0)

    def needed(histogram: Sequence[int], per_second: float) -> int:
        return max(1, math.ceil(per_second * work_ms(histogram, times) / 1000 / target))

    # One queue for all replicas: what is compared is how many there are, not how requests find them.
    fleet = Stage(env, needed(easy, rate), 0, num_layers, step, times.most_rows, answered, answered)
    requests = [Request(at, layer) for at, layer in zip(arrivals.tolist(), exits.tolist(), strict=True)]
    positions.update((id(request), position) for position, request in enumerate(requests))
    used: list[int] = []

    def arrive() -> Generator[Any, Any, None]:
        nonlocal arrived
        for request in requests:
            yield env.timeout(max(0.0, request.arrival - env.now))
            arrived += 1
            fleet.put(request)

    def later(count: int) -> Generator[Any, Any, None]:
        yield env.timeout(1000 * start_s)
        fleet.scale_to(max(count, fleet.wanted))

    def control() -> Generator[Any, Any, None]:
        nonlocal arrived
        while env.now < 1000 * seconds:
            yield env.timeout(1000 * window_s)
            used.append(fleet.wanted)
            histogram = list(easy)
            if policy == "exits" and seen:
                histogram = np.bincount(seen, minlength=num_layers + 1)[1:].tolist()
            count = needed(histogram, arrived / window_s)
            arrived = 0
            seen.clear()
            if count > fleet.wanted:
                env.process(later(count))
            elif count < fleet.wanted - 1:  # one more than needed stays
                fleet.scale_to(count + 1)

    env.process(arrive())
    env.process(control())
    env.run(until=1000 * seconds)
    after = np.sort(latency[arrivals > 1000 * seconds / 3])  # those that were never answered at the end

    def within(share: float) -> float:
        value = float(after[math.ceil(share * len(after)) - 1])
        return round(value, 1) if math.isfinite(value) else -1.0

    return {
        "replicas_first": used[0],
        "replicas_last": used[-1],
        "core_seconds": float(sum(used) * window_s),
        "in_time": round(float(np.mean(after <= slo_ms)), 4),
        "p50_ms": within(0.5),
        "p99_ms": within(0.99),
    }
