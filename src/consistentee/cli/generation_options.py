"""How the command line's options become prompts and references to train on and to report on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from consistentee.atomic_files import write_text
from consistentee.cli.options import (
    HELD_OUT_FILE,
    HELD_OUT_SHARE,
    DataOptions,
    TrainingDataOptions,
    UsageError,
    check_training_source,
)
from consistentee.data.recipes import Recipe
from consistentee.data.tasks import GenerationTask, get_task

if TYPE_CHECKING:
    from consistentee.data.rows import InstructionDataset

HELD_OUT_TEXTS = "held_out.txt"


@dataclass(frozen=True)
class GenerationData:
    """What a training command works on to make a text generator; fields as in `TrainingData`."""

    task: str | None
    train: InstructionDataset
    evaluation: InstructionDataset
    held_out: bool


def generation_training_data(options: TrainingDataOptions, recipe: Recipe, seed: int) -> GenerationData:
    """Load what a training command is to make a text generator from and to report on; as `training_data`."""
    from consistentee.data.generation import load_generation_files, load_generation_task

    check_training_source(options)
    if options.train_file is not None:
        train, evaluation = load_generation_files(
            options.train_file, options.eval_file, **options.generator_columns()
        )
        task = None
    else:
        if options.has_generator_columns:
            raise UsageError(
                "--prompt-column, --input-column and --response-column go with --train-file; a task knows its own."
            )
        task = get_task(options.task or recipe.task or "", GenerationTask).name
        train, evaluation = load_generation_task(task, options.data_dir, need_train=True)
    if train is None:  # both loaders give rows or raise
        raise UsageError("There are no rows to train on.")
    held_out = evaluation is None
    if evaluation is None:
        kept, held = train.split(HELD_OUT_SHARE, seed)
        train, evaluation = train.select(kept), train.select(held)
    return GenerationData(task, train.max_samples(options.max_train_samples, seed), evaluation, held_out)


def save_held_out_texts(folder: Path, rows: InstructionDataset, options: TrainingDataOptions) -> Path:
    """Keep the rows that were cut from the training file, so that --eval-file reads them.

    Returns:
        The file: JSON lines with the columns that were named, or of conversations ("messages"), or texts with blank
        lines between them.
    """
    if not any(rows.instructions) and not any(rows.inputs):
        path = folder / HELD_OUT_TEXTS
        write_text(path, "\n\n".join(rows.references) + "\n")
        return path
    path = folder / HELD_OUT_FILE
    if rows.history is not None and rows.conversations is not None:
        write_text(path, "".join(line + "\n" for line in _conversations(rows)))
        return path
    columns = (
        options.prompt_column or "instruction",
        options.input_column or "input",
        options.response_column or "output",
    )
    lines = [
        json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False)
        for row in zip(rows.instructions, rows.inputs, rows.references, strict=True)
    ]
    write_text(path, "".join(line + "\n" for line in lines))
    return path


def _conversations(rows: InstructionDataset) -> Iterator[str]:
    """JSON lines of whole conversations: that of a row which is the last one of its conversation."""
    of = rows.conversations or []
    for row, (instruction, _, history) in enumerate(rows.prompts()):
        if row + 1 == len(rows) or of[row] != of[row + 1]:
            turns = [*history, ("user", instruction), ("assistant", rows.references[row])]
            messages = [{"role": role, "content": text} for role, text in turns]
            yield json.dumps({"messages": messages}, ensure_ascii=False)


def generation_evaluation_data(options: DataOptions, model_task: str | None) -> InstructionDataset:
    """Load the prompts and references to evaluate a saved text generator on; as `evaluation_data`."""
    from consistentee.data.generation import load_generation_files, load_generation_task

    options.check_kind("generation")
    if options.eval_file is not None:
        if options.task is not None or options.data_dir is not None:
            raise UsageError("--eval-file excludes --task and --data-dir: give one or the other.")
        _, rows = load_generation_files(None, options.eval_file, **options.generator_columns())
        if rows is None:
            raise UsageError("There are no rows to evaluate on.")
        return rows
    if options.has_generator_columns:
        raise UsageError(
            "--prompt-column, --input-column and --response-column go with --eval-file; a task knows its own."
        )
    task = options.task or model_task
    if task is None:
        raise UsageError("Give --task with --data-dir, or --eval-file.")
    try:
        name = get_task(task, GenerationTask).name
    except ValueError as error:
        raise UsageError(str(error)) from error
    return load_generation_task(name, options.data_dir)[1]
