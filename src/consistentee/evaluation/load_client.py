"""Requests at a rate, from outside: an open loop over HTTP/1.1 that does not wait for answers before it asks again.

Arrivals are a Poisson process: the gaps between them are drawn from an exponential distribution. A latency counts from
the time at which the request was due, so that a server that falls behind does not slow its own clock.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

LOST = 0
"""The status of a request that got no answer."""

CONNECTIONS = 1024
"""Connections that are kept for later requests, at most."""


@dataclass
class LoadResult:
    """What became of requests.

    Args:
        seconds: from the first one that was due to the last answer.
        statuses: (requests,) of HTTP; `LOST` for none.
        latency_ms: (requests,) from when it was due to its answer's end.
        wrong: answers with another label than expected.
    """

    seconds: float = 0.0
    statuses: list[int] = field(default_factory=list[int])
    latency_ms: list[float] = field(default_factory=list[float])
    wrong: int = 0

    def accepted_ms(self) -> NDArray[np.float64]:
        """Latencies of answers with status 200."""
        return np.array(
            [value for value, status in zip(self.latency_ms, self.statuses, strict=True) if status == 200]
        )

    def summary(self, slo_ms: float | None = None) -> dict[str, Any]:
        """Counts by status, percentiles of accepted requests in milliseconds, and goodput per second within the SLO."""
        accepted = self.accepted_ms()
        counts = {str(status): self.statuses.count(status) for status in sorted(set(self.statuses))}
        found: dict[str, Any] = {"requests": len(self.statuses), "statuses": counts, "wrong": self.wrong}
        found["answers_per_second"] = len(accepted) / self.seconds if self.seconds else 0.0
        for name, share in (("p50_ms", 50), ("p95_ms", 95), ("p99_ms", 99)):
            found[name] = float(np.percentile(accepted, share)) if len(accepted) else None
        if slo_ms is not None:
            found["goodput"] = float((accepted <= slo_ms).sum()) / self.seconds if self.seconds else 0.0
        return found

    @staticmethod
    def joined(parts: Sequence[LoadResult]) -> LoadResult:
        """The results of several rounds as one."""
        return LoadResult(
            sum(part.seconds for part in parts),
            [status for part in parts for status in part.statuses],
            [value for part in parts for value in part.latency_ms],
            sum(part.wrong for part in parts),
        )


@dataclass(frozen=True)
class AskedText:
    """A text to ask about.

    Args:
        text: as `inputs` takes it.
        fields: of the request beside it.
        label: that is expected; None where any will do.
    """

    text: Any
    fields: dict[str, Any]
    label: str | None = None

    def body(self) -> bytes:
        """Of the request."""
        return json.dumps({"inputs": self.text, **self.fields}).encode()


class LoadClient:
    """Connections to one server.

    Args:
        url: of the server.
    """

    def __init__(self, url: str) -> None:
        place = urlsplit(url)
        self._host, self._port = place.hostname or "", place.port or 80
        self._free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(self, body: bytes) -> tuple[int, bytes]:
        """Status and body of an answer; `LOST` where there is none, also not on a new connection."""
        while self._free:  # the server closes connections that were idle for long
            reader, writer = self._free.pop()
            if not reader.at_eof() and not writer.is_closing():
                found = await self._exchange(reader, writer, body)
                if found is not None:
                    return found
        try:
            reader, writer = await asyncio.open_connection(self._host, self._port)
        except OSError:
            return LOST, b""
        return await self._exchange(reader, writer, body) or (LOST, b"")

    async def _exchange(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes
    ) -> tuple[int, bytes] | None:
        """Status and body; None where the connection broke before there was an answer."""
        try:
            head = f"POST /predict HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: application/json\r\n"
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            answer = await reader.readuntil(b"\r\n\r\n")
            status = int(answer[9:12])
            lines = answer.lower().split(b"\r\n")
            length = next((int(line[15:]) for line in lines if line.startswith(b"content-length:")), 0)
            content = await reader.readexactly(length)
        except (OSError, asyncio.IncompleteReadError, ValueError):
            writer.close()
            return None
        if len(self._free) < CONNECTIONS and b"connection: close" not in lines:
            self._free.append((reader, writer))
        else:
            writer.close()
        return status, content

    async def close(self) -> None:
        """Close what is open."""
        for _, writer in self._free:
            writer.close()
        self._free.clear()


async def poisson_load(
    client: LoadClient, asked: Sequence[AskedText], rate: float, seconds: float, rng: np.random.Generator
) -> LoadResult:
    """Ask at a mean rate for some time, texts in turn from a random place on, then wait for the answers.

    Args:
        client: of the server.
        asked: texts.
        rate: requests per second.
        seconds: for how long requests are due.
        rng: of arrivals and place.
    """
    bodies = [text.body() for text in asked]
    result, begun = LoadResult(), time.perf_counter()
    place, due = int(rng.integers(len(asked))), begun
    tasks: set[asyncio.Task[None]] = set()
    while True:
        due += float(rng.exponential(1 / rate))
        if due - begun > seconds:
            break
        wait = due - time.perf_counter()
        if wait > 0:
            await asyncio.sleep(wait)
        place = (place + 1) % len(asked)
        task = asyncio.ensure_future(_ask(client, asked[place], bodies[place], due, result))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    result.seconds = max(seconds, time.perf_counter() - begun)
    return result


async def closed_load(
    client: LoadClient, asked: Sequence[AskedText], workers: int, seconds: float
) -> LoadResult:
    """Ask by so many at a time, each again as soon as it is answered; its pace is what the server can do."""
    bodies = [text.body() for text in asked]
    result, begun = LoadResult(), time.perf_counter()

    async def work(first: int) -> None:
        place = first
        while time.perf_counter() - begun < seconds:
            place = (place + workers) % len(asked)
            await _ask(client, asked[place], bodies[place], time.perf_counter(), result)

    await asyncio.gather(*(work(worker) for worker in range(workers)))
    result.seconds = time.perf_counter() - begun
    return result


async def _ask(client: LoadClient, text: AskedText, body: bytes, due: float, result: LoadResult) -> None:
    status, content = await client.ask(body)
    result.latency_ms.append(1000 * (time.perf_counter() - due))
    result.statuses.append(status)
    if status == 200 and text.label is not None:
        first = json.loads(content)[0]
        likeliest = first[0] if isinstance(first, list) else first  # of a list of texts, or of one
        result.wrong += likeliest["label"] != text.label
