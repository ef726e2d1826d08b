"""A comparison's figures, from cells made by hand: packing, the bootstrap, what is paired, tables and picture."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from compared_cells import CONFIG, LAYERS, ROWS, cell_of
from consistentee.errors import DataError, SettingError
from consistentee.evaluation.comparison.cells import check_comparable
from consistentee.evaluation.comparison.compare import render, seconds_left
from consistentee.evaluation.comparison.measuring import (
    pack_bits,
    pack_exits,
    rounded,
    unpack_bits,
    unpack_exits,
)
from consistentee.evaluation.comparison.outcomes import (
    FIGURES,
    exit_outcomes,
    figures_of_draws,
    static_outcomes,
)
from consistentee.evaluation.comparison.picture import plot_comparison
from consistentee.evaluation.comparison.plan import (
    ComparedMethod,
    ComparedSet,
    PlannedCell,
    backbone_name,
    compared_methods,
    planned_cells,
    sharing_cells,
    work_left,
)
from consistentee.evaluation.comparison.summary import summarise
from consistentee.evaluation.comparison.tables import comparison_sheets
from consistentee.functional.curves import TOLERANCES, curve_of_thresholds
from consistentee.training.methods import METHODS
from tiny import tiny_dataset

# --- Packing --------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 13), st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_what_is_packed_comes_back(rows: int, layers: int, points: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    exits = np.sort(generator.integers(1, layers + 1, size=(rows, points)), axis=1)
    assert (unpack_exits(pack_exits(exits, layers), rows, layers, points) == exits).all()
    bits = generator.random((rows, layers)) < 0.5
    assert (unpack_bits(pack_bits(bits), rows, layers) == bits).all()


def test_what_is_packed_wrongly_is_said() -> None:
    with pytest.raises(ValueError, match="packed rows must be whole"):
        unpack_bits("?", 3, 2)
    with pytest.raises(ValueError, match="packed rows must be 9 bytes, got 1"):
        unpack_bits(pack_bits(np.ones((3, 2), dtype=bool)), 36, 2)


def test_figures_are_kept_with_six_digits() -> None:
    assert rounded({"a": [0.123456789, 1], "b": (1e-9,), "c": None}) == {
        "a": [0.123457, 1],
        "b": [1e-9],
        "c": None,
    }


def test_thresholds_and_settings_are_kept_whole() -> None:
    close = [0.99999991, 0.99999993]
    cell = {"curve": [[at, 0.123456789, 3.0] for at in close], "at": {"threshold": close[0]}}
    kept = rounded(cell | {"config": {"learning_rate": 0.000123456789}, "validation": {"curve": []}})
    assert [point[:2] for point in kept["curve"]] == [[at, 0.123457] for at in close]
    assert kept["at"]["threshold"] == close[0]
    assert kept["config"] == {"learning_rate": 0.000123456789}
    drawn = rounded({"curve": [{"threshold": at, "accuracy": 0.123456789} for at in close]})
    assert drawn["curve"][1] == {"threshold": close[1], "accuracy": 0.123457}


# --- Figures of draws, against rows that are really repeated ---------------------------------------


@pytest.mark.parametrize("criterion", ["policy", "patience"])
def test_figures_of_a_draw_are_those_of_its_rows(criterion: str) -> None:
    cell, plain_cell = cell_of("consistent"), cell_of("plain", skill=0.72)
    outcomes = exit_outcomes(cell, criterion, LAYERS)
    plain = unpack_bits(plain_cell["correct"], ROWS, 1)[:, 0]
    right = unpack_bits(cell["correct"], ROWS, LAYERS)
    scores = torch.rand(ROWS, LAYERS, generator=torch.Generator().manual_seed(1))
    scores = scores * LAYERS if criterion == "patience" else scores
    generator = np.random.default_rng(0)
    draws = [np.arange(ROWS), *(generator.integers(ROWS, size=ROWS) for _ in range(5))]
    weights = np.stack([np.bincount(rows, minlength=ROWS) for rows in draws]).astype(np.float32)
    found = figures_of_draws(outcomes, weights, plain)
    for rows, figures in zip(draws, found, strict=True):
        points = curve_of_thresholds(scores[rows], torch.from_numpy(right[rows]), outcomes.thresholds)
        floor = plain[rows].mean()
        for place, name in enumerate(FIGURES):
            if name.startswith("accuracy_at"):
                at = float(name.removeprefix("accuracy_at_").removesuffix("x"))
                expected = max(p.accuracy for p in points if p.layer_speedup >= at - 1e-6)
            elif name.startswith("layers_saved_at"):
                least = floor - float(name.removeprefix("layers_saved_at_")) / 100
                fast = [1 - p.mean_exit_layer / LAYERS for p in points if p.accuracy >= least - 1e-6]
                expected = max([0.0, *fast])
            elif name == "validation_accuracy":
                expected = points[outcomes.chosen or 0].accuracy
            elif name == "validation_layers_saved":
                expected = 1 - points[outcomes.chosen or 0].mean_exit_layer / LAYERS
            elif name == "validation_gain":
                expected = points[outcomes.chosen or 0].accuracy - floor
            elif "_within_" in name:
                of, _, loss = name.partition("_within_")
                point = points[outcomes.within[TOLERANCES.index(float(loss) / 100)]]
                saved = 1 - point.mean_exit_layer / LAYERS
                expected = {
                    "accuracy": point.accuracy,
                    "gain": point.accuracy - floor,
                    "layers_saved": saved,
                }[of]
            else:
                continue  # the area has a test of its own
            assert figures[place] == pytest.approx(expected, abs=1e-6), name
    assert (np.diff([point["layer_speedup"] for point in outcomes.curve()]) <= 0).all()


def test_smaller_plain_models_are_points_and_validation_chooses_among_them() -> None:
    cells = [
        cell_of("plain", layers=6, skill=0.80),
        cell_of("plain:2", layers=2, skill=0.70),
        cell_of("plain:3", layers=3, skill=0.81),
        cell_of("plain:4", layers=4, skill=0.82),
    ]
    outcomes = static_outcomes(cells, 6)
    assert outcomes.thresholds == (2, 3, 4, 6)
    assert outcomes.chosen == 1  # the fewest layers that validation finds no worse than all of them
    assert [point["layer_speedup"] for point in outcomes.curve()] == [3.0, 2.0, 1.5, 1.0]
    summary = summarise([*cells, cell_of("consistent")], resamples=20)
    [run] = [run for run in summary["runs"] if run["method"] == "static"]
    assert run["criterion"] is None
    assert run["at_validation_threshold"]["threshold"] == 3
    assert run["accuracy_at_speedup"]["4"] is None
    assert {run["method"] for run in summary["runs"]} == {"plain", "static", "consistent"}
    assert [run["area"] for run in summary["runs"] if run["method"] == "plain"] == [None]


# --- The summary -----------------------------------------------------------------------------------


def test_a_summary_holds_one_run_a_method_set_and_seed_and_pairs_what_both_have() -> None:
    cells = [
        *(cell_of("plain", seed, name=data, skill=0.75) for seed in (1, 2) for data in ("rte", "mrpc")),
        *(cell_of("consistent", seed, name=data) for seed in (1, 2) for data in ("rte", "mrpc")),
        *(cell_of("deebert", 2, name=data) for data in ("rte", "mrpc")),
    ]
    summary = summarise(cells, criteria=["all"], resamples=200)
    assert len(summary["runs"]) == len(cells)
    run = next(run for run in summary["runs"] if run["method"] == "deebert" and run["set"] == "mrpc")
    assert run["plain_accuracy"] == pytest.approx(unpack_bits(cells[3]["correct"], ROWS, 1).mean(), abs=1e-6)
    assert {"threshold", "accuracy", "layer_speedup"} <= run["at_validation_threshold"].keys()
    assert {"threshold", "accuracy", "mean_exit_layer", "layer_speedup"} == run["curve"][0].keys()
    assert 0 < run["area"] < 1
    assert list(run["criteria"]) == ["patience"]

    entries = {(e["set"], e["method"], e["criterion"]): e for e in summary["summary"]}
    of_deebert = entries["rte", "deebert", "policy"]
    areas = {(r["set"], r["method"], r["seed"]): r["area"] for r in summary["runs"]}
    difference = areas["rte", "deebert", 2] - areas["rte", "consistent", 2]  # seed 1 is not paired
    assert of_deebert["difference"]["area"]["mean"] == pytest.approx(difference, abs=1e-5)
    assert of_deebert["seeds"] == [2]
    both = [areas["rte", "consistent", seed] for seed in (1, 2)]
    assert entries["rte", "consistent", "policy"]["area"]["mean"] == pytest.approx(np.mean(both), abs=1e-5)
    assert entries["rte", "consistent", "policy"]["area"]["deviation"] == pytest.approx(
        np.std(both, ddof=1), abs=1e-5
    )
    assert entries["rte", "consistent", "policy"]["difference"] is None
    other = entries["rte", "deebert", "patience"]
    assert not other["own_criterion"]
    assert other["difference_on_same_exits"] is not None
    assert [list(place) for place in summary["averaged_sets"]] == [["small", "rte"], ["small", "mrpc"]]
    average = entries[None, "consistent", "policy"]
    parts = [entries[data, "consistent", "policy"]["area"]["mean"] for data in ("rte", "mrpc")]
    assert average["area"]["mean"] == pytest.approx(np.mean(parts), abs=1e-5)
    at = average["at_validation_threshold"]
    assert at["layer_speedup"]["mean"] == pytest.approx(1 / (1 - at["layers_saved"]["mean"]), abs=1e-4)


def test_thresholds_that_validation_chose_within_a_loss_have_a_table() -> None:
    smaller = [cell_of("plain:2", layers=2, skill=0.742), cell_of("plain:4", layers=4, skill=0.77)]
    cells = [cell_of("plain", skill=0.75), *smaller, cell_of("consistent")]
    summary = summarise(cells, resamples=20)
    [run] = [run for run in summary["runs"] if run["method"] == "consistent"]
    assert run["at_tolerance"]["0"]["threshold"] == run["at_validation_threshold"]["threshold"]
    speedups = [run["at_tolerance"][f"{loss:g}"]["layer_speedup"] for loss in TOLERANCES]
    assert speedups == sorted(speedups)
    [sheet] = [sheet for sheet in comparison_sheets(summary) if "validation allows" in sheet.title]
    [static, ours] = sheet.rows
    assert [text.rpartition(" ")[2] for text in static[2:]] == ["1.50x", "1.50x", "1.50x", "3.00x", "3.00x"]
    gain = run["at_tolerance"]["0.005"]["accuracy"] - run["plain_accuracy"]
    assert ours[4] == f"{100 * gain:+.1f} at {run['at_tolerance']['0.005']['layer_speedup']:.2f}x"

    for figures in cells[-1]["criteria"].values():  # as cells were before
        del figures["at_tolerances"]
    summary = summarise(cells, resamples=20)
    assert not any("validation allows" in sheet.title for sheet in comparison_sheets(summary))


def test_a_method_that_does_the_same_differs_by_nothing() -> None:
    twin = cell_of("consistent") | {"label": "consistent:twin"}
    summary = summarise([cell_of("plain"), cell_of("consistent"), twin], resamples=100)
    [entry] = [entry for entry in summary["summary"] if entry["method"] == "consistent:twin"]
    for figure in (entry["difference"]["area"], *entry["difference"]["accuracy_at_speedup"].values()):
        assert figure["mean"] == 0
        assert figure["interval"] == [0, 0]
    low, high = entry["area"]["interval"]
    assert low < entry["area"]["mean"] < high


def test_the_baseline_may_be_another_method_and_criterion() -> None:
    cells = [cell_of("plain"), cell_of("consistent"), cell_of("deebert")]
    summary = summarise(cells, baseline="deebert/patience", criteria=["patience"], resamples=20)
    entries = {(e["method"], e["criterion"]): e for e in summary["summary"]}
    assert entries["deebert", "patience"]["difference"] is None
    assert entries["deebert", "policy"]["difference"] is not None
    without = summarise(cells[::2], resamples=20)  # no `consistent`
    assert all(entry["difference"] is None for entry in without["summary"])


def test_averages_are_over_sets_that_all_methods_have() -> None:
    cells = [cell_of(label, name=data) for label in ("plain", "deebert") for data in ("a", "b", "c")]
    cells += [cell_of("consistent", name=data) for data in ("a", "b")]
    summary = summarise(cells, resamples=20)
    assert summary["averaged_sets"] == [["small", "a"], ["small", "b"]]
    titles = [sheet.title for sheet in comparison_sheets(summary)]
    assert any(title.startswith("Average over 2 sets (small a, small b)") for title in titles)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data": {"fingerprint": "others"}}, "must share training rows, got others and train"),
        ({"evaluation": {"fingerprint": "others", "num_examples": ROWS}}, "must share evaluation rows"),
        ({"config": CONFIG | {"warmup_epochs": 9.0}}, "must share epochs, got 10.0 and 3.0"),
        ({"config": CONFIG | {"validation_fraction": 0.5}}, "must share validation_fraction"),
        ({"backbone_fingerprint": "g"}, "must share the backbone"),
    ],
)
def test_cells_that_cannot_be_compared_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        summarise([cell_of("plain"), cell_of("deebert", **changes)], resamples=20)


@pytest.mark.parametrize(
    "label, changes, message",
    [
        (
            "consistent",
            {"learning_rate": 1e-7},
            r'"rte" with consistent \(seed 2\) and consistent \(seed 1\) must share learning_rate, got 1e-07 and',
        ),
        ("plain", {"batch_size": 256}, "must share batch_size, got 256 and"),
        ("consistent", {"warmup_epochs": 0.0, "rounds": 6}, "must share warmup_epochs, got 0.0 and 2.0"),
        (
            "deebert",
            {"threshold_margin": 3.0},
            r"deebert \(seed 2\) and consistent .* share threshold_margin",
        ),
        ("deebert", {"parse_special_tokens": True}, "must share parse_special_tokens, got True and False"),
    ],
)
def test_cells_with_other_settings_are_no_seeds_of_one_method(
    label: str, changes: dict[str, Any], message: str
) -> None:
    cells = [cell_of("plain"), cell_of("consistent"), cell_of(label, 2, config=CONFIG | changes)]
    with pytest.raises(DataError, match=message):
        summarise(cells, resamples=20)


def test_seeds_may_differ_in_settings_that_their_method_never_reads() -> None:
    cells = [
        cell_of("plain"),
        cell_of("plain", 2, config=CONFIG | {"threshold_margin": 3.0, "patience": 9, "seed": 2}),
        cell_of("deebert"),  # of an earlier version, without the settings that came later
        cell_of("deebert", 2, config=CONFIG | {"max_disk_mb": 1.0, "batch_size": 32, "seed": 2}),
    ]
    assert [entry["seeds"] for entry in summarise(cells, resamples=20)["summary"]] == [[1, 2], [1, 2]]


def test_cells_of_before_had_whole_gradients() -> None:
    old, new = cell_of("consistent"), cell_of("consistent", 2, config=CONFIG | {"exit_gradient_scale": 0.3})
    with pytest.raises(DataError, match=r"share exit_gradient_scale, got 0\.3 and 1\.0"):
        summarise([cell_of("plain"), old, new], resamples=20)
    new["config"]["exit_gradient_scale"] = 1.0
    assert [row["seeds"] for row in summarise([cell_of("plain"), old, new], resamples=20)["summary"]] == [
        [1],
        [1, 2],
    ]


def test_a_budget_may_be_split_so_that_its_sum_rounds_otherwise() -> None:
    split = {"warmup_epochs": 0.6, "rounds": 3, "consistent_epochs": 0.8}
    assert 0.6 + 3 * 0.8 != 2 + 2 * 0.5  # 3.0000000000000004
    cells = [cell_of("plain"), cell_of("consistent"), cell_of("deebert", config=CONFIG | split)]
    check_comparable(cells)
    cells[-1]["config"] = CONFIG | split | {"consistent_epochs": 0.81}
    with pytest.raises(DataError, match=r"must share epochs, got 3\.03 and 3\.0\."):
        check_comparable(cells)


@pytest.mark.parametrize("folder", ["compare", "ablate"])
def test_the_published_cells_are_comparable(folder: str) -> None:
    kept = (Path(__file__).parents[2] / "benchmarks" / "results" / folder).glob("*.json")
    check_comparable([json.loads(path.read_text()) for path in kept])


def test_unknown_criteria_and_too_few_draws_are_refused() -> None:
    with pytest.raises(SettingError, match='criteria must be all, or among policy, patience, got "luck"'):
        summarise([cell_of("deebert")], criteria=["luck"])
    with pytest.raises(SettingError, match="resamples must be at least 2, got 1"):
        summarise([cell_of("deebert")], resamples=1)


# --- Methods and plans -----------------------------------------------------------------------------


def test_methods_have_the_reference_first_and_settings_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "published").mkdir()
    (tmp_path / "published" / "consistent_released.yaml").write_text("reward: uniform\n")
    (tmp_path / "published" / "deebert.yaml").write_text("head: shared_pooler\nensemble_decay: 0.0\n")
    methods = compared_methods(
        ["consistent", "deebert:published", "deebert:thin", "consistent:released", "static:2"],
        {"learning_rate": 1e-4},
        {"deebert:thin": {"classifier_hidden_size": 8}, "deebert:published": {"ensemble_decay": 0.25}},
        tmp_path,
    )
    assert [method.label for method in methods] == [
        "plain",
        "consistent",
        "deebert:published",
        "deebert:thin",
        "consistent:released",
        "static:2",
    ]
    assert methods[5].settings == {"num_layers": 2}
    assert methods[4].settings == {"reward": "uniform"}
    assert methods[2].settings == {"head": "shared_pooler", "ensemble_decay": 0.25}
    data = ComparedSet("rte", tiny_dataset(20), tiny_dataset(10))
    cells = planned_cells(["models/small"], [data], methods, [3, 4], {"learning_rate": 1e-4})
    assert [cell.name for cell in cells[:4]] == [
        "small_rte_plain_3",
        "small_rte_consistent_3",
        "small_rte_deebert-published_3",
        "small_rte_deebert-thin_3",
    ]
    config = cells[8].config()
    assert (config.seed, config.head, config.learning_rate) == (4, "shared_pooler", 1e-4)


@pytest.mark.parametrize(
    "labels, overrides, message",
    [
        (["pabee2"], {}, 'pabee2: method must be one of .*, got "pabee2"'),
        (["retrofit"], {}, "retrofit: method must be one of"),
        (["deebert", "deebert"], {}, "methods must differ"),
        (["deebert:published"], {}, "deebert:published: a variant must be described"),
        (["static"], {}, "static: num_layers must be given for the method static"),
        (["deebert"], {"deebrt": {}}, 'Settings are given for "deebrt", which is not among the methods'),
        (["deebert"], {"deebert": {"hed": "attention"}}, 'deebert: "hed" is not a training setting'),
        (["deebert"], {"deebert": {"seed": 5}}, "deebert: seed must be the same for all"),
        (["deebert"], {"deebert": {"threshold_margin": 0}}, "deebert: threshold_margin must be the same"),
        (["deebert"], {"deebert": {"max_length": 64}}, "deebert: max_length must be the same for all"),
        (["deebert"], {"deebert": {"warmup_epochs": 9}}, "must be the same for all methods .* got 10"),
        (["dee bert"], {}, "methods must be written NAME or NAME:VARIANT"),
    ],
)
def test_methods_that_make_no_sense_are_refused(
    labels: list[str], overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingError, match=message):
        compared_methods(labels, {}, overrides)


@pytest.mark.parametrize(
    "method, own, message",
    [
        (
            "sweet",
            {"exit_gradient_scale": 0.3},
            "exit_gradient_scale is about layers .*, which sweet has not",
        ),
        (
            "palbert",
            {"policy_epochs": 3},
            "policy_epochs is about fits of the policy, which palbert does not",
        ),
        ("plain", {"ensemble_decay": 0.1}, "ensemble_decay is about exits, which plain does not train"),
        ("deebert", {"patience": 2}, "patience goes with the method consistent and has no effect here"),
        ("consistent", {"passes": 2}, "passes goes with texts without labels and has no effect here"),
        ("deebert", {"pooling": "cls"}, "pooling goes with head shared_pooler and has no effect here"),
        (
            "consistent",
            {"price_warmup": 0.1, "layer_costs": [0.0]},
            "layer_cost_warmup goes with layer_costs above",
        ),
    ],
)
def test_settings_of_one_method_without_effect_are_refused(
    method: str, own: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SettingError, match=rf"^{method}: {message}.*\. Leave it out\.$"):
        compared_methods([method], {}, {method: own})
    (tmp_path / f"{method}_x.yaml").write_text(json.dumps(own))  # a recipe is read by more commands
    compared_methods([f"{method}:x"], {}, {}, tmp_path)
    # Theirs may be for some methods alone, and what all share is nobody's own.
    compared_methods(
        [method], {"exit_gradient_scale": 0.3, "patience": 2}, {method: {"max_accuracy_loss": 0.005}}
    )


def test_the_shipped_variants_fit_a_comparison_of_the_defaults() -> None:
    path = Path(__file__).parents[2] / "benchmarks" / "compare_variants.yaml"
    variants = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert variants
    compared_methods(list(variants), {}, variants)


def test_recipes_of_another_method_or_from_nowhere_are_refused(tmp_path: Path) -> None:
    (tmp_path / "deebert_x.yaml").write_text("method: consistent\n")
    with pytest.raises(
        SettingError, match=r'deebert:x: recipe .* must be of the method "deebert", got "consi'
    ):
        compared_methods(["deebert:x"], {}, {}, tmp_path)
    with pytest.raises(SettingError, match="deebert:x: recipes must be a folder that is there"):
        compared_methods(["deebert:x"], {}, {}, tmp_path / "nowhere")


def test_every_published_recipe_fits_a_comparison_of_the_defaults() -> None:
    recipes = Path(__file__).parents[2] / "recipes"
    names = [path.stem for path in (recipes / "published").glob("*.yaml")]
    labels = [f"{name}:published" for name in names if name in METHODS] + ["consistent:released"]
    assert len(labels) == len(names)
    methods = compared_methods(labels, {}, {}, recipes)
    assert all(method.settings for method in methods if method.label != "plain")


def test_another_split_of_the_same_budget_is_not_refused() -> None:
    [_, method] = compared_methods(["deebert"], {}, {"deebert": {"warmup_epochs": 2.5, "rounds": 1}})
    assert method == ComparedMethod("deebert", "deebert", {"warmup_epochs": 2.5, "rounds": 1})


def test_plans_of_nothing_or_twice_the_same_are_refused() -> None:
    data = ComparedSet("rte", tiny_dataset(20), tiny_dataset(10))
    methods = [ComparedMethod("plain", "plain")]
    for backbones, seeds, message in (
        ([], [1], "backbones must be at least one"),
        (["a/b", "c/b"], [1], "backbones must differ by name, got b, b"),
        (["b"], [1, 1], "seeds must differ by name, got 1, 1"),
        (["b"], [-1], "seed must be from 0"),
    ):
        with pytest.raises(SettingError, match=message):
            planned_cells(backbones, [data], methods, seeds, {})


def test_backbones_are_called_by_their_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / ".models" / "small"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    places = {
        ".": "small",
        "../small/": "small",
        "..": "models",
        "../../.models": "models",
        "user/name": "name",
    }
    assert {place: backbone_name(place) for place in places} == places


def test_the_time_left_comes_from_cells_of_the_same_backbone_and_method() -> None:
    data = ComparedSet("rte", tiny_dataset(50), tiny_dataset(10))
    left = [
        PlannedCell("models/small", data, ComparedMethod(label, label), 9, {})
        for label in ("plain", "deebert")
    ]
    assert left[0].work == pytest.approx(50 * 0.8 * 3)
    assert seconds_left(left, []) is None
    other = cell_of("plain") | {"backbone": "large"}
    assert seconds_left(left, [other]) is None
    assert seconds_left(left, [cell_of("plain", resumed=True)]) is None
    done = [cell_of("plain", seconds=5.0, work=100.0)]
    assert seconds_left(left, done) == pytest.approx(2 * 120 * 0.05)  # nothing is known of deebert
    done.append(cell_of("deebert", seconds=20.0, work=100.0))
    assert seconds_left(left, done) == pytest.approx(120 * (0.05 + 0.2))
    assert seconds_left([], []) == 0


def test_first_steps_that_cells_have_in_common_are_taken_once() -> None:
    data = ComparedSet("rte", tiny_dataset(50), tiny_dataset(10))
    settings: dict[str, dict[str, Any]] = {
        "consistent": {},
        "consistent:uniform": {"reward": "uniform"},
        "consistent:mean": {"head": "shared_pooler"},
        "consistent:forgetting": {"hardness": "forgetting_events"},
        "palbert": {},
        "weighted_sum": {},
        "deebert": {},
        "beem": {},
        "fastbert": {},
    }
    cells = [
        PlannedCell(
            "models/small", data, ComparedMethod(label, label.partition(":")[0], own), 9, {"seed": 9, **own}
        )
        for label, own in settings.items()
    ]
    assert [cell.method.label for cell in sharing_cells(cells)] == [
        "consistent",
        "consistent:uniform",
        "weighted_sum",
        "deebert",
        "beem",
        "fastbert",
    ]
    whole, warm_up = 50 * 0.8 * 3, 50 * 0.8 * 2
    behind = whole - warm_up
    assert work_left(cells) == pytest.approx([whole, behind, whole, whole, whole, behind, whole, 0, behind])
    weighted_sum, beem = cells[5], cells[7]
    assert sharing_cells([weighted_sum, cells[6]]) == []
    assert work_left([beem, cells[0], weighted_sum]) == pytest.approx([whole, behind, 0])
    assert sharing_cells([cells[0], dataclasses.replace(cells[1], seed=8)]) == []
    done = [cell_of("plain", seconds=5.0, work=100.0)]
    assert seconds_left(cells[1:2], done) == pytest.approx(whole * 0.05)
    assert seconds_left(cells[1:2], done, cells[:1]) == pytest.approx((whole - warm_up) * 0.05)


# --- Files, tables, picture ------------------------------------------------------------------------


def test_everything_is_made_from_the_cells_alone(tmp_path: Path) -> None:
    (tmp_path / "cells").mkdir()
    made = [
        cell_of(label, seed, name=data)
        for label in ("plain", "plain:3", "consistent", "deebert")
        for seed in (1, 2)
        for data in ("rte", "mrpc")
        if label != "plain:3"
    ]
    made.append(cell_of("plain:3", layers=3))
    for number, cell in enumerate(made):
        (tmp_path / "cells" / f"{number}.json").write_text(json.dumps(cell))
    (tmp_path / "cells" / ".7.0123abcd.json").write_text("{")  # another process is writing it
    with pytest.raises(SettingError, match="has no cell of nsp"):
        render(tmp_path, methods=["nsp"])
    few = render(tmp_path, methods=["consistent"], resamples=5)
    assert {run["method"] for run in few["runs"]} == {"plain", "consistent", "static"}
    summary = render(tmp_path, criteria=["all"], also=["deebert/patience"], resamples=50)
    assert json.loads((tmp_path / "compare.json").read_text()) == summary
    page = (tmp_path / "compare.md").read_text()
    assert "## rte, small: accuracy along the curve, %" in page
    assert "| static | - | 1 |" in page
    assert "| deebert | patience | 1 2 |" in page
    assert "Made on a machine" in page
    for sheet in comparison_sheets(summary):
        assert sheet.rows
        assert all(len(row) == len(sheet.columns) for row in sheet.rows)
    area = next(e for e in summary["summary"] if e["method"] == "deebert" and e["set"] == "rte")["area"]
    assert f"| deebert | policy | 1 2 | {100 * area['mean']:.1f} [" in page
    for ending in ("png", "pdf", "svg"):
        picture = plot_comparison(summary, tmp_path / f"picture.{ending}", title="Compared")
        assert picture.stat().st_size > 5000


def test_rows_of_no_cell_are_refused() -> None:
    for text in ("deebert", "deebert/luck", "consistent/policy"):
        with pytest.raises(SettingError, match="also must name METHOD/CRITERION of a cell"):
            summarise([cell_of("deebert")], also=[text])


def test_files_that_are_no_cells_are_named(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="must hold at least one finished cell"):
        render(tmp_path)
    (tmp_path / "cells").mkdir()
    broken = tmp_path / "cells" / "x.json"
    seedless, ours = cell_of("plain"), cell_of("consistent")
    del seedless["seed"], ours["criteria"], ours["validation"]
    for text in ("{", "[]", json.dumps(cell_of("plain") | {"form": 0}), json.dumps(seedless)):
        broken.write_text(text)
        with pytest.raises(DataError, match=r"x\.json: It is no cell of a comparison of this version"):
            render(tmp_path)
    broken.write_text(json.dumps(ours))
    with pytest.raises(DataError, match=r"x\.json: .* without validation, criteria\)\. Remove it"):
        render(tmp_path)
