"""Worker processes behind the service: the answers of the thread, and workers that die."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections.abc import Callable, Coroutine, Iterator
from multiprocessing import Pipe
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any, cast

import httpx
import numpy as np
import pytest
import torch

from consistentee.errors import SettingError
from consistentee.inference.encoder.layer_pool import PoolAnswer, PoolRow
from consistentee.inference.encoder.scheduler import ExitRule
from consistentee.inference.threads import threads_of_each
from consistentee.pipelines.classifier import Engine
from consistentee.serving import workers
from consistentee.serving.classification import ClassifierService
from consistentee.serving.computing import (
    AddTexts,
    DropTexts,
    Heartbeat,
    Outcome,
    TextsAnswered,
    TextsFailed,
    WorkerRestarted,
)
from consistentee.serving.predict_route import classifier_app
from consistentee.serving.requests import PredictRequest, RefusedRequest, ServerLimits
from consistentee.serving.worker_process import WorkerModel, WorkerNotStarted, WorkerReady, _compute
from consistentee.serving.workers import LONGEST_PAUSE, ProcessComputing, _Worker
from served import running
from tiny import tiny_backbone, tiny_dataset, tiny_model
from worker_pools import POISON, MortalPool, broken, threads_and_modules

TEXTS = [text for (text,) in tiny_dataset(60, seed=5).texts]
POINTS = {"fast": {"criterion": "confidence", "threshold": 0.5}}
RULES: list[dict[str, Any]] = [
    {},
    {"operating_point": "fast"},
    {"operating_point": "full-depth"},
    {"threshold": 0.45},
]
LIMITS = ServerLimits(deadline_ms=60_000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("workers")
    torch.manual_seed(4)
    backbone = tiny_backbone(root / "backbone", layers=4)
    return str(tiny_model(root / "model", backbone, initial_exit_bias=0.0, operating_points=POINTS))


@pytest.fixture(scope="module")
def engine(folder: str) -> Engine:
    return Engine.from_pretrained(folder, device="cpu")


@pytest.fixture(scope="module")
def computing(folder: str) -> ProcessComputing:
    return ProcessComputing(WorkerModel(folder, device="cpu", pool=MortalPool), 2)


@pytest.fixture(scope="module")
def service(folder: str, computing: ProcessComputing) -> ClassifierService:
    """With no weights of its own."""
    front = Engine.from_pretrained(folder, device="meta")
    return ClassifierService(front, audit=0.5, seed=3, limits=LIMITS, computing=computing)


@pytest.fixture(scope="module")
def url(service: ClassifierService) -> Iterator[str]:
    service.warm_up()
    with running(classifier_app(service)) as address:
        yield address


def on_loop(service: ClassifierService, work: Coroutine[Any, Any, Any]) -> Any:
    assert service._loop is not None
    return asyncio.run_coroutine_threadsafe(work, service._loop).result(60)


def ask(text: str, **rule: Any) -> PredictRequest:
    return PredictRequest([(text,)], False, raw_scores=True, **rule)


async def all_answers(service: ClassifierService, number: int, at_once: int) -> list[Any]:
    """Of so many requests by all rules in turn, some at once, when the audit is through as well."""
    asked = [ask(TEXTS[turn % len(TEXTS)], **RULES[turn % 4]) for turn in range(number)]
    found: list[Any] = []
    for start in range(0, number, at_once):
        found += await asyncio.gather(*map(service.predict, asked[start : start + at_once]))
    while service._pending:
        await asyncio.sleep(0.01)
    return [answer for (answer,) in found]


def run_inside(engine: Engine, work: Callable[[ClassifierService], Coroutine[Any, Any, Any]]) -> Any:
    """What comes of a service whose thread computes, audited by the same draws."""
    inside = ClassifierService(engine, audit=0.5, seed=3, limits=LIMITS)

    async def main() -> Any:
        inside.start()
        try:
            return await work(inside)
        finally:
            await inside.stop()

    return asyncio.run(main())


def counted(service: ClassifierService, name: str) -> float:
    (found,) = re.findall(rf"^consistentee_{name} (\S+)$", service.metrics.text().decode(), re.MULTILINE)
    return float(found)


def until(seen: Callable[[], bool]) -> None:
    for _ in range(3000):
        if seen():
            return
        time.sleep(0.02)
    raise AssertionError("it did not come")


def same(found: list[Any], wanted: list[Any]) -> None:
    """Batches of others, and other numbers of threads, round in another way."""
    for one, other in zip(found, wanted, strict=True):
        assert (one.exit_layer, one.scores.argmax()) == (other.exit_layer, other.scores.argmax())
        assert np.allclose(one.scores, other.scores, rtol=0, atol=2e-6)


@pytest.mark.usefixtures("url")
def test_answers_and_audit_are_the_threads(service: ClassifierService, engine: Engine) -> None:
    async def work(service: ClassifierService) -> Any:
        alone, together = await all_answers(service, 24, 1), await all_answers(service, 120, 120)
        return alone, together, (service.auditor.bounds.rows, service.auditor.bounds.losses)

    alone, together, audited = on_loop(service, work(service))
    wanted_alone, wanted_together, wanted_audited = run_inside(engine, work)
    same(alone, wanted_alone)
    same(together, wanted_together)  # in other batches, so that sums are rounded otherwise
    assert len({answer.exit_layer for answer in together}) > 1
    assert audited == wanted_audited
    assert 0 < audited[1] < audited[0]
    assert counted(service, "exit_layer_count") == 144
    assert counted(service, "workers") == 2
    assert service._unanswered == 0


def test_layers_and_what_a_worker_has(service: ClassifierService, engine: Engine, url: str) -> None:
    got = httpx.post(f"{url}/layers", json={"inputs": TEXTS[0], "threshold": 0.45}, timeout=60).json()
    (wanted,) = engine.predict([TEXTS[0]], threshold=0.45)
    assert (got["label"], got["exit_layer"], len(got["layers"])) == (wanted.label, wanted.exit_layer, 4)
    (threads, modules), _ = on_loop(service, service.look_at(ask("a"), threads_and_modules))
    assert threads == threads_of_each(2)
    assert not {"starlette", "uvicorn", "prometheus_client"} & modules
    failures = counted(service, "failures_total")
    with pytest.raises(RefusedRequest, match="Computing failed"):
        on_loop(service, service.look_at(ask("a"), broken))
    assert counted(service, "failures_total") == failures + 1
    assert service.engine.saved.model.device.type == "meta"


@pytest.mark.usefixtures("url")
def test_a_worker_is_killed_under_load(
    service: ClassifierService, computing: ProcessComputing, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    before, restarts = counted(service, "exit_layer_count"), counted(service, "worker_restarts_total")
    (victim, other) = (computing._started[number].process.pid for number in range(2))

    async def load() -> list[Any]:
        answers = asyncio.ensure_future(all_answers(service, 400, 400))
        while counted(service, "exit_layer_count") < before + 40:
            await asyncio.sleep(0)
        assert all(worker.texts for worker in computing._started.values())
        os.kill(victim, signal.SIGKILL)
        found = await answers
        assert service.is_ready
        return found

    same(on_loop(service, load()), run_inside(engine, lambda inside: all_answers(inside, 400, 400)))
    assert counted(service, "exit_layer_count") == before + 400  # each once
    until(lambda: counted(service, "workers") == 2)
    assert counted(service, "worker_restarts_total") == restarts + 1
    assert computing._started[0].process.pid != victim
    assert computing._started[1].process.pid == other
    assert f"(process {victim}) died (SIGKILL)" in caplog.text
    assert not any(worker.texts for worker in computing._started.values())


def test_a_text_that_kills_is_refused(service: ClassifierService, engine: Engine, url: str) -> None:
    restarts = counted(service, "worker_restarts_total")
    poison = httpx.post(f"{url}/predict", json={"inputs": "a", "threshold": POISON}, timeout=60)
    assert (poison.status_code, poison.json()["error_type"]) == (424, "Backend")
    assert httpx.get(f"{url}/ready").status_code == 503  # it killed both
    assert httpx.post(f"{url}/predict", json={"inputs": "a"}).status_code == 503
    until(lambda: httpx.get(f"{url}/ready").status_code == 200)
    assert counted(service, "worker_restarts_total") == restarts + 2
    (answer,) = httpx.post(f"{url}/predict", json={"inputs": TEXTS[0], "parameters": {"top_k": 1}}).json()
    (wanted,) = engine.predict([TEXTS[0]])
    assert (answer[0]["label"], answer[0]["exit_layer"]) == (wanted.label, wanted.exit_layer)


@pytest.mark.usefixtures("url")
def test_a_worker_that_stands_still_is_replaced(
    service: ClassifierService,
    computing: ProcessComputing,
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    until(lambda: counted(service, "workers") == 2)
    before, restarts = counted(service, "exit_layer_count"), counted(service, "worker_restarts_total")
    monkeypatch.setattr(workers, "STALLED_SECONDS", 6.0)
    victim = computing._started[0].process.pid
    os.kill(victim, signal.SIGSTOP)
    same(
        on_loop(service, all_answers(service, 40, 40)),
        run_inside(engine, lambda own: all_answers(own, 40, 40)),
    )
    until(lambda: counted(service, "workers") == 2)
    assert counted(service, "exit_layer_count") == before + 40  # each once
    assert counted(service, "worker_restarts_total") == restarts + 1
    assert computing._started[0].process.pid != victim
    assert f"(process {victim}) has handed nothing over" in caplog.text


# --- Without processes ------------------------------------------------------------------------------


def row(key: int, *, to_the_end: bool = False) -> PoolRow:
    return PoolRow(key, {"input_ids": [1]}, 0.5, to_the_end)


def answer(key: int, *, went_on: bool = False) -> TextsAnswered:
    return TextsAnswered([PoolAnswer(key, np.zeros(2, np.float32), 1, went_on)], 1)


def told(worker: _Worker) -> list[Any]:
    """What is written to a worker: keys of texts to add, or messages of other kinds."""
    found: list[Any] = []
    while not worker.outbox.empty():
        message = worker.outbox.get()
        found.append([each.key for each in message.rows] if isinstance(message, AddTexts) else message)
    return found


def test_who_gets_what_and_what_becomes_of_it() -> None:
    computing, handed = ProcessComputing(WorkerModel("none"), 2), list[Outcome]()
    computing._hand_over = handed.append
    one, two, three = (_Worker(None, cast(Any, None)) for _ in range(3))
    rule, other = ExitRule("policy", 0.5), ExitRule("confidence", 0.5)
    computing.send(AddTexts([row(1), row(2)], rule))  # nobody is there yet
    assert not computing.is_ready
    computing._on_ready(one)
    assert (told(one), computing.workers) == ([[1, 2]], 1)
    computing._on_ready(two)
    computing.send(AddTexts([row(key, to_the_end=key == 5) for key in range(3, 8)], other))
    assert (told(one), told(two)) == ([[5, 7]], [[3, 4, 6]])
    computing.send(DropTexts([2, 3, 99]))
    assert (told(one), told(two)) == ([DropTexts([2])], [DropTexts([3])])
    computing._on_outcome(one, answer(1))
    computing._on_outcome(one, answer(5))
    assert list(one.texts) == [5, 7]  # 5 is looked at again
    computing._on_death(one)
    assert (told(two), list(two.texts)) == ([[7]], [4, 6, 7])
    assert [type(outcome) for outcome in handed] == [TextsAnswered, TextsAnswered, TextsFailed]
    assert handed[-1] == TextsFailed([5])  # it is answered, and no longer compared
    computing._on_death(two)
    assert not computing.is_ready
    assert handed[-1] == TextsFailed([7])  # the second death
    computing.send(DropTexts([4]))
    computing._on_ready(three)
    assert told(three) == [[6]]
    computing._on_outcome(three, TextsFailed([6]))
    assert not three.texts


def test_who_gives_no_sign_of_life_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    computing, killed = ProcessComputing(WorkerModel("none"), 2), list[str]()
    monkeypatch.setattr(computing, "_beat_later", lambda: None)
    one, two = (
        _Worker(
            cast(Any, SimpleNamespace(pid=name, kill=lambda name=name: killed.append(name))), cast(Any, None)
        )
        for name in ("one", "two")
    )
    computing._ready = [one, two]
    for _ in range(workers.BEATS):
        computing._beat()
        assert told(two) == [Heartbeat()]
        computing._on_outcome(two, Heartbeat())  # and nobody else is told
    assert (told(one), killed) == ([Heartbeat()], [])  # it is asked once
    computing._on_outcome(one, answer(1))
    for _ in range(workers.BEATS):
        computing._beat()
    assert not killed
    computing._beat()
    assert killed == ["one", "two"]


def test_a_worker_that_dies_at_its_start_is_started_again_after_growing_pauses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    computing, handed, pauses = ProcessComputing(WorkerModel("none"), 1), list[Outcome](), list[float]()
    ends = [WorkerReady(), *[WorkerNotStarted("It broke.", is_setting=False)] * 7, WorkerReady()]

    def follow(_: int) -> WorkerReady | WorkerNotStarted:
        if len(ends) == 1:
            computing._ending.set()
        return ends.pop(0)

    monkeypatch.setattr(computing, "_follow", follow)
    monkeypatch.setattr(computing._ending, "wait", lambda seconds: pauses.append(seconds) or False)
    monkeypatch.setattr(computing, "_post", lambda call: call())
    computing._hand_over = handed.append
    computing._keep(0)
    assert pauses == [0, 1, 2, 4, 8, 16, LONGEST_PAUSE, LONGEST_PAUSE]
    assert handed == [WorkerRestarted()] * 8


def test_a_worker_that_cannot_open_the_model_says_why(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for model, reason, error in (
        (WorkerModel(folder, dtype="float64"), "dtype must be one of", SettingError),
        (WorkerModel(f"{folder}/missing"), "missing", ChildProcessError),
    ):
        here, there = Pipe()
        _compute(there, model, SimpleQueue(), ())
        found = here.recv()
        assert reason in found.reason
        computing = ProcessComputing(model, 1)
        monkeypatch.setattr(computing, "_follow", {0: found}.get)
        with pytest.raises(error, match=reason):
            computing.warm_up(())
        computing._threads[0].join(60)
        assert not computing._threads[0].is_alive()


def test_no_workers_are_refused() -> None:
    with pytest.raises(SettingError, match="workers must be at least 1, got 0"):
        ProcessComputing(WorkerModel("none"), 0)
