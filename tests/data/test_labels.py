"""Which label means which class: exactly, as a number, in other letters; never two classes made one."""

from __future__ import annotations

import pytest

from consistentee.data.labels import match_labels, numbers_as_written_once, same_number_twice


@pytest.mark.parametrize(
    "labels, names, wanted",
    [
        (["US", "us"], ["us", "US"], {"US": 1, "us": 0}),
        (["Positive", "negative"], ["positive", "Negative"], {"Positive": 0, "negative": 1}),
        (["Us"], ["us", "US"], {}),  # either could be meant
        (["Us", "uS"], ["us"], {}),  # case keeps these apart
        (["us", "US"], ["us", "uk"], {"us": 0}),
        (["1", "1.0", "01", "0"], ["0", "1"], {"1": 1, "1.0": 1, "01": 1, "0": 0}),
        (["1"], ["1", "01"], {"1": 0}),
        (["1.0"], ["1", "01"], {}),
        (["1.5", "one"], ["1", "2"], {}),
        (["Straße"], ["STRASSE"], {"Straße": 0}),
        (["cafe\u0301", "CAF\u00c9"], ["tea", "caf\u00e9"], {}),  # either could be another word
        (["cafe\u0301"], ["tea", "caf\u00e9"], {"cafe\u0301": 1}),
        (["caf\u00e9"], ["tea", "Cafe\u0301"], {"caf\u00e9": 1}),
        (["caf\u00e9", "cafe\u0301"], ["caf\u00e9"], {"caf\u00e9": 0}),
    ],
)
def test_match_labels(labels: list[str], names: list[str], wanted: dict[str, int]) -> None:
    assert match_labels(labels, {name: index for index, name in enumerate(names)}) == wanted


def test_a_class_may_have_several_names() -> None:
    classes = {"1": 1, "positive": 1, "0": 0, "negative": 0}
    assert match_labels(["1.0", "Positive", "0"], classes) == {"1.0": 1, "Positive": 1, "0": 0}


def test_numbers_get_one_spelling_only_where_all_are_numbers() -> None:
    assert numbers_as_written_once(["1", "1.0", "01", "-2"]) == {"1": "1", "1.0": "1", "01": "1", "-2": "-2"}
    for kept in (["01", "02"], ["1.0", "1", "other"], ["1.0", "1", "2.5"]):
        assert numbers_as_written_once(kept) == {label: label for label in kept}
    assert same_number_twice(["1.0", "2.5", "1"]) == ("1.0", "1")
    assert same_number_twice(["1.0", "2.5"]) is None
