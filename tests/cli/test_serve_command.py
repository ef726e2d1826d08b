"""`consistentee serve`: what it refuses, and a process that is ended while it answers."""

from __future__ import annotations

import concurrent.futures
import logging
import signal
import subprocess
import sys
from pathlib import Path

import httpx
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
    assert main(["serve", str(folder), "--audit", "0.1"]) == 2
    assert "--audit goes with classifiers" in capsys.readouterr().err


def test_sigterm_while_it_answers(model: Path) -> None:
    command = [sys.executable, "-m", "consistentee", "serve", str(model), "--port", "0", "--audit", "0.5"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline()]
        while not lines[-1].startswith("Serving"):
            lines.append(process.stdout.readline())
        url = lines[-1].split()[-1]

        def ask(number: int) -> int:
            body = {"inputs": ["good film " * (1 + number % 5)] * 40}
            try:
                return httpx.post(f"{url}/predict", json=body, timeout=60).status_code
            except httpx.TransportError:
                return 0  # it came after the end

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            first = [pool.submit(ask, number) for number in range(8)]
            concurrent.futures.wait(first, return_when=concurrent.futures.FIRST_COMPLETED)
            process.send_signal(signal.SIGTERM)
            found = [answer.result() for answer in first]
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert set(found) <= {0, 200}
    assert 200 in found
    assert "Traceback" not in errors
    assert "nothing is stepped back from" in "".join(lines)


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
