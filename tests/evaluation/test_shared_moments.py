"""First steps that the cells of a comparison share: kept while another cell needs them, and the cells as alone."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from consistentee.backbones.loading import backbone_fingerprint
from consistentee.evaluation.comparison import claims
from consistentee.evaluation.comparison.cells import read_cells, takes_over
from consistentee.evaluation.comparison.compare import WARM_UPS, run_cells
from consistentee.evaluation.comparison.plan import ComparedSet, PlannedCell, compared_methods, planned_cells
from consistentee.training import checkpoints
from consistentee.training.warm_ups import warm_up_settings
from quick import QUICK
from tiny import tiny_backbone, tiny_dataset

SETTINGS: dict[str, Any] = QUICK | {"policy_input": "log_odds", "policy_epochs": 1}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_backbone(tmp_path_factory.mktemp("backbone"), layers=2))


def plan(backbone: str, *methods: str, **changes: Any) -> list[PlannedCell]:
    data = ComparedSet("rte", tiny_dataset(40), tiny_dataset(20, seed=9))
    settings = SETTINGS | changes
    return planned_cells([backbone], [data], compared_methods(methods, settings, {}), [3], settings)


def kept_after_each(cells: list[PlannedCell], folder: Path, **options: Any) -> list[int]:
    """How many moments are kept after each of the cells."""
    kept: list[int] = []

    def count(line: str) -> None:
        if " s. " in line and "left" in line:
            kept.append(len(list((folder / WARM_UPS).glob("*"))))

    run_cells(cells, folder, report=count, **options)
    return kept


def test_moments_go_when_no_cell_needs_them_any_more(backbone: str, tmp_path: Path) -> None:
    methods = ("consistent", "weighted_sum", "beem", "deebert", "fastbert")
    cells = plan(backbone, *methods)
    assert kept_after_each(cells, tmp_path / "shared", keep_models=False) == [0, 1, 2, 0, 1, 0]
    assert not (tmp_path / "shared" / WARM_UPS).exists()
    for cell in cells:
        run_cells([cell], tmp_path / "alone", keep_models=False, report=lambda line: None)
    shared, alone = read_cells(tmp_path / "shared"), read_cells(tmp_path / "alone")
    assert [cell["label"] for cell in shared] == [cell["label"] for cell in alone]
    for one, other in zip(shared, alone, strict=True):
        assert one | {"seconds": 0} == other | {"seconds": 0}


def test_of_kept_models_those_stay_that_were_shared(backbone: str, tmp_path: Path) -> None:
    cells = plan(backbone, "weighted_sum", "consistent")
    assert kept_after_each(cells, tmp_path) == [0, 1, 1]


def test_what_a_killed_command_has_half_written_goes(backbone: str, tmp_path: Path) -> None:
    cells = plan(backbone, "weighted_sum", "consistent")
    run_cells(cells[:2], tmp_path, keep_warm_ups=True, report=lambda line: None)
    whole, other = (tmp_path / WARM_UPS).iterdir()
    other.rename(other.with_name(f".{other.name}.1234"))
    assert checkpoints.is_claimed(whole)
    assert kept_after_each(cells, tmp_path) == [1]
    assert not list((tmp_path / WARM_UPS).glob(".*"))


def test_all_stay_for_further_plans(backbone: str, tmp_path: Path) -> None:
    cells = plan(backbone, "weighted_sum", "consistent")
    assert kept_after_each(cells, tmp_path, keep_warm_ups=True) == [0, 2, 2]


def test_what_another_command_has_begun_is_put_off(
    backbone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = plan(backbone, "weighted_sum", "deebert", "consistent")
    (tmp_path / claims.LOCKS).mkdir()
    other = FileLock(tmp_path / claims.LOCKS / f"{cells[3].name}.lock")  # of `consistent`
    other.acquire()
    monkeypatch.setattr(claims.time, "sleep", lambda seconds: other.release())
    said: list[str] = []
    run_cells(cells, tmp_path, keep_models=False, report=said.append)
    titles = [line.split()[1].split("_", 2)[2] for line in said if line.startswith("== ")]
    assert titles == ["plain_3", "deebert_3", "weighted_sum_3", "consistent_3"]
    assert any("those of a training that began alike" in line for line in said)


def test_pieces_that_had_better_wait_come_once_nothing_else_does(tmp_path: Path) -> None:
    waits = {"a", "b"}
    taken: list[str] = []
    with closing(
        claims.taken_in_turns(dict.fromkeys("abcd"), tmp_path, print, better_later=waits.__contains__)
    ) as turns:
        for name, _ in turns:
            taken.append(name)
            if name == "d":
                waits.remove("b")
    assert taken == ["c", "d", "b", "a"]


def test_a_warm_up_without_anything_behind_it_is_needed_too(backbone: str, tmp_path: Path) -> None:
    [_, cell] = plan(backbone, "consistent", rounds=0)
    moment = {
        "begins_with": "weighted_sum",
        "backbone": backbone_fingerprint(backbone),
        "data": cell.data.train.fingerprint(),
        "settings": json.loads(json.dumps(warm_up_settings(cell.config().to_dict()))),
        "stop": 2,
        "steps": 2,
    }
    assert takes_over(cell, moment)
    [_, other] = plan(backbone, "consistent")
    assert not takes_over(other, moment)
    assert takes_over(other, moment | {"steps": 3})
