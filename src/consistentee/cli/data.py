"""How the command line's options become rows to train on and to report on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from consistentee.atomic_files import GO_ON, write_text
from consistentee.cli.kinds import GENERATORS, Kind
from consistentee.cli.options import RowOptions, TrainingDataOptions, check_column_count
from consistentee.data.files import TO_ANSWER, read_texts
from consistentee.data.generation import INPUT_COLUMNS, PROMPT_COLUMNS, RESPONSE_COLUMNS
from consistentee.data.recipes import Recipe
from consistentee.data.rows import InstructionDataset, TextDataset, split_rows
from consistentee.data.tasks import get_task
from consistentee.errors import UsageError

HELD_OUT_SHARE = 0.1  # of the rows of a training file that comes without an evaluation file
HELD_OUT_FILE, HELD_OUT_TEXTS = "held_out.jsonl", "held_out.txt"

AnyRows = TextDataset | InstructionDataset


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
    train: Any
    evaluation: Any
    held_out: bool


def training_data(options: TrainingDataOptions, recipe: Recipe, kind: Kind, seed: int) -> TrainingData:
    """Load what a training command is to train on and to report on.

    Args:
        options: the command line's.
        recipe: gives the task where the command line names none.
        kind: of model.
        seed: of the rows held out and drawn.

    Raises:
        UsageError: options contradict each other, or neither task nor training file is given.
        DataError: a file is missing or broken.
    """
    if options.max_train_samples is not None and options.max_train_samples < 2:
        raise UsageError(f"--max-train-samples must be at least 2, got {options.max_train_samples}.")
    if options.train_file is not None and options.task is not None:
        raise UsageError("--task and --train-file exclude each other: give one of them.")
    if options.train_file is None and options.eval_file is not None:
        raise UsageError("--eval-file goes with --train-file; a task brings its own evaluation rows.")
    if options.train_file is not None and options.data_dir is not None:
        raise UsageError("--data-dir goes with --task, not with --train-file.")
    options.check_columns(kind, "--train-file", options.train_file)
    if options.train_file is not None:
        task = None
        train, evaluation = kind.load_files(options.train_file, options.eval_file, **options.columns(kind))
    else:
        if (options.task or recipe.task) is None:
            raise UsageError("Give --task, or --train-file with --text-columns and --label-column.")
        task = known_task(options.task or recipe.task or "", kind)
        train, evaluation = kind.load_task(task, options.data_dir, need_train=True)
    held_out = evaluation is None
    if held_out:
        kept, held = train.split(HELD_OUT_SHARE, seed)
        train, evaluation = train.select(kept), train.select(held)
    return TrainingData(task, train.max_samples(options.max_train_samples, seed), evaluation, held_out)


def num_copies(rows: AnyRows, others: AnyRows) -> int:
    """How many rows have the texts of one of others, whatever their labels."""
    known = set(_contents(others))
    return sum(content in known for content in _contents(rows))


def _contents(rows: AnyRows) -> Sequence[Any]:
    if isinstance(rows, TextDataset):
        return rows.texts
    return list(zip(rows.prompts(), rows.references, strict=True))


def evaluation_data(options: RowOptions, kind: Kind, model_task: str | None, **model: tuple[str, ...]) -> Any:
    """Load the rows to evaluate a saved model on.

    Args:
        options: the command line's.
        kind: of the model.
        model_task: the task the model was trained for, taken where the command line names no data.
        model: `label_names`, a classifier's classes by index.

    Raises:
        UsageError: options contradict each other, or no data is given.
        DataError: a file is missing or broken.
    """
    options.check_kind(kind)
    options.check_columns(kind, "--eval-file", options.eval_file)
    if options.eval_file is not None:
        if options.task is not None or options.data_dir is not None:
            raise UsageError("--eval-file excludes --task and --data-dir: give one or the other.")
        return kind.load_files(None, options.eval_file, **options.columns(kind), **model)[1]
    task = options.task or model_task
    if task is None:
        columns = f" with {kind.column_options}" if kind.columns_needed else ""
        raise UsageError(f"Give --task with --data-dir, or --eval-file{columns}.")
    return kind.load_task(known_task(task, kind), options.data_dir, **model)[1]


def read_all_texts(
    file: str,
    text_columns: Sequence[str] | None,
    saved: Any,
    max_samples: int | None = None,
    splits: Sequence[str] = TO_ANSWER,
) -> tuple[list[tuple[str, ...]], str]:
    """The texts of a file, in every form that `predict` reads.

    Args:
        file: its name; "-" is standard input.
        text_columns: one or two, or None for the usual names.
        saved: the classifier that is to read them.
        max_samples: at most so many, drawn at random, in their order; None takes all.
        splits: of a data set that has several, the first of these that is there.

    Returns:
        The texts, and what to call their source.

    Raises:
        UsageError: another number of columns than the model takes texts.
        DataError: the file is missing, empty or broken.
    """
    from consistentee.cli.terminal import say_reading

    say_reading(file, "texts")
    check_column_count(text_columns, saved.text_pairs, saved.name)
    texts = list(read_texts(file, text_columns, pairs=saved.text_pairs, splits=splits))
    if max_samples is not None and max_samples < len(texts):
        texts = [texts[row] for row in split_rows(len(texts), max_samples / len(texts), seed=0)[1]]
    return texts, "standard input" if file == "-" else file


def known_task(name: str, kind: Kind) -> str:
    """The task's own spelling of its name.

    Raises:
        UsageError: there is no such task of this kind.
    """
    try:
        return get_task(name, kind.task_class).name
    except ValueError as error:
        raise UsageError(str(error)) from error


def save_held_out(folder: Path, rows: AnyRows, options: TrainingDataOptions) -> Path:
    """Keep the rows that were cut from the training file, so that --eval-file reads them.

    Returns:
        The file: JSON lines with the columns that were named, or of conversations ("messages"), or texts with a
        blank line before each.

    Raises:
        FileExistsError: as `check_held_out`.
    """
    path, text = _held_out(folder, rows, options)
    if not check_held_out(folder, rows, options):
        write_text(path, text)
    return path


def check_held_out(folder: Path, rows: AnyRows, options: TrainingDataOptions) -> bool:
    """Whether the file of `save_held_out` is there already.

    Raises:
        FileExistsError: something else is there under its name.
    """
    path, text = _held_out(folder, rows, options)
    if not os.path.lexists(path):
        return False
    wanted = text.encode(errors="backslashreplace")
    if not path.is_file() or path.read_bytes().replace(b"\r\n", b"\n") != wanted.replace(b"\r\n", b"\n"):
        raise FileExistsError(
            f"{path} is no file of these rows, and those to report on would overwrite it. Move it away, then {GO_ON}."
        )
    return True


def _held_out(folder: Path, rows: AnyRows, options: TrainingDataOptions) -> tuple[Path, str]:
    """The file of rows that were cut, and what it holds."""
    if isinstance(rows, InstructionDataset) and not any(rows.instructions) and not any(rows.inputs):
        return folder / HELD_OUT_TEXTS, "".join(f"\n{text}\n" for text in rows.references)
    lines = (json.dumps(values, ensure_ascii=False) for values in _records(rows, options))
    return folder / HELD_OUT_FILE, "".join(line + "\n" for line in lines)


def _records(rows: AnyRows, options: TrainingDataOptions) -> Iterator[dict[str, Any]]:
    """Rows as values by column; of a conversation, those of its last row."""
    if isinstance(rows, TextDataset):
        for texts, label in zip(rows.texts, rows.labels, strict=True):
            named = dict(zip(options.text_columns or (), texts, strict=True))
            yield {**named, options.label_column or "": rows.label_names[label]}
        return
    given = tuple(options.columns(GENERATORS).values())
    usual = (PROMPT_COLUMNS, INPUT_COLUMNS, RESPONSE_COLUMNS)  # of which a named column has another role
    columns = [
        name or next((free for free in known if free not in given), "")
        for name, known in zip(given, usual, strict=True)
    ]
    optional = columns[1] if options.input_column is None else None
    of = rows.conversations
    for row, (instruction, context, history) in enumerate(rows.prompts()):
        reference = rows.references[row]
        if of is None:
            values = zip(columns, (instruction, context, reference), strict=True)
            yield {column: text for column, text in values if text or column != optional}
        elif row + 1 == len(rows) or of[row] != of[row + 1]:
            turns = [*history, ("user", instruction), ("assistant", reference)]
            yield {"messages": [{"role": role, "content": text} for role, text in turns]}
