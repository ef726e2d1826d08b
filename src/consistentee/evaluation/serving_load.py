"""A served classifier under load: with exits, at full depth on the same server, and plain `transformers` behind it.

Servers are processes of their own on the loopback address; rounds of the three take turns, so that what else the
machine does meets all of them. The SLO is twice full depth's 95th percentile without load. Goodput is the number of
answers within it per second.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from consistentee.evaluation.load_client import (
    AskedText,
    LoadClient,
    LoadResult,
    closed_load,
    poisson_load,
)
from consistentee.inference.timing import environment
from consistentee.models.loaded import short_name
from consistentee.pipelines.classifier import Engine

WITH_EXITS, AT_FULL_DEPTH, PLAIN_SERVED = "exits", "full depth", "transformers"
SERVED = (WITH_EXITS, AT_FULL_DEPTH, PLAIN_SERVED)

RATE_SHARES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
"""Rates, in times of what full depth can answer."""

ROUNDS = 3
AT_ONCE = 16
"""Requests on their way where a server is asked as fast as it answers."""

OVERHEAD_TEXTS, OVERHEAD_WARM_UP = 200, 20
"""The most texts by which a request is compared with the engine, and how many asks before are not counted."""

OVERLOAD = 10
"""Rate of the overload, in times of what the server with exits can answer."""


@dataclass
class LoadReport:
    """What was measured.

    Args:
        environment: hardware, versions, seed.
        workload: model, operating point, texts, seconds, threads.
        slo_ms: twice full depth's 95th percentile without load.
        unloaded, saturated: by who is served: one request at a time, and `AT_ONCE` at a time.
        loads: one entry a rate, with a summary for each.
        overload: of the server with exits: before, during and after it, and its memory in MB.
        overhead_ms: median of a request's latency without load above `Engine.predict`'s of the same texts, paired.
    """

    environment: dict[str, Any]
    workload: dict[str, Any]
    slo_ms: float = 0.0
    unloaded: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    saturated: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    loads: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    overload: dict[str, Any] = field(default_factory=dict[str, Any])
    overhead_ms: float = 0.0

    def goodput(self, name: str) -> float:
        """The most answers within the SLO per second, over the rates."""
        return max((load[name]["goodput"] for load in self.loads), default=0.0)


@contextmanager
def served(command: Sequence[str], threads: int) -> Iterator[tuple[str, int]]:
    """A server in a process of its own: its URL and process id; it is asked to end with the block."""
    variables = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    with subprocess.Popen(
        [sys.executable, "-m", *command], stdout=subprocess.PIPE, text=True, env=variables
    ) as process:
        try:
            line = ""
            while not line.startswith("Serving "):
                line = process.stdout.readline() if process.stdout is not None else ""
                if not line:
                    raise OSError(f"The server ended with exit code {process.wait()} before it answered.")
            yield line.split()[-1], process.pid
        finally:
            process.terminate()
            process.wait(60)


def measure_serving(
    model: str,
    texts: Sequence[tuple[str, ...]],
    *,
    operating_point: str | None = None,
    seconds: float = 120.0,
    threads: int = 1,
    seed: int = 0,
    tick: Callable[[str], object] = lambda _: None,
) -> LoadReport:
    """Measure a model under load.

    Args:
        model: folder of a classifier with exits.
        texts: to ask about, in turn.
        operating_point: in force; None for the saved rule.
        seconds: about what it takes, apart from starting.
        threads: of each server.
        seed: of arrivals.
        tick: is told what is being done.
    """
    engine = Engine.from_pretrained(model, device="cpu")
    torch.set_num_threads(threads)
    workload = {
        "model": short_name(model),
        "operating_point": operating_point,
        "texts": len(texts),
        "seconds": seconds,
        "threads": threads,
    }
    report = LoadReport(environment(torch.device("cpu"), seed), workload)
    point = [] if operating_point is None else ["--operating-point", operating_point]
    command = ["consistentee", "serve", model, "--port", "0", "--device", "cpu", *point]
    tick("starting servers")
    with (
        served(command, threads) as (url, pid),
        served(["consistentee.evaluation.served_baseline", model], threads) as (plain_url, _),
    ):
        asked = _asked(engine, texts, operating_point)
        urls = {WITH_EXITS: url, AT_FULL_DEPTH: url, PLAIN_SERVED: plain_url}
        run = _Run(report, {name: LoadClient(urls[name]) for name in SERVED}, asked, pid, seed, tick)
        asyncio.run(run.all(engine, seconds, operating_point))
    return report


def _asked(
    engine: Engine, texts: Sequence[tuple[str, ...]], operating_point: str | None
) -> dict[str, list[AskedText]]:
    """What is asked of each, with the labels that are expected of exits."""
    labels = [answer.label for answer in engine.predict(texts, operating_point=operating_point)]
    # A pair in a list of its own: a model that does not say what it takes reads two texts in a plain one.
    inputs = [parts[0] if len(parts) == 1 else [list(parts)] for parts in texts]
    full = {"operating_point": "full-depth"}
    return {
        WITH_EXITS: [AskedText(text, {}, label) for text, label in zip(inputs, labels, strict=True)],
        AT_FULL_DEPTH: [AskedText(text, full) for text in inputs],
        PLAIN_SERVED: [AskedText(text, {}) for text in inputs],
    }


@dataclass
class _Run:
    report: LoadReport
    clients: dict[str, LoadClient]
    asked: dict[str, list[AskedText]]
    pid: int
    seed: int
    tick: Callable[[str], object]

    async def all(self, engine: Engine, seconds: float, operating_point: str | None) -> None:
        """Everything, in about so many seconds: 10 % without load, 10 % saturated, 55 % at rates, 25 % overload."""
        report = self.report
        for name in SERVED:  # connections, kernels
            await closed_load(self.clients[name], self.asked[name], AT_ONCE, 0.5)
        self.tick("without load")
        unloaded = await self._in_turn(lambda name: self._closed(name, 1, 0.1 * seconds / 9))
        report.unloaded = {name: result.summary() for name, result in unloaded.items()}
        report.slo_ms = 2 * report.unloaded[AT_FULL_DEPTH]["p95_ms"]
        report.overhead_ms = await self._overhead(engine, operating_point)
        self.tick("as fast as it goes")
        saturated = await self._in_turn(lambda name: self._closed(name, AT_ONCE, 0.1 * seconds / 9))
        report.saturated = {name: result.summary() for name, result in saturated.items()}
        capacity = report.saturated[AT_FULL_DEPTH]["answers_per_second"]
        each = 0.55 * seconds / (len(RATE_SHARES) * len(SERVED) * ROUNDS)
        for share in RATE_SHARES:
            rate = share * capacity
            self.tick(f"{rate:.0f} requests per second")
            found = await self._in_turn(lambda name, rate=rate: self._poisson(name, rate, each))
            summaries = {name: result.summary(report.slo_ms) for name, result in found.items()}
            report.loads.append({"rate": rate, "share_of_full_depth": share, **summaries})
        await self._overload(0.25 * seconds)
        for client in self.clients.values():
            await client.close()

    async def _in_turn(self, work: Any) -> dict[str, LoadResult]:
        """Rounds in which the three take turns, each time in another order."""
        parts: dict[str, list[LoadResult]] = {name: [] for name in SERVED}
        for number in range(ROUNDS):
            for place in range(len(SERVED)):
                name = SERVED[(place + number) % len(SERVED)]
                parts[name].append(await work(name))
        return {name: LoadResult.joined(found) for name, found in parts.items()}

    async def _closed(self, name: str, workers: int, seconds: float) -> LoadResult:
        return await closed_load(self.clients[name], self.asked[name], workers, seconds)

    async def _poisson(self, name: str, rate: float, seconds: float) -> LoadResult:
        self.seed += 1
        rng = np.random.default_rng(self.seed)
        return await poisson_load(self.clients[name], self.asked[name], rate, seconds, rng)

    async def _overhead(self, engine: Engine, operating_point: str | None) -> float:
        """Median over texts of what a request takes longer than the engine in this process, asked in turn.

        A few texts are asked again and again, so that `OVERHEAD_WARM_UP` of the asks are at most half of them.
        """
        differences: list[float] = []
        texts = self.asked[WITH_EXITS]
        asks = min(OVERHEAD_TEXTS, max(len(texts), 2 * OVERHEAD_WARM_UP))
        for text in itertools.islice(itertools.cycle(texts), asks):
            parts = (text.text,) if isinstance(text.text, str) else tuple(text.text[0])
            start = time.perf_counter()
            engine.predict([parts], batch_size=1, operating_point=operating_point)
            middle = time.perf_counter()
            await self.clients[WITH_EXITS].ask(text.body())
            differences.append(1000 * (time.perf_counter() - 2 * middle + start))
        return float(np.median(differences[OVERHEAD_WARM_UP:]))

    async def _overload(self, seconds: float) -> None:
        """Ten times what it can answer, and what it is like before and after."""
        rate = self.report.saturated[WITH_EXITS]["answers_per_second"]
        calm = seconds / 8
        await self._poisson(WITH_EXITS, OVERLOAD * rate, calm)  # queues and connections have been full once
        before = await self._poisson(WITH_EXITS, rate / 2, calm)
        memory = [_resident_mb(self.pid)]
        self.tick(f"overload, {OVERLOAD * rate:.0f} requests per second")
        during = await self._poisson(WITH_EXITS, OVERLOAD * rate, seconds - 3 * calm)
        memory.append(_resident_mb(self.pid))
        after = await self._poisson(WITH_EXITS, rate / 2, calm)
        slo = self.report.slo_ms
        self.report.overload = {
            "rate": OVERLOAD * rate,
            "asked_per_second": len(during.statuses) / during.seconds,
            "before": before.summary(slo),
            "during": during.summary(slo),
            "after": after.summary(slo),
            "resident_mb_before": memory[0],
            "resident_mb_after": memory[1],
        }


def _resident_mb(pid: int) -> float | None:
    """Memory of a process; None where the system does not tell."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")), None)
