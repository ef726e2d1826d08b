"""`consistentee probe`: what it says follows from its outcomes, and it leaves nothing behind."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch

from consistentee.cli.main import main
from consistentee.evaluation.probe import FEWEST, speedup_at
from tiny import tiny_classifier, tiny_dataset


def test_the_fastest_exits_that_agree_so_often() -> None:
    # 100 rows of 4 layers: 90 are right and sure at layer 1, 10 are unsure there and right from layer 3 on.
    sure, unsure = [0.9, 0.95, 0.95, 1.0], [0.2, 0.3, 0.8, 1.0]
    scores = torch.tensor([sure] * 90 + [unsure] * 10)
    correct = torch.tensor([[True] * 4] * 90 + [[False, False, True, True]] * 10)
    threshold, speedup, (low, high) = speedup_at(scores, correct, 0.99)
    assert 0.3 <= threshold < 0.8
    assert speedup == pytest.approx(4 / (0.9 * 1 + 0.1 * 3))
    assert low < speedup < high
    threshold, speedup, _ = speedup_at(scores, correct, 0.90)
    assert threshold < 0.2
    assert speedup == 4.0
    never = torch.zeros(100, 4, dtype=torch.bool)
    never[:, -1] = True
    assert speedup_at(scores, never, 0.99)[1:] == (1.0, (1.0, 1.0))


def test_an_interval_covers_what_more_rows_would_show() -> None:
    generator = torch.Generator().manual_seed(0)
    large = torch.rand(20_000, 3, generator=generator)
    right = torch.rand(20_000, 3, generator=generator) < large.sqrt()
    right[:, -1] = True
    truth, hits = speedup_at(large, right, 0.9)[1], 0
    for draw in range(60):
        scores = torch.rand(300, 3, generator=generator)
        correct = torch.rand(300, 3, generator=generator) < scores.sqrt()
        correct[:, -1] = True
        low, high = speedup_at(scores, correct, 0.9, seed=draw)[2]
        hits += low <= truth <= high
    assert hits >= 57


def test_an_interval_of_few_rows_is_not_flattered_by_choosing_on_them() -> None:
    """Of 120 rows, at an agreement that one or two of them decide."""
    generator = torch.Generator().manual_seed(1)

    def drawn(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        scores = torch.rand(rows, 6, generator=generator)
        correct = torch.rand(rows, 6, generator=generator) < 1 - 0.15 * (1 - scores)
        correct[:, -1] = True
        return scores, correct

    truth = speedup_at(*drawn(30_000), 0.99)[1]
    assert truth > 1.2
    hits = 0
    for draw in range(60):
        low, high = speedup_at(*drawn(120), 0.99, seed=draw)[2]
        hits += low <= truth <= high
    assert hits >= 57


def test_a_probe_says_what_it_found_and_keeps_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    model = tiny_classifier(tmp_path / "model", layers=3)
    before = sorted(path.name for path in model.iterdir())
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"{text}\n" for (text,) in tiny_dataset(400, seed=5).texts))
    figures = tmp_path / "figures.json"
    command = ["probe", str(model), "--texts", str(texts), "--seconds", "0.5", "--json", str(figures)]
    assert main(command) == 0
    found = json.loads(figures.read_text())
    out = capsys.readouterr().out
    assert FEWEST <= found["num_train_texts"] + found["num_examples"] <= 400
    assert [point["agreement"] for point in found["points"]] == [0.99, 0.98]
    for point in found["points"]:
        assert (
            f"At {100 * point['agreement']:g} % agreement with your model: {point['layer_speedup']:.2f}x"
            in out
        )
        assert point["interval"][0] <= point["layer_speedup"] + 1e-9
    assert sorted(path.name for path in model.iterdir()) == before
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.parametrize("seconds", ["0", "-1", "inf"])
def test_a_time_that_makes_no_sense(tmp_path: Path, capsys: pytest.CaptureFixture[str], seconds: str) -> None:
    assert main(["probe", str(tmp_path), "--texts", "texts.txt", "--seconds", seconds]) == 2
    assert "--seconds must be above 0" in capsys.readouterr().err
