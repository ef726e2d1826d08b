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
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from consistentee.cli import main as cli
from consistentee.evaluation import speed_classification, speed_generation
from consistentee.evaluation.plots import plot_speed
from consistentee.evaluation.reports import speed_table
from consistentee.evaluation.speed import (
    SpeedResults,
    exit_distribution_shares,
    fixed_exit_layers,
    latencies,
    random_token_ids,
)
from consistentee.evaluation.speed_classification import (
    ClassificationSpeedRow,
    measure_speed,
    shape_workload,
)
from consistentee.evaluation.speed_generation import measure_generation_speed, shape_generator
from consistentee.evaluation.time_budget import TimeBudget
from consistentee.inference import timing
from consistentee.inference.encoder.packing import padded_count
from consistentee.inference.timing import environment, paired_ratio, time_in_turn
from consistentee.models.loaded import LoadedClassifier, load_model
from consistentee.pipelines.classifier import Engine
from saved_generators import generator_folder
from tiny import tiny_backbone, tiny_full_depth_model, tiny_model
from tiny_decoders import tiny_exit_model

TINY_LLAMA = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
}
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
def report(saved: LoadedClassifier) -> SpeedResults[ClassificationSpeedRow]:
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


def test_distributions_over_the_layers_that_have_an_exit() -> None:
    has_exit = [False, True, False, True]
    assert exit_distribution_shares("even", 4, has_exit) == [0, 0.5, 0, 0.5]
    assert exit_distribution_shares("last", 4, has_exit) == [0, 0, 0, 1]
    assert exit_distribution_shares("0,0.25,0,0.75", 4, has_exit) == [0, 0.25, 0, 0.75]
    with pytest.raises(
        ValueError, match=r"exit-distribution must be shares of layers 2, 4, .* got one of layer 3"
    ):
        exit_distribution_shares("0,0.5,0.25,0.25", 4, has_exit)


def test_exit_layers_follow_the_shares_and_the_seed() -> None:
    layers = fixed_exit_layers([0.5, 0.0, 0.3, 0.2], 100, seed=1)
    assert Counter(layers) == {1: 50, 3: 30, 4: 20}
    assert layers == fixed_exit_layers([0.5, 0.0, 0.3, 0.2], 100, seed=1)
    assert layers != fixed_exit_layers([0.5, 0.0, 0.3, 0.2], 100, seed=2)
    assert len(fixed_exit_layers([1 / 3] * 3, 100, seed=0)) == 100


def test_random_rows_have_their_length_and_seed() -> None:
    rows = random_token_ids(5, 7, 30_000, seed=0)
    assert [len(row) for row in rows] == [7] * 5
    assert all(1000 <= token < 30_000 for row in rows for token in row)
    assert rows == random_token_ids(5, 7, 30_000, seed=0) != random_token_ids(5, 7, 30_000, seed=1)


def test_shapes_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"model_type": "bert", "vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 2, "intermediate_size": 16}
    monkeypatch.setitem(speed_classification.SHAPES, "small", small)
    state = torch.get_rng_state()
    works = [shape_workload("small", rows=2, sequence_length=3, num_labels=3, seed=5) for _ in range(2)]
    one, other = (work.engine.saved.model for work in works)
    assert torch.equal(torch.get_rng_state(), state)
    assert one.config.num_classes == 3
    assert not one.training
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(ValueError, match=r'config-name must be one of bert-base, .*got "bert-huge"'):
        shape_workload("bert-huge", rows=2, sequence_length=3)


def test_rows_of_the_report_belong_together(report: SpeedResults[ClassificationSpeedRow]) -> None:
    names = ["engine", "engine-full-depth", "engine-nobody-leaves", "transformers"]
    if find_spec("onnxruntime") is not None:
        names += ["onnxruntime", "onnx-graph"]
    assert [(row.name, row.batch_size) for row in report.rows] == [
        (name, size) for size in (1, 8, None) for name in names if (name, size) != ("onnx-graph", None)
    ]
    with_exits = ("engine", "onnx-graph")
    for row in report.rows:
        assert row.mode == ("throughput" if row.batch_size is None else "latency")
        assert (row.latency_ms_p50 is None) == (row.mode == "throughput")
        if row.latency_ms_p50 is not None and row.latency_ms_p95 is not None:
            assert 0 < row.latency_ms_p50 <= row.latency_ms_p95
        assert row.layer_speedup == pytest.approx(LAYERS / row.mean_exit_layer)
        assert row.mean_exit_layer == pytest.approx(2.5 if row.name in with_exits else LAYERS, abs=0.05)
        low, high = row.wall_clock_speedup_quartiles
        assert low <= row.wall_clock_speedup <= high
        assert (row.efficiency is None) == (row.name != "engine")  # the graph runs elsewhere than full depth
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


def test_the_graph_has_an_efficiency_beside_its_own_runtime_alone() -> None:
    """Against the engine's full depth on torch it would be above 1, and say nothing of exits."""
    outputs = [([], [], [1, 1, 1, 1]), ([], [], [3, 3, 3, 3])]
    seconds = {"engine-full-depth": [[2.0, 2.0]], "transformers": [[4.0, 4.0]], "onnx-graph": [[1.25, 1.25]]}
    for name, wanted in (("torch", None), ("onnxruntime", 0.8)):
        backend = SimpleNamespace(name=name, num_layers=4, dtype="float32")
        engine: Any = SimpleNamespace(backend=backend, saved=SimpleNamespace(model=None))
        batches = speed_classification._Batches(engine, ROWS[:8], 4)
        row = batches._row("onnx-graph", outputs, seconds, None)
        assert (row.layer_speedup, row.wall_clock_speedup, row.efficiency) == (2.0, 1.6, wanted)
        assert (row.latency_ms_p50, row.mode) == (1250.0, "latency")


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


def test_environment_is_on_record(report: SpeedResults[ClassificationSpeedRow]) -> None:
    assert {"hardware", "threads", "torch", "transformers", "seed", "device"} <= set(report.environment)
    assert environment(CPU, 7)["seed"] == 7
    json.dumps(report.to_dict())


def test_table_fits_a_terminal(report: SpeedResults[ClassificationSpeedRow]) -> None:
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
    Console(file=stream, width=80).print(speed_table(dataclasses.replace(report, rows=tuple(rows))))
    text = stream.getvalue()
    assert "…" not in text
    assert "throughput" in text
    assert "nobody exits" in text


def test_picture(report: SpeedResults[ClassificationSpeedRow], tmp_path: Path) -> None:
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
    engine, rows, said = Engine(saved, dtype="bfloat16"), ROWS[:34], list[float]()
    options: dict[str, Any] = {"batch_sizes": (1, 8), "repeats": 4, "announce": said.append}
    short = measure_speed(engine, rows, budget=TimeBudget(1e-9), **options)
    assert {(row.batch_size, row.rows, row.repeats) for row in short.rows} == {(1, 8, 3)}
    assert short.workload["left_out"] == ["batch size 8", "throughput mode"]
    assert (short.workload["seconds"], short.workload["repeats"], said) == (1e-9, 3, [1e-9])
    for budget in (TimeBudget(1e9), TimeBudget(math.inf, amount=False, repeats=False, sizes=False)):
        long = measure_speed(engine, rows, budget=budget, **options)
        found = {(row.batch_size, row.rows, row.repeats) for row in long.rows}
        assert found == {(1, 32, 4), (8, 34, 4), (None, 34, 4)}
        assert long.workload["left_out"] == []
    assert 0 < said[1] < 1e9
    assert len(said) == 3
    kept = measure_speed(engine, rows, budget=TimeBudget(1e-9, sizes=False, amount=False), **options)
    assert {(row.batch_size, row.rows, row.repeats) for row in kept.rows} == {
        (1, 32, 3),
        (8, 34, 3),
        (None, 34, 3),
    }


def test_latencies_are_of_whole_batches() -> None:
    taken = [[0.25, 0.5, 0.125], [0.5, 0.25, 0.125]]
    assert latencies(taken, 20, 8) == (375.0, 500.0)  # the third holds the 4 rows that are left over
    assert latencies(taken, 24, 8)[0] == 250.0
    assert latencies([[0.125], [0.375]], 4, 8)[0] == 250.0  # there is no whole one


def test_ratios_are_paired_by_repetition() -> None:
    slow, fast = [[2.0, 2.0], [8.0, 8.0], [30.0, 30.0]], [[1.0, 1.0], [2.0, 2.0], [10.0, 10.0]]
    assert paired_ratio(slow, fast) == (3.0, 2.5, 3.5)


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(speed_generation.GENERATION_SHAPES, "tiny", TINY_LLAMA)


def test_rows_of_generation_fit_together(tmp_path: Path) -> None:
    model = shape_generator("tiny", seed=1)
    ends = model.generation_config.eos_token_id
    report = measure_generation_speed(
        model,
        random_token_ids(3, 5, 300, 0),
        name="tiny",
        batch_sizes=[1, 3],
        new_tokens=8,
        shares=[0.25] * 4,
        lossless=True,
        repeats=2,
    )
    rows = {(row.batch_size, row.name): row for row in report.rows}
    for size in (1, 3):
        exits, full = rows[size, "engine"], rows[size, "engine-full-depth"]
        # of 8 tokens in each text the first comes from the last layer, the others exit evenly
        assert 2.5 <= exits.mean_exit_layer <= 3.0
        assert exits.layer_speedup == pytest.approx(4 / exits.mean_exit_layer)
        assert exits.efficiency == pytest.approx(exits.wall_clock_speedup / exits.layer_speedup)
        assert (full.mean_exit_layer, full.wall_clock_speedup, full.efficiency) == (4, 1, None)
        assert rows[size, "engine-nobody-leaves"].mean_exit_layer == 4
        assert rows[size, "transformers"].speedup_over_transformers == 1
        assert full.tokens_per_second == pytest.approx(1000 * size / full.latency_ms_per_token)
    assert rows[1, "engine-lossless"].mean_exit_layer == 4
    assert (1, "transformers-early-exit-2") in rows
    assert (3, "transformers-early-exit-2") not in rows
    assert model.generation_config.eos_token_id == ends
    json.dumps(report.to_dict(), allow_nan=False)
    picture = plot_speed(report, tmp_path / "speed.png", "tiny")
    assert picture.stat().st_size > 10_000


def test_drafts_exit_by_the_rule_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = shape_generator("tiny", seed=1), set[tuple[Any, ...]]()
    generate = model.generate

    def seen(**options: Any) -> Any:
        asked.add(tuple(options.get(name) for name in ("mode", "criterion", "threshold")))
        return generate(**options)

    monkeypatch.setattr(model, "generate", seen)
    options: dict[str, Any] = {"name": "tiny", "batch_sizes": [1], "new_tokens": 4, "repeats": 1}
    prompts = random_token_ids(1, 5, 300, 0)
    measure_generation_speed(model, prompts, criterion="static", threshold=2.0, lossless=True, **options)
    assert asked == {("early-exit", "static", 2.0), ("full", None, None), ("lossless", "static", 2.0)}


def test_settings_of_the_models_own_have_no_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in texts: Qwen2.5's penalty would keep the head from being read in int8, beams and no cache would fail."""
    processor = "transformers.RepetitionPenaltyLogitsProcessor.__call__"
    monkeypatch.setattr(processor, lambda *_: pytest.fail("logits were changed"))
    model = shape_generator("tiny", seed=1)
    own = {"repetition_penalty": 1.1, "num_beams": 2, "use_cache": False, "cache_implementation": "quantized"}
    for config in (model.generation_config, model.backbone.generation_config):
        for name, value in own.items():
            setattr(config, name, value)
    options: dict[str, Any] = {"name": "tiny", "batch_sizes": [1], "new_tokens": 4, "repeats": 1}
    report = measure_generation_speed(model, random_token_ids(1, 5, 300, 0), lossless=True, **options)
    assert len(report.rows) == 6
    for config in (model.generation_config, model.backbone.generation_config):
        assert {name: getattr(config, name) for name in own} == own


def test_a_time_to_keep_to_in_generation() -> None:
    model, said = shape_generator("tiny", seed=1), list[float]()
    options = {"name": "tiny", "batch_sizes": [1, 3], "new_tokens": 20, "repeats": 4, "announce": said.append}
    prompts = random_token_ids(3, 5, 300, 0)
    short = measure_generation_speed(model, prompts, budget=TimeBudget(1e-9), **options)
    assert {(row.batch_size, row.new_tokens, row.repeats) for row in short.rows} == {(1, 16, 3)}
    assert short.workload["left_out"] == ["batch size 3"]
    assert said == [1e-9]
    long = measure_generation_speed(model, prompts, budget=TimeBudget(1e9), **options)
    assert {(row.batch_size, row.new_tokens, row.repeats) for row in long.rows} == {(1, 20, 4), (3, 20, 4)}
    kept = TimeBudget(1e-9, amount=False, sizes=False)
    found = measure_generation_speed(model, prompts, budget=kept, **options)
    assert {(row.batch_size, row.new_tokens, row.repeats) for row in found.rows} == {(1, 20, 3), (3, 20, 3)}


def test_weights_follow_the_seed() -> None:
    first, again, other = (shape_generator("tiny", seed=seed) for seed in (0, 0, 1))
    name = "backbone.model.layers.0.mlp.up_proj.weight"
    assert torch.equal(first.state_dict()[name], again.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])


@pytest.mark.parametrize(
    "values",
    [{"prompts": []}, {"batch_sizes": [0]}, {"batch_sizes": []}, {"new_tokens": 1}, {"repeats": 0}],
)
def test_numbers_that_make_no_sense(values: dict[str, object]) -> None:
    options = {"prompts": [[3, 4]], "batch_sizes": [1], "new_tokens": 4, "repeats": 1, **values}
    with pytest.raises(ValueError, match="There must be prompts, batch sizes from 1 on"):
        measure_generation_speed(tiny_exit_model("llama"), name="tiny", **options)
    with pytest.raises(ValueError, match=r'config-name must be one of .*tiny.*, got "small"'):
        shape_generator("small")


def test_command_on_a_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "speed.json"
    options = ["--batch-sizes", "2", "--new-tokens", "4", "--sequence-length", "3", "--repeats", "1"]
    assert cli.main(["benchmark", "--config-name", "tiny", *options, "--json", str(out)]) == 0
    figures = json.loads(out.read_text(encoding="utf-8"))
    assert figures["workload"]["new_tokens"] == 4
    assert {row["name"] for row in figures["rows"]} >= {"engine", "engine-full-depth", "transformers"}
    assert all(row["tokens_per_second"] > 0 for row in figures["rows"])
    captured = capsys.readouterr()
    assert "tokens" in captured.out
    assert captured.err.startswith("This takes about ")
    options = ["--seconds", "0.000001", "--sequence-length", "3", "--json", str(out)]
    assert cli.main(["benchmark", "--config-name", "tiny", *options]) == 0
    figures = json.loads(out.read_text(encoding="utf-8"))
    assert {(row["batch_size"], row["new_tokens"], row["repeats"]) for row in figures["rows"]} == {(1, 16, 3)}
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "Left out, as 1e-06 seconds are too few: batch size 8, batch size 32. Give more, or --batch-sizes"
        in said
    )


def test_command_on_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = generator_folder(tmp_path / "model")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Say this.\nSay that again.\n", encoding="utf-8")
    options = ["--data-file", str(prompts), "--batch-sizes", "1", "--new-tokens", "4", "--repeats", "1"]
    assert cli.main(["benchmark", str(folder), *options, "--lossless"]) == 0
    assert "lossless" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config-name", "tiny", "--throughput"], "--throughput goes with classifiers only"),
        (["--config-name", "tiny", "--lossless"], "--lossless goes with a trained model"),
        (["--config-name", "minilm-6l-shape", "--new-tokens", "4"], "--new-tokens goes with text generators"),
        (["--config-name", "tiny", "--criterion", "patience"], "--criterion must be one of policy"),
        (["--config-name", "tiny", "--dtype", "int8"], "--dtype must be one of float32"),
        (["--config-name", "tiny", "--new-tokens", "1"], "--new-tokens must be at least 2, got 1"),
        (
            ["--config-name", "tiny", "--data-dir", "d"],
            "--data-dir goes with a model, not with --config-name",
        ),
        (["--config-name", "tiny", "--repeats", "1", "--new-tokens", "4", "--seconds", "9"], "leave one out"),
        (
            ["MODEL", "--data-file", "f", "--data-dir", "d"],
            "--data-dir goes with --task, not with --data-file",
        ),
        (
            ["MODEL", "--data-file", "f", "--sequence-length", "9"],
            "--sequence-length goes with --config-name",
        ),
        (
            ["MODEL", "--data-file", "f", "--threshold", "0.5", "--exit-distribution", "even"],
            "exclude each other",
        ),
    ],
)
def test_usage_errors(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "MODEL" in arguments:
        arguments = [str(generator_folder(tmp_path / "model")), *arguments[1:]]
    assert cli.main(["benchmark", *arguments]) == 2
    assert message in capsys.readouterr().err
