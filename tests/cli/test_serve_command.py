"""`consistentee serve`: what it refuses, and a process that is ended while it answers."""

from __future__ import annotations

import concurrent.futures
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest
import torch

from consistentee.cli.main import main
from consistentee.errors import SettingError
from consistentee.serving.server import HttpServer
from saved_generators import generator_folder
from tiny import tiny_backbone, tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("serve")
    torch.manual_seed(4)
    return tiny_model(root / "model", tiny_backbone(root / "backbone"), initial_exit_bias=0.0)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--port", "70000"], "--port must be in [0, 65535]"),
        (["--audit", "2"], "--audit must be a share"),
        (["--max-queue", "0"], "--max-queue must be at least 1"),
        (["--workers", "0"], "--workers must be at least 1"),
        (["--deadline-ms", "0"], "--deadline-ms must be above 0"),
        (["--token-file", "missing"], "--token-file must be a file"),
        (["--operating-point", "none"], 'has no operating point "none"'),
        (["--host", "256.0.0.1", "--port", "0"], "host and port must be free to listen on"),
    ],
)
def test_refused(
    model: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["serve", str(model), *options]) == 2
    assert message in capsys.readouterr().err


def test_tokens_that_are_no_secrets(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content in (b"short", b"with space in it", "über-geheim".encode()):
        (tmp_path / "token").write_bytes(content)
        assert main(["serve", str(model), "--token-file", str(tmp_path / "token")]) == 2
        assert "printable ASCII" in capsys.readouterr().err


def test_options_of_classifiers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = generator_folder(tmp_path / "generator")
    for name, value in (("--audit", "0.1"), ("--workers", "2")):
        assert main(["serve", str(folder), name, value]) == 2
        assert f"{name} goes with classifiers" in capsys.readouterr().err


def started(model: Path, *options: str) -> tuple[subprocess.Popen[str], list[str]]:
    """A server in a group of processes of its own, and the lines it said, the last with its URL at the end."""
    command = [sys.executable, "-m", "consistentee", "serve", str(model), "--port", "0", *options]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    lines = [process.stdout.readline()]
    while lines[-1] and not lines[-1].startswith("Serving"):
        lines.append(process.stdout.readline())
    return process, lines


def test_sigterm_while_it_answers(model: Path) -> None:
    """Service managers send it to all processes of a group, the worker among them."""
    process, lines = started(model, "--audit", "0.5", "--workers", "1")
    with process:
        url, children = lines[-1].split()[-1], psutil.Process(process.pid).children(recursive=True)

        def ask(number: int) -> int:
            body = {"inputs": ["good film " * (1 + number % 5)] * 40}
            try:
                return httpx.post(f"{url}/predict", json=body, timeout=60).status_code
            except httpx.TransportError:
                return 0  # it came after the end

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            first = [pool.submit(ask, number) for number in range(8)]
            concurrent.futures.wait(first, return_when=concurrent.futures.FIRST_COMPLETED)
            os.killpg(process.pid, signal.SIGTERM)
            found = [answer.result() for answer in first]
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert set(found) <= {0, 200}
    assert 200 in found
    assert "Traceback" not in errors
    assert "nothing is stepped back from" in "".join(lines)
    assert len(children) == 2  # the worker, and multiprocessing's own
    assert_gone(children)


def test_workers_end_with_a_server_that_is_killed(model: Path) -> None:
    process, lines = started(model, "--workers", "1")
    with process:
        children = psutil.Process(process.pid).children(recursive=True)
        for child in children:  # the server's signals are none of theirs
            child.send_signal(signal.SIGINT)
            child.send_signal(signal.SIGTERM)
            child.send_signal(signal.SIGHUP)
        asked = httpx.post(f"{lines[-1].split()[-1]}/predict", json={"inputs": "a"}, timeout=60)
        process.kill()
    assert asked.status_code == 200
    assert len(children) == 2
    assert_gone(children)


def assert_gone(processes: list[psutil.Process]) -> None:
    """Wait until none of them runs; one that nobody waits for may stay as a zombie."""

    def is_gone(process: psutil.Process) -> bool:
        try:
            return process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    for _ in range(1500):
        if all(map(is_gone, processes)):
            return
        time.sleep(0.02)
    raise AssertionError(processes)


def test_handlers_of_this_process_stay_open() -> None:
    closed: list[bool] = []

    class Noted(logging.Handler):
        def close(self) -> None:
            closed.append(True)
            super().close()

    handler = Noted()
    with pytest.raises(SettingError, match="host and port must be free"):
        HttpServer(None, host="256.0.0.1", port=0)
    assert closed == []
    handler.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_what_ends_it_lets_it_answer_first(number: signal.Signals) -> None:
    server = HttpServer(None, host="127.0.0.1", port=0)
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with server._signals():
            signal.raise_signal(number)
            assert server._server.should_exit
            assert not server._server.force_exit
            signal.raise_signal(number)
            assert server._server.force_exit
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
        server._socket.close()


def test_a_terminal_that_it_is_to_outlast_may_be_closed() -> None:
    """Under `nohup`."""
    server = HttpServer(None, host="127.0.0.1", port=0)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with server._signals():
            signal.raise_signal(signal.SIGHUP)
            assert not server._server.should_exit
    finally:
        signal.signal(signal.SIGHUP, before)
        server._socket.close()
