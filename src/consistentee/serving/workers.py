"""Processes that compute for one server: each opens the model and runs the loop of `computing` on its texts.

This process keeps what each worker has been given until the answer is there. A worker that dies (killed, out of memory,
crashed) is noticed when its pipe closes: what it had not answered goes to others, or waits for the next one, and a new
worker is started. One that is alive but hands nothing over for a minute, though asked, is killed, and is one that died.
A text that was inside when two workers died is refused. The pipes hold pickles of this library's own values; a worker
ends by itself when this process is gone.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import multiprocessing
import queue
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any

from consistentee.errors import SettingError
from consistentee.inference.encoder.scheduler import ExitRule
from consistentee.inference.threads import threads_of_each
from consistentee.serving.computing import (
    AddTexts,
    DropTexts,
    Heartbeat,
    LookAtText,
    Message,
    Outcome,
    TextsAnswered,
    TextSeen,
    TextsFailed,
    WorkerRestarted,
)
from consistentee.serving.server import ENDING
from consistentee.serving.worker_process import WorkerModel, WorkerNotStarted, WorkerReady, run_worker

_log = logging.getLogger(__name__)

MOST_DEATHS = 2
"""A text inside of which so many workers died is not given to another one."""

LONGEST_PAUSE = 30.0
"""Seconds between two starts, at most, where a worker dies at its start again and again: 1, 2, 4, ..."""

STALLED_SECONDS = 60.0
"""Time after which a worker that hands nothing over, though asked, is killed; a step, a layer, takes far less."""

BEATS = 12
"""How often it is looked at meanwhile. Beats are counted, not seconds: when this process stands still, so do they."""

END_SECONDS = 5.0
"""Time that a worker has to end by itself."""


@dataclass
class _Given:
    """A text that is on its way: what a worker is told about it, and what has come of it."""

    message: AddTexts | LookAtText
    is_answered: bool = False
    deaths: int = 0


@dataclass(eq=False)
class _Worker:
    """A process, its pipe, what waits to be written to it, its texts by key, and beats since it was heard last."""

    process: Any
    pipe: Connection
    outbox: queue.SimpleQueue[Message | None] = field(default_factory=queue.SimpleQueue)
    texts: dict[Hashable, _Given] = field(default_factory=dict)
    silent_beats: int = 0


class ProcessComputing:
    """Worker processes on this machine; see the module, and `Computing`.

    Each has its share of this process's threads. A thread for each worker starts it, reads what it hands over, and
    starts the next one when it has died; one more writes to it. All else happens on the event loop.

    Args:
        model: what they open; a worker that is started later opens it anew.
        workers: how many, at least 1.

    Raises:
        SettingError: fewer than one.
    """

    def __init__(self, model: WorkerModel, workers: int) -> None:
        if workers < 1:
            raise SettingError(f"workers must be at least 1, got {workers}.")
        self._model, self._count = model, workers
        self._rules: tuple[ExitRule, ...] = ()
        self._threads: list[threading.Thread] = []
        self._started: dict[int, _Worker] = {}
        self._is_warming_up = False
        self._starts: queue.SimpleQueue[WorkerNotStarted | WorkerReady] = queue.SimpleQueue()
        self._ending = threading.Event()
        self._starting, self._posting = threading.Lock(), threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._posted: list[tuple[Callable[..., object], tuple[Any, ...]]] = []
        # On the event loop alone:
        self._hand_over: Callable[[Outcome], None] = lambda outcome: None
        self._ready: list[_Worker] = []
        self._next_beat: asyncio.TimerHandle | None = None
        self._held: dict[Hashable, _Given] = {}

    # --- On the event loop, or before there is one ---------------------------------------------------

    def warm_up(self, rules: Sequence[ExitRule]) -> None:
        """Start all workers, each of which answers a text under each rule, and wait for them.

        Raises:
            SettingError: the model does not run so.
            ChildProcessError: a worker does not start.
        """
        self._rules, self._is_warming_up = tuple(rules), True
        self._begin()
        for _ in range(self._count):
            found = self._starts.get()
            if isinstance(found, WorkerNotStarted):
                self._kill()
                raise SettingError(found.reason) if found.is_setting else ChildProcessError(found.reason)
        self._is_warming_up = False

    def start(self, hand_over: Callable[[Outcome], None]) -> None:
        """See `Computing`."""
        self._hand_over = hand_over
        with self._posting:
            self._loop = asyncio.get_running_loop()
            posted, self._posted = self._posted, []
        for call, values in posted:
            call(*values)
        self._begin()
        self._beat_later()

    def send(self, message: Message) -> None:
        """Give texts to the workers with the fewest texts on their way; see `Computing`."""
        match message:
            case AddTexts(rows, rule):
                self._give((row.key, _Given(AddTexts((row,), rule))) for row in rows)
            case LookAtText(key):
                self._give([(key, _Given(message))])
            case DropTexts(keys):
                for key in keys:
                    self._held.pop(key, None)
                for worker in self._ready:
                    gone = [key for key in keys if worker.texts.pop(key, None) is not None]
                    if gone:
                        worker.outbox.put(DropTexts(gone))
            case Heartbeat():  # is sent from here alone
                pass

    async def stop(self) -> None:
        """See `Computing`."""
        if self._next_beat is not None:
            self._next_beat.cancel()
        await asyncio.to_thread(self._end)

    @property
    def is_ready(self) -> bool:
        """Whether at least one worker has opened the model."""
        return bool(self._ready)

    @property
    def workers(self) -> int:
        """Workers that have opened the model."""
        return len(self._ready)

    def _give(self, texts: Iterable[tuple[Hashable, _Given]]) -> None:
        """Texts to workers, those of one rule in one message; they are held where no worker is ready."""
        shares: defaultdict[tuple[int, ExitRule], list[AddTexts]] = defaultdict(list)
        for key, text in texts:
            if not self._ready:
                self._held[key] = text
                continue
            place = min(range(len(self._ready)), key=lambda place: len(self._ready[place].texts))
            self._ready[place].texts[key] = text
            if isinstance(text.message, LookAtText):
                self._ready[place].outbox.put(text.message)
            else:
                shares[place, text.message.rule].append(text.message)
        for (place, rule), share in shares.items():
            self._ready[place].outbox.put(AddTexts([row for message in share for row in message.rows], rule))

    def _on_ready(self, worker: _Worker) -> None:
        """A worker has opened the model."""
        self._ready.append(worker)
        held, self._held = self._held, {}
        self._give(held.items())

    def _beat_later(self) -> None:
        self._next_beat = asyncio.get_running_loop().call_later(STALLED_SECONDS / BEATS, self._beat)

    def _beat(self) -> None:
        """Ask every worker for a sign of life, and kill those that have given none for so many beats."""
        for worker in self._ready:
            if worker.silent_beats == 0:
                worker.outbox.put(Heartbeat())
            worker.silent_beats += 1
            if worker.silent_beats > BEATS:
                _log.error(
                    "A worker (process %s) has handed nothing over for %g s: it is killed.",
                    worker.process.pid,
                    STALLED_SECONDS,
                )
                worker.process.kill()  # the thread that follows it sees its end
                worker.silent_beats = 0
        self._beat_later()

    def _on_outcome(self, worker: _Worker, outcome: Outcome) -> None:
        """A worker hands something over."""
        worker.silent_beats = 0
        match outcome:
            case TextsAnswered(answers):
                for answer in answers:
                    text = worker.texts.get(answer.key)
                    if text is None or not isinstance(text.message, AddTexts):
                        continue
                    text.is_answered = True
                    if answer.went_on or not text.message.rows[0].to_the_end:
                        del worker.texts[answer.key]
            case TextsFailed(keys):
                for key in keys:
                    worker.texts.pop(key, None)
            case TextSeen(key):
                worker.texts.pop(key, None)
            case Heartbeat():
                return
            case WorkerRestarted():
                pass
        self._hand_over(outcome)

    def _on_death(self, worker: _Worker) -> None:
        """A worker has died: what it had goes to others once; who was answered, and only looked at again, is not."""
        if worker in self._ready:
            self._ready.remove(worker)
        again: list[tuple[Hashable, _Given]] = []
        failed: list[Hashable] = []
        for key, text in worker.texts.items():
            text.deaths += 1
            if text.is_answered or text.deaths >= MOST_DEATHS:
                failed.append(key)
            else:
                again.append((key, text))
        worker.texts = {}
        if failed:
            self._hand_over(TextsFailed(failed))
        self._give(again)

    # --- On the threads -----------------------------------------------------------------------------

    def _begin(self) -> None:
        """Start the threads that keep workers alive, once."""
        if self._threads:
            return
        atexit.register(self._kill)  # before multiprocessing would wait for them
        for number in range(self._count):
            name = f"consistentee-worker-{number + 1}"
            self._threads.append(threading.Thread(target=self._keep, args=(number,), name=name, daemon=True))
        for thread in self._threads:
            thread.start()

    def _keep(self, number: int) -> None:
        """Start a worker, follow it until it dies, and start the next one."""
        failures = 0
        while True:
            reason = self._follow(number)
            if self._ending.is_set():
                return
            failures = 0 if isinstance(reason, WorkerReady) else failures + 1
            pause = min(LONGEST_PAUSE, 2.0 ** (failures - 1)) if failures else 0.0
            if isinstance(reason, WorkerNotStarted):
                if self._is_warming_up:
                    self._starts.put(reason)
                    return
                _log.error("%s It is started again in %g s.", reason.reason, pause)
            if self._ending.wait(pause):
                return
            self._post(self._hand_over_restart)

    def _hand_over_restart(self) -> None:
        self._hand_over(WorkerRestarted())

    def _follow(self, number: int) -> WorkerReady | WorkerNotStarted:
        """One worker from its start to its end: whether it was ready, or why not."""
        found: WorkerReady | WorkerNotStarted | None = None
        try:
            worker = self._start_worker(number)
        except Exception as error:  # no more processes, no memory, a pool that cannot be sent
            return WorkerNotStarted(f"Worker {number + 1} could not be started: {error}.", is_setting=False)
        if worker is None:
            return WorkerReady()
        writer = threading.Thread(target=_write, args=(worker,), daemon=True)
        writer.start()
        try:
            while True:
                outcome = worker.pipe.recv()
                if isinstance(outcome, WorkerReady):
                    found = outcome
                    self._post(self._on_ready, worker)
                    if self._is_warming_up:
                        self._starts.put(outcome)
                elif isinstance(outcome, WorkerNotStarted):
                    found = outcome
                else:
                    self._post(self._on_outcome, worker, outcome)
        except (EOFError, OSError):  # its end
            pass
        except Exception:
            _log.exception("What worker %d hands over cannot be read.", number + 1)
        if not self._ending.is_set():
            self._post(self._on_death, worker)
        worker.outbox.put(None)
        worker.process.join(END_SECONDS)
        worker.process.kill()  # one that only closed its pipe
        worker.process.join()
        writer.join()
        worker.pipe.close()
        how = _how_it_ended(worker.process.exitcode)
        if isinstance(found, WorkerReady) and not self._ending.is_set():
            _log.error(
                "Worker %d (process %d) died (%s). What it had is computed anew, and the next one is started.",
                number + 1,
                worker.process.pid,
                how,
            )
        return found or WorkerNotStarted(
            f"Worker {number + 1} died at its start ({how}). Is there memory for another copy of the model?",
            is_setting=False,
        )

    def _start_worker(self, number: int) -> _Worker | None:
        """A new process; None where all is to end."""
        context = multiprocessing.get_context("spawn")
        with self._starting:
            if self._ending.is_set():
                return None
            here, there = context.Pipe()
            threads = threads_of_each(self._count)
            process = context.Process(
                target=run_worker,
                args=(there, self._model, threads, self._rules),
                name=f"consistentee-worker-{number + 1}",
                daemon=True,
            )
            try:
                with _signals_held_back():
                    process.start()
            finally:
                there.close()  # so that the pipe ends with the process
            worker = self._started[number] = _Worker(process, here)
            return worker

    def _post(self, call: Callable[..., object], *values: Any) -> None:
        """Call something on the event loop, as soon as there is one."""
        with self._posting:
            if self._loop is None:
                self._posted.append((call, values))
                return
        with suppress(RuntimeError):  # the loop has ended, and nobody waits any more
            self._loop.call_soon_threadsafe(call, *values)

    def _end(self) -> None:
        """End all workers, those that do not end by themselves by force."""
        self._ending.set()
        with self._starting:
            started = list(self._started.values())
        for worker in started:
            worker.outbox.put(None)
        until = time.monotonic() + END_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        self._kill()
        for thread in self._threads:
            thread.join()

    def _kill(self) -> None:
        self._ending.set()
        atexit.unregister(self._kill)
        with self._starting:
            for worker in self._started.values():
                worker.process.kill()


def _write(worker: _Worker) -> None:
    """Write to a worker what is put into its outbox; a full pipe makes this thread wait, and nobody else."""
    with suppress(OSError):  # it has died
        while True:
            message = worker.outbox.get()
            worker.pipe.send(message)
            if message is None:
                return


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Processes that are started here begin with what would end them blocked.

    Ctrl-C, a closing terminal's SIGHUP, and a service manager's SIGTERM reach all processes of a group; workers are to
    answer on until this process has no more to ask.
    """
    resource_tracker.ensure_running()  # it would unblock them
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _how_it_ended(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    with suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"
