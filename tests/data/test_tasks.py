"""The table of tasks."""

from __future__ import annotations

import pytest

from consistentee.data.tasks import TASKS, get_task
from consistentee.functional.metrics import METRICS


def test_every_task_of_the_paper_is_there() -> None:
    assert {"sst2", "mrpc", "rte", "qnli", "qqp", "mnli", "m-cid", "stackoverflow"} <= set(TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_rows_are_complete(name: str) -> None:
    task = TASKS[name]
    assert task.name == name
    assert len(task.text_columns) in (1, 2)
    assert task.metrics
    assert set(task.metrics) <= set(METRICS)
    assert all(len(layout.text) == len(task.text_columns) for layout in task.layouts)
    assert task.label_names is None or len(task.label_aliases) == len(task.label_names) >= 2
    assert (task.hub_path is None) == (task.hub_config is None) == (task.home is not None)
    if "f1" in task.metrics:
        assert len(task.label_names) == 2


@pytest.mark.parametrize("name", ["SST-2", "sst2", "Sst_2"])
def test_names_are_found_whatever_their_spelling(name: str) -> None:
    assert get_task(name) is TASKS["sst2"]


def test_canonical_label_order() -> None:
    assert TASKS["rte"].label_aliases == {"0": "entailment", "1": "not_entailment"}
    assert TASKS["mnli"].label_names == ("entailment", "neutral", "contradiction")
    assert TASKS["stackoverflow"].label_aliases["1"] == "wordpress"
    assert TASKS["stackoverflow"].label_aliases["20"] == "magento"
    assert "0" not in TASKS["stackoverflow"].label_aliases


def test_unknown_task_lists_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r'Task "stackoverflw" is not known\. Did you mean "stackoverflow"\?'
    ):
        get_task("stackoverflw")
    with pytest.raises(ValueError, match="Known tasks: sst2, mrpc, rte"):
        get_task("imdb")
