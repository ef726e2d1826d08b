"""The pictures: there and whole, of the right size, with the panels that the values allow, global state left alone."""

from __future__ import annotations

import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from consistentee.errors import MissingExtraError
from consistentee.evaluation.classification import evaluate_layers
from consistentee.evaluation.looks import LOOKS
from consistentee.evaluation.plots import layer_ticks, plot_evaluation
from consistentee.evaluation.results import (
    Evaluation,
    GeneratedPoint,
    GenerationEvaluation,
    GenerationPoint,
    OtherGenerationCriterion,
)
from consistentee.functional.criteria import CRITERIA, GENERATION_CRITERIA

ROWS, LAYERS, DEPTH = 60, 4, 30


def curve(loss: float) -> list[GenerationPoint]:
    """Token accuracy falls as depth does."""
    layers = [30.0, 24.0, 18.0, 12.0, 10.0]
    return [
        GenerationPoint(1 - step / 4, 0.6 - loss * step, 8.0 + step, layer, DEPTH / layer)
        for step, layer in enumerate(layers)
    ]


def generated(
    criterion: str, threshold: float, layer: float, rouge: float, mode: str = "copy"
) -> GeneratedPoint:
    return GeneratedPoint(mode, criterion, threshold, {"rougeL": rouge}, layer, DEPTH / layer, 40.0, 100)


GENERATION = GenerationEvaluation(
    num_hidden_layers=DEPTH,
    num_examples=5,
    mode="copy",
    criterion="policy",
    threshold=0.5,
    batch_size=1,
    max_new_tokens=8,
    metrics={"rougeL": 0.4},
    num_tokens=100,
    mean_exit_layer=18.0,
    layer_speedup=DEPTH / 18,
    layers_saved=0.4,
    tokens_per_second=40.0,
    exit_histogram=[0] * 5 + [60] + [0] * 23 + [40],
    exit_by_position=[20.0, 18.0, 17.0],
    curve=curve(0.01),
    full_depth=generated("policy", 1.0, 30.0, 0.42),
    generated=[generated("policy", 0.75, 24.0, 0.41), generated("policy", 0.5, 18.0, 0.39, "recompute")],
    other_criteria={"confidence": OtherGenerationCriterion(0.9, curve(0.02), [])},
    reference=generated("none", 1.0, 30.0, 0.43, "plain"),
)


def classified() -> Evaluation:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (ROWS,), generator=generator)
    logits = torch.randn(ROWS, LAYERS, 2, generator=generator)
    logits[torch.arange(ROWS), :, labels] += torch.linspace(0, 2, LAYERS)
    return evaluate_layers(
        logits,
        torch.rand(ROWS, LAYERS, generator=generator),
        labels,
        threshold=0.6,
        other_criteria={"confidence": 0.9, "entropy": None, "patience": 1.5},
        reference_predictions=labels,
    )


CLASSIFICATION = classified()


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that is saved."""
    saved: list[Figure] = []
    original = Figure.savefig

    def savefig(self: Figure, *args: object, **options: object) -> None:
        saved.append(self)
        original(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return saved


def panel(figure: Figure, title: str) -> Axes:
    (axes,) = [axes for axes in figure.axes if axes.get_title(loc="left") == title]
    return axes


def series(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    return {
        str(line.get_label()): [
            (round(float(x), 6), round(float(y), 6)) for x, y in np.asarray(line.get_xydata())
        ]
        for line in axes.lines
    }


def test_generated_text_against_depth(tmp_path: Path, figures: list[Figure]) -> None:
    plot_evaluation(GENERATION, tmp_path / "plot.svg")
    lines = series(panel(figures[0], "Generated text against depth"))
    assert lines["policy, copy"] == [(1.25, 41.0), (1.666667, 40.0)]
    assert lines["policy, recompute"] == [(1.666667, 39.0)]
    assert {y for _, y in lines["last layer, no exits"]} == {42.0}
    assert {y for _, y in lines["plain model"]} == {43.0}


def test_next_token_against_depth(tmp_path: Path, figures: list[Figure]) -> None:
    plot_evaluation(GENERATION, tmp_path / "plot.svg")
    lines = series(panel(figures[0], "Next token of the references against depth"))
    assert lines["policy"][0] == (1.0, 60.0)
    assert lines["policy"][-1] == (3.0, 56.0)
    assert lines["confidence"][-1] == (3.0, 52.0)
    assert {y for _, y in lines["last layer, no exits"]} == {60.0}


def test_where_and_when_tokens_exit(tmp_path: Path, figures: list[Figure]) -> None:
    plot_evaluation(GENERATION, tmp_path / "plot.svg")
    bars = panel(figures[0], "Where the 100 generated tokens exit").patches
    assert {
        round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in bars if bar.get_height()
    } == {
        6: 60.0,
        30: 40.0,
    }
    lines = series(panel(figures[0], "When tokens exit early"))
    assert [(1.0, 20.0), (2.0, 18.0), (3.0, 17.0)] in lines.values()


def test_no_panel_of_text_without_two_points(tmp_path: Path, figures: list[Figure]) -> None:
    plot_evaluation(replace(GENERATION, generated=GENERATION.generated[1:]), tmp_path / "plot.png")
    assert len(figures[0].axes) == 3
    other = OtherGenerationCriterion(
        None, [], [generated("confidence", 0.1 * n, 10.0 + n, 0.3 + 0.01 * n) for n in (1, 2)]
    )
    plot_evaluation(
        replace(GENERATION, generated=[], other_criteria={"confidence": other}), tmp_path / "plot.png"
    )
    assert len(figures[1].axes) == 4


@pytest.mark.parametrize("criteria", [CRITERIA, GENERATION_CRITERIA])
def test_no_two_criteria_of_a_task_share_a_colour(criteria: tuple[str, ...]) -> None:
    assert len({LOOKS[criterion][0] for criterion in criteria}) == len(criteria)


def test_bare_evaluation(tmp_path: Path) -> None:
    bare = replace(
        GENERATION,
        metrics={},
        num_tokens=0,
        exit_histogram=[0] * DEPTH,
        exit_by_position=[],
        curve=[],
        full_depth=None,
        generated=[],
        other_criteria={},
        reference=None,
    )
    assert plot_evaluation(bare, tmp_path / "plot.png").is_file()


def test_ticks() -> None:
    assert layer_ticks(1) == [1]
    assert layer_ticks(4) == [1, 2, 3, 4]
    assert layer_ticks(24) == [1, *range(4, 23, 2), 24]
    assert layer_ticks(32) == [1, 5, 10, 15, 20, 25, 32]


@pytest.mark.parametrize("evaluation, height", [(CLASSIFICATION, 500), (GENERATION, 900)])
def test_png_of_its_size(evaluation: Evaluation | GenerationEvaluation, height: int, tmp_path: Path) -> None:
    path = plot_evaluation(evaluation, tmp_path / "new" / "plot.png", title="a task")
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert struct.unpack(">II", content[16:24]) == (1200, height)
    assert [file.name for file in path.parent.iterdir()] == ["plot.png"]


@pytest.mark.parametrize("ending", [".svg", ".pdf"])
def test_other_formats(tmp_path: Path, ending: str) -> None:
    assert plot_evaluation(CLASSIFICATION, tmp_path / f"plot{ending}").stat().st_size > 1000


def test_one_row_and_one_criterion(tmp_path: Path) -> None:
    single = evaluate_layers(torch.zeros(1, 2, 2), torch.zeros(1, 2), torch.tensor([1]))
    assert plot_evaluation(single, tmp_path / "plot.png").is_file()


def test_unknown_ending(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in .png, .pdf, .svg, got .*plot.bmp"):
        plot_evaluation(CLASSIFICATION, tmp_path / "plot.bmp")


def test_failure_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plot.png"
    path.write_bytes(b"old")

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        plot_evaluation(CLASSIFICATION, path)
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["plot.png"]


def test_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"consistentee\[plot\]"):
        plot_evaluation(CLASSIFICATION, tmp_path / "plot.png")


def test_global_state_is_left_alone(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['consistentee']; from pathlib import Path; from types import SimpleNamespace as N\n"
        "from consistentee.evaluation.plots import plot_evaluation\n"
        "point = N(threshold=0.5, accuracy=0.5, mean_exit_layer=1.0, layer_speedup=2.0)\n"
        "figures = N(criterion='policy', curve=[point], other_criteria={}, accuracy=0.5, layer_speedup=2.0,\n"
        "  reference=None, clock=None, num_hidden_layers=2, num_examples=4, exit_histogram=[4, 0],\n"
        "  exit_accuracy=[0.5, None],\n"
        "  per_layer_accuracy=[0.5, 0.5])\n"
        "plot_evaluation(figures, Path(sys.stdin.read()) / 'plot.png')\n"
        "assert 'matplotlib.pyplot' not in sys.modules and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], input=str(tmp_path), text=True, check=True)
