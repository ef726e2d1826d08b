"""Standard output that nobody reads, streams that were closed from the start, and signals: real processes and pipes."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from consistentee.cli import main as cli
from consistentee.cli.main import main
from consistentee.cli.terminal import (
    LastingStream,
    Stopped,
    outlasting_readers,
    save_figures,
    say,
    stoppable,
)
from tiny import tiny_backbone, tiny_dataset, tiny_model, write_csv
from tiny_training import tiny_decoder

COMMAND = [sys.executable, "-m", "consistentee"]
SETTINGS = "--warmup-epochs 1 --rounds 0 --policy-input log_odds --policy-epochs 1 --policy-min-steps 1"
SETTINGS += " --policy-folds 2 --layer-costs 0.02 --mixed-precision no"
QUICK_TEXTS = "--rounds 0 --warmup-epochs 1 --mixed-precision no --prompt-template plain --max-length 32"
QUICK_TEXTS += " --validation-fraction 0.4"


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Commands that train, without their output folders."""
    root = tmp_path_factory.mktemp("streams")
    rows = write_csv(root / "train.csv", tiny_dataset(60, seed=1))
    evaluation = write_csv(root / "evaluation.csv", tiny_dataset(30, seed=2))
    files = ["--train-file", str(rows), "--eval-file", str(evaluation)]
    encoder, decoder = tiny_backbone(root / "encoder"), tiny_decoder(root / "decoder", layers=2)
    texts = root / "texts.jsonl"
    lines = [json.dumps({"instruction": f"say {n}", "output": f"{n} {n}"}) for n in range(20)]
    texts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    columns = ["--text-columns", "text", "--label-column", "label", "--backbone", str(encoder)]
    prompts = ["--train-file", str(texts), "--eval-file", str(texts), "--response-column", "output"]
    tiny_model(root / "model", encoder)
    return {
        "train": ["train", *files, *columns, *SETTINGS.split()],
        "finetune texts": ["finetune", *prompts, "--backbone", str(decoder), *QUICK_TEXTS.split()],
        "predict": ["predict", str(root / "model"), str(evaluation)],
        "evaluate": ["evaluate", str(root / "model"), "--eval-file", str(evaluation), *columns[:4]],
    }


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "training_record.json").read_text(encoding="utf-8"))


# Readers that go away.


@pytest.mark.parametrize("name", ["train", "finetune texts"])
def test_training_outlasts_its_reader(name: str, arguments: dict[str, list[str]], tmp_path: Path) -> None:
    command = [*COMMAND, *arguments[name], "--output-dir", str(tmp_path / "o")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert "steps" in process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 0, errors
    assert errors == "consistentee: nobody reads standard output any more; the work goes on.\n"
    assert record(tmp_path / "o")["evaluation"]["num_examples"] > 0
    assert (tmp_path / "o" / "model.safetensors").is_file()


def test_training_without_any_output(arguments: dict[str, list[str]], tmp_path: Path) -> None:
    command = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *COMMAND, *arguments["train"]]
    done = subprocess.run([*command, "--output-dir", str(tmp_path / "o")], check=False)
    assert done.returncode == 0
    assert record(tmp_path / "o")["evaluation"]["num_examples"] == 30


def test_answers_need_somewhere_to_go(arguments: dict[str, list[str]], tmp_path: Path) -> None:
    command = ["sh", "-c", 'exec "$@" >&-', "sh", *COMMAND, *arguments["predict"]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "have nowhere to go. Give --output." in done.stderr


def test_figures_are_written_although_nobody_reads_the_table(
    arguments: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Gone())
    assert main([*arguments["evaluate"], "--json", str(tmp_path / "e.json")]) == 0
    assert json.loads((tmp_path / "e.json").read_text(encoding="utf-8"))["num_examples"] == 30


def test_another_broken_pipe_is_a_failure(
    arguments: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise BrokenPipeError("of the hub")

    monkeypatch.setattr("consistentee.training.train.train", fail)
    assert main([*arguments["train"], "--output-dir", "nowhere"]) == 1
    assert "of the hub" in capsys.readouterr().err
    assert set(cli.OUTLASTING) < set(cli.COMMANDS)


@pytest.mark.parametrize(
    "line, name, value",
    [
        ("probe M --texts -", "texts", ["-"]),
        ("retrofit M --texts a.txt - b.txt --output-dir o", "texts", ["a.txt", "-", "b.txt"]),
        ("retrofit M --output-dir o --texts=a.txt -", "texts", ["a.txt", "-"]),
        ("train --unlabelled-file - a.csv --output-dir o", "unlabelled_file", ["-", "a.csv"]),
        ("calibrate M --file -", "file", "-"),
        ("evaluate M --texts - --batch-size 3", "texts", "-"),
        ("generate M --stop - --stop x -", "stop", ["-", "x"]),
        ("generate M --stop - --stop x -", "file", "-"),
        ("generate M --do-sample -", "file", "-"),
        ("predict M --text-columns a b -", "file", "-"),
        ("predict M - --debug", "file", "-"),
    ],
)
def test_a_hyphen_goes_to_its_option_or_is_the_file(line: str, name: str, value: object) -> None:
    _, bound, _ = cli.app.parse_args(cli.place_hyphens(line.split()), exit_on_error=False, print_error=False)
    assert bound.arguments[name] == value


@pytest.mark.parametrize("line", ["predict M - --output -", "probe M --texts a.txt --json -", "report -"])
def test_a_hyphen_without_a_meaning_is_an_error(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "error", [BrokenPipeError(), OSError(28, "No space left"), ValueError("closed file")]
)
def test_a_stream_that_fails_is_dropped_once(error: Exception) -> None:
    class Failing(io.StringIO):
        def write(self, text: str) -> int:
            if text == "bad":
                raise error
            return super().write(text)

    lost, stream = list[int](), Failing()
    lasting = LastingStream(stream, on_loss=lambda: lost.append(1))
    for text in ("good", "bad", "bad", "good"):
        assert lasting.write(text) == len(text)
    lasting.flush()
    assert (stream.getvalue(), lost) == ("good", [1])
    assert not lasting.isatty()
    assert not LastingStream(None).isatty()
    assert LastingStream(None).write("x") == 1


def test_a_text_that_has_no_bytes_is_an_error() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with pytest.raises(UnicodeEncodeError):
        LastingStream(stream).write("ä")


def test_names_that_are_no_utf8_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    said = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(said, encoding="ascii"))
    assert main(["--version"]) == 0
    say(os.fsdecode("Written to Zwölf/".encode() + b"donn\xe9es.html"))
    assert said.getvalue().endswith("Written to Zwölf/donn\\udce9es.html\n".encode())


def test_streams_are_as_before_afterwards() -> None:
    before = sys.stdout, sys.stderr
    with outlasting_readers():
        assert (sys.stdout, sys.stderr) != before
        sys.stdout.write("x")
    assert (sys.stdout, sys.stderr) == before


# Signals.


def test_training_that_is_ended_says_how_it_goes_on(arguments: dict[str, list[str]], tmp_path: Path) -> None:
    command = [*COMMAND, *arguments["train"], "--output-dir", str(tmp_path / "o")]
    endless = [word if word != "1" else "500" for word in command]
    with subprocess.Popen(endless, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert errors == "consistentee: Ended by SIGTERM. Continue with the same command and --resume.\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_what_can_be_stopped(number: int) -> None:
    before = signal.signal(number, signal.SIG_DFL)  # ignored where the tests run under nohup
    try:
        with pytest.raises(Stopped) as stopped, stoppable():
            os.kill(os.getpid(), number)
        assert stopped.value.number == number
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        with stoppable():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_figures_that_are_no_numbers_do_not_cost_the_others(tmp_path: Path) -> None:
    figures = {"a": [1.5, float("nan")], "b": {"c": (float("inf"), True, None, "text")}}
    save_figures(figures, tmp_path / "figures.json", None, lambda path: None)
    found = json.loads((tmp_path / "figures.json").read_text())
    assert found == {"a": [1.5, None], "b": {"c": [None, True, None, "text"]}}
