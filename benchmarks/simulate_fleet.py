"""A fleet of engines, simulated: whole replicas, autoscaled, against replicas that are split by depth.

Requests come at random (Poisson). Each has an exit layer, drawn from a measured histogram. A server is one core with
one engine; a step takes the rows before the shallowest layer (or, as `LayerPool` does, the one with the most),
as many as fit, past that layer, and a row that has been inside for too many steps goes first. A step takes as long as
measured for its number of rows.

- *whole*: every server has all layers; a balancer gives a request to the emptier of two servers drawn at random.
- *split* at depth d: some servers have the layers up to d, the others those behind. Survivors wait in one queue for all
  deep servers, so that these have fuller batches. Each costs a transfer: hidden states of so many bytes over a link,
  and work on both sides.

`fleet_figures.py` makes the figures of docs/scale.md with it, which says what they assume, and what they leave out.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import simpy
from numpy.typing import NDArray

PATIENCE = 4  # times the layers, as of LayerPool
IN_TIME = 0.99  # of the requests must be answered within the SLO


@dataclass(frozen=True)
class StepTimes:
    """Milliseconds of a step by its rows.

    Args:
        layer_ms: (most_rows + 1,) of a layer, with classifier and exit score.
        entry_ms: (most_rows + 1,) of tokenizing and embedding, before the first layer.
    """

    layer_ms: NDArray[np.float64]
    entry_ms: NDArray[np.float64]

    @property
    def most_rows(self) -> int:
        """Rows of a batch, at most."""
        return len(self.layer_ms) - 1

    @classmethod
    def measured(cls, figures: dict[str, Any], most_rows: int) -> StepTimes:
        """Straight lines between the sizes that `layer_times.py` measured."""
        rows = np.arange(most_rows + 1)
        layer, entry = (
            np.interp(rows, figures["batch_sizes"], figures[name]) for name in ("layer_ms", "entry_ms")
        )
        return cls(layer, entry)

    def flat_up_to(self, rows: int) -> StepTimes:
        """As if so many rows took no longer than one, as on a device that one row does not fill."""
        index = np.maximum(0, np.arange(len(self.layer_ms)) - rows + 1)
        growth = self.layer_ms[index] - self.layer_ms[0]
        return replace(self, layer_ms=self.layer_ms[1] + np.maximum(0, growth))


@dataclass(frozen=True)
class Transfer:
    """What it costs to hand a row over.

    Args:
        num_bytes: of its hidden states: tokens x hidden size x 4.
        gigabits: of the link, per second.
        latency_ms: of the network.
        work_ms: of the processor for a row, on either side (packing, copying, calls).
    """

    num_bytes: float
    gigabits: float = 10.0
    latency_ms: float = 0.2
    work_ms: float = 0.05

    @property
    def wire_ms(self) -> float:
        """Time on the way."""
        return self.latency_ms + self.num_bytes * 8 / (self.gigabits * 1e6)


@dataclass
class Request:
    """Someone who waits: since when, until which layer (from 1), and since which step of its server."""

    arrival: float
    exit_layer: int
    since: int = 0


class Stage:
    """Servers that run the layers from `first` (0-based) up to `last` for whom one queue waits.

    Args:
        env: the simulation.
        servers: how many.
        first, last: layers, `first <= layer < last`.
        step_ms: milliseconds of a step by layer and rows.
        most_rows: of a batch.
        on_exit, on_end: are told of a request that exits, and of one that is through without.
        fullest_first: whether the layer with the most rows goes next, in place of the shallowest.
    """

    def __init__(
        self,
        env: simpy.Environment,
        servers: int,
        first: int,
        last: int,
        step_ms: Callable[[int, int], float],
        most_rows: int,
        on_exit: Callable[[Request], object],
        on_end: Callable[[Request], object],
        fullest_first: bool = False,
    ) -> None:
        self._fullest_first = fullest_first
        self.env, self.first, self.last = env, first, last
        self.queue: deque[Request] = deque()
        self.load = 0  # in the queue and inside
        self.busy_ms = self.steps = self.rows = 0.0
        self.wanted = servers
        self._running: set[int] = set()
        self._step_ms, self._most_rows = step_ms, most_rows
        self._on_exit, self._on_end = on_exit, on_end
        self._woken = env.event()
        self.scale_to(servers)

    def put(self, request: Request) -> None:
        """A request arrives."""
        self.queue.append(request)
        self.load += 1
        if not self._woken.triggered:
            self._woken.succeed()

    def scale_to(self, servers: int) -> None:
        """Start servers, or let the last ones end once nobody is inside of them."""
        self.wanted = servers
        for number in set(range(servers)) - self._running:
            self._running.add(number)
            self.env.process(self._serve(number))

    def _serve(self, number: int) -> Generator[Any, Any, None]:
        inside: list[deque[Request]] = [deque() for _ in range(self.last - self.first)]
        count = step = 0
        while True:
            may_start = number < self.wanted
            if not count and not may_start:
                self._running.remove(number)
                return
            if not count and not self.queue:
                if self._woken.triggered:
                    self._woken = self.env.event()
                yield self._woken
                continue
            waiting = self.queue if may_start and count < 8 * self._most_rows else ()
            index = self._choose(inside, waiting, step)
            source = self.queue if index == 0 else inside[index]
            batch = [source.popleft() for _ in range(min(len(source), self._most_rows))]
            step += 1
            if index == 0:
                count += len(batch)
                for request in batch:
                    request.since = step
            layer = self.first + index
            duration = self._step_ms(layer, len(batch))
            self.busy_ms += duration
            self.steps += 1
            self.rows += len(batch)
            yield self.env.timeout(duration)
            for request in batch:
                if request.exit_layer == layer + 1:
                    told = self._on_exit
                elif layer + 1 == self.last:
                    told = self._on_end
                else:
                    inside[index + 1].append(request)
                    continue
                count -= 1
                self.load -= 1
                told(request)

    def _choose(self, inside: list[deque[Request]], waiting: Sequence[Request], step: int) -> int:
        """The layer whose rows go next: by the rule, unless a row has been inside for too long."""
        counts = [len(waiting), *(len(rows) for rows in inside[1:])]
        index = max(range(len(counts)), key=lambda layer: (counts[layer], -layer))
        if not self._fullest_first:
            index = next(layer for layer, count in enumerate(counts) if count)
        since, overdue = min(
            ((rows[0].since, layer) for layer, rows in enumerate(inside) if rows), default=(step, 0)
        )
        return overdue if step - since > PATIENCE * len(inside) else index


@dataclass(frozen=True)
class Design:
    """How cores are used.

    Args:
        cores: servers; of a split fleet those that are shallow.
        depth: layers of the shallow ones; None where every server has all.
        deep_cores: servers behind them.
        central: whether all whole servers take from one queue, in place of a balancer.
        fullest_first: as of `Stage`.
    """

    cores: int
    depth: int | None = None
    deep_cores: int = 0
    central: bool = False
    fullest_first: bool = False

    @property
    def all_cores(self) -> int:
        """Shallow and deep ones."""
        return self.cores + self.deep_cores


@dataclass(frozen=True)
class Outcome:
    """What came of a simulation.

    Args:
        latency_ms: (requests,) from arrival to answer, in the order of arrival, without the first fifth.
        busy: share of the cores' time.
        mean_rows: of a step's batch, of all, or of shallow and of deep servers.
        seconds: that were simulated.
    """

    latency_ms: NDArray[np.float64]
    busy: float
    mean_rows: tuple[float, ...]
    seconds: float

    def percentile(self, share: float) -> float:
        """Milliseconds within which a share of the requests is answered."""
        return float(np.quantile(self.latency_ms, share))


def simulate(
    design: Design,
    times: StepTimes,
    arrivals: NDArray[np.float64],
    exit_layers: NDArray[np.int64],
    *,
    num_layers: int,
    transfer: Transfer | None = None,
    step_ms: Callable[[int, int], float] | None = None,
    seed: int = 0,
) -> Outcome:
    """Run a fleet.

    Args:
        design: of the fleet.
        times: of steps.
        arrivals: (requests,) ascending, milliseconds.
        exit_layers: (requests,) from 1.
        num_layers: of the model.
        transfer: of a split fleet; None for one that costs nothing.
        step_ms: in place of `times`: milliseconds by layer and rows.
        seed: of the balancer.
    """
    env, rng = simpy.Environment(), np.random.default_rng(seed)
    latency: dict[int, float] = {}
    layer_ms, entry_ms = times.layer_ms.tolist(), times.entry_ms.tolist()
    work_ms = 0.0 if transfer is None else transfer.work_ms
    depth = design.depth

    def measured(layer: int, rows: int) -> float:
        extra = rows * work_ms if depth is not None and layer == depth else 0.0
        return layer_ms[rows] + (entry_ms[rows] if layer == 0 else 0.0) + extra

    def answered(request: Request) -> None:
        latency[id(request)] = env.now - request.arrival

    step = step_ms or measured
    deep: list[Stage] = []

    def hand_over(request: Request) -> None:
        env.process(_sent(env, request, deep[0], transfer))

    most, order = times.most_rows, design.fullest_first
    if depth is not None:
        deep.append(Stage(env, design.deep_cores, depth, num_layers, step, most, answered, answered, order))
    last = num_layers if depth is None else depth
    on_end = answered if depth is None else hand_over
    if design.central:
        fleet = [Stage(env, design.cores, 0, last, step, most, answered, on_end, order)]
    else:
        fleet = [Stage(env, 1, 0, last, step, most, answered, on_end, order) for _ in range(design.cores)]
    requests = [Request(at, layer) for at, layer in zip(arrivals.tolist(), exit_layers.tolist(), strict=True)]

    def arrive() -> Generator[Any, Any, None]:
        pairs = rng.integers(len(fleet), size=(len(requests), 2)).tolist()
        for request, (one, other) in zip(requests, pairs, strict=True):
            if request.arrival > env.now:
                yield env.timeout(request.arrival - env.now)
            fleet[one if fleet[one].load <= fleet[other].load else other].put(request)

    env.process(arrive())
    env.run()
    busy = sum(stage.busy_ms for stage in [*fleet, *deep]) / (env.now * design.all_cores)
    counted = requests[len(requests) // 5 :]
    mean_rows = tuple(
        round(sum(stage.rows for stage in part) / max(1, sum(stage.steps for stage in part)), 2)
        for part in (fleet, deep)
        if part
    )
    return Outcome(np.array([latency[id(one)] for one in counted]), busy, mean_rows, env.now / 1000)


def _sent(
    env: simpy.Environment, request: Request, to: Stage, transfer: Transfer | None
) -> Generator[Any, Any, None]:
    if transfer is not None:
        yield env.timeout(transfer.wire_ms + transfer.work_ms)
    to.put(request)


def poisson(per_second: float, requests: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """(requests,) times of arrival, milliseconds."""
    return np.cumsum(rng.exponential(1000 / per_second, requests))


def drawn_exits(histogram: Sequence[int], requests: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """(requests,) exit layers from a histogram by layer."""
    shares = np.asarray(histogram, dtype=np.float64)
    return rng.choice(len(shares), size=requests, p=shares / shares.sum()) + 1


def work_ms(histogram: Sequence[int], times: StepTimes, layers: tuple[int, int] | None = None) -> float:
    """Milliseconds of a core that a request takes on full batches, of all layers or of `first <= layer < last`."""
    shares = np.asarray(histogram, dtype=np.float64) / np.sum(histogram)
    first, last = layers or (0, len(shares))
    alive = shares[::-1].cumsum()[::-1]  # share of requests that pass layer l, 0-based
    most = times.most_rows
    entry = times.entry_ms[most] / most if first == 0 else 0.0
    return float(entry + alive[first:last].sum() * times.layer_ms[most] / most)


@dataclass(frozen=True)
class Goodput:
    """The most that a fleet takes.

    Args:
        per_core: answers within the SLO per second and core, where `IN_TIME` of all are within it.
        rate: requests per second.
        p50_ms, p95_ms, p99_ms: at that rate.
        busy: share of the cores' time.
        mean_rows: of a batch; shallow and deep.
    """

    per_core: float
    rate: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    busy: float
    mean_rows: tuple[float, ...]


def goodput(
    design: Design,
    times: StepTimes,
    histogram: Sequence[int],
    slo_ms: float,
    *,
    requests: int = 8_000,
    transfer: Transfer | None = None,
    steps: int = 6,
    seed: int = 0,
) -> Goodput:
    """The highest rate at which enough requests are answered in time, by halving the interval."""
    num_layers = len(histogram)
    low, high = 0.0, 1.05 * 1000 * design.all_cores / work_ms(histogram, times)
    best = Goodput(0.0, 0.0, math.nan, math.nan, math.nan, 0.0, ())
    for _ in range(steps):
        rate = (low + high) / 2
        rng = np.random.default_rng(seed)
        arrivals, exits = poisson(rate, requests, rng), drawn_exits(histogram, requests, rng)
        found = simulate(design, times, arrivals, exits, num_layers=num_layers, transfer=transfer, seed=seed)
        share = float(np.mean(found.latency_ms <= slo_ms))
        if share >= IN_TIME:
            low = rate
            p50, p95, p99 = (round(found.percentile(part), 1) for part in (0.5, 0.95, 0.99))
            per_core = share * rate / design.all_cores
            best = Goodput(
                round(per_core, 2), round(rate, 1), p50, p95, p99, round(found.busy, 3), found.mean_rows
            )
        else:
            high = rate
    return best


def split_designs(cores: int, depth: int, histogram: Sequence[int], times: StepTimes) -> list[Design]:
    """Ways to deal out cores, near to where the work is."""
    shallow = work_ms(histogram, times, (0, depth))
    wanted = cores * shallow / work_ms(histogram, times)
    counts = {min(cores - 1, max(1, count)) for count in (math.floor(wanted), math.ceil(wanted))}
    return [Design(count, depth, cores - count) for count in sorted(counts)]
