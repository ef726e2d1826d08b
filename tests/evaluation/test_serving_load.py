"""Load: arrivals at a rate, what is counted of answers, and the whole measurement on a tiny model."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from consistentee.cli.main import main
from consistentee.evaluation import serving_load
from consistentee.evaluation.load_client import (
    AskedText,
    LoadClient,
    LoadResult,
    closed_load,
    poisson_load,
)
from consistentee.evaluation.served_baseline import PaddedPool
from consistentee.inference.encoder.layer_pool import PoolRow
from consistentee.inference.encoder.scheduler import ExitRule
from consistentee.pipelines.classifier import Engine
from consistentee.serving.classification import ClassifierService
from consistentee.serving.predict_route import classifier_app
from served import running
from tiny import tiny_backbone, tiny_dataset, tiny_model

TEXTS = [text for (text,) in tiny_dataset(24, seed=5).texts]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("load")
    torch.manual_seed(4)
    return tiny_model(root / "model", tiny_backbone(root / "backbone"), initial_exit_bias=0.0)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine.from_pretrained(folder, device="cpu")


def test_what_is_counted() -> None:
    result = LoadResult(2.0, [200, 200, 429, 200, 0], [1.0, 3.0, 0.1, 9.0, 0.1], wrong=1)
    found = result.summary(slo_ms=3.0)
    assert found["statuses"] == {"0": 1, "200": 3, "429": 1}
    assert (found["p50_ms"], found["goodput"], found["answers_per_second"]) == (3.0, 1.0, 1.5)
    joined = LoadResult.joined([result, LoadResult(2.0)])
    assert joined.summary(3.0)["goodput"] == 0.5
    assert LoadResult().summary(1.0)["p99_ms"] is None


def test_plain_transformers_says_what_full_depth_says(engine: Engine) -> None:
    rows, _ = engine.tokenize(TEXTS)
    pool = PaddedPool(engine)
    pool.add([PoolRow(number, row, 0.0) for number, row in enumerate([*rows, *rows])], None)
    pool.drop([1])
    answers = [answer for _ in range(3) for answer in pool.step()[0]]
    full = engine.run(rows, batch_size=8, rule=ExitRule.full_depth()).labels
    assert [answer.key for answer in answers] == [number for number in range(48) if number != 1]
    assert all(int(answer.logits.argmax()) == full[int(str(answer.key)) % 24] for answer in answers)
    assert pool.step() == ([], 0)


def test_arrivals_are_poisson_and_answers_are_checked(engine: Engine) -> None:
    labels = [answer.label for answer in engine.predict(TEXTS)]
    asked = [AskedText(text, {}, label) for text, label in zip(TEXTS, labels, strict=True)]
    wrong = [AskedText(TEXTS[0], {}, "no such label")]
    with running(classifier_app(ClassifierService(engine))) as url:

        async def work() -> tuple[LoadResult, LoadResult, LoadResult]:
            client = LoadClient(url)
            rng = np.random.default_rng(0)
            results = (
                await poisson_load(client, asked, 200.0, 0.5, rng),
                await closed_load(client, asked, 2, 0.1),
                await poisson_load(client, wrong, 50.0, 0.2, rng),
            )
            await client.close()
            return results

        poisson, closed, bad = asyncio.run(work())
    drawn = np.random.default_rng(0)
    drawn.integers(24)
    assert len(poisson.statuses) == int((np.cumsum(drawn.exponential(1 / 200, 300)) <= 0.5).sum())
    assert {*poisson.statuses, *closed.statuses} == {200}
    assert poisson.wrong == closed.wrong == 0
    assert bad.wrong == len(bad.statuses) > 0

    async def after() -> int:
        return (await LoadClient(url).ask(b"{}"))[0]

    assert asyncio.run(after()) == 0  # nobody listens any more


def test_the_command(
    folder: Path,
    engine: Engine,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @contextmanager
    def in_this_process(command: Sequence[str], threads: int) -> Iterator[tuple[str, int]]:
        is_plain = "consistentee.evaluation.served_baseline" in command
        pool = (lambda: PaddedPool(engine)) if is_plain else None
        assert is_plain or "--device cpu" in " ".join(command)  # as the others, and as the report says
        with running(classifier_app(ClassifierService(engine, pool=pool))) as url:
            yield url, os.getpid()

    monkeypatch.setattr(serving_load, "served", in_this_process)
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    figures, picture = tmp_path / "load.json", tmp_path / "load.png"
    command = ["benchmark", str(folder), "--serve", "--data-file", str(tmp_path / "texts.txt")]
    assert main([*command, "--batch-sizes", "1"]) == 2
    assert "--batch-sizes has no effect with --serve" in capsys.readouterr().err
    assert main([*command, "--seconds", "3", "--json", str(figures), "--plot", str(picture)]) == 0
    said = capsys.readouterr().out
    report = json.loads(figures.read_text())
    assert picture.stat().st_size > 1000
    assert "Goodput within the SLO: exits" in said
    assert "0 wrong" in said
    assert len(report["loads"]) == 7
    assert report["overload"]["during"]["wrong"] == 0
    assert report["slo_ms"] == 2 * report["unloaded"]["full depth"]["p95_ms"]


@pytest.mark.parametrize("text_pairs", [True, None])
def test_pairs_are_asked_as_such(tmp_path: Path, text_pairs: bool | None) -> None:
    """Also of a model that does not say that it takes them, as those of 0.1.0."""
    values = {"initial_exit_bias": 0.0, "text_pairs": text_pairs}
    engine = Engine.from_pretrained(
        tiny_model(tmp_path / "model", tiny_backbone(tmp_path / "b"), **values), device="cpu"
    )
    pairs = list(zip(TEXTS[:8], TEXTS[8:16], strict=True))
    asked = serving_load._asked(engine, pairs, None)
    report = serving_load.LoadReport({}, {})
    with running(classifier_app(ClassifierService(engine))) as url:

        async def work() -> LoadResult:
            clients = {name: LoadClient(url) for name in serving_load.SERVED}
            run = serving_load._Run(report, clients, asked, os.getpid(), 0, lambda _: None)
            await run._overhead(engine, None)
            result = await closed_load(clients[serving_load.WITH_EXITS], asked["exits"], 1, 0.3)
            for client in clients.values():
                await client.close()
            return result

        result = asyncio.run(work())
    assert set(result.statuses) == {200}
    assert result.wrong == 0


def test_what_a_request_takes_longer_is_known_of_few_texts(engine: Engine) -> None:
    asked = {name: [AskedText(text, {}) for text in TEXTS[:3]] for name in serving_load.SERVED}
    report = serving_load.LoadReport({}, {})
    with running(classifier_app(ClassifierService(engine))) as url:

        async def work() -> float:
            clients = {name: LoadClient(url) for name in serving_load.SERVED}
            run = serving_load._Run(report, clients, asked, os.getpid(), 0, lambda _: None)
            found = await run._overhead(engine, None)
            for client in clients.values():
                await client.close()
            return found

        assert np.isfinite(asyncio.run(work()))


def test_a_connection_that_the_server_has_closed_is_replaced() -> None:
    """Each connection answers once and is closed then, without a word in its answer."""
    content = b'[{"label": "a"}]'

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(head.split(b"Content-Length: ")[1].split(b"\r\n")[0]))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(content) + content)
        await writer.drain()
        writer.close()

    async def work() -> list[tuple[int, bytes]]:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        client = LoadClient(f"http://127.0.0.1:{port}")
        found = [await client.ask(b"{}") for _ in range(5)]
        await client.close()
        server.close()
        await server.wait_closed()
        return found

    assert asyncio.run(work()) == [(200, content)] * 5
