"""The benchmark: workloads as stated, competitors in turn, figures that belong together. Nothing here is timed."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import struct
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from consistentee.evaluation import speed
from consistentee.evaluation.plots import plot_speed
from consistentee.evaluation.reports import speed_report
from consistentee.evaluation.speed import (
    SpeedReport,
    exit_distribution_shares,
    exit_layers_of,
    measure_speed,
    random_rows,
    shape_model,
)
from consistentee.evaluation.time_budget import TimeBudget
from consistentee.inference import timing
from consistentee.inference.encoder.packing import padded_count
from consistentee.inference.timing import environment, paired_ratio, time_in_turn
from consistentee.models.loaded import LoadedClassifier, load_model
from consistentee.pipelines.classifier import Engine
from tiny import tiny_backbone, tiny_full_depth_model, tiny_model

CPU = torch.device("cpu")
LAYERS = 4
ROWS = [{"input_ids": [4 + (row + i) % 50 for i in range(3 + row % 9)]} for row in range(70)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> LoadedClassifier:
    root = tmp_path_factory.mktemp("speed")
    backbone = tiny_backbone(root / "backbone", "mpnet", layers=LAYERS)
    tiny_full_depth_model(root / "plain", backbone)
    return load_model(
        tiny_model(root / "model", backbone, initial_exit_bias=0.0), LoadedClassifier, device="cpu"
    )


@pytest.fixture(scope="module")
def report(saved: LoadedClassifier) -> SpeedReport:
    shares = exit_distribution_shares("even", LAYERS)
    return measure_speed(Engine(saved), ROWS, batch_sizes=(1, 8), shares=shares, repeats=2)


@pytest.mark.parametrize(
    "text,wanted",
    [("even", [0.25] * 4), ("last", [0, 0, 0, 1]), ("0.5, 0.25,0.25,0", [0.5, 0.25, 0.25, 0])],
)
def test_distributions(text: str, wanted: list[float]) -> None:
    assert exit_distribution_shares(text, 4) == wanted


@pytest.mark.parametrize(
    "text,message",
    [
        ("half", 'must be "even", "last" or shares'),
        ("0.5,0.5", "one share for each of 4 layers, got 2"),
        ("0.5,0.5,0.5,0", "sum to 1, got a sum of 1.5"),
        ("1.5,-0.5,0,0", "must be shares >= 0"),
    ],
)
def test_distributions_that_are_none(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        exit_distribution_shares(text, 4)


def test_exit_layers_follow_the_shares_and_the_seed() -> None:
    layers = exit_layers_of([0.5, 0.0, 0.3, 0.2], 100, seed=1)
    assert Counter(layers) == {1: 50, 3: 30, 4: 20}
    assert layers == exit_layers_of([0.5, 0.0, 0.3, 0.2], 100, seed=1)
    assert layers != exit_layers_of([0.5, 0.0, 0.3, 0.2], 100, seed=2)
    assert len(exit_layers_of([1 / 3] * 3, 100, seed=0)) == 100


def test_random_rows_have_their_length_and_seed() -> None:
    rows = random_rows(5, 7, 30_000, seed=0)
    assert [len(row["input_ids"]) for row in rows] == [7] * 5
    assert all(1000 <= token < 30_000 for row in rows for token in row["input_ids"])
    assert rows == random_rows(5, 7, 30_000, seed=0) != random_rows(5, 7, 30_000, seed=1)


def test_shapes_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"model_type": "bert", "vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 2, "intermediate_size": 16}
    monkeypatch.setitem(speed.SHAPES, "small", small)
    state = torch.get_rng_state()
    one, other = (shape_model("small", num_labels=3, seed=5).model for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert one.config.num_classes == 3
    assert not one.training
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(ValueError, match=r'config-name must be one of bert-base, .*got "bert-huge"'):
        shape_model("bert-huge")


def test_rows_of_the_report_belong_together(report: SpeedReport) -> None:
    names = ["engine", "engine-full-depth", "engine-nobody-leaves", "transformers"]
    if find_spec("onnxruntime") is not None:
        names.append("onnxruntime")
    assert [(row.name, row.batch_size) for row in report.rows] == [
        (name, size) for size in (1, 8, None) for name in names
    ]
    for row in report.rows:
        assert row.mode == ("throughput" if row.batch_size is None else "latency")
        assert (row.latency_ms_p50 is None) == (row.mode == "throughput")
        if row.latency_ms_p50 is not None and row.latency_ms_p95 is not None:
            assert 0 < row.latency_ms_p50 <= row.latency_ms_p95
        assert row.layer_speedup == pytest.approx(LAYERS / row.mean_exit_layer)
        assert row.mean_exit_layer == pytest.approx(2.5 if row.name == "engine" else LAYERS, abs=0.05)
        low, high = row.wall_clock_speedup_quartiles
        assert low <= row.wall_clock_speedup <= high
        assert (row.efficiency is None) == (row.name != "engine")
        assert 0 <= row.padding_share < 1
        assert row.peak_memory_mb is None
        assert row.instances_per_second > 0
    rows = {(row.name, row.batch_size): row for row in report.rows}
    assert rows["engine-full-depth", 1].wall_clock_speedup == 1
    assert rows["transformers", 8].speedup_over_transformers == 1
    engine = rows["engine", 8]
    assert engine.efficiency == pytest.approx(engine.wall_clock_speedup / engine.layer_speedup)
    lengths = [len(row["input_ids"]) for row in ROWS[:32]]  # short rows are computed as they are
    rounded = sum(padded_count(length) for length in lengths)
    assert rows["engine-full-depth", 1].padding_share == pytest.approx(1 - sum(lengths) / rounded)
    widths = [max(3 + row % 9 for row in range(start, min(start + 8, 70))) for start in range(0, 70, 8)]
    positions = sum(width * min(8, 70 - 8 * i) for i, width in enumerate(widths))
    real = sum(len(row["input_ids"]) for row in ROWS)
    assert rows["transformers", 8].padding_share == pytest.approx(1 - real / positions)


def test_a_plain_model_has_no_exits_to_measure(saved: LoadedClassifier) -> None:
    plain = Engine(load_model(Path(saved.name).parent / "plain", LoadedClassifier, device="cpu"))
    found = measure_speed(Engine(plain.saved, dtype="bfloat16"), ROWS, batch_sizes=(), repeats=1)
    assert [row.name for row in found.rows] == [
        "engine-full-depth",
        "transformers",
    ]


@pytest.mark.parametrize(
    "values", [{"repeats": 0}, {"batch_sizes": (0,)}, {"batch_sizes": (), "throughput": False}]
)
def test_nothing_to_measure(saved: LoadedClassifier, values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="at least one row, one repetition and one batch size"):
        measure_speed(Engine(saved), ROWS[:3], **values)


def test_environment_is_on_record(report: SpeedReport) -> None:
    assert {"hardware", "threads", "torch", "transformers", "seed", "device"} <= set(report.environment)
    assert environment(CPU, 7)["seed"] == 7
    json.dumps(report.to_dict())


def test_table_fits_a_terminal(report: SpeedReport) -> None:
    """Whatever the clock said: with figures as wide as they get."""
    values = {"instances_per_second": 12345.6, "padding_share": 0.654}
    values.update(wall_clock_speedup=123.45, speedup_over_transformers=12.345)
    rows = [
        dataclasses.replace(
            row,
            **values,
            latency_ms_p50=None if row.latency_ms_p50 is None else 12345.6,
            latency_ms_p95=None if row.latency_ms_p95 is None else 12345.6,
        )
        for row in report.rows
    ]
    stream = io.StringIO()
    Console(file=stream, width=80).print(speed_report(dataclasses.replace(report, rows=tuple(rows))))
    text = stream.getvalue()
    assert "…" not in text
    assert "throughput" in text
    assert "nobody leaves" in text


def test_picture(report: SpeedReport, tmp_path: Path) -> None:
    content = plot_speed(report, tmp_path / "speed.png", title="a shape").read_bytes()
    assert struct.unpack(">II", content[16:24]) == (1200, 500)
    bare = dataclasses.replace(report, rows=tuple(row for row in report.rows if row.name == "transformers"))
    assert plot_speed(bare, tmp_path / "bare.svg").stat().st_size > 1000
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bare.svg", "speed.png"]


def test_competitors_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    calls: list[str] = []
    work = {name: [lambda name=name: calls.append(name)] * 2 for name in "abc"}
    ticks: list[int] = []
    seconds = time_in_turn(work, CPU, 3, lambda: ticks.append(1))
    assert "".join(calls) == "aabbcc" + "bbccaa" + "ccaabb" + "aabbcc"
    assert {name: [len(steps) for steps in taken] for name, taken in seconds.items()} == dict.fromkeys(
        "abc", [2] * 3
    )
    assert len(ticks) == 12
    calls.clear()
    time_in_turn(work, CPU, 1, untimed=False)
    assert "".join(calls) == "bbccaa"


def test_a_time_to_keep_to(saved: LoadedClassifier) -> None:
    engine, said = Engine(saved, dtype="bfloat16"), list[float]()
    options: dict[str, Any] = {"batch_sizes": (1, 8), "repeats": 4, "announce": said.append}
    short = measure_speed(engine, ROWS, budget=TimeBudget(1e-9), **options)
    assert {(row.batch_size, row.rows, row.repeats) for row in short.rows} == {(1, 8, 3)}
    assert short.workload["left_out"] == ["batch size 8", "throughput mode"]
    assert (short.workload["seconds"], short.workload["repeats"], said) == (1e-9, 3, [1e-9])
    for budget in (TimeBudget(1e9), TimeBudget(math.inf, amount=False, repeats=False, sizes=False), None):
        long = measure_speed(engine, ROWS, budget=budget, **options)
        found = {(row.batch_size, row.rows, row.repeats) for row in long.rows}
        assert found == {(1, 32, 4), (8, 70, 4), (None, 70, 4)}
        assert long.workload["left_out"] == []
    assert 0 < said[1] < 1e9
    assert len(said) == 3
    kept = measure_speed(engine, ROWS, budget=TimeBudget(1e-9, sizes=False, amount=False), **options)
    assert {(row.batch_size, row.rows, row.repeats) for row in kept.rows} == {
        (1, 32, 3),
        (8, 70, 3),
        (None, 70, 3),
    }


def test_ratios_are_paired_by_repetition() -> None:
    slow, fast = [[2.0, 2.0], [8.0, 8.0], [30.0, 30.0]], [[1.0, 1.0], [2.0, 2.0], [10.0, 10.0]]
    assert paired_ratio(slow, fast) == (3.0, 2.5, 3.5)
