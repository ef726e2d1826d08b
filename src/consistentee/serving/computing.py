"""What computes for a classifier's service: one loop, here on a thread of the process, in `workers` in other processes.

The service hands over messages (texts to add, to forget, to look at) and is handed outcomes on its event loop. After
every step of the pool who exited is handed over, so that an answer goes out while its neighbours are still on their
way, and who has arrived is taken in.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from consistentee.inference.encoder.backend import TokenRow
from consistentee.inference.encoder.layer_pool import Pool, PoolAnswer, PoolRow
from consistentee.inference.encoder.packing import padded_count
from consistentee.inference.encoder.prepacked_linear import PREPACKED_ROWS
from consistentee.inference.encoder.scheduler import ExitRule
from consistentee.pipelines.classifier import Engine
from consistentee.serving.points import ServedPoint

_log = logging.getLogger(__name__)

KERNEL_SECONDS = 5.0
"""Of a start, for kernels; larger models make theirs when they are met."""

View = Callable[[Engine, TokenRow, ServedPoint], Any]
"""What is computed of one text at an operating point; a function of a module, so that other processes find it."""


@dataclass(frozen=True)
class AddTexts:
    """Texts to answer.

    Args:
        rows: with keys that nobody has had before.
        rule: whose criterion they exit by; thresholds are the rows' own.
    """

    rows: Sequence[PoolRow]
    rule: ExitRule


@dataclass(frozen=True)
class DropTexts:
    """Texts that nobody waits for any more."""

    keys: Collection[Hashable]


@dataclass(frozen=True)
class LookAtText:
    """A text to compute a view of, between two steps.

    Args:
        key: that nobody has had before.
        row: its tokens.
        point: by which it would exit.
        view: to compute.
    """

    key: Hashable
    row: TokenRow
    point: ServedPoint
    view: View


@dataclass(frozen=True)
class Heartbeat:
    """A sign of life: asked for by a message, and given between two steps by the same."""


@dataclass(frozen=True)
class TextsAnswered:
    """A step of a pool: who was answered, and how many rows passed a layer together."""

    answers: Sequence[PoolAnswer]
    rows: int


@dataclass(frozen=True)
class TextSeen:
    """The view of a text."""

    key: Hashable
    view: Any


@dataclass(frozen=True)
class TextsFailed:
    """Texts of which nothing more comes: their batch or view failed."""

    keys: Collection[Hashable]


@dataclass(frozen=True)
class WorkerRestarted:
    """A process has died, and the next one begins in its place."""


Message = AddTexts | DropTexts | LookAtText | Heartbeat
Outcome = TextsAnswered | TextSeen | TextsFailed | WorkerRestarted | Heartbeat


class Computing(Protocol):
    """What runs the layers for a service."""

    def warm_up(self, rules: Sequence[ExitRule]) -> None:
        """Make what is made once, by answering a text under each rule; before `start`."""
        ...

    def start(self, hand_over: Callable[[Outcome], None]) -> None:
        """Begin; call it on the event loop, where outcomes are handed over as well."""
        ...

    def send(self, message: Message) -> None:
        """Take a message in; call it on the event loop."""
        ...

    async def stop(self) -> None:
        """End; nothing is handed over afterwards."""
        ...

    @property
    def is_ready(self) -> bool:
        """Whether what is sent is computed."""
        ...

    @property
    def workers(self) -> int:
        """Processes that compute beside this one."""
        ...


class ThreadComputing:
    """One thread of this process.

    Args:
        engine: of the model.
        pool: makes the pool; None for the engine's.
    """

    def __init__(self, engine: Engine, pool: Callable[[], Pool] | None = None) -> None:
        self._engine, self._make_pool = engine, pool or engine.pool
        self._inbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def warm_up(self, rules: Sequence[ExitRule]) -> None:
        """See `Computing`."""
        answer_once(self._engine, rules)

    def start(self, hand_over: Callable[[Outcome], None]) -> None:
        """See `Computing`."""
        loop = asyncio.get_running_loop()

        def told(outcome: Outcome) -> None:
            with suppress(RuntimeError):  # the loop has ended, and nobody waits any more
                loop.call_soon_threadsafe(hand_over, outcome)

        def compute() -> None:
            compute_texts(self._engine, self._make_pool, self._inbox, told)

        self._thread = threading.Thread(target=compute, name="consistentee-layers", daemon=True)
        self._thread.start()

    def send(self, message: Message) -> None:
        """See `Computing`."""
        self._inbox.put(message)

    async def stop(self) -> None:
        """See `Computing`."""
        self._inbox.put(None)
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    @property
    def is_ready(self) -> bool:
        """See `Computing`."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def workers(self) -> int:
        """None."""
        return 0


def answer_once(engine: Engine, rules: Sequence[ExitRule]) -> None:
    """Make what is made once, so that no request waits for it and memory does not grow by it later.

    A text is answered under each rule. On CPU, where a kernel is made for each new number of tokens and kept, texts of
    so many tokens go through all layers as well, for `KERNEL_SECONDS` at most.
    """
    rows, _ = engine.tokenize([("a", "a") if engine.saved.text_pairs else ("a",)])
    for rule in rules:
        engine.run(rows, batch_size=1, rule=rule)
    if engine.backend.name != "torch" or engine.backend.device.type != "cpu":
        return
    begun, longest, depth = time.perf_counter(), engine.saved.max_length, engine.backend.num_layers
    for tokens in sorted({padded_count(number) for number in range(1, PREPACKED_ROWS + 1)}):
        if time.perf_counter() - begun > KERNEL_SECONDS:
            return
        lengths = [longest] * (tokens // longest) + [tokens % longest] * (tokens % longest > 0)
        part = [{name: (values * length)[:length] for name, values in rows[0].items()} for length in lengths]
        engine.run(part, batch_size=len(part), rule=ExitRule.fixed([depth] * len(part)))


def compute_texts(
    engine: Engine,
    make_pool: Callable[[], Pool],
    inbox: queue.SimpleQueue[Message | None],
    hand_over: Callable[[Outcome], object],
) -> None:
    """Take in what arrives, and compute as long as there is something to do; until None arrives.

    Args:
        engine: of the model.
        make_pool: makes a pool at the start, and anew where a batch failed.
        inbox: where messages arrive.
        hand_over: takes outcomes, on this thread.
    """
    pool = make_pool()
    inside: dict[
        Hashable, bool
    ] = {}  # keys of which something comes, with whether it goes on after the answer
    arrived: deque[Message | None] = deque()
    while True:
        if not arrived and not len(pool):
            arrived.append(inbox.get())
        while not inbox.empty():
            arrived.append(inbox.get())
        if None in arrived:
            return
        gone = {key for message in arrived if isinstance(message, DropTexts) for key in message.keys}
        try:
            while arrived:
                match arrived.popleft():
                    case AddTexts(added, rule):
                        inside.update((row.key, row.to_the_end) for row in added)
                        pool.add(added, engine.exit_scores(rule))
                    case DropTexts(keys):
                        pool.drop(keys)
                        for key in keys:
                            inside.pop(key, None)
                    case LookAtText(key) as asked if key not in gone:
                        hand_over(_view(engine, asked))
                    case Heartbeat() as sign:
                        hand_over(sign)
                    case _:
                        pass
            answers, rows = pool.step()
        except Exception:  # whatever it was: those who were on their way are told, and a new pool begins
            _log.exception("A batch failed.")
            hand_over(TextsFailed(tuple(inside)))
            pool, inside = make_pool(), {}
            continue
        for answer in answers:
            if answer.went_on or not inside.get(answer.key):
                inside.pop(answer.key, None)
        if rows:
            hand_over(TextsAnswered(answers, rows))


def _view(engine: Engine, asked: LookAtText) -> TextSeen | TextsFailed:
    """The view that was asked for, or that it failed."""
    try:
        return TextSeen(asked.key, asked.view(engine, asked.row, asked.point))
    except Exception:
        _log.exception("Looking at a text failed.")
        return TextsFailed((asked.key,))
