"""The net under rebuilding: golden runs repeat themselves bit by bit, and their comparison sees what changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from benchmark_scripts import script

cases, runs, values = script("golden_cases"), script("golden_runs"), script("golden_values")


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return cases.run_cases(["classifier log-odds", "classifier layers", "generator last_layer"])


def test_runs_repeat_themselves(result: dict[str, Any]) -> None:
    again = cases.run_cases(["classifier log-odds", "generator last_layer"])
    names = [name for name in result["values"] if not name.startswith("classifier layers")]
    assert again["values"] == {name: result["values"][name] for name in names}
    assert {name.split("/")[0].split(": ")[1] for name in names} >= {
        "weights",
        "record",
        "evaluation",
        "texts",
    }


def test_nothing_differs_from_itself(result: dict[str, Any]) -> None:
    assert result["skipped"] == {}
    assert runs.differences(result, copy.deepcopy(result)) == {}


def test_a_changed_value_is_named(result: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    name = "classifier layers: policy/accuracy"
    accuracy = result["values"][name]
    other = {**result, "values": result["values"] | {name: 0.125}}
    found = runs.differences(other, result)
    assert found == {name: (0.125, accuracy)}
    assert runs.described(found, 1) == [
        name,
        "    before 0.125",
        f"    now    {accuracy}",
        "classifier layers: 1 values differ",
    ]
    assert runs.sort_out(found) == ({}, found)
    monkeypatch.setitem(runs.EXPECTED, "classifier layers: */accuracy", "rounded")
    assert runs.sort_out(found) == ({name: "rounded"}, {})


def test_new_names_of_old_values(result: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    new = {name.replace("/mean_exit_layer", "/depth"): value for name, value in result["values"].items()}
    now = {**result, "values": new}
    assert set(runs.differences(result, now).values()) > {("-", new["classifier layers: policy/depth"])}
    monkeypatch.setitem(runs.RENAMED, "mean_exit_layer", "depth")
    assert runs.differences(result, now) == {}


def test_unknown_settings_are_skipped_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"source": "", "values": {"classifier log-odds: record/best_round": 1}, "skipped": {}}
    monkeypatch.setitem(values.SETTINGS["classifier"]["base"], "no_such_setting", 1)
    unknown = cases.run_cases(["classifier log-odds"])
    assert "no_such_setting" in unknown["skipped"]["classifier log-odds"]
    assert runs.differences(known, unknown) == {}
    (line,) = runs.skips(known, unknown)
    assert line.startswith("Not compared: classifier log-odds, which this tree does not know: ")


def test_digests_tell_types_shapes_and_values_apart() -> None:
    torch = cases.torch
    tensors = [torch.zeros(2), torch.zeros(1, 2), torch.zeros(2).double(), torch.tensor([0.0, -0.0])]
    assert len({values.digest(tensor) for tensor in tensors}) == len(tensors)
