"""The simulated fleet against what queueing theory says, and against sums that must come out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from benchmark_scripts import script

pytest.importorskip("simpy", reason="needs simpy, which `dev` brings")
fleet: Any = script("simulate_fleet")
scaling: Any = script("simulate_scaling")


def steps(layer: float, entry: float = 0.0, most_rows: int = 8, by_row: bool = False) -> Any:
    """Steps of a fixed time, or of a time for each row."""
    rows = np.arange(most_rows + 1) if by_row else np.ones(most_rows + 1)
    return fleet.StepTimes(layer * rows, entry * rows)


def run(design: Any, times: Any, per_second: float, histogram: list[int], number: int, **how: Any) -> Any:
    rng = np.random.default_rng(how.pop("seed", 0))
    arrivals, exits = fleet.poisson(per_second, number, rng), fleet.drawn_exits(histogram, number, rng)
    return fleet.simulate(design, times, arrivals, exits, num_layers=len(histogram), **how)


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_one_server_of_fixed_times(load: float) -> None:
    """M/D/1: Pollaczek and Khinchine's wait, load x service / (2 (1 - load))."""
    service = 10.0
    found = run(fleet.Design(1), steps(service, most_rows=1), 1000 * load / service, [1], 30_000)
    waited = found.latency_ms.mean() - service
    assert waited == pytest.approx(load * service / (2 * (1 - load)), rel=0.06)
    assert found.busy == pytest.approx(load, rel=0.03)


def test_several_servers_of_random_times() -> None:
    """M/M/c: Erlang's C, the share of requests that wait, times the mean wait of these."""
    servers, load, service = 3, 0.8, 10.0
    rng = np.random.default_rng(7)
    drawn = iter(rng.exponential(service, 60_000).tolist())
    found = run(
        fleet.Design(servers, central=True),
        steps(service, most_rows=1),
        1000 * load * servers / service,
        [1],
        50_000,
        step_ms=lambda layer, rows: next(drawn),
    )
    offered = load * servers
    last = offered**servers / math.factorial(servers) / (1 - load)
    waits = last / (sum(offered**k / math.factorial(k) for k in range(servers)) + last)
    assert found.latency_ms.mean() - service == pytest.approx(
        waits * service / (servers * (1 - load)), rel=0.12
    )


def test_a_request_alone_takes_its_layers() -> None:
    arrivals, exits = np.array([0.0, 1000.0, 2000.0]), np.array([1, 3, 4])
    times = steps(2.0, entry=0.5)
    link = fleet.Transfer(num_bytes=1e6, gigabits=8.0, latency_ms=3.0, work_ms=0.25)
    assert link.wire_ms == pytest.approx(3.0 + 1.0)
    whole = fleet.simulate(fleet.Design(2), times, arrivals, exits, num_layers=4)
    assert whole.latency_ms.tolist() == pytest.approx([2.5, 6.5, 8.5])
    split = fleet.simulate(fleet.Design(1, 2, 1), times, arrivals, exits, num_layers=4, transfer=link)
    sent = 4.0 + 2 * 0.25  # over the wire, and work on both sides
    assert split.latency_ms.tolist() == pytest.approx([2.5, 6.5 + sent, 8.5 + sent])


@pytest.mark.parametrize("design", [fleet.Design(3), fleet.Design(2, 2, 1), fleet.Design(3, central=True)])
def test_work_is_what_was_asked_for(design: Any) -> None:
    """Where a step takes a time for each row, busy time is the sum over all layers that requests pass."""
    histogram = [4, 1, 1, 2]
    times = steps(1.5, entry=0.5, by_row=True)
    rng = np.random.default_rng(3)
    arrivals, exits = fleet.poisson(200, 4000, rng), fleet.drawn_exits(histogram, 4000, rng)
    found = fleet.simulate(design, times, arrivals, exits, num_layers=4)
    assert len(found.latency_ms) == 3200
    worked = found.busy * found.seconds * 1000 * design.all_cores
    assert worked == pytest.approx(1.5 * exits.sum() + 0.5 * 4000)
    assert fleet.work_ms(histogram, times) == pytest.approx(0.5 + 1.5 * (4 + 2 + 3 + 8) / 8)
    assert fleet.work_ms(histogram, times, (0, 2)) == pytest.approx(0.5 + 1.5 * (8 + 4) / 8)


def test_nobody_waits_for_ever() -> None:
    """One who needs all layers is answered although others come all the time, who would always go first."""
    arrivals, exits = np.arange(4000) * 1.0, np.ones(4000, dtype=np.int64)
    exits[1000] = 6
    found = fleet.simulate(fleet.Design(1), steps(1.0, most_rows=4), arrivals, exits, num_layers=6)
    steps_inside = found.latency_ms[1000 - 800]
    assert 6 * fleet.PATIENCE < steps_inside <= 6 * fleet.PATIENCE + 2 * 6
    others = np.delete(found.latency_ms, 200)
    assert others.max() <= 2 * 6


def test_goodput_is_the_highest_rate_in_time() -> None:
    times = steps(1.0, most_rows=1)
    found = fleet.goodput(fleet.Design(1), times, [1], slo_ms=6.0, requests=6000)
    for rate, holds in ((found.rate, True), (1.15 * found.rate, False)):
        again = run(fleet.Design(1), times, rate, [1], 6000)
        assert (np.mean(again.latency_ms <= 6.0) >= fleet.IN_TIME) is np.bool_(holds)
    assert 0 < found.per_core <= 1000


def test_servers_come_and_go() -> None:
    easy, hard = [1, 0, 0, 0], [0, 0, 0, 1]
    how: dict[str, Any] = {"rate": 200, "slo_ms": 60, "seconds": 60.0, "window_s": 2.0, "start_s": 2.0}
    by_rate, by_exits = (
        scaling.autoscaled(policy, steps(2.0, most_rows=1), easy, hard, **how) for policy in ("rate", "exits")
    )
    assert by_rate["replicas_first"] == by_exits["replicas_first"] == 1
    assert by_rate["replicas_last"] <= 2
    assert by_exits["replicas_last"] >= 3
    assert by_exits["in_time"] > by_rate["in_time"] + 0.1


def test_flat_times() -> None:
    measured = {"batch_sizes": [1, 4], "layer_ms": [2.0, 5.0], "entry_ms": [1.0, 1.0]}
    times = fleet.StepTimes.measured(measured, 6)
    assert times.layer_ms.tolist() == [2, 2, 3, 4, 5, 5, 5]
    assert times.flat_up_to(3).layer_ms[1:].tolist() == [2, 2, 2, 3, 4, 5]
