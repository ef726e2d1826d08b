"""The tasks known by name: what their columns, labels and metrics are, on the hub and in local files."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple


class Columns(NamedTuple):
    """Which columns of a file hold the text and the label."""

    text: tuple[str, ...]
    label: str


@dataclass(frozen=True)
class Task:
    """One row of the table of tasks.

    Args:
        name: The name used on the command line.
        text_columns: One column, or two for a pair, as the hub names them.
        label_names: Class names by index; None where they are learned from the training file.
        metrics: Names from `metrics.METRICS`, the headline metric first.
        label_column: The label's column, as the hub names it.
        hub_path: Repository on the hub; None where the task has no canonical home there.
        hub_config: Configuration of that repository.
        evaluation_split: The hub's split that has labels and is reported.
        evaluation_files: Local file names (without ending) of the evaluation set, the best first.
        local_columns: Columns of the task's usual local files; the hub's and the `text_a`/`text_b` names always work.
        local_header: Column names of a local TSV file that has no header line; None where it has one.
        label_values: How files write the classes, by index, besides their names; None means "0", "1", ...
        skip_broken_rows: Whether the published files hold a few broken rows, to be skipped with a warning.
        home: Where the files can be had when the hub has none.
    """

    name: str
    text_columns: tuple[str, ...]
    label_names: tuple[str, ...] | None
    metrics: tuple[str, ...] = ("accuracy",)
    label_column: str = "label"
    hub_path: str | None = None
    hub_config: str | None = None
    evaluation_split: str = "validation"
    evaluation_files: tuple[str, ...] = ("dev", "validation")
    local_columns: tuple[Columns, ...] = ()
    local_header: tuple[str, ...] | None = None
    label_values: tuple[str, ...] | None = None
    skip_broken_rows: bool = False
    home: str | None = None

    @property
    def layouts(self) -> tuple[Columns, ...]:
        """Every set of columns that a local file of this task may have, the most specific first."""
        generic = ("text_a", "text_b") if len(self.text_columns) == 2 else ("text",)
        hub = Columns(self.text_columns, self.label_column)
        return tuple(dict.fromkeys((*self.local_columns, hub, Columns(generic, "label"))))

    @property
    def label_aliases(self) -> dict[str, str]:
        """How files may write a label, to its class name; empty where the names are learned."""
        if self.label_names is None:
            return {}
        values = self.label_values or tuple(str(index) for index in range(len(self.label_names)))
        return dict(zip(values, self.label_names, strict=True))


_glue = partial(Task, hub_path="nyu-mll/glue")
_SENTENCES = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")

# The order in which the label file of github.com/jacoxu/StackOverflow numbers them, from 1.
_STACKOVERFLOW_TOPICS = (
    *("wordpress", "oracle", "svn", "apache", "excel", "matlab", "visual-studio", "cocoa", "osx", "bash"),
    *("spring", "hibernate", "scala", "sharepoint", "ajax", "qt", "drupal", "linq", "haskell", "magento"),
)

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _glue("sst2", ("sentence",), ("negative", "positive"), hub_config="sst2"),
        _glue(
            "mrpc",
            _SENTENCES,
            ("not_equivalent", "equivalent"),
            hub_config="mrpc",
            metrics=("f1", "accuracy"),
            local_columns=(Columns(("#1 String", "#2 String"), "Quality"),),
        ),
        _glue("rte", _SENTENCES, _ENTAILMENT, hub_config="rte"),
        _glue("qnli", ("question", "sentence"), _ENTAILMENT, hub_config="qnli"),
        _glue(
            "qqp",
            ("question1", "question2"),
            ("not_duplicate", "duplicate"),
            hub_config="qqp",
            metrics=("accuracy", "f1"),
            local_columns=(Columns(("question1", "question2"), "is_duplicate"),),
            skip_broken_rows=True,
        ),
        _glue(
            "mnli",
            ("premise", "hypothesis"),
            ("entailment", "neutral", "contradiction"),
            hub_config="mnli",
            evaluation_split="validation_matched",
            evaluation_files=("dev_matched", "validation_matched", "dev", "validation"),
            local_columns=(Columns(_SENTENCES, "gold_label"),),
        ),
        _glue(
            "cola",
            ("sentence",),
            ("unacceptable", "acceptable"),
            hub_config="cola",
            metrics=("matthews", "accuracy"),
            local_header=("source", "label", "mark", "sentence"),
        ),
        Task(
            "m-cid",
            ("text",),
            None,
            evaluation_files=("test", "dev", "validation"),
            home="https://github.com/fanolabs/NID_ACLARR2022 (data/mcid)",
        ),
        Task(
            "stackoverflow",
            ("text",),
            _STACKOVERFLOW_TOPICS,
            evaluation_files=("test", "dev", "validation"),
            label_values=tuple(str(number) for number in range(1, 21)),
            home="https://github.com/jacoxu/StackOverflow",
        ),
    )
}


def plain_name(name: str) -> str:
    """A task's or folder's name without case and punctuation, so that "SST-2" and "sst2" are the same."""
    return "".join(character for character in name.lower() if character.isalnum())


def get_task(name: str) -> Task:
    """The task of that name.

    Args:
        name: A key of TASKS; case and punctuation do not matter.

    Returns:
        Its row.

    Raises:
        ValueError: There is no such task; the message lists those there are.

    Example:
        >>> get_task("SST-2").label_names
        ('negative', 'positive')
    """
    by_plain_name = {plain_name(key): task for key, task in TASKS.items()}
    if task := by_plain_name.get(plain_name(name)):
        return task
    close = difflib.get_close_matches(plain_name(name), by_plain_name, n=1)
    hint = f' Did you mean "{by_plain_name[close[0]].name}"?' if close else ""
    raise ValueError(
        f'Task "{name}" is not known.{hint} Known tasks: {", ".join(TASKS)}. '
        "For data of your own, give the training and evaluation files instead."
    )
