"""Prompts that join texts which are being written: what they get, whose turn it is, and who is not disturbed."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import httpx
import pytest

from consistentee.models.loaded import LoadedGenerator, load_model
from consistentee.pipelines.continuous import ContinuousTexts, JoiningPrompt
from consistentee.pipelines.decoding_options import DecodingOptions
from consistentee.pipelines.generator import TextGenerator
from consistentee.serving import generation
from consistentee.serving.completions import generator_app
from consistentee.serving.generation import GeneratorService, TokenEvent
from consistentee.serving.requests import RefusedRequest
from consistentee.serving.server import HttpServer
from saved_generators import generator_folder
from tiny_decoders import prompt

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> TextGenerator:
    folder = generator_folder(tmp_path_factory.mktemp("joining") / "exits")
    return TextGenerator(load_model(folder, LoadedGenerator, device="cpu"))


class HeldTexts:
    """Texts whose steps wait until a test lets them go."""

    def __init__(self, texts: ContinuousTexts, held: Held) -> None:
        self._texts, self._held = texts, held

    def join(self, prompts: Sequence[JoiningPrompt]) -> None:
        self._texts.join(prompts)
        self._held.joined += [list(prompt.token_ids) for prompt in prompts]

    def step(self) -> None:
        if self._held.free.is_set() or self._held.go.acquire(timeout=0.01):
            self._texts.step()
            self._held.steps += 1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._texts, name)

    def __len__(self) -> int:
        return len(self._texts)


class Held:
    """A generator whose texts are held.

    Attributes:
        go, free: a step each, or all of them.
        joined: prompts in the order in which they were begun.
        steps, opened: that were made, and batches.
    """

    def __init__(self, generator: TextGenerator) -> None:
        self._generator = generator
        self.go, self.free = threading.Semaphore(0), threading.Event()
        self.joined: list[list[int]] = []
        self.steps = self.opened = 0

    def continuous_texts(self, options: DecodingOptions) -> Any:
        self.opened += 1
        return HeldTexts(self._generator.continuous_texts(options), self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._generator, name)


class Bench:
    """A service whose steps a test counts out, and what its requests were told.

    Args:
        generator: that writes.
    """

    def __init__(self, generator: TextGenerator) -> None:
        self.generator, self.held = generator, Held(generator)
        self.service = GeneratorService(self.held)
        self.told: dict[str, list[TokenEvent]] = {}
        self.prompts: dict[str, list[int]] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    def ask(self, name: str, token_ids: list[int], limit: int, **values: Any) -> None:
        """Begin a request."""
        options = self.generator.check(DecodingOptions(**values))
        assert token_ids not in self.prompts.values()
        self.told[name], self.prompts[name] = [], token_ids

        async def follow() -> None:
            async for event in self.service.texts([token_ids], [limit], options):
                self.told[name].append(event)

        self.tasks[name] = asyncio.ensure_future(follow())

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until something is so."""
        for _ in range(30_000):
            if holds():
                return
            await asyncio.sleep(0.001)
        raise TimeoutError("It never was so.")

    @property
    def order(self) -> list[str]:
        """In which texts were begun."""
        names = {tuple(token_ids): name for name, token_ids in self.prompts.items()}
        return [names[tuple(token_ids)] for token_ids in self.held.joined]

    async def begun(self, name: str) -> None:
        """Wait until a text is being written."""
        await self.until(lambda: name in self.order)

    async def step(self, count: int) -> None:
        """Let so many steps go, and wait for them."""
        due = self.held.steps + count
        self.held.go.release(count)
        await self.until(lambda: self.held.steps >= due)

    async def step_until_begun(self, name: str) -> None:
        """Let one step go after the other until a text is being written."""
        while name not in self.order:
            await self.step(1)

    async def finish(self) -> None:
        """Let everything come to its end."""
        self.held.free.set()
        await asyncio.wait(self.tasks.values(), timeout=60)

    def assert_as_alone(self, name: str, token_ids: list[int], limit: int, **values: Any) -> None:
        """Compare what was told with the generator's own text."""
        options = DecodingOptions(**values, max_new_tokens=limit)
        (wanted,) = self.generator.generate_encoded([token_ids], options=options)
        events = self.told[name]
        assert "".join(event.piece for event in events) == wanted.text
        layers = [event.exit_layer for event in events if event.exit_layer is not None]
        assert layers == wanted.exit_layers
        assert events[-1].finish_reason == wanted.finish_reason


def held_service(generator: TextGenerator, work: Callable[[Bench], Awaitable[None]]) -> Bench:
    """Run a service for as long as `work` takes."""

    async def run() -> Bench:
        bench = Bench(generator)
        bench.service.start()
        try:
            await work(bench)
        finally:
            bench.held.free.set()
            await bench.service.stop()
        return bench

    return asyncio.run(run())


@pytest.mark.parametrize(
    "values", [{}, {"mode": "full"}, {"skipped_states": "recompute"}], ids=["copy", "full", "recompute"]
)
def test_a_prompt_joins_between_two_tokens(generator: TextGenerator, values: dict[str, Any]) -> None:
    first, second, third = prompt(6), prompt(3, 1), prompt(9, 2)

    async def work(bench: Bench) -> None:
        bench.ask("first", first, 30, **values)
        await bench.begun("first")
        await bench.step(3)
        bench.ask("second", second, 5, **values)
        bench.ask("third", third, 12, **values)
        await bench.begun("second")  # no step of the first text is needed for it
        await bench.begun("third")
        assert not bench.tasks["first"].done()
        await bench.finish()

    bench = held_service(generator, work)
    assert bench.held.opened == 1
    bench.assert_as_alone("first", first, 30, **values)
    bench.assert_as_alone("second", second, 5, **values)
    bench.assert_as_alone("third", third, 12, **values)


def test_nobody_joins_ahead_of_a_prompt_that_cannot(generator: TextGenerator) -> None:
    async def work(bench: Bench) -> None:
        bench.ask("first", prompt(6), 12)
        await bench.begun("first")
        bench.ask("other", prompt(5), 6, mode="full")
        bench.ask("late", prompt(4), 6)
        await bench.step(3)
        assert bench.order == ["first"]  # there is room, but it is not its turn
        await bench.finish()

    bench = held_service(generator, work)
    assert bench.order == ["first", "other", "late"]
    assert bench.held.opened == 3


def test_those_that_wait_and_are_alike_begin_together(generator: TextGenerator) -> None:
    async def work(bench: Bench) -> None:
        bench.ask("first", prompt(6), 4, mode="full")
        await bench.begun("first")
        for number in range(3):
            bench.ask(f"a{number}", prompt(3, number), 4)
            bench.ask(f"b{number}", prompt(4, number), 4, threshold=0.9)
        await bench.finish()

    bench = held_service(generator, work)
    assert bench.order == ["first", "a0", "a1", "a2", "b0", "b1", "b2"]
    assert bench.held.opened == 3


def test_a_text_that_ends_and_a_client_that_goes_away_make_room(
    generator: TextGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "MOST_ROWS", 2)

    async def work(bench: Bench) -> None:
        bench.ask("gone", prompt(6), 200)
        bench.ask("short", prompt(4), 3)
        await bench.begun("short")
        bench.ask("third", prompt(5), 200)
        bench.ask("fourth", prompt(7), 4)
        await bench.step(2)
        await bench.begun("third")  # the short one has ended
        assert "fourth" not in bench.order
        bench.tasks["gone"].cancel()
        await bench.step_until_begun("fourth")  # which step it is depends on when the service hears of it
        assert not bench.tasks["third"].done()
        bench.held.free.set()
        await bench.tasks["fourth"]
        bench.tasks["third"].cancel()

    bench = held_service(generator, work)
    bench.assert_as_alone("short", prompt(4), 3)
    bench.assert_as_alone("fourth", prompt(7), 4)


def test_long_prompts_are_read_one_after_the_other(
    generator: TextGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "MOST_JOINING_TOKENS", 12)

    async def work(bench: Bench) -> None:
        bench.ask("first", prompt(6), 9)
        await bench.begun("first")
        for number, length in enumerate((6, 6, 3, 40)):
            bench.ask(f"{number}", prompt(length, number + 1), 9)
        await bench.begun("1")
        assert bench.order == ["first", "0", "1"]  # 2 x 6 tokens, a third would make it 3 x 6
        await bench.step(1)
        await bench.begun("2")
        assert "3" not in bench.order
        await bench.finish()

    bench = held_service(generator, work)
    assert bench.order == ["first", "0", "1", "2", "3"]
    bench.assert_as_alone("3", prompt(40, 4), 9)


def test_a_prompt_that_fails_fails_alone(generator: TextGenerator, caplog: pytest.LogCaptureFixture) -> None:
    async def work(bench: Bench) -> None:
        bench.ask("first", prompt(6), 9)
        await bench.begun("first")
        bench.ask("broken", [10**6], 9)  # the model has no such token
        bench.ask("good", prompt(4), 9)
        await bench.finish()

    bench = held_service(generator, work)
    error: Any = bench.tasks["broken"].exception()
    assert isinstance(error, RefusedRequest)
    assert (error.status, error.message) == (424, "Computing failed. Try again.")
    bench.assert_as_alone("first", prompt(6), 9)
    bench.assert_as_alone("good", prompt(4), 9)
    assert "consistentee_failures_total 1.0" in bench.service.metrics.text().decode()
    assert "Writing failed" in caplog.text


def test_after_a_step_that_failed_texts_are_written_again(
    generator: TextGenerator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(texts: ContinuousTexts) -> None:
        raise RuntimeError("a layer broke")

    async def work(bench: Bench) -> None:
        bench.ask("first", prompt(6), 9)
        bench.ask("second", prompt(4), 9)
        await bench.begun("second")
        with monkeypatch.context() as patch:
            patch.setattr(ContinuousTexts, "step", broken)
            bench.held.go.release(1)
            await bench.until(lambda: all(task.done() for task in bench.tasks.values()))
        bench.ask("third", prompt(5), 9)
        await bench.finish()

    bench = held_service(generator, work)
    for name in ("first", "second"):
        error: Any = bench.tasks[name].exception()
        assert error.status == 424
    bench.assert_as_alone("third", prompt(5), 9)


def test_draws_with_a_seed_are_alone_and_reproducible(generator: TextGenerator) -> None:
    drawn = {"do_sample": True, "temperature": 1.5, "seed": 3}

    async def work(bench: Bench) -> None:
        bench.ask("first", prompt(6), 9, **drawn)
        await bench.begun("first")
        bench.ask("same", prompt(7), 9, **drawn)
        await bench.step(2)
        assert bench.order == ["first"]
        await bench.finish()

    bench = held_service(generator, work)
    assert bench.held.opened == 2
    bench.assert_as_alone("first", prompt(6), 9, **drawn)
    bench.assert_as_alone("same", prompt(7), 9, **drawn)


def test_shutting_down_refuses_texts_that_are_written_and_those_that_wait(generator: TextGenerator) -> None:
    async def work(bench: Bench) -> None:
        bench.ask("first", prompt(6), 200)
        await bench.begun("first")
        bench.ask("waits", prompt(5), 4, mode="full")
        await asyncio.sleep(0)
        await bench.service.stop()
        await bench.finish()

    bench = held_service(generator, work)
    assert [event.finish_reason for event in bench.told["first"]] == [None]  # cut off is not come to its end
    for name in ("first", "waits"):
        error: Any = bench.tasks[name].exception()
        assert error.status == 503


def test_a_stream_that_the_end_breaks_off_says_so(
    generator: TextGenerator, caplog: pytest.LogCaptureFixture
) -> None:
    held: Any = Held(generator)
    held.go.release(4)
    server = HttpServer(generator_app(GeneratorService(held)), host="127.0.0.1", port=0, drain_seconds=0)
    thread = threading.Thread(target=server.run)
    thread.start()
    body = {"prompt": "do this", "max_tokens": 100, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
        lines = (line.removeprefix("data: ") for line in answer.iter_lines() if line)
        assert "choices" in json.loads(next(lines))
        server.stop()
        *_, error, end = lines
    thread.join(30)
    assert not thread.is_alive()
    assert json.loads(error)["error"] == {
        "message": "The server is shutting down.",
        "type": "Unhealthy",
        "code": 503,
    }
    assert end == "[DONE]"
    assert "Traceback" not in caplog.text
