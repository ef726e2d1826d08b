"""The published page of results is what the kept cells say."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from benchmark_scripts import script

ROOT = Path(__file__).parents[2]
CELLS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


@pytest.fixture(scope="module")
def rendering() -> ModuleType:
    return script("render_results")


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_page_of_results_is_made_from_the_kept_cells(rendering: ModuleType):
    written = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert written == rendering.page([read(path) for path in CELLS]), (
        "Run: python benchmarks/render_results.py benchmarks/results docs/results.md"
    )


@pytest.mark.parametrize("path", CELLS, ids=lambda path: path.stem)
def test_a_cell_is_what_its_name_says(path: Path):
    cell = read(path)
    assert path.stem == f"{cell['backbone']}_{cell['task']}_{cell['method']}_{cell['seed']}"
    assert cell["config"]["seed"] == cell["seed"]
    assert "source" not in cell["data"]  # no paths


def test_layers_saved_and_accuracy_at_a_speed_up(rendering: ModuleType):
    curve = [[0.9, 0.80, 4.0], [0.5, 0.79, 2.0], [0.1, 0.60, 1.0]]
    cell = {"per_layer_accuracy": [0.6, 0.7, 0.75, 0.8], "criteria": {"policy": {"curve": curve}}}
    assert rendering.layers_saved_at(cell, "policy", 0.79) == 0.5
    assert rendering.layers_saved_at(cell, "policy", 0.8) == 0.0
    assert rendering.layers_saved_at(cell, "policy", 0.9) == 0.0
    assert rendering.accuracy_at(cell, "policy", 1.5) == 0.79
    assert rendering.accuracy_at(cell, "policy", 4) == 0.60


def cell_of(
    method: str, seed: int, accuracy: float, *, backbone: str = "small", task: str = "rte"
) -> dict[str, Any]:
    """A finished cell whose every threshold gives the same accuracy at two of four layers."""
    point = {"metrics": {"accuracy": accuracy}, "mean_exit_layer": 2.0, "curve": [[0.5, accuracy, 1.0]]}
    cell = {"backbone": backbone, "task": task, "method": method, "seed": seed}
    if method == "plain":
        return cell | {"metrics": {"accuracy": accuracy}}
    return cell | {
        "per_layer_accuracy": [accuracy] * 4,
        "criteria": dict.fromkeys(("policy", "confidence", "patience"), point),
    }


def test_ways_of_training_are_compared_seed_by_seed(rendering: ModuleType):
    """Seeds that only one way has would pass for what the way is worth: here a bad one of `consistent`."""
    cells = [
        *(cell_of("plain", seed, 0.8) for seed in (1, 2, 3)),
        *(cell_of("consistent", seed, accuracy) for seed, accuracy in ((1, 0.8), (2, 0.5), (3, 0.7))),
        *(cell_of("weighted", seed, accuracy) for seed, accuracy in ((1, 0.81), (3, 0.72))),
    ]
    table = rendering._difference_table(cells)
    assert "| consistent | policy | 1 | 75.0 |" in table
    assert "| weighted | policy | 1 | 76.5 |" in table
    assert "| weighted - consistent | policy | 1 | +1.5 |" in table
    assert rendering._shared_seeds(cells) == "seed 1, 3"
    gains = rendering._gain_table(cells)
    assert "| small | rte | consistent | 1, 2, 3 | 80.0 ± 0.0 |" in gains
    assert "| small | rte | weighted | 1, 3 | 80.0 ± 0.0 |" in gains
    assert (
        "for `consistent` (seeds that all three ways have): 38 % of layers saved at no loss" in gains
    )  # not 25 %


def made_by(line: str) -> set[tuple[str, str, str, int]]:
    """The cells that a command of run_results.py makes."""
    values: dict[str, list[str]] = {"methods": ["plain", "weighted", "consistent"]}
    for part in line.split(" --")[1:]:
        name, *given = part.split()
        values[name] = given
    names = ("backbones", "tasks", "methods")
    return {
        (*run, int(seed))  # type: ignore[misc]
        for run in itertools.product(*(values[name] for name in names))
        for seed in values["seeds"]
    }


@pytest.mark.parametrize("missing", ["", "e5-12l_m-cid_weighted_2", "mpnet-12l_sst2_plain_1"])
def test_the_commands_make_what_is_there(rendering: ModuleType, missing: str):
    cells = [read(path) for path in CELLS if path.stem != missing]
    *runs, last = rendering.commands(cells)
    made = [made_by(line) for line in runs]
    assert sum(map(len, made)) == len(cells)
    assert set().union(*made) == {(c["backbone"], c["task"], c["method"], c["seed"]) for c in cells}
    assert last == "python benchmarks/render_results.py benchmarks/results docs/results.md"
