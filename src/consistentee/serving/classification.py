"""Texts that arrive one by one, through one model: accepted on the event loop, computed on a thread of their own.

The thread owns a pool (`LayerPool`). After every step it hands over who exited, so that an answer goes out while its
neighbours are still on their way, and takes in who has arrived. The event loop keeps the queue's bound, the deadlines
and the audit.
"""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from consistentee.inference.encoder.backend import TokenRow
from consistentee.inference.encoder.incremental_scores import IncrementalExitScores, log_softmax
from consistentee.inference.encoder.layer_pool import Pool, PoolAnswer, PoolRow
from consistentee.pipelines.classifier import Engine
from consistentee.serving.audit import Auditor
from consistentee.serving.metrics import ServerMetrics
from consistentee.serving.points import FULL_DEPTH_POINT, ServedPoint, named_point, served_points
from consistentee.serving.requests import PredictRequest, RefusedRequest, ServerLimits, refuse

_log = logging.getLogger(__name__)

Result = TypeVar("Result")

LONG_TEXTS = 4_000
"""Characters from which texts are tokenized beside the event loop, not on it."""

COMPUTING_FAILED = "Computing failed. Try again."

RECENT, PACE_ANSWERS = 256, 64
"""The last answers, by which the pace is told; fewer than the second number tell none."""


@dataclass(frozen=True)
class ScoredText:
    """What is answered for one text.

    Args:
        scores: (labels,) by index, probabilities or logits.
        exit_layer: from 1.
        truncated: whether it was cut.
    """

    scores: NDArray[np.float32]
    exit_layer: int
    truncated: bool


@dataclass
class _Pending:
    """A text on its way."""

    future: asyncio.Future[Any]
    point: ServedPoint
    accepted: float
    is_audited: bool
    label: int = -1


class ClassifierService:
    """Answers requests to classify.

    Args:
        engine: of the model.
        limits: what is taken at most.
        operating_point: the point in force to begin with; None for the saved rule.
        audit: share of the texts that are compared with full depth.
        seed: of the draws of the audit; None for one that nobody knows.
        pool: makes the pool; None for the engine's.

    Attributes:
        points: operating points by name.
        auditor: holds the one in force.
        metrics: what is counted.

    Raises:
        SettingError: no such operating point, or a share out of its range.
    """

    kind = "classifier"

    def __init__(
        self,
        engine: Engine,
        *,
        limits: ServerLimits | None = None,
        operating_point: str | None = None,
        audit: float = 0.0,
        seed: int | None = None,
        pool: Callable[[], Pool] | None = None,
    ) -> None:
        self.engine, self.limits = engine, limits or ServerLimits()
        self._folder = engine.saved.name
        self.name = self._folder.rstrip("/").split("/")[-1]  # where it lies is nobody's business
        self.points = served_points(engine)
        point = named_point(self.points, operating_point, self._folder)
        self.auditor = Auditor(self.points, point, audit, seed=seed)
        self.metrics = ServerMetrics(engine.backend.num_layers, self.name)
        self.metrics.follow_queue(lambda: self._unanswered)
        self._show_point()
        self._make_pool: Callable[[], Pool] = pool or engine.pool
        self._keys = count()
        self._pending: dict[Hashable, _Pending] = {}
        self._unanswered = 0
        self._answered_at: deque[float] = deque(maxlen=RECENT)
        self._inbox: queue.SimpleQueue[tuple[str, Any] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    # --- On the event loop ------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to compute; call it on the event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._compute, name="consistentee-layers", daemon=True)
        self._thread.start()

    def warm_up(self) -> None:
        """Answer a text or two, so that the first request does not wait for what is made once."""
        parts = ("a",) if not self.engine.saved.text_pairs else ("a", "a")
        rows, _ = self.engine.tokenize([parts])
        for point in (self.points[FULL_DEPTH_POINT], self.auditor.point):
            self.engine.run(rows, batch_size=1, rule=point.rule)

    async def stop(self) -> None:
        """End the thread; who still waits is refused."""
        self._inbox.put(None)
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
        self._fail(RefusedRequest(503, "Unhealthy", "The server is shutting down."))

    @property
    def is_ready(self) -> bool:
        """Whether requests are computed."""
        return self._thread is not None and self._thread.is_alive()

    async def predict(self, request: PredictRequest) -> list[ScoredText]:
        """Answers for the texts of a request, in their order.

        Raises:
            RefusedRequest: the queue is full (429), the deadline has passed (504), there is no such operating point or
                a text does not fit (422), there are too many tokens (413), or computing failed (424).
        """
        number = len(request.texts)
        self._take_place(number)
        accepted = time.perf_counter()
        keys: list[int] = []
        try:
            point = self._point(request)
            rows, cut = await self._tokenized(request)
            keys, futures = self._submit(rows, point, accepted)
            answers = await self._in_time(futures, accepted)
        finally:
            self._free_place(number, keys)
        return [
            ScoredText(_scores(answer.logits, request.raw_scores), answer.exit_layer, is_cut)
            for answer, is_cut in zip(answers, cut, strict=True)
        ]

    async def look_at(
        self, request: PredictRequest, view: Callable[[TokenRow, ServedPoint], Result]
    ) -> tuple[Result, bool]:
        """What a function gives for the one text of a request, between two steps of the pool, and whether it was cut.

        The text counts as one that waits, and for no metric of answers.

        Args:
            request: of one text.
            view: takes its token ids and operating point; called on the thread that computes.

        Raises:
            RefusedRequest: as of `predict`.
        """
        self._take_place(1)
        accepted, key = time.perf_counter(), next(self._keys)
        try:
            point = self._point(request)
            (row,), (is_cut,) = await self._tokenized(request)
            if self._loop is None or not self.is_ready:
                raise RefusedRequest(503, "Unhealthy", "The server is not ready.")
            loop, future = self._loop, self._loop.create_future()
            self._pending[key] = _Pending(future, point, accepted, is_audited=False)

            def work() -> None:
                if not future.done():
                    loop.call_soon_threadsafe(_settle, future, self._attempt(lambda: view(row, point)))

            self._inbox.put(("work", work))
            (result,) = await self._in_time([future], accepted)
            return result, is_cut
        finally:
            self._free_place(1, [key])
            self._pending.pop(key, None)

    def _take_place(self, number: int) -> None:
        """Count texts as unanswered, or refuse them where the queue is full."""
        if number > self.limits.max_queue:
            refuse(f"inputs must hold at most {self.limits.max_queue} texts, got {number}.", 413)
        is_full = self._unanswered + number > self.limits.max_queue
        if is_full or self._expected_seconds(number) > self.limits.deadline_ms / 1000:
            most = f"of at most {self.limits.max_queue}" if is_full else "more than it answers in time"
            message = f"The server is overloaded: {self._unanswered} texts wait, {most}."
            raise RefusedRequest(429, "Overloaded", message, self._retry_after())
        self._unanswered += number

    async def _in_time(self, futures: Sequence[asyncio.Future[Result]], accepted: float) -> list[Result]:
        """What the futures give, or 504 at the deadline."""
        left = self.limits.deadline_ms / 1000 - (time.perf_counter() - accepted)
        _, late = await asyncio.wait(futures, timeout=max(0.0, left))
        if late:
            raise RefusedRequest(
                504,
                "Overloaded",
                f"No answer within {self.limits.deadline_ms:g} ms. Send fewer requests at a time.",
                self._retry_after(),
            )
        failed = [error for future in futures if (error := future.exception()) is not None]
        if failed:
            raise failed[0]
        return [future.result() for future in futures]

    def _free_place(self, number: int, keys: Sequence[int]) -> None:
        """The end of `_take_place`, whether the texts were answered or not."""
        self._unanswered -= number
        self._drop(keys)
        if not self._unanswered:  # the pace is that of a busy server
            self._answered_at.clear()

    def _point(self, request: PredictRequest) -> ServedPoint:
        """The operating point of a request."""
        name, threshold = request.operating_point, request.threshold
        if name is not None and threshold is not None:
            refuse("operating_point and threshold exclude each other: give one of them.")
        try:
            if name is not None:
                return named_point(self.points, name, self.name)
            if threshold is not None:
                return ServedPoint("threshold", self.engine.rule(self._criterion(), threshold))
        except ValueError as error:
            refuse(str(error).replace(self._folder, self.name))
        return self.auditor.point

    def _criterion(self) -> str | None:
        """The criterion of thresholds that requests give: that of the point in force; None is the saved one."""
        point = self.auditor.point
        return None if point.name == FULL_DEPTH_POINT else point.rule.criterion

    async def _tokenized(self, request: PredictRequest) -> tuple[list[dict[str, list[int]]], list[bool]]:
        texts = request.texts
        try:
            if sum(len(part) for parts in texts for part in parts) > LONG_TEXTS:
                rows, cut = await asyncio.to_thread(self.engine.tokenize, texts)
            else:
                rows, cut = self.engine.tokenize(texts)
        except ValueError as error:
            refuse(str(error).replace(self._folder, self.name), kind="Tokenizer")
        longest = self.engine.saved.max_length
        if not request.truncate and any(cut):
            place = cut.index(True) + 1
            refuse(
                f"Text {place} must have at most {longest} tokens, got more. Shorten it, or set truncate.",
                413,
            )
        tokens = sum(len(row["input_ids"]) for row in rows)
        if tokens > self.limits.max_tokens:
            refuse(f"inputs must have at most {self.limits.max_tokens} tokens together, got {tokens}.", 413)
        return rows, cut

    def _submit(
        self, rows: Sequence[dict[str, list[int]]], point: ServedPoint, accepted: float
    ) -> tuple[list[int], list[asyncio.Future[PoolAnswer]]]:
        if self._loop is None or not self.is_ready:
            raise RefusedRequest(503, "Unhealthy", "The server is not ready.")
        keys = [next(self._keys) for _ in rows]
        futures: list[asyncio.Future[PoolAnswer]] = []
        entered: list[PoolRow] = []
        for key, row in zip(keys, rows, strict=True):
            is_audited = self.auditor.draws(point)
            future: asyncio.Future[PoolAnswer] = self._loop.create_future()
            self._pending[key] = _Pending(future, point, accepted, is_audited)
            futures.append(future)
            entered.append(PoolRow(key, row, point.rule.threshold, is_audited))
        self._inbox.put(("add", (entered, self.engine.exit_scores(point.rule))))
        return keys, futures

    def _drop(self, keys: Sequence[int]) -> None:
        """Forget texts that nobody waits for any more; who was answered and is looked at again goes on."""
        gone = [key for key in keys if key in self._pending and not self._pending[key].future.done()]
        for key in gone:
            self._pending.pop(key).future.cancel()
        if gone:
            self._inbox.put(("drop", gone))

    def _deliver(self, answers: Sequence[PoolAnswer], passed: Sequence[int]) -> None:
        """Hand answers to who waits for them, and audited ones to the audit."""
        now = time.perf_counter()
        for rows in passed:
            self.metrics.batch_rows.observe(rows)
        for answer in answers:
            pending = self._pending.get(answer.key)
            if pending is None:
                continue
            if answer.went_on:
                del self._pending[answer.key]
                self._audit(pending, int(answer.logits.argmax()))
                continue
            pending.label = int(answer.logits.argmax())
            if not pending.is_audited:
                del self._pending[answer.key]
            self._answered_at.append(now)
            self.metrics.waited.observe(now - pending.accepted)
            self.metrics.exit_layers.observe(answer.exit_layer)
            if not pending.future.done():
                pending.future.set_result(answer)

    def _audit(self, pending: _Pending, label: int) -> None:
        point, disagrees = pending.point, label != pending.label
        self.metrics.audited.labels(point.name).inc()
        self.metrics.disagreed.labels(point.name).inc(int(disagrees))
        if self.auditor.add(point, disagrees):
            left, bounds = self.auditor.steps_back[-1]
            self.metrics.steps_back.inc()
            _log.warning(
                "Operating point %s is left for %s: its certificate allows a disagreement of %.4g, and the traffic "
                "has at least %.4g (%d of %d audited texts).",
                left.name,
                self.auditor.point.name,
                left.max_disagreement,
                bounds.lower,
                bounds.losses,
                bounds.rows,
            )
            self._show_point()
        self._show_bounds()

    def _show_point(self) -> None:
        point = self.auditor.point
        self.metrics.set_point(point.name, point.max_disagreement, point.confidence)
        self._show_bounds()

    def _show_bounds(self) -> None:
        if self.auditor.watches:
            name, bounds = self.auditor.point.name, self.auditor.bounds
            self.metrics.lower.labels(name).set(bounds.lower)
            self.metrics.upper.labels(name).set(bounds.upper)

    def _expected_seconds(self, more: int = 0) -> float:
        """Until what waits, and so many texts more, is answered at the pace of the last ones; 0 where none is known."""
        count = len(self._answered_at)
        if count < PACE_ANSWERS:
            return 0.0
        return (self._unanswered + more) * (time.perf_counter() - self._answered_at[0]) / count

    def _retry_after(self) -> int:
        """Whole seconds until what waits now is answered, from 1 to 60."""
        return max(1, min(60, math.ceil(self._expected_seconds())))

    def _fail(self, error: RefusedRequest) -> None:
        """Refuse all that are on their way."""
        pending, self._pending = self._pending, {}
        for waiting in pending.values():
            if not waiting.future.done():
                waiting.future.set_exception(error)

    def _failed(self) -> None:
        self.metrics.failures.inc()
        self._fail(RefusedRequest(424, "Backend", COMPUTING_FAILED))

    # --- On the thread ----------------------------------------------------------------------------

    def _attempt(self, work: Callable[[], Result]) -> Result | RefusedRequest:
        """What a function gives, or the error that its request is told."""
        try:
            return work()
        except Exception:
            _log.exception("Looking at a text failed.")
            self.metrics.failures.inc()
            return RefusedRequest(424, "Backend", COMPUTING_FAILED)

    def _compute(self) -> None:
        """Take in what arrives, and compute as long as there is something to do."""
        loop = self._loop
        if loop is None:
            return
        pool = self._make_pool()
        while True:
            arrived = [self._inbox.get()] if not len(pool) else []
            while not self._inbox.empty():
                arrived.append(self._inbox.get())
            if None in arrived:
                return
            try:
                for message in arrived:
                    _take_in(pool, message)
                answers, rows = pool.step()
            except Exception:  # whatever it was: those who were on their way are told, and a new pool begins
                _log.exception("A batch failed.")
                pool = self._make_pool()
                loop.call_soon_threadsafe(self._failed)
                continue
            if rows:
                loop.call_soon_threadsafe(self._deliver, answers, [rows])


def _settle(future: asyncio.Future[Any], result: Any) -> None:
    """Hand a result or a refusal to who waits for it."""
    if future.done():
        return
    if isinstance(result, RefusedRequest):
        future.set_exception(result)
    else:
        future.set_result(result)


def _take_in(pool: Pool, message: tuple[str, Any] | None) -> None:
    if message is None:
        return
    what, value = message
    if what == "drop":
        pool.drop(value)
        return
    if what == "work":
        value()
        return
    rows: list[PoolRow]
    exit_scores: IncrementalExitScores | None
    rows, exit_scores = value
    pool.add(rows, exit_scores)


def _scores(logits: NDArray[np.float32], raw: bool) -> NDArray[np.float32]:
    return logits if raw else np.exp(log_softmax(logits[None]))[0]
