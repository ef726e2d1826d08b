"""Errors about a user's data, installation and arguments, and the checks that raise them."""

from __future__ import annotations

import importlib
import math
import numbers
import os
from collections.abc import Mapping
from types import ModuleType
from typing import Any, cast, get_args


class DataError(ValueError):
    """Something is wrong with a data file; the message says where, what, and what to do about it.

    Args:
        problem: What is wrong, a full sentence.
        file: The file (or hub data set) at fault.
        row: Where in the file, counted from 1.
        unit: What `row` counts: "line" of a text file, "row" of a table that has no lines.
        remedy: What to do about it, a full sentence.
    """

    def __init__(
        self,
        problem: str,
        *,
        file: str | os.PathLike[str] | None = None,
        row: int | None = None,
        unit: str = "line",
        remedy: str | None = None,
    ) -> None:
        self.problem = problem
        self.file = None if file is None else os.fspath(file)
        self.row = row
        self.remedy = remedy
        place = [] if self.file is None else [self.file]
        if row is not None:
            place.append(f"{unit} {row}")
        message = f"{', '.join(place)}: {problem}" if place else problem
        super().__init__(f"{message} {remedy}" if remedy else message)


class SettingError(ValueError):
    """A setting or option that does not fit the model, the data or the machine; the message says what does."""


class UsageError(SettingError):
    """The command line makes no sense as given; the message says what to give instead."""


def require_characters(text: str, *, row: int | None = None, unit: str = "text") -> None:
    """Check that a text is of whole characters, which tokenizers and files need.

    Args:
        text: Any string.
        row: Where it stands, counted from 1.
        unit: What `row` counts.

    Raises:
        DataError: Half a surrogate pair is in it.
    """
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"Character {error.start + 1} is half a surrogate pair ({text[error.start]!a}), which is no character.",
            row=row,
            unit=unit,
            remedy='Decode its source with errors="replace", or remove it.',
        ) from None


class MissingExtraError(ImportError):
    """An optional dependency is needed and not installed; the message names the extra that brings it."""


def require_extra(extra: str, module: str) -> ModuleType:
    """Import a module that an extra of this package brings.

    Args:
        extra: The extra's name, e.g. "plot".
        module: The module to import, e.g. "matplotlib".

    Returns:
        The imported module.

    Raises:
        MissingExtraError: The module is not installed. One that is installed but broken raises its own error.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise MissingExtraError(
            f'This needs {module}, which is not installed. Install it with: pip install "consistentee[{extra}]"',
            name=module,
        ) from error


def require_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raise ValueError unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f'{name} must be one of {", ".join(map(str, choices))}, got "{value}".')


def require_number(name: str, value: Any, *, whole: bool = False) -> None:
    """Raise ValueError unless the value is a number, as one that was read from a file need not be."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral if whole else numbers.Real):
        raise ValueError(f"{name} must be a {'whole ' if whole else ''}number, got {value!r}.")


def require_thresholds(name: str, values: object) -> None:
    """Raise ValueError unless they are numbers by name; None stands for no thresholds."""
    if values is None:
        return
    if not isinstance(values, Mapping):
        raise ValueError(f"{name} must be numbers by the name of their criterion, got {values!r}.")
    by_criterion = cast("Mapping[object, object]", values)
    for criterion, value in by_criterion.items():
        require_number(f"{name}.{criterion}", value)


def require_seed(seed: int) -> None:
    """Raise ValueError unless every generator of random numbers takes the seed."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be from 0 to {2**32 - 1}, got {seed}.")


def require_range(name: str, value: float, low: float, high: float, open_end: bool = False) -> None:
    """Raise ValueError unless low <= value <= high (below high with `open_end`)."""
    if not (low <= value < high if open_end else low <= value <= high):
        raise ValueError(f"{name} must be in [{low}, {high}{')' if open_end else ']'}, got {value}.")


def checked_setting(key: str, value: Any, hint: Any) -> Any:
    """A setting in its field's type, a plain value of Python's: records are JSON, which knows no other.

    Raises:
        ValueError: it is of another type, or a number that is not finite.
    """
    if hasattr(value, "tolist"):  # numbers and arrays of numpy and torch
        value = value.tolist()
    if key == "layer_costs":
        costs = cast("list[Any]", value if isinstance(value, (list, tuple)) else [value])
        return tuple(checked_setting("each of layer_costs", cost, float) for cost in costs)
    kinds = get_args(hint) or (hint,)
    if value is None and type(None) in kinds:
        return None
    if bool in kinds:
        if not isinstance(value, bool):
            raise ValueError(f"{key} must be true or false, got {value!r}.")
        return value
    if int in kinds:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{key} must be a whole number, got {value!r}.")
        return value
    if float in kinds:
        try:
            if isinstance(value, bool) or not isinstance(value, (int, float, str)):
                raise TypeError
            number = float(value)  # YAML reads 1e-5 as text
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"{key} must be a number, got {value!r}.") from None
        if not math.isfinite(number):
            raise ValueError(f"{key} must be a finite number, got {number}. Give a large one for no bound.")
        return number
    if str in kinds:
        if not isinstance(value, str):
            raise ValueError(f"{key} must be text, got {value!r}.")
        return value
    if value is False and "no" in kinds:
        value = "no"  # which YAML reads as false
    require_choice(key, value, kinds)
    return value
