"""A process that computes for a server (`workers`): opens the model, and runs the loop of `computing`."""

from __future__ import annotations

import os
import queue
import signal
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
import transformers

from consistentee.errors import SettingError
from consistentee.inference.encoder.layer_pool import Pool
from consistentee.inference.encoder.scheduler import ExitRule
from consistentee.pipelines.classifier import Engine
from consistentee.serving.computing import Message, answer_once, compute_texts
from consistentee.serving.server import ENDING


@dataclass(frozen=True)
class WorkerModel:
    """What a worker opens; the first four as of `Engine.from_pretrained`.

    Args:
        pool: makes the pool; None for the engine's. A function of a module, so that the worker finds it.
    """

    name_or_path: str
    device: str = "auto"
    dtype: str = "float32"
    backend: str = "torch"
    pool: Callable[[Engine], Pool] | None = None


@dataclass(frozen=True)
class WorkerReady:
    """A worker has opened the model."""


@dataclass(frozen=True)
class WorkerNotStarted:
    """A worker could not open the model.

    Args:
        reason: why, a full sentence.
        is_setting: whether by a setting that does not fit.
    """

    reason: str
    is_setting: bool


def run_worker(pipe: Connection, model: WorkerModel, threads: int, rules: Sequence[ExitRule]) -> None:
    """What a worker does, from its start to its end, which is that of the process.

    Args:
        pipe: messages come in, outcomes go out, `WorkerReady` or `WorkerNotStarted` first.
        model: to open.
        threads: to compute with.
        rules: under which a text is answered before the first message.
    """
    for number in ENDING:  # the server ends it, once all is answered
        signal.signal(number, signal.SIG_IGN)
    inbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(pipe, inbox), daemon=True).start()
    # The server has said what matters.
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    with suppress(BrokenPipeError, ConnectionResetError):  # the server is gone
        _compute(pipe, model, inbox, rules)
    os._exit(0)  # there is nothing to clear away, which takes Python a while


def _compute(
    pipe: Connection,
    model: WorkerModel,
    inbox: queue.SimpleQueue[Message | None],
    rules: Sequence[ExitRule],
) -> None:
    """Open the model, say how that went, and compute what arrives."""
    make_pool = model.pool
    try:
        engine = Engine.from_pretrained(
            model.name_or_path, device=model.device, dtype=model.dtype, backend=model.backend
        )
        answer_once(engine, rules)
    except Exception as error:
        is_told = isinstance(error, (ValueError, OSError, ImportError))
        reason = str(error) if is_told else f"{type(error).__name__}: {error}"
        pipe.send(WorkerNotStarted(reason, isinstance(error, SettingError)))
        return
    pipe.send(WorkerReady())
    compute_texts(engine, engine.pool if make_pool is None else lambda: make_pool(engine), inbox, pipe.send)


def _read(pipe: Connection, inbox: queue.SimpleQueue[Message | None]) -> None:
    """Take in what arrives, so that the server never waits; where the server ends, this process does."""
    try:
        while True:
            inbox.put(pipe.recv())
    except (EOFError, OSError):
        os._exit(0)
