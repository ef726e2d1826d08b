"""Tokens and their layers: readable in colour and without it, as they arrive."""

from __future__ import annotations

import io
import random
import re

import pytest
from rich.console import Console

from benchmark_scripts import script
from consistentee.cli.exit_colours import ExitPrinter, can_colour, layer_colour, legend

DEPTH = 30
PIECES = ["The", " cat", " sat", " on", " the", " mat", ".", "\n", "It", " slept"]
LAYERS = [12, 12, 3, 3, 30, 30, 30, 5, 7, 7]
MARKED = "The cat⟨12⟩ sat on⟨3⟩ the mat.⟨30⟩\nIt slept⟨7⟩"


def luminance(colour: str) -> float:
    """Relative luminance of WCAG 2.1."""
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def printed(pieces: list[str], layers: list[int], **options: bool | None) -> str:
    stream = io.StringIO()
    printer = ExitPrinter(stream, DEPTH, **options)
    for piece, layer in zip(pieces, layers, strict=True):
        printer.put(piece, layer)
    printer.end()
    return stream.getvalue()


def test_every_colour_reads_on_dark_and_on_light() -> None:
    for depth in (1, 2, 12, DEPTH):
        for layer in range(1, depth + 1):
            light = luminance(layer_colour(layer, depth))
            assert 1.05 / (light + 0.05) >= 4, (layer, depth)
            assert (light + 0.05) / 0.05 >= 4, (layer, depth)


def test_colours_go_from_cool_to_warm() -> None:
    colours = [layer_colour(layer, DEPTH) for layer in range(1, DEPTH + 1)]
    assert len(set(colours)) == DEPTH
    blue = [int(colour[5:7], 16) for colour in colours]
    assert blue.index(max(blue)) < 6
    assert blue[6:] == sorted(blue[6:], reverse=True)
    assert int(colours[0][1:3], 16) < 20 < 180 < int(colours[-1][1:3], 16)


def test_legend_shares() -> None:
    text = legend(DEPTH, [1, 5, 6, 30])
    assert text.plain == "layers  ■ 1-5 50%  ■ 6-10 25%  ■ 11-15 0%  ■ 16-20 0%  ■ 21-25 0%  ■ 26-30 25%"
    assert [span.style for span in text.spans] == [
        layer_colour(layer, DEPTH) for layer in (3, 8, 13, 18, 23, 28)
    ]
    assert legend(2, [1, 2]).plain == "layers  ■ 1 50%  ■ 2 50%"
    plain = legend(2, [1, 1], colour=False)
    assert plain.plain.splitlines() == [
        "⟨n⟩: the text before it, back to the last mark, exited after n of 2 layers.",
        "layers  1: 100%  2: 0%",
    ]
    assert not plain.spans


def test_legend_covers_every_layer_once() -> None:
    for depth in range(1, 40):
        ranges = re.findall(r"■ (\d+)(?:-(\d+))?", legend(depth, []).plain)
        covered = [n for first, last in ranges for n in range(int(first), int(last or first) + 1)]
        assert covered == list(range(1, depth + 1))


def test_printer_without_colour() -> None:
    out = printed(PIECES, LAYERS)  # a stream that is no terminal
    assert "\x1b" not in out
    text, rest = out.split("\n\n")
    assert text == MARKED
    assert rest.startswith("⟨n⟩: the text before it")
    assert rest.splitlines()[-1] == "mean exit layer 13.90 of 30, layer speed-up 2.16x, 10 tokens"


def test_printer_writes_tokens_as_they_come() -> None:
    stream = io.StringIO()
    printer = ExitPrinter(stream, DEPTH, colour=False)
    seen = []
    for piece, layer in zip(PIECES[:3], LAYERS[:3], strict=True):
        printer.put(piece, layer)
        seen.append(stream.getvalue())
    assert seen == ["The", "The cat", "The cat⟨12⟩ sat"]


def test_printer_agrees_with_the_whole_text_at_once() -> None:
    marked_tokens = script("render_generation").marked_tokens
    assert marked_tokens(PIECES, LAYERS) == MARKED
    rng = random.Random(0)
    for _ in range(200):
        pieces = rng.choices(["a", " b", " ", "\n", "", "c ", "[d]", ":e:"], k=rng.randint(1, 12))
        layers = rng.choices([1, 2, 30], k=len(pieces))
        out = printed(pieces, layers, colour=False)
        assert out.startswith(marked_tokens(pieces, layers) + "\n\n⟨n⟩"), (pieces, layers)


def test_printer_in_colour() -> None:
    out = printed(PIECES, LAYERS, colour=True)
    assert "\x1b[38;2;" in out
    assert "⟨" not in out
    bare = re.sub(r"\x1b\[[\d;]*m", "", out)
    assert bare.startswith("".join(PIECES) + "\n\nlayers  ■ 1-5 30%")


def test_second_text_begins_anew() -> None:
    stream = io.StringIO()
    printer = ExitPrinter(stream, DEPTH, colour=False)
    for layer in (30, 2):
        printer.put("a", layer)
        printer.end()
    first, second = (line for line in stream.getvalue().splitlines() if line.startswith("mean"))
    assert "layer 30.00 of 30" in first
    assert "layer 2.00 of 30" in second
    printer.end()
    assert stream.getvalue().endswith("1 tokens\n\n")


def terminal(**options: object) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, **options)


def test_colours_only_where_they_reach_the_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert can_colour(terminal())
    assert not can_colour(Console(file=io.StringIO(), force_terminal=False))
    monkeypatch.setenv("TERM", "dumb")
    assert not can_colour(terminal())
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1")
    console = terminal()
    assert not can_colour(console)
    printer = ExitPrinter(console, DEPTH, colour=True)
    printer.put("a", 3)
    printer.end()
    assert console.file.getvalue().startswith("a⟨3⟩\n")


def test_ascii_brackets_where_others_cannot_be_written() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    printer = ExitPrinter(stream, DEPTH)
    printer.put("a", 3)
    printer.end()
    stream.flush()
    assert raw.getvalue().decode("ascii").startswith("a<3>\n\n<n>: the text")


def test_layers_that_do_not_exist() -> None:
    for layer in (0, 31):
        message = rf"exit_layer must be from 1 to 30, got {layer}\. Layers count from 1"
        with pytest.raises(ValueError, match=message):
            ExitPrinter(io.StringIO(), DEPTH).put("a", layer)
        with pytest.raises(ValueError, match=message):
            legend(DEPTH, [layer])
