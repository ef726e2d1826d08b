"""The picture: there and whole, of the right size, without touching matplotlib's global state."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from consistentee.errors import MissingExtraError
from consistentee.evaluation.classification import Evaluation, evaluate_layers
from consistentee.evaluation.plots import plot_evaluation

ROWS, LAYERS = 60, 4


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
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


def test_png_of_1200_by_500(evaluation: Evaluation, tmp_path: Path) -> None:
    path = plot_evaluation(evaluation, tmp_path / "new" / "plot.png", title="a task")
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert struct.unpack(">II", content[16:24]) == (1200, 500)
    assert [file.name for file in path.parent.iterdir()] == ["plot.png"]


@pytest.mark.parametrize("ending", [".svg", ".pdf"])
def test_other_formats(evaluation: Evaluation, tmp_path: Path, ending: str) -> None:
    assert plot_evaluation(evaluation, tmp_path / f"plot{ending}").stat().st_size > 1000


def test_one_row_and_one_criterion(tmp_path: Path) -> None:
    single = evaluate_layers(torch.zeros(1, 2, 2), torch.zeros(1, 2), torch.tensor([1]))
    assert plot_evaluation(single, tmp_path / "plot.png").is_file()


def test_unknown_ending(evaluation: Evaluation, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in .png, .pdf, .svg, got .*plot.bmp"):
        plot_evaluation(evaluation, tmp_path / "plot.bmp")


def test_failure_leaves_the_old_picture(
    evaluation: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plot.png"
    path.write_bytes(b"old")

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        plot_evaluation(evaluation, path)
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["plot.png"]


def test_missing_extra_is_named(
    evaluation: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"consistentee\[plot\]"):
        plot_evaluation(evaluation, tmp_path / "plot.png")


def test_global_state_is_left_alone(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['consistentee']; from pathlib import Path; from types import SimpleNamespace as N\n"
        "from consistentee.evaluation.plots import plot_evaluation\n"
        "point = N(threshold=0.5, accuracy=0.5, mean_exit_layer=1.0, layer_speedup=2.0)\n"
        "figures = N(criterion='policy', curve=[point], other_criteria={}, accuracy=0.5, layer_speedup=2.0,\n"
        "  reference=None, num_hidden_layers=2, num_examples=4, exit_histogram=[4, 0], exit_accuracy=[0.5, None],\n"
        "  per_layer_accuracy=[0.5, 0.5])\n"
        "plot_evaluation(figures, Path(sys.stdin.read()) / 'plot.png')\n"
        "assert 'matplotlib.pyplot' not in sys.modules and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], input=str(tmp_path), text=True, check=True)
