"""Labels as data write them, and the names of classes: which label means which class.

A label means the class whose name it spells exactly. What no name spells may still be the same whole number (`1.0` and
`01` for `1`), or the same word in other letters (`Positive` for `positive`, an accent as a character of its own for a
letter with it), but only where nothing is merged by that: `us` and `US` stay two.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_WHOLE_NUMBER = re.compile(r"([+-]?[0-9]+)(?:\.0*)?")


def whole_number(label: str) -> int | None:
    """The whole number that a label writes, None for any other label.

    Example:
        >>> whole_number("1"), whole_number("01"), whole_number("1.0"), whole_number("1.5"), whole_number("one")
        (1, 1, 1, None, None)
    """
    found = _WHOLE_NUMBER.fullmatch(label)
    return None if found is None else int(found[1])


def match_labels(labels: Iterable[str], classes: Mapping[str, int]) -> dict[str, int]:
    """The class of every label that has one: by its exact spelling, as a number, or without regard to case.

    Args:
        labels: As data write them.
        classes: Class index by name; a class may have several names.

    Returns:
        Class index by label. A label is not in it where no name fits, or more than one does, or where case is all that
        keeps it apart from another label.

    Example:
        >>> match_labels(["us", "US", "Uk", "1.0"], {"us": 0, "uk": 1, "1": 2})
        {'us': 0, 'Uk': 1, '1.0': 2}
    """
    distinct = list(dict.fromkeys(labels))
    bare = Counter(name.strip() for name in classes)  # labels of files are read without outer spaces
    classes = {
        **{name.strip(): index for name, index in classes.items() if bare[name.strip()] == 1},
        **classes,
    }
    by_number: dict[int | None, set[int]] = {}
    by_folded: dict[str, list[int]] = {}
    for name, index in classes.items():
        by_number.setdefault(whole_number(name), set()).add(index)
        by_folded.setdefault(_folded(name), []).append(index)
    folded = Counter(map(_folded, distinct))
    matched: dict[str, int] = {}
    for label in distinct:
        number, same = whole_number(label), by_folded.get(_folded(label), [])
        if label in classes:
            matched[label] = classes[label]
        elif number is not None:
            if len(indices := by_number.get(number, set())) == 1:
                matched[label] = next(iter(indices))
        elif len(same) == 1 and folded[_folded(label)] == 1:
            matched[label] = same[0]
    return matched


def _folded(label: str) -> str:
    return unicodedata.normalize("NFC", label.casefold())


def numbers_as_written_once(labels: Iterable[str]) -> dict[str, str]:
    """For a column of whole numbers, the one spelling of each, by every spelling there is.

    Args:
        labels: As a column writes them.

    Returns:
        The labels themselves where they are not all whole numbers, or where each has one spelling without a decimal
        point.

    Example:
        >>> numbers_as_written_once(["1", "1.0", "01", "2"])
        {'1': '1', '1.0': '1', '01': '1', '2': '2'}
        >>> numbers_as_written_once(["01", "02"]), numbers_as_written_once(["1.0", "many"])
        ({'01': '01', '02': '02'}, {'1.0': '1.0', 'many': 'many'})
    """
    distinct = list(dict.fromkeys(labels))
    numbers = [whole_number(label) for label in distinct]
    keep = None in numbers or (
        len(set(numbers)) == len(distinct) and not any("." in label for label in distinct)
    )
    return {label: label if keep else str(number) for label, number in zip(distinct, numbers, strict=True)}


def number_on_a_scale(labels: Iterable[str]) -> str | None:
    """The first label that is no whole number, if all of them are numbers; else None.

    Example:
        >>> number_on_a_scale(["1", "2.5"]), number_on_a_scale(["1", "2"]), number_on_a_scale(["2.5", "many"])
        ('2.5', None, None)
    """
    distinct = list(dict.fromkeys(labels))
    if not all(map(_NUMBER.fullmatch, distinct)):
        return None
    return next((label for label in distinct if whole_number(label) is None), None)


def same_number_twice(labels: Iterable[str]) -> tuple[str, str] | None:
    """Two labels that are one whole number in two spellings, None where there are none such.

    Example:
        >>> same_number_twice(["1", "many", "1.0"])
        ('1', '1.0')
    """
    first: dict[int, str] = {}
    for label in dict.fromkeys(labels):
        number = whole_number(label)
        if number is not None and first.setdefault(number, label) != label:
            return first[number], label
    return None


def is_nameless(label_names: Sequence[str]) -> bool:
    """Whether classes have no names but those that Hugging Face gives them: `LABEL_0`, `LABEL_1`, ..."""
    return all(name == f"LABEL_{index}" for index, name in enumerate(label_names))


def names_of_nameless(label_names: Sequence[str], declared: Sequence[str] | None) -> dict[str, str]:
    """What data may call classes that have no names: none for others.

    Args:
        label_names: Class names by index, of a model.
        declared: Names that the data declare, which are taken in their order where they are as many; else indices are.

    Example:
        >>> names_of_nameless(["LABEL_0", "LABEL_1"], None)
        {'0': 'LABEL_0', '1': 'LABEL_1'}
        >>> names_of_nameless(["LABEL_0", "LABEL_1"], ["no", "yes"]), names_of_nameless(["no", "yes"], None)
        ({'no': 'LABEL_0', 'yes': 'LABEL_1'}, {})
    """
    if not is_nameless(label_names):
        return {}
    if declared is None or len(declared) != len(label_names):
        declared = [str(index) for index in range(len(label_names))]
    return dict(zip(declared, label_names, strict=True))
