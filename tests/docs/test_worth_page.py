"""The decision page: its figures are those of the kept files, and each names the file."""

from __future__ import annotations

import re
from typing import Any

import pytest

from benchmark_scripts import ROOT, missing, read, script
from consistentee.functional.bounds import smallest_certifiable_rows

PAGE = "docs/worth-it.md"
SHAPES = (
    "minilm-float32",
    "minilm-float32-narrow-exits",
    "base-float32-onnxruntime",
    "base-bfloat16",
    "minilm-int8",
)


def of_row(report: dict[str, Any], size: int | None, name: str, key: str = "wall_clock_speedup") -> float:
    return next(row[key] for row in report["rows"] if (row["batch_size"], row["name"]) == (size, name))


def test_retrofitted_models() -> None:
    held_out, dev = (read("retrofit", f"e5-12l_sst2_{rows}_0.json") for rows in ("held-out", "dev"))
    clock = {
        row["batch_size"]: row["wall_clock_speedup"] for row in held_out["speed"] if row["name"] == "engine"
    }
    said = [
        f"agrees on {100 * held_out['agreement']:.2f} % of unseen texts, "
        f"{held_out['layer_speedup']:.2f}x fewer layers, "
        f"{clock[1]:.2f}x faster than its own full depth at batch 1 and {clock[32]:.2f}x at 32",
        f"agrees on {100 * dev['agreement']:.1f} %, not 99",
    ]
    for task in ("stackoverflow", "m-cid", "mrpc"):
        pair = read("retrofit", "pairs", f"e5-12l_{task}_1.json")
        at = pair["at_default_threshold"]
        said.append(
            f"{100 * pair['plain_accuracy']:.1f} % before, {100 * at['accuracy']:.1f} % at "
            f"{at['layer_speedup']:.2f}x fewer layers ([measured here](retrofit.md#few-texts-and-train-on-labels), "
            f"[file](../benchmarks/results/retrofit/pairs/e5-12l_{task}_1.json))"
        )
    assert missing(PAGE, *said, f"Fewer than {smallest_certifiable_rows(0.01)} texts") == []


def test_training_and_serving() -> None:
    (mean,) = (
        line
        for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| **mean over the ten** |")  # which a test of its own computes
    )
    plain, exits, saved = re.findall(r"([\d.]+) %", mean)[:3]
    found = script("render_serving").ratios(read("serving", "e5-12l_sst2.json"))
    assert (
        missing(
            PAGE,
            f"{exits} % with {saved} % of the layers saved, {plain} % without exits",
            f"p95 at half of full depth's most: {found['p95']:.2f} of full depth's; "
            f"goodput {found['goodput']:.2f}x full depth's",
        )
        == []
    )


def test_text_generators() -> None:
    few, many = (read("generation", "speed", f"alpaca-float32{name}.json") for name in ("", "-batch-32"))
    clock = [of_row(few, 1, "engine"), of_row(few, 8, "engine"), of_row(many, 32, "engine")]
    engine = of_row(few, 1, "engine-full-depth", "speedup_over_transformers")
    first, second, third = (f"{value:.2f}x" for value in clock)
    assert (
        missing(
            PAGE,
            f"{first}, {second} and {third} of full depth's speed at batches 1, 8 and 32",
            f"the engine without exits is {engine:.2f}x as fast as `transformers` at batch 1",
        )
        == []
    )


@pytest.mark.parametrize("name", SHAPES)
def test_layers_and_time(name: str) -> None:
    report = read("speed", f"{name}.json")
    cells = [f"{of_row(report, size, 'engine'):.2f}x" for size in (1, 32, None)]
    cells += [f"{of_row(report, size, 'engine-nobody-leaves'):.2f}x" for size in (1, 32)]
    row = f"([file](../benchmarks/results/speed/{name}.json)) | {' | '.join(cells)} |"
    assert missing(PAGE, row) == []
    assert f"{of_row(report, 1, 'engine', 'layer_speedup'):.2f}" == "1.85"


def test_what_the_engine_gives_without_exits() -> None:
    over = [
        of_row(read("speed", f"minilm-{name}.json"), size, "engine-full-depth", "speedup_over_transformers")
        for name, size in (("float32", 1), ("float32", 32), ("int8", 1))
    ]
    assert (
        missing(
            PAGE,
            f"at full depth it is {over[0]:.1f}x as fast at batch 1 and {over[1]:.2f}x at 32 "
            f"(12 layers of 384, float32), {over[2]:.1f}x at batch 1 in int8",
        )
        == []
    )


def test_what_one_would_take_instead() -> None:
    report = read("against", "e5-12l_m-cid.json")
    tables = [script("render_against").table(each) for each in (report, read("against", "e5-12l_sst2.json"))]
    assert missing(PAGE, *tables) == []
    good = [row for row in report["rows"] if row["accuracy_difference"] >= -0.0101]
    said: list[str] = []
    for size in (1, 32):
        best = [
            min(
                row["milliseconds"] for row in good if row["batch_size"] == size and row["has_exits"] is exits
            )
            for exits in (False, True)
        ]
        said.append(f"{best[0]:.2f} and {best[1]:.2f} ms at batch {size}, {best[0] / best[1]:.2f}x")
    assert missing(PAGE, *said) == []
    assert sorted({row["rows"] for row in report["rows"]}) == [17, 32]
