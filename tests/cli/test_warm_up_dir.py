"""`train --warm-up-dir`: the second training goes on from the first one's warm-up; and where it has no place."""

from __future__ import annotations

from pathlib import Path

import pytest

from consistentee.cli.main import main
from consistentee.training.train import train
from tiny import tiny_backbone, tiny_dataset, write_csv

QUICK = (
    "--warmup-epochs 1 --rounds 1 --consistent-epochs 1 --policy-epochs 1 --policy-min-steps 1 --policy-folds 2 "
    "--policy-input log_odds --mixed-precision no --text-columns text --label-column label"
)


def command(folder: Path, output: str, *more: str) -> list[str]:
    return [
        *("train", "--output-dir", str(folder / output), "--train-file", str(folder / "train.csv")),
        *("--backbone", str(folder / "backbone"), "--warm-up-dir", str(folder / "warm-ups"), *QUICK.split()),
        *more,
    ]


def test_settings_of_the_reward_are_tried_on_one_warm_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_backbone(tmp_path / "backbone", layers=2)
    write_csv(tmp_path / "train.csv", tiny_dataset(60))
    assert main(command(tmp_path, "first")) == 0
    assert "began alike" not in capsys.readouterr().out
    assert main(command(tmp_path, "second", "--reward", "uniform")) == 0
    assert "steps are those of a training that began alike" in capsys.readouterr().out


def test_a_method_without_a_warm_up_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(tmp_path, "model", "--method", "sweet")) == 2
    assert (
        "--warm-up-dir goes with --method consistent, deebert, weighted_sum, fastbert, beem, got sweet"
        in capsys.readouterr().err
    )
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_no_folder_of_warm_ups(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "warm-ups").touch()
    assert main(command(tmp_path, "model")) == 2  # before the data and the backbone are looked for
    place = tmp_path / "warm-ups"
    assert f'--warm-up-dir must lie in a folder, and "{place}" is none.' in capsys.readouterr().err
    with pytest.raises(FileExistsError, match=r"Folder of warm-ups .*warm-ups is a file\. Choose another"):
        train(
            backbone="nowhere", train_data=tiny_dataset(8), output_dir=tmp_path / "model", warm_up_dir=place
        )
