"""The form of the tables at the end of `criteria.py`, `rewards.py` and `hardness.py`: a formula a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

CLASSIFICATION, GENERATION = "classification", "generation"
BOTH_TASKS = (CLASSIFICATION, GENERATION)


@dataclass(frozen=True, kw_only=True)
class Formula:
    """One row.

    Attributes:
        function: a pure function of tensors.
        reads: the names of what it takes, in order.
        tasks: whose instances it is for: rows of `classification`, tokens of `generation`.
        source: where it comes from.
        relation: how it stands to the other rows.
    """

    function: Callable[..., Tensor]
    reads: tuple[str, ...]
    tasks: tuple[str, ...] = BOTH_TASKS
    source: str
    relation: str


FormulaT = TypeVar("FormulaT", bound=Formula)


def names_of(table: Mapping[str, Formula], task: str) -> tuple[str, ...]:
    """The names of a task's rows, in the table's order."""
    return tuple(name for name, row in table.items() if task in row.tasks)


def row_of(table: Mapping[str, FormulaT], name: str, setting: str, task: str | None = None) -> FormulaT:
    """A row by name.

    Args:
        table: the table.
        name: the row's.
        setting: what the table's names are values of, for the message.
        task: whose rows count; None takes all.

    Raises:
        ValueError: there is no such row.
    """
    known = tuple(table) if task is None else names_of(table, task)
    if name not in known:
        raise ValueError(f'{setting} must be one of {", ".join(known)}, got "{name}".')
    return table[name]


def value_of(row: Formula, label: str, known: Mapping[str, Tensor | None]) -> Tensor:
    """What a row's function gives for what is known.

    Args:
        row: whose function.
        label: setting and name, for the message.
        known: tensors by name; more than the row reads may be given.

    Raises:
        ValueError: the row reads something that is not there.
    """
    missing = [name for name in row.reads if known.get(name) is None]
    if missing:
        raise ValueError(f"{label} needs {' and '.join(missing)}, got None.")
    return row.function(*(known[name] for name in row.reads))
