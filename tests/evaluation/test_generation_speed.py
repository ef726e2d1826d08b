"""The benchmark of generation: its figures fit together, on a tiny shape."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from consistentee.cli import main as cli
from consistentee.evaluation import generation_speed as speed
from consistentee.evaluation.generation_plots import plot_generation_speed
from consistentee.evaluation.generation_speed import measure_generation_speed, random_prompts, shape_generator
from consistentee.evaluation.time_budget import TimeBudget
from saved_generators import generator_folder
from tiny_decoders import tiny_exit_model

TINY = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
}


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(speed.GENERATION_SHAPES, "tiny", TINY)


def test_rows_fit_together(tmp_path: Path) -> None:
    model = shape_generator("tiny", seed=1)
    ends = model.generation_config.eos_token_id
    report = measure_generation_speed(
        model,
        random_prompts(3, 5, 300, 0),
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
        # of 8 tokens in each text the first comes from the last layer, the others leave evenly
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
    picture = plot_generation_speed(report, tmp_path / "speed.png", "tiny")
    assert picture.stat().st_size > 10_000


def test_a_time_to_keep_to() -> None:
    model, said = shape_generator("tiny", seed=1), list[float]()
    options = {"name": "tiny", "batch_sizes": [1, 3], "new_tokens": 20, "repeats": 4, "announce": said.append}
    prompts = random_prompts(3, 5, 300, 0)
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
            ["MODEL", "--data-file", "f", "--lossless", "--criterion", "static"],
            "--criterion goes without --loss",
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
