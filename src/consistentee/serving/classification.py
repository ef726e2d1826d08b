"""Texts that arrive one by one, through one model: accepted on the event loop, computed elsewhere (`Computing`).

The event loop keeps the queue's bound, the deadlines and the audit.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import math
import time
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from consistentee.data.tokenization import encode_texts
from consistentee.inference.encoder.incremental_scores import is_answer, log_softmax
from consistentee.inference.encoder.layer_pool import Pool, PoolAnswer, PoolRow
from consistentee.models.loaded import short_name
from consistentee.models.operating_points import FULL_DEPTH_POINT
from consistentee.pipelines.classifier import Engine
from consistentee.serving.audit import Auditor
from consistentee.serving.computing import (
    AddTexts,
    Computing,
    DropTexts,
    LookAtText,
    Outcome,
    TextsAnswered,
    TextSeen,
    TextsFailed,
    ThreadComputing,
    View,
    WorkerRestarted,
)
from consistentee.serving.metrics import ServerMetrics
from consistentee.serving.pace import AnswerPace
from consistentee.serving.points import ServedPoint, named_point, served_points
from consistentee.serving.requests import PredictRequest, RefusedRequest, ServerLimits, refuse, shutting_down
from consistentee.serving.tokenizing import LONG_TEXTS, TokenizingThread

_log = logging.getLogger(__name__)

COMPUTING_FAILED = "Computing failed. Try again."
NO_NUMBERS = (
    "Computing failed: logits must be numbers. The model's weights are broken, or its numbers too large for its dtype: "
    "serve it in float32."
)

WITHIN_DEADLINE = 0.75
"""Share of the deadline within which a text must be expected to be answered to be taken: the pace varies."""


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
        engine: of the model; where it does not compute, one on torch's device `meta` will do.
        limits: what is taken at most.
        operating_point: the point in force to begin with; None for the saved rule.
        audit: share of the texts that are compared with full depth.
        seed: of the draws of the audit; None for one that nobody knows.
        computing: runs the layers; None for a thread of this process.
        pool: makes the pool of that thread; None for the engine's.

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
        computing: Computing | None = None,
        pool: Callable[[], Pool] | None = None,
    ) -> None:
        self.engine, self.limits = engine, limits or ServerLimits()
        self._folder = engine.saved.name
        self.name = short_name(self._folder)  # where it lies is nobody's business
        self.points = served_points(engine)
        point = named_point(self.points, operating_point, self._folder)
        self.auditor = Auditor(self.points, point, audit, seed=seed)
        self.metrics = ServerMetrics(engine.backend.num_layers, self.name)
        self._computing: Computing = computing or ThreadComputing(engine, pool)
        self.metrics.follow_queue(lambda: self._unanswered)
        self.metrics.follow_workers(lambda: self._computing.workers)
        self._show_point()
        # Of the event loop alone: the engine's own may be held by the thread of long texts, or by who else predicts.
        self._tokenizer = copy.deepcopy(engine.saved.tokenizer)
        self._long_texts = TokenizingThread()
        self._keys = count()
        self._pending: dict[Hashable, _Pending] = {}
        self._unanswered = 0
        self._pace = AnswerPace()
        self._loop: asyncio.AbstractEventLoop | None = None

    def warm_up(self) -> None:
        """Answer a text or two, so that the first request does not wait for what is made once."""
        self._computing.warm_up((self.points[FULL_DEPTH_POINT].rule, self.auditor.point.rule))

    def start(self) -> None:
        """Begin to compute; call it on the event loop."""
        self._loop = asyncio.get_running_loop()
        self._computing.start(self._take)

    async def stop(self) -> None:
        """End; who still waits is refused."""
        await self._computing.stop()
        self._refuse(tuple(self._pending), shutting_down())

    @property
    def is_ready(self) -> bool:
        """Whether requests are computed."""
        return self._computing.is_ready

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
            rows, cut = await self._tokenized(request, accepted)
            keys, futures = self._submit(rows, point, accepted)
            answers = await self._in_time(futures, accepted)
        finally:
            self._free_place(number, keys)
        return [
            ScoredText(_scores(answer.logits, request.raw_scores), answer.exit_layer, is_cut)
            for answer, is_cut in zip(answers, cut, strict=True)
        ]

    async def look_at(self, request: PredictRequest, view: View) -> tuple[Any, bool]:
        """What a function gives for the one text of a request, between two steps of the pool, and whether it was cut.

        The text counts as one that waits, and for no metric of answers.

        Args:
            request: of one text.
            view: called where the layers are computed.

        Raises:
            RefusedRequest: as of `predict`.
        """
        self._take_place(1)
        accepted, key = time.perf_counter(), next(self._keys)
        try:
            point = self._point(request)
            (row,), (is_cut,) = await self._tokenized(request, accepted)
            future = self._wait_for(key, point, accepted)
            self._computing.send(LookAtText(key, row, point, view))
            (seen,) = await self._in_time([future], accepted)
            return seen, is_cut
        finally:
            self._free_place(1, [key])

    def _take_place(self, number: int) -> None:
        """Count texts as unanswered, or refuse them where the queue is full."""
        if number > self.limits.max_queue:
            refuse(f"inputs must hold at most {self.limits.max_queue} texts, got {number}.", 413)
        is_full = self._unanswered + number > self.limits.max_queue
        if (
            is_full
            or self._pace.seconds(self._unanswered + number)
            > WITHIN_DEADLINE * self.limits.deadline_ms / 1000
        ):
            most = f"of at most {self.limits.max_queue}" if is_full else "more than it answers in time"
            message = f"The server is overloaded: {self._unanswered} texts wait, {most}."
            raise RefusedRequest(429, "Overloaded", message, self._retry_after())
        self._unanswered += number

    async def _in_time(self, futures: Sequence[asyncio.Future[Any]], accepted: float) -> list[Any]:
        """What the futures give, or 504 at the deadline."""
        _, late = await asyncio.wait(futures, timeout=max(0.0, self._seconds_left(accepted)))
        if late:
            raise self._too_late()
        failed = [error for future in futures if (error := future.exception()) is not None]
        if failed:
            raise failed[0]
        return [future.result() for future in futures]

    def _seconds_left(self, accepted: float) -> float:
        """Until the deadline of what was accepted then."""
        return self.limits.deadline_ms / 1000 - (time.perf_counter() - accepted)

    def _too_late(self) -> RefusedRequest:
        message = f"No answer within {self.limits.deadline_ms:g} ms. Send fewer requests at a time."
        return RefusedRequest(504, "Overloaded", message, self._retry_after())

    def _free_place(self, number: int, keys: Sequence[int]) -> None:
        """The end of `_take_place`, whether the texts were answered or not."""
        self._unanswered -= number
        self._drop(keys)
        if not self._unanswered:
            self._pace.rest()

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
            refuse(self._without_folder(error))
        return self.auditor.point

    def _without_folder(self, error: ValueError) -> str:
        """What an error says, with the model's name where it says its folder."""
        return str(error).replace(f'"{self._folder}"', f'"{self.name}"')

    def _criterion(self) -> str | None:
        """The criterion of thresholds that requests give: that of the point in force; None is the saved one."""
        point = self.auditor.point
        return None if point.name == FULL_DEPTH_POINT else point.rule.criterion

    async def _tokenized(
        self, request: PredictRequest, accepted: float
    ) -> tuple[list[dict[str, list[int]]], list[bool]]:
        """Token ids, and which texts were cut; long texts wait for their turn on a thread, until the deadline."""
        texts, engine = request.texts, self.engine
        try:
            if sum(len(part) for parts in texts for part in parts) > LONG_TEXTS:
                left = self._seconds_left(accepted)
                rows, cut = await self._long_texts.run(lambda: engine.tokenize(texts), left)
            else:
                rows, cut = encode_texts(
                    list(engine.checked(texts)), self._tokenizer, engine.saved.max_length
                )
        except asyncio.TimeoutError:
            raise self._too_late() from None
        except ValueError as error:
            refuse(self._without_folder(error), kind="Tokenizer")
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
    ) -> tuple[list[int], list[asyncio.Future[Any]]]:
        keys = [next(self._keys) for _ in rows]
        futures: list[asyncio.Future[Any]] = []
        entered: list[PoolRow] = []
        for key, row in zip(keys, rows, strict=True):
            is_audited = self.auditor.draws(point)
            futures.append(self._wait_for(key, point, accepted, is_audited=is_audited))
            entered.append(PoolRow(key, row, point.rule.threshold, is_audited))
        self._computing.send(AddTexts(entered, point.rule))
        return keys, futures

    def _wait_for(
        self, key: int, point: ServedPoint, accepted: float, *, is_audited: bool = False
    ) -> asyncio.Future[Any]:
        """What will be handed over for a text; 503 where nothing computes."""
        if self._loop is None or not self.is_ready:
            raise RefusedRequest(503, "Unhealthy", "The server is not ready.")
        future = self._loop.create_future()
        self._pending[key] = _Pending(future, point, accepted, is_audited)
        return future

    def _drop(self, keys: Sequence[int]) -> None:
        """Forget texts that nobody waits for any more; who was answered and is looked at again goes on."""
        gone = [key for key in keys if key in self._pending and not self._pending[key].future.done()]
        for key in gone:
            self._pending.pop(key).future.cancel()
        if gone:
            self._computing.send(DropTexts(gone))

    def _take(self, outcome: Outcome) -> None:
        """What was computed, to whom it concerns."""
        match outcome:
            case TextsAnswered(answers, rows):
                self.metrics.batch_rows.observe(rows)
                self._deliver(answers)
            case TextSeen(key, view):
                pending = self._pending.pop(key, None)
                if pending is not None and not pending.future.done():
                    pending.future.set_result(view)
            case TextsFailed(keys):
                self.metrics.failures.inc()
                self._refuse(keys, RefusedRequest(424, "Backend", COMPUTING_FAILED))
            case WorkerRestarted():
                self.metrics.worker_restarts.inc()

    def _deliver(self, answers: Sequence[PoolAnswer]) -> None:
        """Hand answers to who waits for them, and audited ones to the audit."""
        now = time.perf_counter()
        for answer in answers:
            pending = self._pending.get(answer.key)
            if pending is None:
                continue
            if not is_answer(answer.logits[None])[0]:
                self._refuse([answer.key], self.no_numbers(answer.exit_layer))
                continue
            if answer.went_on:
                del self._pending[answer.key]
                self._audit(pending, int(answer.logits.argmax()))
                continue
            pending.label = int(answer.logits.argmax())
            if not pending.is_audited:
                del self._pending[answer.key]
            self._pace.answered(self._unanswered)
            self.metrics.waited.observe(now - pending.accepted)
            self.metrics.exit_layers.observe(answer.exit_layer)
            if not pending.future.done():
                pending.future.set_result(answer)

    def no_numbers(self, layer: int) -> RefusedRequest:
        """What is said of a text whose logits are no numbers at a layer; it is logged and counted."""
        _log.error("Logits of a text are no numbers at layer %d. %s", layer, NO_NUMBERS)
        self.metrics.failures.inc()
        return RefusedRequest(424, "Backend", NO_NUMBERS)

    def _audit(self, pending: _Pending, label: int) -> None:
        point, disagrees, allowed = pending.point, label != pending.label, self.auditor.allowed
        self.metrics.audited.labels(point.name).inc()
        self.metrics.disagreed.labels(point.name).inc(int(disagrees))
        if self.auditor.add(point, disagrees):
            left, bounds = self.auditor.steps_back[-1]
            self.metrics.steps_back.inc()
            _log.warning(
                "Operating point %s is left for %s: a certificate allows a disagreement of %.4g, and the traffic has "
                "at least %.4g (%d of %d audited texts).",
                left.name,
                self.auditor.point.name,
                allowed,
                bounds.lower,
                bounds.losses,
                bounds.rows,
            )
            self._show_point()
        self._show_bounds()

    def _show_point(self) -> None:
        auditor = self.auditor
        self.metrics.set_point(auditor.point.name, auditor.allowed, auditor.confidence)
        self._show_bounds()

    def _show_bounds(self) -> None:
        if self.auditor.watches:
            name, bounds = self.auditor.point.name, self.auditor.bounds
            self.metrics.lower.labels(name).set(bounds.lower)
            self.metrics.upper.labels(name).set(bounds.upper)

    def _retry_after(self) -> int:
        """Whole seconds until what waits now is answered, from 1 to 60."""
        return max(1, min(60, math.ceil(self._pace.seconds(self._unanswered))))

    def _refuse(self, keys: Collection[Hashable], error: RefusedRequest) -> None:
        """Tell who waits for texts that no answer comes; who was answered is forgotten."""
        for key in keys:
            pending = self._pending.pop(key, None)
            if pending is not None and not pending.future.done():
                pending.future.set_exception(error)


def _scores(logits: NDArray[np.float32], raw: bool) -> NDArray[np.float32]:
    return logits if raw else np.exp(log_softmax(logits[None]))[0]
