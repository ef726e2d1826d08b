"""Recall class by class against counts by hand, and when it is worth a warning."""

from __future__ import annotations

import pytest

from consistentee.functional.recall import ClassRecall, recall_by_class, recall_warnings


def test_recall_by_hand() -> None:
    labels = [0, 0, 0, 0, 1, 1]
    found = recall_by_class([0, 0, 1, 1, 1, 0], [0, 0, 0, 1, 0, 0], labels, ["ham", "spam", "none"])
    assert found == [
        ClassRecall("ham", 4, recall=0.5, full_depth_recall=0.75, lost=1, gained=0),
        ClassRecall("spam", 2, recall=0.5, full_depth_recall=0.0, lost=0, gained=1),
        ClassRecall("none", 0, recall=None, full_depth_recall=None, lost=0, gained=0),
    ]


def of_class(label: str, rows: int, lost: int, gained: int = 0) -> ClassRecall:
    right = rows - lost
    return ClassRecall(label, rows, (right - lost + gained) / rows, right / rows, lost, gained)


@pytest.mark.parametrize(
    "lost, gained, rows, falls",
    [
        (4, 0, 30, True),
        (3, 0, 30, False),  # may be chance
        (20, 12, 100, False),  # may be chance
        (40, 12, 1000, False),  # no chance, but 2.8 points
        (0, 30, 100, False),
    ],
)
def test_a_fall_is_large_and_no_chance(lost: int, gained: int, rows: int, falls: bool) -> None:
    assert of_class("spam", rows, lost, gained).falls == falls


def test_warnings_name_class_figures_and_remedy() -> None:
    fallen, rare = recall_warnings([of_class("ham", 970, 0), of_class("spam", 30, 10)], 0.25)
    assert fallen == (
        'recall of class "spam" (30 rows) falls from 66.7 % at full depth to 33.3 % at threshold 0.25. '
        "A higher --threshold keeps more of it; training with --threshold-metric macro_f1 chooses one that counts "
        "every class alike."
    )
    assert rare == (
        'rare among 1,000 rows: "spam" (30). Accuracy hardly shows them: read their recall, and consider '
        "--threshold-metric macro_f1 in training."
    )


def test_nothing_is_said_where_all_is_well_nor_advised_what_was_done() -> None:
    assert (
        recall_warnings([of_class("yes", 60, 1), of_class("no", 40, 1), of_class("none", 1, 0)], 0.5)[1:]
        == []
    )
    assert recall_warnings([of_class("yes", 60, 1), of_class("no", 40, 1)], 0.5) == []
    lines = recall_warnings(
        [of_class("ham", 970, 0), of_class("spam", 30, 10)], 0.25, threshold_metric="macro_f1"
    )
    assert len(lines) == 2
    assert not any("macro_f1" in line for line in lines)


def test_of_many_classes_some_are_named() -> None:
    lines = recall_warnings([of_class("big", 5000, 0), *(of_class(f"c{i}", 20, 10) for i in range(9))], 0.5)
    assert sum("falls from" in line for line in lines) == 5
    assert "so it does of 4 more classes." in lines
    assert '"c4" (20) and 4 more.' in lines[-1]
