"""What the commands have in common: options for data and training settings, and how they become a config."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

import docstring_parser
from cyclopts import Group, Parameter

from consistentee.cli.effects import Command, check_effects
from consistentee.cli.kinds import CLASSIFIERS, GENERATORS, MODEL_KINDS, Kind, kind_of_task
from consistentee.config import ClassificationTrainingConfig, TrainingConfig
from consistentee.data.recipes import Recipe, load_recipe
from consistentee.errors import UsageError

DATA = Group("Data", sort_key=1)
SETTINGS = Group("Settings (also keys of a recipe)", sort_key=3)
NO_RECIPE = Group("Settings", sort_key=3)
SETTINGS_OF_KINDS = (
    Group("Settings of classifiers only", sort_key=4),
    Group("Settings of text generators only", sort_key=5),
)

Columns = Annotated[list[str] | None, Parameter(consume_multiple=True, negative=())]
NOT_GIVEN: Any = object()  # not None: "none" is a value that some settings have
Flag = Annotated[bool, Parameter(negative=())]


class Unchecked:
    """Of an option's type: pydantic, where it is loaded, takes every value, as `NOT_GIVEN` is of no type.

    cyclopts holds defaults to their types by it. What is given on the command line cyclopts converts by itself.
    """

    def __get_pydantic_core_schema__(self, *_: Any) -> Any:
        return importlib.import_module("pydantic_core.core_schema").any_schema()


@Parameter(name="*", group=DATA)
@dataclass(frozen=True)
class RowOptions:
    """Which rows of a classifier to read: a task by name, or a file of one's own.

    Args:
        task: A task by name: sst2, mrpc, rte, qnli, qqp, mnli, cola, m-cid, stackoverflow.
        data_dir: The task's local folder; without it the task comes from the model hub.
        eval_file: Rows to report on: CSV, TSV, JSON, Parquet, a `datasets` folder, or a data set of the hub,
            hf:user/name (with /config and :split where it has several).
        text_columns: The column of the text, or the two columns of a pair.
        label_column: The column of the label.
    """

    task: str | None = None
    data_dir: Path | None = None
    eval_file: Path | None = None
    text_columns: Columns = None
    label_column: str | None = None

    def columns(self, kind: Kind) -> dict[str, Any]:
        """The columns of a kind of rows by name, None for those that are not given."""
        return {name: getattr(self, name, None) for name in kind.columns}

    def has_columns(self, kind: Kind) -> bool:
        """Whether columns of a kind of rows are given."""
        return any(self.columns(kind).values())

    def check_kind(self, kind: Kind) -> None:
        """Raise UsageError where columns of the other kind of rows are given."""
        for other in MODEL_KINDS:
            if other is not kind and self.has_columns(other):
                raise UsageError(
                    f"{other.column_options} go with {other.rows}, and these are "
                    f"{'of ' if kind is GENERATORS else ''}{kind.rows}."
                )

    def check_columns(self, kind: Kind, file_option: str, file: Path | None) -> None:
        """Columns belong to files and files need them.

        Raises:
            UsageError: one without the other, or the wrong number of columns.
        """
        if file is None and self.has_columns(kind):
            raise UsageError(f"{kind.column_options} go with {file_option}; a task knows its own.")
        if file is not None and kind.columns_needed and not all(self.columns(kind).values()):
            either = isinstance(self, DataOptions)
            others = " to classify, or --response-column to generate text" if either else ""
            raise UsageError(f"{file_option} needs {kind.column_options}{others}.")
        check_one_or_two(self.text_columns)


@Parameter(name="*", group=DATA)
@dataclass(frozen=True)
class DataOptions(RowOptions):
    """Which rows of either kind to read: a task by name, or files of one's own.

    Args:
        task: A task by name: sst2, mrpc, rte, qnli, qqp, mnli, cola, m-cid, stackoverflow; to generate text: alpaca,
            dolly, cnndm, xsum.
        text_columns: To classify: the column of the text, or the two columns of a pair.
        label_column: To classify: the column of the label.
        prompt_column: To generate: the column of the instruction. [default: the usual names]
        input_column: To generate: the column of what the instruction is about. [default: the usual names]
        response_column: To generate: the column of the text to generate. [default: the usual names]
    """

    task: str | None = None
    text_columns: Columns = None
    label_column: str | None = None
    prompt_column: str | None = None
    input_column: str | None = None
    response_column: str | None = None


@Parameter(name="*", group=DATA)
@dataclass(frozen=True)
class TrainingDataOptions(DataOptions):
    """Which rows to train on.

    Args:
        train_file: Rows to train on: CSV, TSV, JSON, Parquet, a `datasets` folder or hf:user/name; to generate text
            also conversations ("messages" or "conversations") or a .txt file of texts.
        max_train_samples: Train on at most so many rows, every class with its share.
    """

    train_file: Path | None = None
    max_train_samples: int | None = None

    def kind(self, recipe_task: str | None = None) -> Kind:
        """What is to be trained: of a task its kind; of a file, generation with its columns or by what is in it.

        Without columns a .txt file, conversations, and instructions with responses are for generation.

        Args:
            recipe_task: taken where the command line names neither task nor file.

        Raises:
            UsageError: columns of both kinds, or of the other kind.
            DataError: the file decides, and is missing or broken.
        """
        if all(map(self.has_columns, MODEL_KINDS)):
            raise UsageError(
                f"{CLASSIFIERS.column_options} (to classify) and {GENERATORS.column_options} (to generate text) "
                "exclude each other: give one or the other."
            )
        kind = kind_of_task(self.task or (recipe_task if self.train_file is None else None))
        if self.train_file is not None and self.task is None:
            from consistentee.data.generation import holds_text_to_generate

            is_text = self.train_file.suffix.lower() == ".txt" and not self.train_file.is_dir()
            if (
                self.has_columns(GENERATORS)
                or is_text
                or (not self.has_columns(CLASSIFIERS) and holds_text_to_generate(self.train_file))
            ):
                kind = GENERATORS
        self.check_kind(kind)
        return kind


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """The string under each field of a class, or of a base's field; empty where the source is not at hand."""
    return {
        field.arg_name: " ".join((field.description or "").split())
        for part in reversed(cls.__mro__)
        if dataclasses.is_dataclass(part)
        for field in docstring_parser.parse_from_object(part).params
    }


def _setting_options(name: str, *kinds: Kind) -> type:
    """A dataclass with every field of the training configs, `NOT_GIVEN` where the command line does not give it."""
    classes = [kind.config_class for kind in kinds]
    hints = [get_type_hints(cls) for cls in classes]
    docs = [field_docs(cls) for cls in classes]
    defaults = [{field.name: field.default for field in dataclasses.fields(cls)} for cls in classes]
    fields: list[tuple[str, Any, Any]] = []
    for field in dict.fromkeys(itertools.chain(*defaults)):
        of = [index for index, known in enumerate(defaults) if field in known]
        hint = functools.reduce(_either, (hints[index][field] for index in of))
        shown = [shown_default(defaults[index][field]) for index in of]
        default = f" [default: {shown[0]}]" if shown[0] else ""
        if shown[-1] != shown[0]:
            default += f" [default to generate text: {shown[-1]}]"
        parameter = Parameter(
            help=docs[of[0]].get(field, "") + default,
            group=SETTINGS if len(of) == len(kinds) else SETTINGS_OF_KINDS[of[0]],
            show_default=False,
            negative=None if hint is bool else (),
            consume_multiple=isinstance(defaults[of[0]][field], tuple),
        )
        fields.append((field, Annotated[hint, Unchecked(), parameter], NOT_GIVEN))
    options = dataclasses.make_dataclass(name, fields, frozen=True, namespace={"__module__": __name__})
    return Parameter(name="*")(options)


def shown_default(default: Any) -> str:
    """A default as the help shows it; "" for none."""
    if default is None:
        return ""
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _either(first: Any, second: Any) -> Any:
    """A type for what either of two fields takes: choices are joined."""
    if first == second:
        return first
    if get_origin(first) is Literal and get_origin(second) is Literal:
        choices = tuple(dict.fromkeys((*get_args(first), *get_args(second))))
        return Literal[choices]
    return first | second


if TYPE_CHECKING:
    SettingOptions = ClassifierSettingOptions = ClassificationTrainingConfig
else:
    SettingOptions = _setting_options("SettingOptions", *MODEL_KINDS)
    ClassifierSettingOptions = _setting_options("ClassifierSettingOptions", CLASSIFIERS)


def training_config(
    settings: Any,
    recipe: Recipe,
    kind: Kind = CLASSIFIERS,
    command: Command = "train",
    method: str | None = None,
    *,
    unlabelled: bool = False,
) -> TrainingConfig:
    """The settings of a run: command line before recipe before defaults.

    Args:
        settings: the command line's `SettingOptions`, or None where none was given.
        recipe: the recipe file's.
        kind: of model.
        command: what it is for.
        method: of training; None for the command's own.
        unlabelled: whether there are texts without labels.

    Raises:
        SettingError: a value is out of its range, a setting belongs to the other kind of model, or has no effect.
    """
    values = {} if settings is None else vars(settings)
    given = {name: value for name, value in values.items() if value is not NOT_GIVEN}
    known = {field.name for field in dataclasses.fields(kind.config_class)}
    for name in given:
        if name not in known:
            others = next(other.models for other in MODEL_KINDS if other is not kind)
            raise UsageError(
                f"--{name.replace('_', '-')} is a setting of {others}, and this trains {kind.model}."
            )
    try:
        config = kind.config_class.from_dict({**recipe.settings, **given})
    except ValueError as error:
        raise UsageError(str(error)) from error
    check_effects(given, config, command, method, unlabelled=unlabelled)
    return config


def read_recipe(path: Path | None, options: TrainingDataOptions) -> Recipe:
    """The recipe file, or an empty recipe.

    Args:
        path: the file, or None.
        options: say what is to be trained, hence which settings there are; where they do not, the recipe's task does.
    """
    if path is None:
        return Recipe()
    if options.task is None and options.train_file is None:
        return load_recipe(path)
    return load_recipe(path, options.kind().config_class)


def check_one_or_two(text_columns: Sequence[str] | None) -> None:
    """Raise UsageError where more columns are named than a row has texts."""
    if text_columns is not None and len(text_columns) > 2:
        raise UsageError(f"--text-columns takes one column or two, got {len(text_columns)}.")


def check_column_count(text_columns: Sequence[str] | None, pairs: bool | None, model: str) -> None:
    """--text-columns names as many columns as the model takes texts; None for what is not known.

    Raises:
        UsageError: it does not.
    """
    if text_columns is not None and pairs is not None and len(text_columns) != 1 + pairs:
        texts = "two texts" if pairs else "one text"
        raise UsageError(f'Model "{model}" takes {texts}, and --text-columns names {len(text_columns)}.')
