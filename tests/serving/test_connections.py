"""Connections that ask for nothing, and more of them than there is room for."""

from __future__ import annotations

import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest
import torch

from consistentee.pipelines.classifier import Engine
from consistentee.serving import connections
from consistentee.serving.classification import ClassifierService
from consistentee.serving.predict_route import classifier_app
from served import running
from tiny import tiny_backbone, tiny_model

HALF_A_HEAD = b"GET /health HTTP/1.1\r\nHost: x\r\nAcce"
GET = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    root = tmp_path_factory.mktemp("connections")
    torch.manual_seed(4)
    return Engine.from_pretrained(tiny_model(root / "model", tiny_backbone(root / "backbone")), device="cpu")


@pytest.fixture
def url(engine: Engine, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    for name, value in request.param.items():
        monkeypatch.setattr(connections, name, value)
    with running(classifier_app(ClassifierService(engine))) as url:
        yield url


def connect(url: str, sent: bytes = b"") -> socket.socket:
    place = urlsplit(url)
    found = socket.create_connection((str(place.hostname), int(place.port or 0)), timeout=30)
    if sent:
        found.sendall(sent)
    return found


def answer(client: socket.socket) -> bytes:
    """The first answer of a connection; b"" where it was closed without one."""
    found = b""
    while b"\r\n\r\n" not in found and (more := client.recv(1000)):
        found += more
    return found


@pytest.mark.parametrize("url", [{"HEAD_SECONDS": 0.5}], indirect=True)
def test_who_asks_for_nothing_is_not_waited_for(url: str) -> None:
    silent, half, later = connect(url), connect(url, HALF_A_HEAD), connect(url, GET)
    with silent, half, later:
        assert answer(later).startswith(b"HTTP/1.1 200")
        later.sendall(HALF_A_HEAD)
        assert [answer(client) for client in (silent, half)] == [b"", b""]
        while later.recv(1000):  # the rest of the first answer, and then its end
            pass


@pytest.mark.parametrize("url", [{"HEAD_SECONDS": 0.5}], indirect=True)
def test_who_asked_may_take_its_time(url: str) -> None:
    body = b'{"inputs": "a"}'
    head = (
        b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    )
    with connect(url, head % len(body)) as slow, connect(url, GET) as idle:
        assert answer(idle).startswith(b"HTTP/1.1 200")
        assert not select.select([slow], [], [], 1.5)[0]  # three times as long as a head may take
        slow.sendall(body)
        assert answer(slow).startswith(b"HTTP/1.1 200")
        idle.sendall(GET)  # between two requests the time for idle connections holds, which is longer
        assert b"HTTP/1.1 200" in answer(idle)


@pytest.mark.parametrize("url", [{"MAX_CONNECTIONS": 3, "REFUSED_AT_ONCE": 2}], indirect=True)
def test_connections_beyond_the_most_are_told_so(url: str) -> None:
    held = [connect(url, GET) for _ in range(3)]
    assert all(answer(client).startswith(b"HTTP/1.1 200") for client in held)
    refused = [connect(url), connect(url)]
    beyond = connect(url)
    assert beyond.recv(1000) == b""
    for client in refused:
        client.sendall(GET)
        assert answer(client).startswith(b"HTTP/1.1 503")
    held[0].sendall(GET)  # who was in before stays
    assert b"HTTP/1.1 200" in answer(held[0])
    for client in (*held, *refused, beyond):
        client.close()
    assert httpx.get(f"{url}/health", timeout=30).status_code == 200


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
def test_as_many_files_are_taken_as_there_may_be() -> None:
    code = (
        "import logging, resource\n"
        "from consistentee.serving.connections import room_for_connections\n"
        "for limits in ((300, 5000), (100, 1000), (64, 100)):\n"
        "    resource.setrlimit(resource.RLIMIT_NOFILE, limits)\n"
        "    print(room_for_connections(), resource.getrlimit(resource.RLIMIT_NOFILE)[0])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:3] == ["4096 4352", "744 1000", "50 100"]
    assert done.stderr.count("ulimit -n") == 2
