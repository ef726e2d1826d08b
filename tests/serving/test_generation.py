"""Texts over HTTP, as OpenAI's client asks for them: the generator's own, streamed or whole, alone or together."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from huggingface_hub import InferenceClient

from consistentee.data.templates import PLAIN
from consistentee.models.loaded import LoadedGenerator, load_model
from consistentee.pipelines.continuous import ContinuousTexts
from consistentee.pipelines.decoding_options import DecodingOptions
from consistentee.pipelines.generator import GeneratedText, TextGenerator
from consistentee.serving.completions import generator_app, read_text_request
from consistentee.serving.generation import GeneratorService
from consistentee.serving.requests import RefusedRequest, ServerLimits
from saved_generators import TEMPLATE, generator_folder, plain_folder
from served import running
from tiny_decoders import tiny_decoder
from tiny_tokenizers import spaced

PROMPTS = ["do this", "très bien", "1, 2 and", "name a river or two, please"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=["exits", "plain"])
def generator(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextGenerator:
    make = generator_folder if request.param == "exits" else plain_folder
    folder = make(tmp_path_factory.mktemp("generator") / request.param)
    return TextGenerator(load_model(folder, LoadedGenerator, device="cpu"), template=TEMPLATE)


@pytest.fixture(scope="module")
def url(generator: TextGenerator) -> Iterator[str]:
    with running(generator_app(GeneratorService(generator))) as address:
        yield address


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"{url}/v1", timeout=60) as found:
        yield found


def ask(client: httpx.Client, path: str = "completions", **values: Any) -> Any:
    answer = client.post(path, json={"model": "any", **values})
    assert answer.status_code == 200, answer.text
    return answer.json()


def stream(client: httpx.Client, path: str = "completions", **values: Any) -> list[Any]:
    """What a stream says, each event apart."""
    body = {"model": "any", "stream": True, **values}
    with client.stream("POST", path, json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def written(generator: TextGenerator, prompt: str, **values: Any) -> GeneratedText:
    """What the generator writes behind a text as it is."""
    plain = TextGenerator(generator.saved, template=PLAIN)
    (text,) = plain.generate_texts([(prompt, "")], batch_size=1, **values)
    return text


def test_texts_are_the_generators(generator: TextGenerator, client: httpx.Client) -> None:
    wanted = written(generator, PROMPTS[0], max_new_tokens=12)
    answer = ask(client, prompt=PROMPTS[0], max_tokens=12)
    (choice,), usage = answer["choices"], answer["usage"]
    assert choice["text"] == wanted.text
    assert usage["exit_layers"] == choice["exit_layers"] == wanted.exit_layers
    assert usage["completion_tokens"] == len(wanted.token_ids)
    assert usage["mean_exit_layer"] == pytest.approx(wanted.mean_exit_layer)
    assert choice["finish_reason"] == {"end": "stop"}.get(wanted.finish_reason, wanted.finish_reason)
    several = ask(client, prompt=PROMPTS, max_tokens=9)
    assert [choice["text"] for choice in several["choices"]] == [
        written(generator, prompt, max_new_tokens=9).text for prompt in PROMPTS
    ]


def test_streams_are_the_text_piece_by_piece(generator: TextGenerator, client: httpx.Client) -> None:
    wanted = written(generator, PROMPTS[1], max_new_tokens=15)
    chunks = stream(client, prompt=PROMPTS[1], max_tokens=15, stream_options={"include_usage": True})
    choices = [chunk["choices"][0] for chunk in chunks[:-1]]
    assert "".join(choice["text"] for choice in choices) == wanted.text
    told = [layer for choice in choices for layer in choice["exit_layers"]]
    assert told == chunks[-1]["usage"]["exit_layers"] == wanted.exit_layers
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)


def test_the_description_of_a_stream_is_of_its_events(client: httpx.Client) -> None:
    """As schemathesis reads it: every event is an object with a text `data`."""
    described = httpx.get(str(client.base_url).replace("/v1/", "/openapi.json"), timeout=60).json()
    for path in ("/v1/completions", "/v1/chat/completions"):
        content = described["paths"][path]["post"]["responses"]["200"]["content"]
        schema = content["text/event-stream"]["schema"]
        assert (schema["type"], schema["required"]) == ("object", ["data"])
        assert schema["properties"]["data"]["type"] == "string"


def test_whole_numbers_may_be_written_with_a_point(client: httpx.Client) -> None:
    """JSON Schema has it so, and the description says `integer`."""
    assert (
        ask(client, prompt="do", max_tokens=3.0, seed=7.0)["usage"]
        == ask(client, prompt="do", max_tokens=3)["usage"]
    )
    answer = client.post("completions", json={"model": "any", "prompt": "do", "max_tokens": 3.5})
    assert answer.status_code == 422


def test_stop_strings_end_a_text_before_them(generator: TextGenerator, client: httpx.Client) -> None:
    whole = written(generator, PROMPTS[2], max_new_tokens=24).text
    stop = whole[8:10]
    assert stop.strip()
    wanted = written(generator, PROMPTS[2], max_new_tokens=24, stop=stop)
    (kept,) = ask(client, prompt=PROMPTS[2], max_tokens=24, stop=[stop])["choices"]
    assert kept["text"] == wanted.text == whole[: whole.index(stop)]
    assert kept["finish_reason"] == "stop"
    chunks = stream(client, prompt=PROMPTS[2], max_tokens=24, stop=stop)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == wanted.text


def test_conversations(generator: TextGenerator, client: httpx.Client) -> None:
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": [{"type": "text", "text": "three?"}]},
    ]
    turns = [("system", "Be kind."), ("user", "one?"), ("assistant", "two"), ("user", "three?")]
    (wanted,) = generator.generate_encoded(
        [generator.encode_conversation(turns)], options=DecodingOptions(max_new_tokens=10)
    )
    path = "chat/completions"
    answer = ask(client, path, messages=messages, max_completion_tokens=10)
    assert answer["choices"][0]["message"]["content"] == wanted.text
    deltas = [
        chunk["choices"][0]["delta"] for chunk in stream(client, path, messages=messages, max_tokens=10)
    ]
    assert "".join(delta.get("content", "") for delta in deltas) == wanted.text
    assert deltas[0]["role"] == "assistant"
    assert client.get("models").json()["data"][0]["id"] == generator.saved.name.split("/")[-1]


def test_an_empty_question_keeps_what_was_said_before_it(
    generator: TextGenerator, client: httpx.Client
) -> None:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": ""}]
    answer = ask(client, "chat/completions", messages=messages, max_tokens=5)
    wanted = written(generator, "Be kind.\n\n<>", max_new_tokens=5)
    assert answer["choices"][0]["message"]["content"] == wanted.text
    assert answer["usage"]["prompt_tokens"] == len(generator.encode_text("Be kind.\n\n<>"))


def test_parts_of_a_message_stand_on_lines_of_their_own_as_in_training(client: httpx.Client) -> None:
    parts = [{"type": "text", "text": text} for text in ("one", "two?")]
    asked = [{"role": "user", "content": content} for content in (parts, "one\ntwo?")]
    usages = [ask(client, "chat/completions", messages=[message], max_tokens=5)["usage"] for message in asked]
    assert usages[0] == usages[1]


def test_null_is_as_if_it_were_missing(client: httpx.Client) -> None:
    """Also in messages: what OpenAI's client dumps of an answer goes into the next question."""
    said = {"role": "assistant", "content": "two", "refusal": None, "annotations": None, "tool_calls": None}
    user = {"role": "user", "content": "one?"}
    asked = {
        "messages": [user, said, user],
        "max_tokens": 3,
        "prediction": None,
        "stream_options": {"x": None},
    }
    assert ask(client, "chat/completions", **asked)["choices"]
    answer = client.post("chat/completions", json={**asked, "prediction": True})
    assert (answer.status_code, '"prediction" is no field' in answer.text.replace("\\", "")) == (422, True)


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0, "top_p": 0.9},
        {"temperature": 0.0, "top_p": 1},
        {"metadata": {}, "store": False, "modalities": ["text"]},
        {"service_tier": "auto", "tool_choice": "auto", "tools": []},
        {"service_tier": "default", "tool_choice": "none", "parallel_tool_calls": True},
        {"stream_options": {"include_obfuscation": False}, "parallel_tool_calls": False},
    ],
)
def test_what_changes_nothing_is_taken(client: httpx.Client, values: dict[str, Any]) -> None:
    description = httpx.get(str(client.base_url).replace("/v1/", "/openapi.json"), timeout=60).json()
    body = {"model": "any", "max_tokens": 4}
    for path, asked in (
        ("completions", {"prompt": "do"}),
        ("chat/completions", {"messages": [{"role": "user", "content": "do"}]}),
    ):
        plain, answer = (client.post(path, json={**body, **asked, **more}) for more in ({}, values))
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"] == plain.json()["usage"]
        schema = description["paths"][f"/v1/{path}"]["post"]["requestBody"]["content"]["application/json"][
            "schema"
        ]
        assert values.keys() <= schema["properties"].keys()


def test_the_one_model_by_its_name(generator: TextGenerator, client: httpx.Client, url: str) -> None:
    name = generator.saved.name.split("/")[-1]
    assert client.get(f"models/{name}").json() == client.get("models").json()["data"][0]
    for other in ("other", f"org/{name}", ""):
        answer = client.get(f"models/{other}")
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == 404
    assert f'The model is "{name}", got "other".' in client.get("models/other").json()["error"]["message"]
    described = httpx.get(f"{url}/openapi.json", timeout=60).json()["paths"]["/v1/models/{model}"]["get"]
    assert described["responses"].keys() >= {"200", "404"}
    counted = httpx.get(f"{url}/metrics", timeout=60).text
    assert 'route="/v1/models/{model}",status="404"' in counted


OPENAI = """
import json, sys, openai
client = openai.OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0)
whole = client.completions.create(model="any", prompt="do this", max_tokens=9)
chunks = list(client.completions.create(model="any", prompt="do this", max_tokens=9, stream=True))
asked = dict(model="any", messages=[{"role": "user", "content": "one?"}], max_completion_tokens=9)
chat = client.chat.completions.create(**asked)
parts = list(client.chat.completions.create(**asked, stream=True))
try:
    client.completions.create(model="any", prompt="a", n=2)
except openai.UnprocessableEntityError as error:
    refused = str(error)
texts = [whole.choices[0].text, "".join(chunk.choices[0].text for chunk in chunks)]
texts += [chat.choices[0].message.content, "".join(part.choices[0].delta.content or "" for part in parts)]
print(json.dumps([texts, whole.usage.exit_layers, [model.id for model in client.models.list()], refused]))
"""


def test_openais_client(generator: TextGenerator, url: str) -> None:
    """In a process of its own: with it comes pydantic, and then cyclopts reads command lines in another way."""
    if not generator.saved.has_exits:
        pytest.skip("once is enough")
    command = [sys.executable, "-c", OPENAI, f"{url}/v1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    texts, layers, models, refused = json.loads(done.stdout)
    wanted = written(generator, "do this", max_new_tokens=9)
    (chat,) = generator.generate_encoded(
        [generator.encode_conversation([("user", "one?")])], options=DecodingOptions(max_new_tokens=9)
    )
    assert texts == [wanted.text] * 2 + [chat.text] * 2
    assert layers == wanted.exit_layers
    assert models == [generator.saved.name.split("/")[-1]]
    assert "n is not supported" in refused


def test_the_hubs_client(generator: TextGenerator, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: False)
    hub = InferenceClient(base_url=url)
    answer = hub.chat_completion([{"role": "user", "content": "one?"}], max_tokens=8)
    (wanted,) = generator.generate_encoded(
        [generator.encode_conversation([("user", "one?")])], options=DecodingOptions(max_new_tokens=8)
    )
    assert answer.choices[0].message.content == wanted.text


@pytest.mark.parametrize(
    "path, values, status, message",
    [
        ("completions", {"prompt": "a", "n": 2}, 422, "n is not supported"),
        ("completions", {"prompt": "a", "logprobs": 0}, 422, "logprobs is not supported"),
        ("completions", {"prompt": "a", "best_off": 1}, 422, "best_off"),
        ("completions", {"prompt": [1, 2]}, 422, "prompt must be a string"),
        ("completions", {"prompt": ["a"] * 100}, 413, "at most 64 prompts"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "a"}] * 16_385},
            413,
            "messages must be at most 16384, as many as tokens, got 16385.",
        ),
        ("completions", {"prompt": "a", "max_tokens": 100_000}, 422, "must fit into 256 tokens"),
        ("completions", {"prompt": "a" * 300}, 422, "must fit into 256 tokens"),
        ("completions", {"prompt": ""}, 422, "no token|must"),
        ("completions", {"prompt": "a", "top_p": 0.5}, 422, "Give a temperature."),
        ("completions", {"prompt": "a", "temperature": 0, "top_p": 1.5}, 422, "top_p must be in [0, 1]"),
        ("completions", {"prompt": "a", "store": True}, 422, "store is not supported"),
        ("completions", {"prompt": "a", "metadata": {"a": "b"}}, 422, "metadata is not supported"),
        ("completions", {"prompt": "a", "service_tier": "flex"}, 422, "service_tier is not supported"),
        ("completions", {"prompt": "a", "modalities": ["audio"]}, 422, "modalities is not supported"),
        (
            "completions",
            {"prompt": "a", "stream_options": {"include_obfuscation": True}},
            422,
            "include_obfuscation is not supported",
        ),
        ("completions", {"prompt": "a", "temperature": -1}, 422, "temperature must be above 0"),
        (
            "completions",
            {"prompt": "a", "temperature": 10**400, "mode": "lossless"},
            422,
            "temperature must be a number that a float holds",
        ),
        ("completions", {"prompt": "a", "stop": [""]}, 422, "stop must hold"),
        ("completions", {"prompt": "a", "mode": "fast"}, 422, "mode must be one of"),
        ("chat/completions", {"messages": []}, 422, "not empty"),
        ("chat/completions", {"messages": [{"role": "user"}]}, 422, "content of message 1"),
        ("chat/completions", {"messages": [{"role": "tool", "content": "a"}]}, 422, "role of message 1"),
        ("chat/completions", {"messages": [{"role": "assistant", "content": "a"}]}, 422, "in turn"),
    ],
)
def test_refused(url: str, path: str, values: dict[str, Any], status: int, message: str) -> None:
    answer = httpx.post(f"{url}/v1/{path}", json={"model": "any", **values}, timeout=60)
    if values.get("prompt") == "" and answer.status_code == 200:
        return  # a tokenizer that begins every text with a token has something to go on with
    assert answer.status_code == status, answer.text
    assert any(part in answer.json()["error"]["message"] for part in message.split("|"))


def test_the_prompt_that_is_wrong_is_named(client: httpx.Client) -> None:
    body = json.dumps({"model": "any", "prompt": ["a", "b", "\ud800"]})
    answer = client.post("completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 422
    assert answer.json()["error"]["message"].startswith("prompt 3: Character 1 is half a surrogate pair")


def test_prompts_are_written_together_and_the_short_one_ends_first(generator: TextGenerator) -> None:
    service = GeneratorService(generator)
    ended: list[str] = []

    async def work() -> dict[str, list[Any]]:
        service.start()
        options = service.generator.check(DecodingOptions())
        found: dict[str, list[Any]] = {}

        async def ask(prompt: str, limit: int) -> None:
            events = service.texts([generator.encode_text(prompt)], [limit], options)
            found[prompt] = [event async for event in events]
            ended.append(prompt)

        with service._changed:  # all wait before the first is begun
            tasks = [
                asyncio.ensure_future(ask(prompt, 4 + 8 * place)) for place, prompt in enumerate(PROMPTS)
            ]
            await asyncio.sleep(0)
        await asyncio.gather(*tasks)
        await service.stop()
        return found

    found = asyncio.run(work())
    assert ended[0] == PROMPTS[0]
    lengths = [
        len(written(generator, prompt, max_new_tokens=4 + 8 * place).token_ids)
        for place, prompt in enumerate(PROMPTS)
    ]
    counted = (
        service.metrics.text().decode()
    )  # one pass of the prompts, and one for every token behind the first
    assert f"consistentee_batch_rows_count {float(max(lengths))}" in counted
    assert f"consistentee_batch_rows_sum {float(sum(lengths))}" in counted
    for place, prompt in enumerate(PROMPTS):
        wanted = written(generator, prompt, max_new_tokens=4 + 8 * place)
        assert "".join(event.piece for event in found[prompt]) == wanted.text
        layers = [event.exit_layer for event in found[prompt] if event.exit_layer is not None]
        assert layers == wanted.exit_layers
        assert found[prompt][-1].finish_reason == wanted.finish_reason


def test_queue_deadline_and_clients_that_go_away(generator: TextGenerator) -> None:
    service = GeneratorService(generator, limits=ServerLimits(max_queue=2, deadline_ms=500))
    options = generator.check(DecodingOptions())
    held = threading.Event()

    async def first(limit: int = 4) -> Any:
        async for event in service.texts([generator.encode_text("a")], [limit], options):
            return event
        return None

    def held_texts(options: DecodingOptions) -> ContinuousTexts:
        held.wait(30)
        return generator.continuous_texts(options)

    async def work() -> None:
        service.start()
        service.__dict__["generator"] = _With(generator, held_texts)
        late = asyncio.ensure_future(first())
        gone = asyncio.ensure_future(first())
        await asyncio.sleep(0.02)
        with pytest.raises(RefusedRequest, match="overloaded") as caught:
            await first()
        assert caught.value.status == 429
        gone.cancel()
        with pytest.raises(RefusedRequest, match="No token within 500 ms") as caught:
            await late
        assert caught.value.status == 504
        held.set()
        service.generator = generator
        assert service._unanswered == 0
        assert (await first()).exit_layer >= 1
        await service.stop()

    asyncio.run(work())


def test_a_text_that_has_ended_frees_its_place_however_slowly_it_is_read(generator: TextGenerator) -> None:
    service = GeneratorService(generator, limits=ServerLimits(max_queue=2))
    options = generator.check(DecodingOptions())
    token_ids = generator.encode_text("a")

    async def work() -> None:
        service.start()
        read = service.texts([token_ids] * 2, [3, 3], options)
        await anext(read)  # and no more for now
        while service._unanswered:
            await asyncio.sleep(0.01)
        assert [event async for event in service.texts([token_ids] * 2, [3, 3], options)]
        assert [event.finish_reason is None async for event in read][-1] is False
        assert service._unanswered == 0  # freed once
        await service.stop()

    asyncio.run(asyncio.wait_for(work(), 60))


@pytest.mark.parametrize("mode", ["full", "lossless"])
def test_a_text_that_the_servers_end_cuts_off_is_not_whole(generator: TextGenerator, mode: str) -> None:
    if mode == "lossless" and not generator.saved.has_exits:
        pytest.skip("plain models have no such mode")
    service = GeneratorService(generator)
    options = generator.check(DecodingOptions(mode=mode))

    async def work() -> None:
        service.start()
        read = service.texts([generator.encode_text("do this")], [200], options)
        await anext(read)
        await service.stop()
        with pytest.raises(RefusedRequest, match="shutting down") as caught:
            [event async for event in read]
        assert caught.value.status == 503
        assert service._unanswered == 0

    asyncio.run(asyncio.wait_for(work(), 60))


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_client_that_does_not_read_counts_as_gone(
    generator: TextGenerator, monkeypatch: pytest.MonkeyPatch, is_stream: bool
) -> None:
    monkeypatch.setattr("consistentee.serving.app.SEND_SECONDS", 0.05)
    service = GeneratorService(generator)
    body = json.dumps({"prompt": ["a"] * 2, "max_tokens": 200, "stream": is_stream}).encode()
    messages = iter([{"type": "http.request", "body": body}])

    async def receive() -> Any:
        return next(messages, None) or await asyncio.Event().wait()

    async def send(_: Any) -> None:
        await asyncio.Event().wait()

    async def work() -> None:
        service.start()
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b""}
        headers = [(b"content-type", b"application/json")]
        await generator_app(service)({**scope, "headers": headers}, receive, send)
        assert service._unanswered == 0
        await service.stop()

    asyncio.run(asyncio.wait_for(work(), 60))


def test_tokenizing_counts_in_the_queue_and_within_the_deadline(
    generator: TextGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a long prompt; a short one waits for no long one."""
    free, encode_text = threading.Event(), generator.encode_text

    def held(text: str) -> list[int]:
        free.wait(20)
        return encode_text(text)

    monkeypatch.setattr(generator, "encode_text", held)
    service = GeneratorService(generator, limits=ServerLimits(max_queue=2, deadline_ms=2_000))

    async def read(prompt: str) -> list[list[int]]:
        values = {"prompt": prompt, "max_tokens": 2}
        return (await read_text_request(values, service, is_chat=False)).prompts

    async def work() -> None:
        service.start()
        late = asyncio.ensure_future(read("a " * 3_000))
        await asyncio.sleep(0)
        assert await read("a") == [encode_text("a")]
        assert service._unanswered == 1
        other = asyncio.ensure_future(read("a " * 3_000))
        await asyncio.sleep(0)
        with pytest.raises(RefusedRequest, match="overloaded: 2 prompts") as caught:
            await read("a")
        assert caught.value.status == 429
        for task in (late, other):
            with pytest.raises(RefusedRequest, match="No token within 2000 ms") as caught:
                await task
            assert caught.value.status == 504
        assert not free.is_set()
        assert service._unanswered == 0
        free.set()
        await service.stop()

    asyncio.run(work())


class _With:
    def __init__(self, generator: TextGenerator, continuous_texts: Any) -> None:
        self._generator, self.continuous_texts = generator, continuous_texts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._generator, name)


@pytest.mark.parametrize("joins", [True, False])
def test_a_text_that_goes_on_keeps_its_first_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, joins: bool
) -> None:
    tokenizer = spaced("▁the")
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 64}
    model = tiny_decoder("llama", **sizes, pad_token_id=3, eos_token_id=3, bos_token_id=2)
    with torch.no_grad():
        model.model.norm.weight.zero_()  # all logits are equal: it writes "▁the" again and again
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    generator = TextGenerator(load_model(tmp_path, LoadedGenerator, device="cpu"), template=TEMPLATE)
    if not joins:
        monkeypatch.setattr("consistentee.serving.generation.can_join", lambda *_: False)
    with running(generator_app(GeneratorService(generator))) as address:

        def answer(path: str, **values: Any) -> Any:
            body = {"model": "any", "max_tokens": 2, **values}
            return httpx.post(f"{address}/v1/{path}", json=body, timeout=60).json()["choices"][0]

        assert answer("completions", prompt="Rivers:")["text"] == " the the"
        stopped = answer("completions", prompt="Rivers:", stop=[" the"])
        assert (stopped["text"], stopped["finish_reason"], len(stopped["exit_layers"])) == ("", "stop", 1)
        asked = answer("chat/completions", messages=[{"role": "user", "content": "Rivers:"}])
        assert asked["message"]["content"] == "the the"  # a text of its own
        body = {"model": "any", "max_tokens": 2, "prompt": "Rivers:", "stream": True}
        with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=60) as lines:
            events = [line[6:] for line in lines.iter_lines() if line.startswith("data: {")]
        assert "".join(json.loads(event)["choices"][0]["text"] for event in events) == " the the"


def test_lossless_and_drawn_texts(tmp_path: Path) -> None:
    generator = TextGenerator(load_model(generator_folder(tmp_path / "exits"), LoadedGenerator, device="cpu"))
    with running(generator_app(GeneratorService(generator))) as address:

        def text_of(**values: Any) -> str:
            body = {"model": "any", "prompt": "do this", "max_tokens": 12, **values}
            answer = httpx.post(f"{address}/v1/completions", json=body, timeout=60)
            assert answer.status_code == 200, answer.text
            return answer.json()["choices"][0]["text"]

        full = written(generator, "do this", max_new_tokens=12, mode="full").text
        assert text_of(mode="lossless") == text_of(mode="full") == full
        assert text_of(temperature=1e-45, top_p=0.5) == text_of()  # its logits would be no numbers
        drawn = {text_of(temperature=1.5, seed=seed) for seed in range(4)}
        assert len(drawn) > 1
        assert text_of(temperature=1.5, seed=3, top_p=0.9) == text_of(temperature=1.5, seed=3, top_p=0.9)


@pytest.mark.parametrize("saved", ["early-exit", "lossless"])
def test_refusals_name_what_a_request_has(tmp_path: Path, saved: str) -> None:
    folder = generator_folder(tmp_path / "exits", mode=saved)
    service = GeneratorService(TextGenerator(load_model(folder, LoadedGenerator, device="cpu")))
    of_mode = {} if saved == "lossless" else {"mode": "lossless"}

    async def refused(**values: Any) -> str:
        with pytest.raises(RefusedRequest) as caught:
            await read_text_request({"prompt": "a", **values}, service, is_chat=False)
        assert caught.value.status == 422
        return caught.value.message

    drawn = asyncio.run(refused(temperature=0.5, **of_mode))
    assert drawn.startswith('temperature must be 0 in mode "lossless"')
    assert asyncio.run(refused(criterion="static")).endswith("Give one with threshold.")
