"""Prompts that arrive one by one, through one model: written on a thread of its own, told token by token.

Prompts that are to be written in the same way are written together, up to `MOST_ROWS`. A text that ends is answered at
once, and between two tokens the next prompts take its place: they are read in a pass of their own, for which the others
wait. Prompts join in the order in which they came; where the next one is to be written in another way, none joins until
the batch is through, so that it gets its turn.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from consistentee.models.loaded import short_name
from consistentee.pipelines.continuous import ContinuousTexts, JoiningPrompt, can_join
from consistentee.pipelines.decoding_options import DecodingOptions
from consistentee.pipelines.generator import TextGenerator
from consistentee.serving.metrics import ServerMetrics
from consistentee.serving.requests import RefusedRequest, ServerLimits, shutting_down
from consistentee.serving.tokenizing import LONG_TEXTS, TokenizingThread
from consistentee.serving.waiting import within

_log = logging.getLogger(__name__)

MOST_ROWS = 8
"""Texts that are written together."""

MOST_JOINING_TOKENS = 256
"""Tokens of prompts (with padding) that are read between two tokens of the other texts, unless one prompt has more."""


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
    goes_on: bool = False
    is_gone: bool = False
    has_place: bool = True
    accepted: float = field(default_factory=time.perf_counter)
    is_told: bool = False


class GeneratorService:
    """Answers requests to write texts.

    Args:
        generator: of the model.
        limits: what is taken at most; the deadline is that of the first token, and tokenizing is within it.

    Attributes:
        metrics: what is counted.
    """

    kind = "generator"

    def __init__(self, generator: TextGenerator, *, limits: ServerLimits | None = None) -> None:
        self.generator, self.limits = generator, limits or ServerLimits()
        self.name = short_name(generator.saved.name)
        self.metrics = ServerMetrics(generator.saved.num_hidden_layers, self.name)
        self.metrics.follow_queue(lambda: self._unanswered)
        self._for_short_texts = TextGenerator(
            generator.saved, template=generator.template
        )  # its own tokenizer
        self._short_texts, self._long_texts = TokenizingThread(), TokenizingThread()
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
        """End the thread; texts that wait are refused, and so are those being written, where they are."""
        with self._changed:
            self._ends = True
            self._changed.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
        for job in self._waiting:
            self._tell(job, error=shutting_down())

    @property
    def is_ready(self) -> bool:
        """Whether requests are answered."""
        return self._thread is not None and self._thread.is_alive()

    async def encoded(
        self,
        encode: Callable[[TextGenerator], list[list[int]]],
        *,
        characters: Sequence[int],
        accepted: float,
    ) -> list[list[int]]:
        """Token ids of the prompts of a request, which count as unanswered meanwhile; short ones wait for no long ones.

        Args:
            encode: makes them with a generator of this model, on a thread.
            characters: (prompts,) of each prompt.
            accepted: when the request was, of `time.perf_counter`.

        Returns:
            (prompts, tokens).

        Raises:
            RefusedRequest: the queue is full (429), or it took longer than the deadline (504).
            ValueError: as `encode`.
        """
        self._take_places(len(characters))
        try:
            if sum(characters) > LONG_TEXTS:
                thread, generator = self._long_texts, self.generator
            else:
                thread, generator = self._short_texts, self._for_short_texts
            return await thread.run(lambda: encode(generator), self._seconds_left(accepted))
        except asyncio.TimeoutError:
            raise self._too_late() from None
        finally:
            self._unanswered -= len(characters)

    async def texts(
        self,
        prompts: Sequence[list[int]],
        limits: Sequence[int],
        options: DecodingOptions,
        *,
        accepted: float | None = None,
        go_on: bool = False,
    ) -> AsyncGenerator[TokenEvent, None]:
        """What happens to the prompts of a request, until each has ended.

        Args:
            prompts: (prompts, tokens).
            limits: (prompts,) the most tokens of each text.
            options: how to write them.
            accepted: when the request was, of `time.perf_counter`; None for now.
            go_on: whether the texts go on with the prompts, as in `JoiningPrompt`.

        Raises:
            RefusedRequest: the queue is full (429), the first token did not come in time (504), or it failed (424).
        """
        self._take_places(len(prompts))
        begun = time.perf_counter() if accepted is None else accepted
        events: asyncio.Queue[TokenEvent] = asyncio.Queue()
        jobs = [
            _Job(index, prompt, limit, options, events, go_on, accepted=begun)
            for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
        ]
        try:
            with self._changed:
                self._waiting.extend(jobs)
                self._changed.notify()
            running = len(jobs)
            event = await self._first(events, begun)
            while True:
                if event.error is not None:
                    raise event.error
                yield event
                running -= event.finish_reason is not None
                if not running:
                    return
                event = await events.get()
        finally:
            with self._changed:
                for job in jobs:
                    job.is_gone = True
            for job in jobs:
                self._free_place(job)

    def _take_places(self, number: int) -> None:
        """Count prompts as unanswered, or refuse them where the queue is full or nothing writes."""
        if number > self.limits.max_queue:
            message = f"prompt must hold at most {self.limits.max_queue} prompts, got {number}."
            raise RefusedRequest(413, "Validation", message)
        if self._unanswered + number > self.limits.max_queue:
            message = f"The server is overloaded: {self._unanswered} prompts wait or are answered."
            raise RefusedRequest(429, "Overloaded", message, 1)
        if not self.is_ready:
            raise RefusedRequest(503, "Unhealthy", "The server is not ready.")
        self._unanswered += number

    async def _first(self, events: asyncio.Queue[TokenEvent], accepted: float) -> TokenEvent:
        try:
            return await within(events.get(), max(0.0, self._seconds_left(accepted)))
        except asyncio.TimeoutError:
            raise self._too_late() from None

    def _seconds_left(self, accepted: float) -> float:
        """Until the deadline of what was accepted then."""
        return self.limits.deadline_ms / 1000 - (time.perf_counter() - accepted)

    def _too_late(self) -> RefusedRequest:
        message = f"No token within {self.limits.deadline_ms:g} ms. Send fewer requests at a time."
        return RefusedRequest(504, "Overloaded", message, 1)

    def _tell(self, job: _Job, **event: object) -> None:
        """Put an event into the queue of who waits, from the thread."""
        if self._loop is not None:
            told = TokenEvent(job.index, **event)  # pyright: ignore[reportArgumentType]
            with suppress(RuntimeError):  # the loop has ended, and nobody waits any more
                self._loop.call_soon_threadsafe(self._deliver, job, told)

    def _deliver(self, job: _Job, event: TokenEvent) -> None:
        """An event, on the event loop; a text that has ended frees its place, however slowly it is read."""
        job.events.put_nowait(event)
        if event.finish_reason is not None or event.error is not None:
            self._free_place(job)

    def _free_place(self, job: _Job) -> None:
        """The end of `_take_places` for a prompt; once, whoever comes first."""
        self._unanswered -= job.has_place
        job.has_place = False

    # --- On the thread ----------------------------------------------------------------------------

    def _write(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._ends:
                    self._changed.wait()
                if self._ends:
                    return
                options = self._next_options()
            if options is None:
                continue
            if can_join(self.generator.saved, options):
                self._write_continuously(options)
            else:
                self._write_batch(options)

    def _next_options(self) -> DecodingOptions | None:
        """Those of the prompt that has waited longest; some that are alike come forward behind it."""
        waiting = [job for job in self._waiting if not job.is_gone]
        alike = [job for job in waiting if job.options == waiting[0].options]
        alike = alike[: _most_rows(waiting[0].options)] if waiting else []
        self._waiting = deque([*alike, *(job for job in waiting if job not in alike)])
        return alike[0].options if alike else None

    def _taken(
        self, options: DecodingOptions, room: int, fit: Callable[[Sequence[_Job]], bool]
    ) -> list[_Job]:
        """Prompts from the head of the queue that can be written with those options; nobody overtakes one that cannot.

        Args:
            options: of the texts that are written.
            room: for so many more.
            fit: whether several can be read together.
        """
        jobs: list[_Job] = []
        with self._changed:
            while self._waiting and len(jobs) < room:
                job = self._waiting[0]
                if not job.is_gone:
                    if job.options != options or (jobs and not fit([*jobs, job])):
                        break
                    jobs.append(job)
                self._waiting.popleft()
        return jobs

    def _write_continuously(self, options: DecodingOptions) -> None:
        """Write the prompts at the head of the queue, and those that join them, until no text is left."""
        written: set[_Job] = set()
        most = _most_rows(options)
        try:
            texts = self.generator.continuous_texts(replace(options, max_new_tokens=None))
            self._join(texts, self._newcomers(options, most), written)
            while len(texts) and not self._ends:
                self.metrics.batch_rows.observe(len(texts))
                texts.step()
                written.difference_update([job for job in written if job.is_gone])
                if len(texts):  # else the next ones begin anew: their draws, and a cache of their size
                    self._join(texts, self._newcomers(options, most - len(texts)), written)
            texts.cut()
        except Exception as error:
            self._fail(written or self._newcomers(options, most), error)

    def _newcomers(self, options: DecodingOptions, room: int) -> list[_Job]:
        """Prompts that join texts that are being written."""

        def fit(jobs: Sequence[_Job]) -> bool:
            return len(jobs) * max(len(job.token_ids) for job in jobs) <= MOST_JOINING_TOKENS

        return self._taken(options, room, fit)

    def _join(self, texts: ContinuousTexts, jobs: Sequence[_Job], written: set[_Job]) -> None:
        if not jobs:
            return
        self.metrics.batch_rows.observe(len(jobs))
        written.update(jobs)
        try:
            texts.join([self._prompt(job, written) for job in jobs])
        except Exception as error:
            written.difference_update(jobs)
            if len(jobs) == 1:
                self._fail(jobs, error)
            else:  # whoever did not cause it is written
                for job in jobs:
                    self._join(texts, [job], written)

    def _prompt(self, job: _Job, written: set[_Job]) -> JoiningPrompt:
        def on_end(reason: str) -> None:
            written.discard(job)
            self._tell_end(job, reason)

        def on_error(error: Exception) -> None:
            written.discard(job)
            self._fail([job], error)

        return JoiningPrompt(
            job.token_ids,
            job.limit,
            on_token=lambda piece, layer: self._tell_token(job, piece, layer),
            on_end=on_end,
            on_error=on_error,
            is_gone=lambda: job.is_gone,
            goes_on=job.goes_on,
        )

    def _write_batch(self, options: DecodingOptions) -> None:
        """Write the prompts at the head of the queue in one batch, which none can join."""

        def fit(jobs: Sequence[_Job]) -> bool:
            longest, most = max(len(job.token_ids) for job in jobs), max(job.limit for job in jobs)
            return longest + most <= self.generator.saved.context_length

        jobs = self._taken(options, _most_rows(options), fit)
        if not jobs:
            return
        self.metrics.batch_rows.observe(len(jobs))
        try:
            self.generator.stream_rows(
                [job.token_ids for job in jobs],
                [job.limit for job in jobs],
                on_token=lambda row, piece, layer: self._tell_token(jobs[row], piece, layer),
                on_end=lambda row, reason: self._tell_end(jobs[row], reason),
                is_gone=lambda row: jobs[row].is_gone or self._ends,
                go_on=[job.goes_on for job in jobs],
                options=replace(options, max_new_tokens=None),
            )
        except Exception as error:
            self._fail(jobs, error)

    def _tell_token(self, job: _Job, piece: str, layer: int) -> None:
        if not job.is_told:
            job.is_told = True
            self.metrics.waited.observe(time.perf_counter() - job.accepted)
        self.metrics.exit_layers.observe(layer)
        self._tell(job, piece=piece, exit_layer=layer)

    def _tell_end(self, job: _Job, reason: str) -> None:
        """A text has ended; one that the server's end cuts off is not whole."""
        if self._ends and reason == "length":
            self._tell(job, error=shutting_down())
        else:
            self._tell(job, finish_reason=reason)

    def _fail(self, jobs: Collection[_Job], error: Exception) -> None:
        """Tell prompts that they have failed; call it where the error is caught."""
        _log.error("Writing failed.", exc_info=error)
        self.metrics.failures.inc()
        # An option that does not fit the model is told; what else went wrong is for the log.
        told = str(error) if isinstance(error, ValueError) else "Computing failed. Try again."
        status = 422 if isinstance(error, ValueError) else 424
        for job in jobs:
            self._tell(job, error=RefusedRequest(status, "Backend", told))


def _most_rows(options: DecodingOptions) -> int:
    """Texts that are written together: draws with a seed are reproducible alone, and drafts are verified alone."""
    alone = options.mode == "lossless" or (options.do_sample and options.seed is not None)
    return 1 if alone else MOST_ROWS
