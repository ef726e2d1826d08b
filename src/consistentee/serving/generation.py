"""Prompts that arrive one by one, through one model: written on a thread of its own, told token by token.

Prompts that wait and are to be written in the same way are written together, up to `MOST_ROWS`. A row that ends is
answered at once and makes room for the others; prompts that arrive meanwhile wait until the batch is through.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace

from consistentee.pipelines.decoding_options import DecodingOptions
from consistentee.pipelines.generator import TextGenerator
from consistentee.serving.metrics import ServerMetrics
from consistentee.serving.requests import RefusedRequest, ServerLimits

_log = logging.getLogger(__name__)

MOST_ROWS = 8
"""Texts that are written together."""


@dataclass(frozen=True)
class TokenEvent:
    """What happened to a prompt of a request.

    Args:
        index: of the prompt in its request.
        piece: of the text; "" where nothing was added to it.
        exit_layer: of the token; None where the text has ended or failed.
        finish_reason: `stop`, `end` or `length` where it has ended.
        error: why it failed.
    """

    index: int
    piece: str = ""
    exit_layer: int | None = None
    finish_reason: str | None = None
    error: RefusedRequest | None = None


@dataclass(eq=False)
class _Job:
    """A prompt that waits or is written."""

    index: int
    token_ids: list[int]
    limit: int
    options: DecodingOptions
    events: asyncio.Queue[TokenEvent]
    is_gone: bool = False
    accepted: float = field(default_factory=time.perf_counter)
    is_told: bool = False


class GeneratorService:
    """Answers requests to write texts.

    Args:
        generator: of the model.
        limits: what is taken at most; the deadline is that of the first token.

    Attributes:
        metrics: what is counted.
    """

    kind = "generator"

    def __init__(self, generator: TextGenerator, *, limits: ServerLimits | None = None) -> None:
        self.generator, self.limits = generator, limits or ServerLimits()
        self.name = generator.saved.name.rstrip("/").split("/")[-1]
        self.metrics = ServerMetrics(generator.saved.num_hidden_layers, self.name)
        self.metrics.follow_queue(lambda: self._unanswered)
        self._waiting: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._unanswered = 0
        self._ends = False
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Begin to write; call it on the event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._write, name="consistentee-tokens", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """End the thread; texts that wait are refused, those being written are cut off."""
        with self._changed:
            self._ends = True
            self._changed.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
        for job in self._waiting:
            self._tell(job, error=RefusedRequest(503, "Unhealthy", "The server is shutting down."))

    @property
    def is_ready(self) -> bool:
        """Whether requests are answered."""
        return self._thread is not None and self._thread.is_alive()

    async def texts(
        self, prompts: Sequence[list[int]], limits: Sequence[int], options: DecodingOptions
    ) -> AsyncIterator[TokenEvent]:
        """What happens to the prompts of a request, until each has ended.

        Args:
            prompts: (prompts, tokens).
            limits: (prompts,) the most tokens of each text.
            options: how to write them.

        Raises:
            RefusedRequest: the queue is full (429), the first token did not come in time (504), or it failed (424).
        """
        if len(prompts) > self.limits.max_queue:
            message = f"prompt must hold at most {self.limits.max_queue} prompts, got {len(prompts)}."
            raise RefusedRequest(413, "Validation", message)
        if self._unanswered + len(prompts) > self.limits.max_queue:
            message = f"The server is overloaded: {self._unanswered} prompts wait or are answered."
            raise RefusedRequest(429, "Overloaded", message, 1)
        if not self.is_ready:
            raise RefusedRequest(503, "Unhealthy", "The server is not ready.")
        events: asyncio.Queue[TokenEvent] = asyncio.Queue()
        jobs = [
            _Job(index, prompt, limit, options, events)
            for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
        ]
        self._unanswered += len(jobs)
        try:
            with self._changed:
                self._waiting.extend(jobs)
                self._changed.notify()
            running = len(jobs)
            event = await self._first(events)
            while True:
                if event.error is not None:
                    raise event.error
                yield event
                running -= event.finish_reason is not None
                if not running:
                    return
                event = await events.get()
        finally:
            self._unanswered -= len(jobs)
            with self._changed:
                for job in jobs:
                    job.is_gone = True

    async def _first(self, events: asyncio.Queue[TokenEvent]) -> TokenEvent:
        try:
            return await asyncio.wait_for(events.get(), self.limits.deadline_ms / 1000)
        except asyncio.TimeoutError:
            message = f"No token within {self.limits.deadline_ms:g} ms. Send fewer requests at a time."
            raise RefusedRequest(504, "Overloaded", message, 1) from None

    def _tell(self, job: _Job, **event: object) -> None:
        """Put an event into the queue of who waits, from the thread."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(job.events.put_nowait, TokenEvent(job.index, **event))  # pyright: ignore[reportArgumentType]

    # --- On the thread ----------------------------------------------------------------------------

    def _write(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._ends:
                    self._changed.wait()
                if self._ends:
                    return
                jobs = self._taken()
            if not jobs:
                continue
            try:
                self._write_together(jobs)
            except Exception as error:
                _log.exception("A batch failed.")
                self.metrics.failures.inc()
                for job in jobs:
                    # An option that does not fit the model is told; what else went wrong is for the log.
                    told = str(error) if isinstance(error, ValueError) else "Computing failed. Try again."
                    status = 422 if isinstance(error, ValueError) else 424
                    self._tell(job, error=RefusedRequest(status, "Backend", told))

    def _taken(self) -> list[_Job]:
        """The prompt that has waited longest, and those that can be written with it."""
        jobs: list[_Job] = []
        left: deque[_Job] = deque()
        while self._waiting:
            job = self._waiting.popleft()
            if job.is_gone:
                continue
            if not jobs or (len(jobs) < MOST_ROWS and self._go_together([*jobs, job])):
                jobs.append(job)
            else:
                left.append(job)
        self._waiting = left
        return jobs

    def _go_together(self, jobs: Sequence[_Job]) -> bool:
        """Whether prompts are to be written in the same way, and fit beside each other with their padding."""
        first = jobs[0].options
        alone = self.generator.check(first).mode == "lossless" or (first.do_sample and first.seed is not None)
        longest, most = max(len(job.token_ids) for job in jobs), max(job.limit for job in jobs)
        fits = longest + most <= self.generator.saved.context_length
        return not alone and fits and all(job.options == first for job in jobs)

    def _write_together(self, jobs: Sequence[_Job]) -> None:
        self.metrics.batch_rows.observe(len(jobs))

        def on_token(row: int, piece: str, layer: int) -> None:
            job = jobs[row]
            if not job.is_told:
                job.is_told = True
                self.metrics.waited.observe(time.perf_counter() - job.accepted)
            self.metrics.exit_layers.observe(layer)
            self._tell(job, piece=piece, exit_layer=layer)

        self.generator.stream_rows(
            [job.token_ids for job in jobs],
            [job.limit for job in jobs],
            on_token=on_token,
            on_end=lambda row, reason: self._tell(jobs[row], finish_reason=reason),
            is_gone=lambda row: jobs[row].is_gone or self._ends,
            options=replace(jobs[0].options, max_new_tokens=None),
        )
