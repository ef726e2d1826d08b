"""The second signal: a server that does not wait ends without a word of failures that are none."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from consistentee.inference.encoder.layer_pool import PoolAnswer
from consistentee.models.loaded import LoadedGenerator, load_model
from consistentee.pipelines.classifier import Engine
from consistentee.pipelines.decoding_options import DecodingOptions
from consistentee.pipelines.generator import TextGenerator
from consistentee.serving.classification import ClassifierService
from consistentee.serving.generation import GeneratorService, _Job
from consistentee.serving.predict_route import classifier_app
from consistentee.serving.requests import PredictRequest
from consistentee.serving.server import HttpServer
from saved_generators import generator_folder
from served import HeldPool
from tiny import tiny_backbone, tiny_model


class SlowPool(HeldPool):
    """A pool in whose step a test waits: `entered` says that it has begun, `free` lets it go on."""

    def __init__(self, pool: Any) -> None:
        super().__init__(pool)
        self.entered = threading.Event()

    def step(self) -> tuple[list[PoolAnswer], int]:
        self.entered.set()
        self.free.wait(60)
        return self.pool.step()


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    root = tmp_path_factory.mktemp("ending")
    torch.manual_seed(4)
    return Engine.from_pretrained(tiny_model(root / "model", tiny_backbone(root / "backbone")), device="cpu")


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What threads raised."""
    found: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", found.append)
    return found


def test_nobody_is_told_of_a_failure(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    pool = SlowPool(engine.pool())
    server = HttpServer(
        classifier_app(ClassifierService(engine, pool=lambda: pool)), host="127.0.0.1", port=0
    )
    answers: list[int] = []

    def ask() -> None:
        answers.append(httpx.post(f"{server.url}/predict", json={"inputs": "a"}, timeout=60).status_code)

    threads = [threading.Thread(target=work) for work in (server.run, ask)]
    for thread in threads:
        thread.start()
    try:
        assert pool.entered.wait(60)
        server.stop()
        server.stop()
        for thread in threads:
            thread.join(60)
    finally:
        pool.let_go()
    assert not any(thread.is_alive() for thread in threads)
    assert answers == [503]
    assert "Traceback" not in caplog.text
    assert not [record for record in caplog.records if record.exc_info]


def test_texts_that_are_computed_behind_the_end(engine: Engine, broken: list[Any]) -> None:
    pool = SlowPool(engine.pool())
    service = ClassifierService(engine, pool=lambda: pool)

    async def work() -> None:
        service.start()
        asking = asyncio.ensure_future(service.predict(PredictRequest([("good",)], is_batch=False)))
        while not pool.entered.is_set():
            await asyncio.sleep(0.01)
        assert not asking.done()

    asyncio.run(work())
    pool.let_go()
    asyncio.run(service._computing.stop())
    assert not broken


def test_tokens_that_are_written_behind_the_end(tmp_path: Path) -> None:
    saved = load_model(generator_folder(tmp_path / "exits"), LoadedGenerator, device="cpu")
    service = GeneratorService(TextGenerator(saved))
    job = _Job(0, [1], 1, DecodingOptions(), asyncio.Queue())

    async def work() -> None:
        service.start()

    asyncio.run(work())
    service._tell_token(job, "a", 1)
    service._tell_end(job, "length")
    asyncio.run(service.stop())
    assert not service.is_ready
    assert job.events.empty()


def test_a_server_that_waits_is_told_of_what_fails(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    service = ClassifierService(engine)
    monkeypatch.setattr(service, "stop", lambda: 1 / 0)
    server = HttpServer(classifier_app(service), host="127.0.0.1", port=0)
    thread = threading.Thread(target=server.run)
    thread.start()
    for _ in range(3000):
        if server._server.started:
            break
        time.sleep(0.02)
    server.stop()
    thread.join(60)
    assert not thread.is_alive()
    assert server._server.lifespan.shutdown_failed
    service._computing.send(None)
