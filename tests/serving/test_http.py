"""The server over HTTP: what clients of others expect of it, and what it does with bad ones."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import torch
from huggingface_hub import InferenceClient

from consistentee.pipelines.classifier import Engine
from consistentee.serving.classification import ClassifierService
from consistentee.serving.predict_route import classifier_app
from consistentee.serving.requests import ServerLimits
from served import HeldPool, running
from tiny import tiny_backbone, tiny_dataset, tiny_model

TEXTS = [text for (text,) in tiny_dataset(24, seed=5).texts]
LIMITS = ServerLimits(max_queue=8, max_bytes=20_000, max_batch=4, body_seconds=0.5)
TOKEN = b"a-token-of-some-length"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    root = tmp_path_factory.mktemp("http")
    torch.manual_seed(4)
    backbone = tiny_backbone(root / "backbone", layers=4)
    return Engine.from_pretrained(tiny_model(root / "model", backbone, initial_exit_bias=0.0), device="cpu")


@pytest.fixture(scope="module")
def held(engine: Engine) -> HeldPool:
    pool = HeldPool(engine.pool())
    pool.let_go()
    return pool


@pytest.fixture(scope="module")
def service(engine: Engine, held: HeldPool) -> ClassifierService:
    return ClassifierService(engine, limits=LIMITS, pool=lambda: held)


@pytest.fixture(scope="module")
def url(service: ClassifierService) -> Iterator[str]:
    with running(classifier_app(service)) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=30) as found:
        yield found


@pytest.fixture
def _loopback_is_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests are offline, and the hub's client then refuses our own address as well."""
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: False)


def expected(engine: Engine, text: str, **rule: Any) -> tuple[str, int]:
    (answer,) = engine.predict([text], **rule)
    return answer.label, answer.exit_layer


def test_forms_of_text_embeddings_inference(engine: Engine, client: httpx.Client) -> None:
    one = client.post("/predict", json={"inputs": TEXTS[0]}).json()
    several = client.post("/predict", json={"inputs": [[text] for text in TEXTS[:3]]}).json()
    assert [set(item) for item in one] == [{"score", "label", "exit_layer"}] * 2
    assert one[0]["score"] >= one[1]["score"]
    assert sum(item["score"] for item in one) == pytest.approx(1)
    for text, items in zip(TEXTS, [one, *several[1:]], strict=False):
        assert (items[0]["label"], items[0]["exit_layer"]) == expected(engine, text)
    raw = client.post("/predict", json={"inputs": TEXTS[0], "raw_scores": True}).json()
    assert torch.tensor([item["score"] for item in raw]).softmax(0).tolist() == pytest.approx(
        [item["score"] for item in one]
    )
    long = client.post("/predict", json={"inputs": "good " * 100}).json()
    assert long[0]["truncated"] is True
    refused = client.post("/predict", json={"inputs": "good " * 100, "truncate": False})
    assert (refused.status_code, refused.json()["error_type"]) == (413, "Validation")


def test_a_model_that_cuts_on_the_left_is_asked_for_that(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.saved.tokenizer, "truncation_side", "left")
    texts = {"inputs": "bad " * 100 + "good " * 50}
    with running(classifier_app(ClassifierService(engine, limits=LIMITS))) as url:
        cut = [
            httpx.post(f"{url}/predict", json={**texts, **more}).json()
            for more in ({}, {"truncation_direction": "Left"}, {"truncation_direction": "left"})
        ]
        refused = httpx.post(f"{url}/predict", json={**texts, "truncation_direction": "Right"})
    assert (cut[0][0]["truncated"], cut[1], cut[2]) == (True, cut[0], cut[0])
    assert refused.status_code == 422
    assert refused.json()["error"].startswith('truncation_direction must be "Left", as this model cuts')


def test_a_threshold_of_the_request(engine: Engine, client: httpx.Client) -> None:
    for threshold in (0.0, 0.5, 0.999):
        items = client.post("/predict", json={"inputs": TEXTS[1], "threshold": threshold}).json()
        assert (items[0]["label"], items[0]["exit_layer"]) == expected(engine, TEXTS[1], threshold=threshold)
    items = client.post("/predict", json={"inputs": TEXTS[1], "operating_point": "full-depth"}).json()
    assert items[0]["exit_layer"] == 4


@pytest.mark.usefixtures("_loopback_is_no_hub")
def test_the_hubs_client(engine: Engine, url: str) -> None:
    hub = InferenceClient(model=f"{url}/predict")
    found = hub.text_classification(TEXTS[0])
    assert (found[0].label, found[0]["exit_layer"]) == expected(engine, TEXTS[0])
    assert len(found) == 2
    assert len(hub.text_classification(TEXTS[0], top_k=1)) == 1


def test_state_counters_and_description(client: httpx.Client) -> None:
    client.post("/predict", json={"inputs": TEXTS[0]})
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json() == {"status": "ready"}
    text = client.get("/metrics").text
    for name in (
        "request_seconds_bucket",
        "queue",
        "batch_rows_bucket",
        'exit_layer_bucket{le="4.0"}',
        "operating_point{",
        'requests_total{route="/predict",status="200"}',
    ):
        assert f"consistentee_{name}" in text
    description = client.get("/openapi.json").json()
    assert set(description["paths"]) == {
        "/",
        "/health",
        "/ready",
        "/metrics",
        "/openapi.json",
        "/predict",
        "/layers",
    }
    assert description["paths"]["/predict"]["post"]["responses"].keys() >= {"200", "413", "422", "429", "504"}


@pytest.mark.parametrize(
    "content, content_type, status",
    [
        (b"{", "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b"[" * 15_000, "application/json", 400),
        (b"[]", "application/json", 422),
        (b'{"inputs": ""}', "application/json", 422),
        (b'{"inputs": "\\ud800"}', "application/json; charset=utf-8", 422),
        (b'{"inputs": "a"}', "text/plain", 415),
        (b'{"inputs": "' + b"a" * 30_000 + b'"}', "application/json", 413),
        (b'{"inputs": ["a", "a", "a", "a", "a"]}', "application/json", 413),
        (b'{"inputs": "a", "model": "/etc/passwd"}', "application/json", 422),
    ],
)
def test_bad_requests_are_told_why(
    client: httpx.Client, content: bytes, content_type: str, status: int
) -> None:
    answer = client.post("/predict", content=content, headers={"content-type": content_type})
    assert answer.status_code == status
    assert answer.json()["error"]
    assert client.post("/predict", json={"inputs": "a"}).status_code == 200  # and it goes on


def test_compressed_bodies_are_refused_as_such(client: httpx.Client) -> None:
    body = gzip.compress(b'{"inputs": "a"}')
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    answer = client.post("/predict", content=body, headers=headers)
    assert answer.status_code == 415
    assert answer.json()["error"] == (
        'The body must not be compressed, got Content-Encoding "gzip". Send it as it is.'
    )
    plain = client.post(
        "/predict", content=b'{"inputs": "a"}', headers={**headers, "content-encoding": "identity"}
    )
    assert plain.status_code == 200


def test_ten_megabytes_are_not_read(url: str) -> None:
    def body() -> Iterator[bytes]:  # without a length beforehand
        for _ in range(160):
            yield b"a" * 65_536

    with httpx.Client(timeout=30) as whole:
        headers = {"content-type": "application/json"}
        try:
            answer = whole.post(f"{url}/predict", content=body(), headers=headers)
            assert answer.status_code == 413
        except httpx.TransportError:  # the server has closed while we still wrote
            pass
        known = whole.post(f"{url}/predict", content=b"a" * 10_000_000, headers=headers)
        assert known.status_code == 413


def test_a_body_that_does_not_come(url: str) -> None:
    place = urlsplit(url)
    with socket.create_connection((place.hostname, place.port), timeout=20) as link:
        head = f"POST /predict HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\n"
        link.sendall(f"{head}Content-Length: 100\r\n\r\n".encode() + b'{"inputs"')
        assert b"408" in link.recv(1000).split(b"\r\n")[0]


def test_a_full_queue_and_clients_that_go_away(
    url: str, client: httpx.Client, held: HeldPool, service: ClassifierService
) -> None:
    held.free.clear()
    try:
        place = urlsplit(url)
        body = json.dumps({"inputs": [TEXTS[0]] * 4}).encode()
        head = "POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        links = [socket.create_connection((place.hostname, place.port)) for _ in range(2)]
        for link in links:
            link.sendall(head.encode() + body)
        until(lambda: service._unanswered == 8)
        refused = client.post("/predict", json={"inputs": TEXTS[0]})
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        for link in links:
            link.close()
        until(lambda: service._unanswered == 0)
    finally:
        held.let_go()
    assert client.post("/predict", json={"inputs": TEXTS[0]}).status_code == 200
    until(lambda: len(held) == 0)
    assert 'status="499"' in client.get("/metrics").text


def until(condition: Any) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


class HeldTokenizer:
    """Tokenizes short texts at once, and long ones when it is let go; `gave_up` where nobody let it go."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.is_held, self.free, self.gave_up = threading.Event(), threading.Event(), False

    def __call__(self, texts: list[str], *more: Any, **how: Any) -> Any:
        if len(texts[0]) > 4_000:
            self.is_held.set()
            self.gave_up = not self.free.wait(20)
        return self._tokenizer(texts, *more, **how)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def test_long_texts_are_tokenized_beside_everything_else(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = HeldTokenizer(engine._tokenizer)
    monkeypatch.setattr(engine, "_tokenizer", tokenizer)
    service = ClassifierService(engine)
    with running(classifier_app(service)) as address, httpx.Client(base_url=address, timeout=60) as guest:
        statuses: list[int] = []

        def ask_long() -> None:
            body = {"inputs": "good " * 1_000}
            statuses.append(httpx.post(f"{address}/predict", json=body, timeout=60).status_code)

        asking = threading.Thread(target=ask_long)
        asking.start()
        assert tokenizer.is_held.wait(20)
        assert guest.post("/predict", json={"inputs": "good"}).status_code == 200
        assert guest.get("/health").status_code == 200
        assert not tokenizer.gave_up
        assert service._unanswered == 1
        tokenizer.free.set()
        asking.join(30)
        assert statuses == [200]


def test_many_at_once_get_their_own_answers(engine: Engine, url: str, service: ClassifierService) -> None:
    service_limit = service.limits.max_queue

    async def ask_all() -> list[tuple[int, httpx.Response]]:
        async with httpx.AsyncClient(base_url=url, timeout=60) as many:

            async def ask(number: int) -> tuple[int, httpx.Response]:
                body = {"inputs": TEXTS[number % 24], "threshold": 0.4 + 0.05 * (number % 5)}
                return number, await many.post("/predict", json=body)

            return await asyncio.gather(*map(ask, range(60)))

    answers = asyncio.run(ask_all())
    assert {answer.status_code for _, answer in answers} <= {200, 429}
    assert sum(answer.status_code == 200 for _, answer in answers) >= service_limit
    for number, answer in answers:
        if answer.status_code == 200:
            found = answer.json()[0]
            rule = {"threshold": 0.4 + 0.05 * (number % 5)}
            assert (found["label"], found["exit_layer"]) == expected(engine, TEXTS[number % 24], **rule)


def test_a_slow_reader_does_not_hold_up_the_others(url: str, client: httpx.Client) -> None:
    place = urlsplit(url)
    body = json.dumps({"inputs": TEXTS[:4]}).encode()
    head = "POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    with socket.create_connection((place.hostname, place.port)) as link:
        for _ in range(50):  # asks and asks, and reads nothing
            link.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        for text in TEXTS[:5]:
            assert client.post("/predict", json={"inputs": text}).status_code in (200, 429)
        until(lambda: client.post("/predict", json={"inputs": "a"}).status_code == 200)


@pytest.mark.usefixtures("_loopback_is_no_hub")
def test_the_bearer_token(engine: Engine) -> None:
    with (
        running(classifier_app(ClassifierService(engine), token=TOKEN)) as address,
        httpx.Client(base_url=address) as guest,
    ):
        for path in ("/metrics", "/openapi.json", "/other"):
            assert guest.get(path).status_code == 401
        for given in ("Bearer wrong", f"bearer {TOKEN.decode()}x", TOKEN.decode()):
            answer = guest.post("/predict", json={"inputs": "a"}, headers={"authorization": given})
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert guest.get("/health").status_code == 200
        bearing = {"authorization": f"Bearer {TOKEN.decode()}"}
        assert guest.post("/predict", json={"inputs": "a"}, headers=bearing).status_code == 200
        hub = InferenceClient(model=f"{address}/predict", token=TOKEN.decode())
        assert hub.text_classification("a")
        description = guest.get("/openapi.json", headers=bearing).json()
        assert description["paths"]["/predict"]["post"]["security"] == [{"token": []}]


def test_below_a_prefix(engine: Engine) -> None:
    """As a part of another application, and behind Ray Serve's `route_prefix`."""
    from starlette.applications import Starlette
    from starlette.routing import Mount

    service = ClassifierService(engine)
    mounted = Starlette(routes=[Mount("/models/a", classifier_app(service, token=TOKEN))])

    async def work() -> None:
        service.start()
        transport = httpx.ASGITransport(mounted)
        async with httpx.AsyncClient(transport=transport, base_url="http://host/models/a") as guest:
            for path in ("/", "/health", "/ready"):
                assert (await guest.get(path)).status_code == 200
            for path in ("/metrics", "/health/other", "/models/a/health"):
                assert (await guest.get(path)).status_code == 401
            bearing = {"authorization": f"bearer {TOKEN.decode()}"}  # schemes have no case
            assert (await guest.get("/layers", headers=bearing)).status_code == 200
            text = (await guest.get("/metrics", headers=bearing)).text
        assert 'requests_total{route="/health",status="200"} 1.0' in text
        assert 'requests_total{route="/layers",status="200"} 1.0' in text
        assert 'requests_total{route="other",status="401"} 2.0' in text
        await service.stop()

    asyncio.run(work())


def test_ending_answers_who_waits_and_takes_no_more(engine: Engine) -> None:
    from consistentee.serving.server import HttpServer

    held = HeldPool(engine.pool())
    server = HttpServer(
        classifier_app(ClassifierService(engine, pool=lambda: held)), host="127.0.0.1", port=0
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    answers: list[int] = []

    def ask() -> None:
        answers.append(httpx.post(f"{server.url}/predict", json={"inputs": "a"}, timeout=60).status_code)

    asking = threading.Thread(target=ask)
    asking.start()
    until(lambda: len(held) == 1)
    server.stop()
    until(lambda: not reachable(server.url))
    held.let_go()
    asking.join(30)
    thread.join(30)
    assert answers == [200]
    assert not thread.is_alive()


def test_whom_the_end_leaves_no_time_for_is_told(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    from consistentee.serving.server import HttpServer

    held = HeldPool(engine.pool())
    app = classifier_app(ClassifierService(engine, pool=lambda: held))
    server = HttpServer(app, host="127.0.0.1", port=0, drain_seconds=0)
    thread = threading.Thread(target=server.run)
    thread.start()
    answers: list[httpx.Response] = []
    asking = threading.Thread(
        target=lambda: answers.append(httpx.post(f"{server.url}/predict", json={"inputs": "a"}, timeout=60))
    )
    asking.start()
    until(lambda: len(held) == 1)
    server.stop()
    asking.join(30)
    thread.join(30)
    assert not thread.is_alive()
    (answer,) = answers
    assert answer.status_code == 503
    assert answer.json() == {"error": "The server is shutting down.", "error_type": "Unhealthy"}
    assert "Traceback" not in caplog.text


def reachable(address: str) -> bool:
    place = urlsplit(address)
    try:
        socket.create_connection((place.hostname, place.port), timeout=5).close()
    except OSError:
        return False
    return True


def test_the_log_says_it_once(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    with running(classifier_app(ClassifierService(engine))) as address:
        place = urlsplit(address)
        for _ in range(5):
            with socket.create_connection((place.hostname, place.port), timeout=5) as broken:
                broken.sendall(b"no request\r\n\r\n")
                assert broken.recv(100).startswith(b"HTTP/1.1 400")
    assert [record.message for record in caplog.records if record.name == "uvicorn.error"] == [
        "Invalid HTTP request received."
    ]
