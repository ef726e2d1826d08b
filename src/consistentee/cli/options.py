"""What the commands have in common: options for data and training settings, and how they become data and a config."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

from cyclopts import Group, Parameter

from consistentee.atomic_files import write_text
from consistentee.cli.effects import Command, check_effects
from consistentee.config import ClassificationTrainingConfig, GenerationTrainingConfig, TrainingConfig
from consistentee.data.recipes import Recipe, load_recipe
from consistentee.data.tasks import is_generation_task
from consistentee.errors import UsageError

if TYPE_CHECKING:
    from consistentee.data.rows import TextDataset

DATA = Group("Data", sort_key=1)
SETTINGS = Group("Settings (also keys of a recipe)", sort_key=3)
CLASSIFIER_SETTINGS = Group("Settings of classifiers only", sort_key=4)
GENERATOR_SETTINGS = Group("Settings of text generators only", sort_key=5)

HELD_OUT_SHARE = 0.1  # of the rows of a training file that comes without an evaluation file
HELD_OUT_FILE = "held_out.jsonl"

Columns = Annotated[list[str] | None, Parameter(consume_multiple=True, negative=())]
NOT_GIVEN: Any = object()  # not None: "none" is a value that some settings have
Flag = Annotated[bool, Parameter(negative=())]


Kind = Literal["classification", "generation"]
"""What a model is for."""


@Parameter(name="*", group=DATA)
@dataclass(frozen=True)
class DataOptions:
    """Which rows to read: a task by name, or files of one's own.

    Args:
        task: A task by name: sst2, mrpc, rte, qnli, qqp, mnli, cola, m-cid, stackoverflow; to generate text: alpaca,
            dolly, cnndm, xsum.
        data_dir: The task's local folder; without it the task comes from the model hub.
        eval_file: Rows to report on: CSV, TSV, JSON, Parquet, a `datasets` folder, or a data set of the hub,
            hf:user/name (with /config and :split where it has several).
        text_columns: To classify: the column of the text, or the two columns of a pair.
        label_column: To classify: the column of the label.
        prompt_column: To generate: the column of the instruction. [default: the usual names]
        input_column: To generate: the column of what the instruction is about. [default: the usual names]
        response_column: To generate: the column of the text to generate. [default: the usual names]
    """

    task: str | None = None
    data_dir: Path | None = None
    eval_file: Path | None = None
    text_columns: Columns = None
    label_column: str | None = None
    prompt_column: str | None = None
    input_column: str | None = None
    response_column: str | None = None

    def check_kind(self, kind: Kind) -> None:
        """Columns are those of the kind of rows.

        Raises:
            UsageError: a column that the other kind has.
        """
        if kind == "generation" and self.has_classifier_columns:
            raise UsageError(
                "--text-columns and --label-column go with rows to classify, and these are of text to generate."
            )
        if kind == "classification" and self.has_generator_columns:
            raise UsageError(
                "--prompt-column, --input-column and --response-column go with text to generate, and these are rows to "
                "classify."
            )

    @property
    def has_classifier_columns(self) -> bool:
        """Whether columns of rows to classify are given."""
        return bool(self.text_columns or self.label_column)

    @property
    def has_generator_columns(self) -> bool:
        """Whether columns of text to generate are given."""
        return any((self.prompt_column, self.input_column, self.response_column))

    def generator_columns(self) -> dict[str, str | None]:
        """The columns as `load_generation_files` takes them."""
        return {
            "prompt_column": self.prompt_column,
            "input_column": self.input_column,
            "response_column": self.response_column,
        }

    def check_columns(self, file_option: str, file: Path | None) -> None:
        """Columns belong to files and files need them.

        Raises:
            UsageError: one without the other, or the wrong number of columns.
        """
        if file is None:
            if self.text_columns or self.label_column:
                raise UsageError(
                    f"--text-columns and --label-column go with {file_option}; a task knows its own."
                )
            return
        if not self.text_columns or not self.label_column:
            raise UsageError(
                f"{file_option} needs --text-columns and --label-column to classify, or --response-column to generate "
                "text."
            )
        if len(self.text_columns) > 2:
            raise UsageError(f"--text-columns takes one column or two, got {len(self.text_columns)}.")


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
        """
        if self.has_classifier_columns and self.has_generator_columns:
            raise UsageError(
                "--text-columns and --label-column (to classify) and --prompt-column, --input-column and "
                "--response-column (to generate text) exclude each other: give one or the other."
            )
        if self.train_file is not None and self.task is None:
            is_text = self.train_file.suffix.lower() == ".txt" and not self.train_file.is_dir()
            kind: Kind = "generation" if self.has_generator_columns or is_text else "classification"
            if kind == "classification" and not self.has_classifier_columns:
                from consistentee.data.generation import holds_text_to_generate

                if holds_text_to_generate(self.train_file):
                    kind = "generation"
        else:
            task = self.task or recipe_task
            kind = "generation" if task is not None and is_generation_task(task) else "classification"
        self.check_kind(kind)
        return kind


def _field_docs(cls: type) -> dict[str, str]:
    """The string under each field of a class, or of a base's field; empty where the source is not at hand."""
    inherited = _field_docs(cls.__base__) if cls.__base__ not in (None, object) else {}
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except OSError:
        return inherited
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    docs = dict(inherited)
    for field, text in pairwise(body):
        match field, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(doc))):
                docs[name] = " ".join(doc.split())
            case _:
                continue
    return docs


def _setting_options() -> type:
    """A dataclass with every field of both training configs, `NOT_GIVEN` where the command line does not give it."""
    classes = (ClassificationTrainingConfig, GenerationTrainingConfig)
    hints = [get_type_hints(cls) for cls in classes]
    docs = [_field_docs(cls) for cls in classes]
    defaults = [{field.name: field.default for field in dataclasses.fields(cls)} for cls in classes]
    fields: list[tuple[str, Any, Any]] = []
    for name in dict.fromkeys([*defaults[0], *defaults[1]]):
        of = [kind for kind in (0, 1) if name in defaults[kind]]
        hint = _either(hints[0][name], hints[1][name]) if len(of) == 2 else hints[of[0]][name]
        shown = [_shown(defaults[kind][name]) for kind in of]
        default = f" [default: {shown[0]}]" if shown[0] else ""
        if shown[-1] != shown[0]:
            default += f" [default to generate text: {shown[-1]}]"
        parameter = Parameter(
            help=docs[of[0]].get(name, "") + default,
            group=SETTINGS if len(of) == 2 else (CLASSIFIER_SETTINGS, GENERATOR_SETTINGS)[of[0]],
            show_default=False,
            negative=None if hint is bool else (),
            consume_multiple=isinstance(defaults[of[0]][name], tuple),
        )
        fields.append((name, Annotated[hint, parameter], NOT_GIVEN))
    options = dataclasses.make_dataclass(
        "SettingOptions", fields, frozen=True, namespace={"__module__": __name__}
    )
    return Parameter(name="*")(options)


def _shown(default: Any) -> str:
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
    SettingOptions = ClassificationTrainingConfig
else:
    SettingOptions = _setting_options()


def training_config(
    settings: Any,
    recipe: Recipe,
    config_class: type[TrainingConfig] = ClassificationTrainingConfig,
    command: Command = "train",
) -> TrainingConfig:
    """The settings of a run: command line before recipe before defaults.

    Args:
        settings: the command line's `SettingOptions`, or None where none was given.
        recipe: the recipe file's.
        config_class: `ClassificationTrainingConfig` or `GenerationTrainingConfig`.
        command: what it is for.

    Raises:
        SettingError: a value is out of its range, a setting belongs to the other kind of model, or has no effect.
    """
    values = {} if settings is None else vars(settings)
    given = {name: value for name, value in values.items() if value is not NOT_GIVEN}
    known = {field.name for field in dataclasses.fields(config_class)}
    for name in given:
        if name not in known:
            kinds = ("text generators", "a classifier")
            of, here = (
                kinds if config_class is ClassificationTrainingConfig else ("classifiers", "a text generator")
            )
            raise UsageError(f"--{name.replace('_', '-')} is a setting of {of}, and this trains {here}.")
    try:
        config = config_class.from_dict({**recipe.settings, **given})
    except ValueError as error:
        raise UsageError(str(error)) from error
    check_effects(given, config, command)
    return config


def read_recipe(path: Path | None, options: TrainingDataOptions | None = None) -> Recipe:
    """The recipe file, or an empty recipe.

    Args:
        path: the file, or None.
        options: say what is to be trained, hence which settings there are; where they do not, the recipe's task does.
    """
    if path is None:
        return Recipe()
    if options is None or (options.task is None and options.train_file is None):
        return load_recipe(path)
    return load_recipe(path, config_class_of_kind(options.kind()))


def config_class_of_kind(kind: Kind) -> type[TrainingConfig]:
    """The training config of a kind of model."""
    return GenerationTrainingConfig if kind == "generation" else ClassificationTrainingConfig


@dataclass(frozen=True)
class TrainingData:
    """What a training command works on.

    Args:
        task: the task's name, None for files.
        train: rows to train on; selection cuts its validation part from them.
        evaluation: rows to report on.
        held_out: whether these were cut from the training file, because there was no evaluation file.
    """

    task: str | None
    train: TextDataset
    evaluation: TextDataset
    held_out: bool


def training_data(options: TrainingDataOptions, recipe: Recipe, seed: int) -> TrainingData:
    """Load what a training command is to train on and to report on.

    Args:
        options: the command line's.
        recipe: gives the task where the command line names none.
        seed: of the rows held out and drawn.

    Raises:
        UsageError: options contradict each other, or neither task nor training file is given.
        DataError: a file is missing or broken.
    """
    from consistentee.data.classification import load_files, load_task
    from consistentee.data.rows import stratified_split

    check_training_source(options)
    options.check_columns("--train-file", options.train_file)
    if options.train_file is not None:
        train, evaluation = load_files(
            options.train_file, options.eval_file, options.text_columns or (), options.label_column or ""
        )
        task = None
    else:
        task = options.task or recipe.task
        if task is None:
            raise UsageError("Give --task, or --train-file with --text-columns and --label-column.")
        task = known_task(task)
        train, evaluation = load_task(task, options.data_dir, need_train=True)
    if train is None:  # `load_files` with a file and `load_task` with need_train give rows or raise
        raise UsageError("There are no rows to train on.")
    held_out = evaluation is None
    if evaluation is None:
        kept, held = stratified_split(train.labels, HELD_OUT_SHARE, seed)
        train, evaluation = train.select(kept), train.select(held)
    return TrainingData(task, train.max_samples(options.max_train_samples, seed), evaluation, held_out)


def check_training_source(options: TrainingDataOptions) -> None:
    """A task or a file, and what goes with it."""
    if options.max_train_samples is not None and options.max_train_samples < 2:
        raise UsageError(f"--max-train-samples must be at least 2, got {options.max_train_samples}.")
    if options.train_file is not None and options.task is not None:
        raise UsageError("--task and --train-file exclude each other: give one of them.")
    if options.train_file is None and options.eval_file is not None:
        raise UsageError("--eval-file goes with --train-file; a task brings its own evaluation rows.")
    if options.train_file is not None and options.data_dir is not None:
        raise UsageError("--data-dir goes with --task, not with --train-file.")


def save_held_out(path: Path, rows: TextDataset, options: TrainingDataOptions) -> None:
    """Keep the rows that were cut from the training file, as JSON lines with its column names."""
    columns, label_column = options.text_columns or [], options.label_column or ""
    lines = [
        json.dumps(
            {**dict(zip(columns, texts, strict=True)), label_column: rows.label_names[label]},
            ensure_ascii=False,
        )
        for texts, label in zip(rows.texts, rows.labels, strict=True)
    ]
    write_text(path, "".join(line + "\n" for line in lines))


def evaluation_data(
    options: DataOptions, label_names: tuple[str, ...], model_task: str | None
) -> TextDataset:
    """Load the rows to evaluate a saved model on.

    Args:
        options: the command line's.
        label_names: the model's classes by index.
        model_task: the task the model was trained for, taken where the command line names no data.

    Raises:
        UsageError: options contradict each other, or no data is given.
        DataError: a file is missing or broken.
    """
    from consistentee.data.classification import load_files, load_task

    options.check_kind("classification")
    options.check_columns("--eval-file", options.eval_file)
    if options.eval_file is not None:
        if options.task is not None or options.data_dir is not None:
            raise UsageError("--eval-file excludes --task and --data-dir: give one or the other.")
        _, evaluation = load_files(
            None, options.eval_file, options.text_columns or (), options.label_column or "", label_names
        )
        if evaluation is None:
            raise UsageError("There are no rows to evaluate on.")
        return evaluation
    task = options.task or model_task
    if task is None:
        raise UsageError(
            "Give --task with --data-dir, or --eval-file with --text-columns and --label-column."
        )
    return load_task(known_task(task), options.data_dir, label_names=label_names)[1]


def check_column_count(text_columns: Sequence[str] | None, pairs: bool | None, model: str) -> None:
    """--text-columns names as many columns as the model takes texts; None for what is not known.

    Raises:
        UsageError: it does not.
    """
    if text_columns is not None and pairs is not None and len(text_columns) != 1 + pairs:
        texts = "two texts" if pairs else "one text"
        raise UsageError(f'Model "{model}" takes {texts}, and --text-columns names {len(text_columns)}.')


def known_task(name: str) -> str:
    """The task's own spelling of its name.

    Raises:
        UsageError: there is no such task.
    """
    from consistentee.data.tasks import get_task

    try:
        return get_task(name).name
    except ValueError as error:
        raise UsageError(str(error)) from error
