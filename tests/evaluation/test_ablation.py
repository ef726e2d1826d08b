"""Questions of an ablation, and what cells made by hand and small instances say to them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from compared_cells import CONFIG, LAYERS, ROWS, cell_of
from consistentee.cli.main import main
from consistentee.config import ClassificationTrainingConfig
from consistentee.errors import DataError, SettingError
from consistentee.evaluation.ablation.ablate import render_answers
from consistentee.evaluation.ablation.answers import answer, differences, rounds, thirds
from consistentee.evaluation.ablation.pages import ablation_sheets
from consistentee.evaluation.ablation.picture import plot_ablation
from consistentee.evaluation.ablation.questions import QUESTIONS, question
from consistentee.evaluation.ablation.studies import (
    Studied,
    gradient_study,
    policy_rows_study,
    row_counts,
    studied,
)
from consistentee.evaluation.comparison.measuring import pack_exits, unpack_bits, unpack_exits
from consistentee.evaluation.comparison.plan import compared_methods
from consistentee.evaluation.comparison.tables import NOTHING, Sheet
from consistentee.functional.hardness import memorized_layer
from consistentee.heads.policy import PolicyNetwork
from consistentee.models.loaded import LoadedClassifier, load_model
from consistentee.training.instances import Instances
from consistentee.training.policy_phase import policy_search
from consistentee.training.train import train
from quick import quick_config
from tiny import tiny_backbone, tiny_dataset

UNIFORM = "consistent:uniform_reward"


@pytest.mark.parametrize("name", QUESTIONS)
@pytest.mark.parametrize("shared", [{}, {"warmup_epochs": 6.0, "rounds": 4, "consistent_epochs": 0.25}])
def test_every_question_is_one_that_a_comparison_can_run(name: str, shared: dict[str, Any]) -> None:
    asked = question(name, shared)
    methods = compared_methods(
        asked.labels, shared, {label: asked.settings[label] for label in asked.settings}
    )
    common = ClassificationTrainingConfig.from_dict(shared)
    for method in methods[1:]:
        config = ClassificationTrainingConfig.from_dict({**shared, **method.settings})
        assert (config == common) == (method.label in ("consistent", "weighted_sum")), method.label


def test_a_question_without_a_switch_to_turn_is_refused() -> None:
    with pytest.raises(
        SettingError, match='"reward" has nothing to compare: all methods have consistent:uniform'
    ):
        question("reward", {"reward": "uniform"})
    with pytest.raises(
        SettingError, match=r'"rounds" needs a consistent phase, got 0 rounds .* Give --rounds'
    ):
        question("rounds", {"rounds": 0})
    with pytest.raises(SettingError, match=r'"hardness" needs a reward that goes by it, got reward uniform'):
        question("hardness", {"reward": "uniform"})  # whose trainings would all be the same
    with pytest.raises(SettingError, match=r'questions must be among reward, .*, got "mood"'):
        question("mood", {})
    assert "consistent:sampled_8" not in question("estimator", {"estimator": "sampled"}).settings


def _cells(seeds: tuple[int, ...] = (1, 2)) -> list[dict[str, Any]]:
    return [
        cell_of(label, seed, skill=skill, history=_history(seed))
        for seed in seeds
        for label, skill in (("plain", 0.8), ("consistent", 0.8), (UNIFORM, 0.7))
    ]


def _history(seed: int) -> list[dict[str, Any]]:
    return [
        {
            "changed_exits": None if number == 0 else 0.1 * seed,
            "score": 0.7 + 0.01 * number,
            "reward": -0.2 * seed,
            "per_layer_accuracy": [0.5, 0.8],
        }
        for number in range(seed + 1)
    ]


def test_differences_are_the_variants_minus_the_others_on_the_same_rows() -> None:
    cells = _cells()
    found = differences(question("reward", {}), cells, resamples=50)
    assert [(one["variant"], one["baseline"], one["criterion"]) for one in found] == [
        (UNIFORM, "consistent", "policy")
    ]

    def at_validation(label: str) -> float:
        accuracies = []
        for cell in cells:
            if cell["label"] == label:
                figures = cell["criteria"]["policy"]
                point = figures["at_validation_threshold"]["point"]
                exits = unpack_exits(figures["exits"], ROWS, LAYERS, len(figures["curve"]))[:, point]
                right = unpack_bits(cell["correct"], ROWS, LAYERS)
                accuracies.append(right[np.arange(ROWS), exits - 1].mean())
        return float(np.mean(accuracies))

    chosen = found[0]["difference"]["at_validation_threshold"]["accuracy"]
    assert chosen["mean"] == pytest.approx(at_validation(UNIFORM) - at_validation("consistent"), abs=1e-5)
    assert chosen["interval"][0] <= chosen["mean"] <= chosen["interval"][1]
    missing = [cell for cell in cells if cell["label"] != UNIFORM]
    assert differences(question("reward", {}), missing, resamples=50) == []


def test_differences_name_the_seeds_that_both_have_and_are_of_these_alone() -> None:
    whole = [*_cells((1, 2, 3)), cell_of("consistent", 1, name="mrpc"), cell_of(UNIFORM, 2, name="mrpc")]
    cells = [cell for cell in whole if (cell["label"], cell["set"], cell["seed"]) != ("consistent", "rte", 3)]
    found = differences(question("reward", {}), cells, resamples=20)
    assert [(one["set"], one["seeds"]) for one in found] == [("rte", [1, 2])]  # of mrpc they share none
    expected = differences(question("reward", {}), _cells((1, 2)), resamples=20)
    assert [one["figures"] for one in found] == [one["figures"] for one in expected]
    assert [one["difference"] for one in found] == [one["difference"] for one in expected]


def test_thirds_are_the_same_rows_for_both_and_in_order_of_hardness() -> None:
    cells = _cells()
    found = thirds(question("reward", {}), cells)
    assert [(one["method"], one["third"]) for one in found] == [
        (label, third) for label in (UNIFORM, "consistent") for third in ("easy", "middle", "hard")
    ]
    exits = [cell for cell in cells if cell["label"] != "plain"]
    rights = [torch.from_numpy(unpack_bits(cell["correct"], ROWS, LAYERS)) for cell in exits]
    hardness = torch.stack([memorized_layer(right).double() for right in rights]).mean(0)
    ordered = sorted(range(ROWS), key=lambda row: float(hardness[row]))
    for place, third in enumerate(found[:3]):
        rows = ordered[place * 30 : place * 30 + 30]
        assert third["memorized_layer"] == pytest.approx(float(hardness[rows].mean()))
        expected = []
        for cell, right in zip(exits, rights, strict=True):
            if cell["label"] == UNIFORM:
                figures = cell["criteria"]["policy"]
                point = figures["at_validation_threshold"]["point"]
                layers = unpack_exits(figures["exits"], ROWS, LAYERS, len(figures["curve"]))[:, point]
                expected.append(right.numpy()[rows, layers[rows] - 1].mean())
        assert third["accuracy_at_validation"] == pytest.approx(float(np.mean(expected)))
    for label in (UNIFORM, "consistent"):
        mean = np.mean([one["exit_layer_at_2x"] for one in found if one["method"] == label])
        assert mean <= LAYERS / 2 + 1e-9


def test_a_policy_that_never_exits_has_no_figure_at_twice_the_speed() -> None:
    cells = _cells()
    for cell in cells:
        if cell["label"] == UNIFORM and cell["seed"] == 2:
            policy = cell["criteria"]["policy"]
            points = len(policy["curve"])
            policy["curve"] = [[threshold, 0.7, LAYERS] for threshold, *_ in policy["curve"]]
            policy["exits"] = pack_exits(np.full((ROWS, points), LAYERS), LAYERS)
    asked = question("reward", {})
    found = thirds(asked, cells)
    assert {(one["method"], "accuracy_at_2x" in one) for one in found} == {
        (UNIFORM, False),
        ("consistent", True),
    }
    assert all("accuracy_at_validation" in one for one in found)
    summary = {"questions": {"reward": answer(asked, cells, [], resamples=20)}}
    [sheet] = [sheet for sheet in ablation_sheets(summary) if "easy" in sheet.title]
    assert [row[sheet.columns.index("accuracy at 2x")] == NOTHING for row in sheet.rows] == [True] * 3 + [
        False
    ] * 3


def test_rounds_are_means_over_the_runs_that_got_there() -> None:
    found = rounds(question("reward", {}), _cells())
    ours = [one for one in found if one["method"] == "consistent"]
    assert [(one["round"], one["runs"]) for one in ours] == [(0, 2), (1, 2), (2, 1)]
    assert [one["changed_exits"] for one in ours] == [None, pytest.approx(0.15), pytest.approx(0.2)]
    assert ours[0]["reward"] == pytest.approx(-0.3)


def test_rounds_are_of_the_runs_that_all_methods_have() -> None:
    cells = _cells()
    fewer = [cell for cell in cells if (cell["label"], cell["seed"]) != (UNIFORM, 2)]
    found = {(one["method"], one["round"]): one for one in rounds(question("reward", {}), fewer)}
    assert {one["runs"] for one in found.values()} == {1}
    assert set(found) == {(label, number) for label in (UNIFORM, "consistent") for number in (0, 1)}
    assert found["consistent", 0]["reward"] == pytest.approx(-0.2)
    alone = rounds(question("reward", {}), [cell for cell in cells if cell["label"] != UNIFORM])
    assert [(one["method"], one["runs"]) for one in alone] == [("consistent", runs) for runs in (2, 2, 1)]


# --- Studies --------------------------------------------------------------------------------------


@pytest.fixture
def small_study() -> Studied:
    """Rows whose exits are right where their state says so, of a policy that reads it."""
    generator = torch.Generator().manual_seed(0)
    correct = torch.rand(400, 4, generator=generator) < torch.tensor([0.5, 0.6, 0.7, 0.9])
    states = torch.randn(400, 4, 8, generator=generator)
    states[..., 0] = 2.0 * correct - 1
    rows = Instances(
        correct=correct,
        exit_cost=(~correct).float(),
        hardness=torch.zeros(400),
        group=torch.arange(400),
        states=states.half(),
    )

    class Model:
        def __init__(self) -> None:
            self.policy = self.new_policy("state")

        def new_policy(self, policy_input: str) -> PolicyNetwork:
            return PolicyNetwork(
                num_layers=4,
                hidden_size=8,
                policy_input=policy_input,
                policy_hidden_size=8,
                dropout=0.0,
                initial_exit_bias=-1.0,
            )

    config = ClassificationTrainingConfig(policy_epochs=10, policy_min_steps=60, policy_learning_rate=1e-2)
    search = policy_search(config, (), layer_costs=config.layer_costs)
    return Studied(Model(), search, 0, 128, rows, rows, confidence_area=0.5)


def test_a_study_is_of_the_policy_that_its_run_kept(tmp_path: Path) -> None:
    costs, data = (2.0, 0.001), tiny_dataset(120)
    settings = quick_config(layer_cost_mode="each", layer_costs=costs, policy_epochs=20, warmup_epochs=4.0)
    backbone = tiny_backbone(tmp_path / "backbone", layers=3)
    saved = load_model(
        train(backbone=backbone, train_data=data, output_dir=tmp_path / "model", config=settings),
        LoadedClassifier,
    )
    assert saved.record["policy"]["layer_cost"] == costs[1]
    assert studied(saved, data, tiny_dataset(30, seed=5)).search.fitted_costs == (costs[1],)


def test_a_study_computes_as_it_would_in_a_process_of_its_own(tmp_path: Path) -> None:
    """Whatever precision the training before it has set for the process."""
    data, backbone = tiny_dataset(60), tiny_backbone(tmp_path / "backbone")
    folder = train(
        backbone=backbone,
        train_data=data,
        output_dir=tmp_path / "model",
        config=quick_config(mixed_precision="bf16"),
    )

    def costs() -> torch.Tensor:
        saved = load_model(folder, LoadedClassifier)
        return studied(saved, data, tiny_dataset(30, seed=5)).judged.exit_cost

    assert AcceleratorState().mixed_precision == "bf16"
    behind_it = costs()
    AcceleratorState._reset_state(reset_partial_state=True)
    assert torch.equal(behind_it, costs())


def test_a_sampled_gradient_has_less_noise_the_more_rollouts(small_study: Studied) -> None:
    found = gradient_study(small_study)
    for stage in ("untrained", "fitted"):
        noise = found["noise"][stage]["sampling_noise"]
        assert noise["1"] > noise["8"] > noise["32"] > 0
        # The variance of a mean of K rollouts falls as 1 / K, with and without a baseline.
        assert noise["8"] / noise["32"] == pytest.approx(4, rel=0.5)
    assert set(found["fits"]) == {"exact", "1", "8", "32"}
    assert found["fits"]["exact"]["area"] > 0.75
    assert all(fit["seconds"] > 0 for fit in found["fits"].values())


def test_a_batch_of_all_rows_has_no_noise(small_study: Studied, folder: Path) -> None:
    whole = gradient_study(replace(small_study, batch_size=400))
    assert [whole["noise"][stage]["batch_noise"] for stage in ("untrained", "fitted")] == [None, None]
    assert whole["noise"]["fitted"]["sampling_noise"]["1"] > 0
    (folder / "studies").mkdir()

    def noise_sheet(seed: int, study: dict[str, Any]) -> Sheet:
        value = {"backbone": "small", "set": "rte", "seed": seed} | study
        file = folder / "studies" / f"small_rte_consistent_{seed}_estimator.json"
        file.write_text(json.dumps(value))
        summary = render_answers(folder, questions=["estimator"], resamples=20)
        [sheet] = [sheet for sheet in ablation_sheets(summary) if "noise" in sheet.title]
        return sheet

    sheet = noise_sheet(1, whole)
    assert {row[2:] for row in sheet.rows} == {("-", "-")}
    assert "Without 1 of 1 models, whose batch is all held-out rows" in sheet.note
    study = gradient_study(small_study)
    sheet = noise_sheet(2, study)
    assert "Without 1 of 2 models, whose batch is all held-out rows" in sheet.note
    noise = study["noise"]["fitted"]
    share = f"{noise['sampling_noise']['8'] / noise['batch_noise']:.3f}"
    assert ("fitted", "8", share, f"{share} to {share}") in sheet.rows


def test_a_policy_gains_with_the_rows_it_learns_from(small_study: Studied) -> None:
    found = policy_rows_study(small_study)
    assert [point["rows"] for point in found["areas"]] == [100, 200, 400]
    whole = small_study.area(small_study.fitted(rows=torch.arange(400)))
    assert found["areas"][-1]["area"] == pytest.approx(whole)
    assert found["confidence_area"] == 0.5


def test_numbers_of_rows_double_up_to_all() -> None:
    assert row_counts(4_300) == [500, 1000, 2000, 4000, 4300]
    assert row_counts(1_000) == [500, 1000]
    assert row_counts(244) == [61, 122, 244]


# --- Files ----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return _keep(tmp_path, _cells())


def test_answers_are_written_as_tables_json_and_a_picture(folder: Path, small_study: Studied) -> None:
    (folder / "studies").mkdir()
    for name, study in (("estimator", gradient_study), ("policy_rows", policy_rows_study)):
        value = {"backbone": "small", "set": "rte", "seed": 1} | study(small_study)
        (folder / "studies" / f"small_rte_consistent_1_{name}.json").write_text(json.dumps(value))
    summary = render_answers(folder, resamples=20)
    assert list(summary["questions"]) == ["reward", "rounds", "estimator", "policy_rows"]  # what is there
    assert json.loads((folder / "ablate.json").read_text()) == summary
    page = (folder / "ablate.md").read_text()
    for sheet in ablation_sheets(summary):
        assert f"## {sheet.title}" in page
        assert all(len(row) == len(sheet.columns) for row in sheet.rows)
    assert "| 32 |" in page
    assert plot_ablation(summary, folder / "picture.svg").read_text().count("consistent:uniform_reward") == 1


def _keep(folder: Path, cells: list[dict[str, Any]]) -> Path:
    (folder / "cells").mkdir(parents=True)
    for cell in cells:
        name = f"small_{cell['set']}_{cell['label'].replace(':', '-')}_{cell['seed']}"
        (folder / "cells" / f"{name}.json").write_text(json.dumps(cell))
    return folder


def _cells_in_rounds(rounds: int, name: str = "rte", epochs: float = 0.5) -> list[dict[str, Any]]:
    """What the question `rounds` has run where the method goes through so many."""
    config = CONFIG | {"rounds": rounds, "consistent_epochs": epochs}
    twice = {"rounds": 2 * rounds, "consistent_epochs": epochs / 2, "patience": 2 * rounds}
    of_labels = {
        "plain": config,
        "consistent": config,
        "consistent:one_round": config | {"rounds": 1, "consistent_epochs": rounds * epochs},
        f"consistent:{2 * rounds}_rounds": config | twice,
    }
    return [
        cell_of(label, seed, name=name, config=own, history=_history(seed))
        for label, own in of_labels.items()
        for seed in (1, 2)
    ]


def test_answers_alone_take_the_settings_that_cells_were_made_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = _keep(tmp_path / "out", _cells_in_rounds(3))
    found = render_answers(out, questions=["rounds"], resamples=10)["questions"]["rounds"]
    variants = ["consistent:one_round", "consistent:6_rounds"]
    assert [one["variant"] for one in found["differences"]] == variants
    assert {one["method"] for one in found["rounds"]} == {"consistent", *variants}
    again = render_answers(out, questions=["rounds"], settings={"rounds": 3}, resamples=10)
    assert again["questions"]["rounds"] == found

    written = (out / "ablate.json").read_bytes()
    message = r"rounds must be that of the kept cells of consistent, 3 on rte \(small\), got 2\. Leave it out"
    with pytest.raises(SettingError, match=message):
        render_answers(out, questions=["rounds"], settings={"rounds": 2}, resamples=10)
    command = ["ablate", "--render", "--questions", "rounds", "--output-dir", str(out), "--resamples", "10"]
    assert main([*command, "--rounds", "2"]) == 2  # the default, said aloud
    assert "got 2. Leave it out" in capsys.readouterr().err
    assert (out / "ablate.json").read_bytes() == written
    assert main([*command, "--rounds", "3"]) == 0
    assert json.loads((out / "ablate.json").read_bytes())["questions"]["rounds"] == found
    assert render_answers(out, settings={"max_disk_mb": 1.0}, resamples=10)  # which nothing of it reads


def test_sets_with_other_variants_are_not_answered_in_one(tmp_path: Path) -> None:
    cells = [*_cells_in_rounds(3), *_cells_in_rounds(2, "mrpc")]
    out = _keep(tmp_path / "out", cells)
    message = (
        r'"rounds" must have the same variants on all sets, got consistent:one_round, consistent:4_rounds on '
        r"mrpc \(small\) and consistent:one_round, consistent:6_rounds on rte"
    )
    with pytest.raises(SettingError, match=message):
        render_answers(out, questions=["rounds"], resamples=10)
    longer = _keep(tmp_path / "longer", [*_cells_in_rounds(3), *_cells_in_rounds(3, "mrpc", epochs=1.0)])
    found = render_answers(longer, questions=["rounds"], resamples=10)["questions"]["rounds"]
    assert {one["set"] for one in found["differences"]} == {"rte", "mrpc", None}


def test_a_question_that_kept_cells_leave_nothing_to_compare_is_left_out(tmp_path: Path) -> None:
    cells = _cells_in_rounds(3)
    for cell in cells:
        cell["config"] = cell["config"] | {"reward": "uniform"}
    out = _keep(tmp_path / "out", cells)
    assert list(render_answers(out, resamples=10)["questions"]) == ["rounds"]
    with pytest.raises(
        SettingError, match='"reward" has nothing to compare: all methods have consistent:uni'
    ):
        render_answers(out, questions=["reward"], resamples=10)
    with pytest.raises(SettingError, match="questions must be among"):
        render_answers(out, questions=["rounds", "mood"], resamples=10)


def test_a_study_of_another_model_is_refused(folder: Path, small_study: Studied) -> None:
    (folder / "studies").mkdir()
    file = folder / "studies" / "small_rte_consistent_1_policy_rows.json"
    study = {"backbone": "small", "set": "rte", "seed": 1} | policy_rows_study(small_study)
    kept = next(cell for cell in _cells() if (cell["label"], cell["seed"]) == ("consistent", 1))
    whose = {key: kept[key] for key in ("kind", "method", "backbone", "backbone_fingerprint", "config")}
    whose |= {key: kept[key] for key in ("data", "evaluation")}
    file.write_text(json.dumps(study | {"cell": whose}))
    found = render_answers(folder, questions=["policy_rows"], resamples=20)["questions"]["policy_rows"]
    assert found["policy_rows"][0].keys() == study.keys()  # whose it is stays in the file
    other = whose | {"config": whose["config"] | {"warmup_epochs": 9.0}}
    file.write_text(json.dumps(study | {"cell": other}))
    with pytest.raises(
        SettingError, match=r"The model of the study .*policy_rows\.json has warmup_epochs = 9.0"
    ):
        render_answers(folder, questions=["policy_rows"], resamples=20)
    other = whose | {"evaluation": {"fingerprint": "others", "num_examples": ROWS}}
    file.write_text(json.dumps(study | {"cell": other}))
    with pytest.raises(SettingError, match=r"policy_rows\.json was measured on other evaluation rows"):
        render_answers(folder, questions=["policy_rows"], resamples=20)


def test_broken_or_missing_files_are_named(folder: Path, tmp_path: Path) -> None:
    (folder / "studies").mkdir()
    (folder / "studies" / "small_rte_consistent_1_estimator.json").write_text("{")
    with pytest.raises(DataError, match=r"It is no study .*\n?.*Remove it; ablate makes it anew"):
        render_answers(folder)
    with pytest.raises(SettingError, match="must hold finished cells that answer objective, got none"):
        render_answers(folder, questions=["objective"])
    with pytest.raises(SettingError, match="questions must be at least one, each once, got reward, reward"):
        render_answers(folder, questions=["reward", "reward"])


def test_a_question_leaves_out_cells_of_others() -> None:
    cells = [*_cells(), cell_of("deebert", 1)]
    asked = question("reward", {})
    assert answer(asked, cells, [], resamples=20) == answer(asked, _cells(), [], resamples=20)
