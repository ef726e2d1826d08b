"""Instructions with responses, by task or from files of one's own; prompts to respond to."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from consistentee.data.conversations import CONVERSATION_COLUMNS, answers, read_turns
from consistentee.data.encodings import file_lines
from consistentee.data.files import Source, open_table, read_source
from consistentee.data.parsing import quoted
from consistentee.data.rows import InstructionDataset
from consistentee.data.sources import no_training_rows, task_tables
from consistentee.data.tables import Table
from consistentee.data.tasks import END_MARKER, GenerationTask, PromptColumns, get_task
from consistentee.errors import DataError

PROMPT_COLUMNS = ("instruction", "prompt", "question", "article", "document", "text")
INPUT_COLUMNS = ("input", "context")
RESPONSE_COLUMNS = ("output", "response", "answer", "completion", "summary", "highlights")
"""Columns that are taken where none are named, the first that is there."""


def load_generation_task(
    name: str, data_dir: str | os.PathLike[str] | None = None, *, need_train: bool = False
) -> tuple[InstructionDataset | None, InstructionDataset]:
    """Training and evaluation rows of a generation task, from the hub or from a local folder.

    Published files hold a few rows without a response: they are left out.

    Args:
        name: A generation task of `tasks.TASKS`.
        data_dir: The task's folder, or the folder that holds it, with files whose names begin with train and with
            test, validation or dev, or with a single file; None loads from the hub.
        need_train: Whether a missing training file is an error.

    Returns:
        The training rows (None where there are none) and the evaluation rows. Where there is one set of rows, its last
        `GenerationTask.evaluation_rows` are the evaluation rows, or its last tenth where that would be over half.

    Raises:
        DataError: A missing or broken file; the message names file, row and remedy.
        ValueError: An unknown task.
    """
    task = get_task(name, GenerationTask)
    sets = [
        None if table is None else _read(table, task.layouts, task.instruction, clean=True)
        for table in task_tables(task, data_dir)
    ]
    train, evaluation = sets
    if evaluation is None and train is not None:
        train, evaluation = _without_last(train, task.evaluation_rows or 1)
    if evaluation is None or (need_train and train is None):
        raise no_training_rows(task, data_dir, "to train on")
    return train, evaluation


def load_generation_files(
    train_file: str | os.PathLike[str] | None,
    eval_file: str | os.PathLike[str] | None,
    *,
    prompt_column: str | None = None,
    input_column: str | None = None,
    response_column: str | None = None,
) -> tuple[InstructionDataset | None, InstructionDataset | None]:
    """Training and evaluation rows from files of one's own.

    Args:
        train_file: CSV, TSV, JSON or Parquet file, or a `datasets.save_to_disk` folder, of instructions and responses,
            or of conversations (`conversations.read_turns`), whose answers are a row each; or a `.txt` file of texts
            to learn: one a line, or, where a blank line is before or between them, all lines up to the next blank
            one. None for none.
        eval_file: The same; of a folder with several splits, "validation" is read, else "test".
        prompt_column: Column of the instruction; None takes the first of PROMPT_COLUMNS that the file has.
        input_column: Column of the input, which rows may lack; None takes the first of INPUT_COLUMNS that a row has and
            that is not named for something else.
        response_column: Column of the response; None takes the first of RESPONSE_COLUMNS that the file has.

    Returns:
        The training rows and the evaluation rows, each None where no file was given.

    Raises:
        DataError: A missing or broken file, an empty instruction or response; the message names file, row and remedy.
        ValueError: No file, or the same column twice.
    """
    if train_file is None and eval_file is None:
        raise ValueError("train_file or eval_file must be given, got neither.")
    named = [column for column in (prompt_column, input_column, response_column) if column is not None]
    if len(set(named)) < len(named):
        raise ValueError(f"Columns must differ, got {quoted(named)}.")

    def rows(
        path: str | os.PathLike[str] | None, splits: tuple[str, ...] = ("train",)
    ) -> InstructionDataset | None:
        if path is None:
            return None
        if Path(path).suffix.lower() == ".txt" and not Path(path).is_dir():
            return _plain_texts(Path(path))
        columns, table = open_table(path, splits=splits).with_columns()
        conversation = conversation_column(columns, named)
        if conversation is not None:
            return _read_conversations(table, conversation)
        free = [column for column in columns if column not in named]  # a named column has its one role
        prompt = prompt_column or _known(table, 1, free, PROMPT_COLUMNS, "instruction")
        response = response_column or _known(table, 1, free, RESPONSE_COLUMNS, "response")
        for column in (prompt, response):
            if column not in columns:
                raise table.error(1, f'There is no column "{column}".', f"Columns here: {quoted(columns)}.")
        data = _read(table, (PromptColumns(response, prompt, input_column),), "")
        if input_column is not None and input_column not in columns and not any(data.inputs):
            raise table.error(
                None, f'There is no column "{input_column}".', f"Columns here: {quoted(columns)}."
            )
        return data

    return rows(train_file), rows(eval_file, ("validation", "test"))


def conversation_column(columns: Sequence[str], named: Sequence[str] = ()) -> str | None:
    """The column that holds conversations: one that is named, or, where none is, the usual; None where none does."""
    looked_at = named or columns
    return next((name for name in CONVERSATION_COLUMNS if name in looked_at and name in columns), None)


def holds_text_to_generate(path: str | os.PathLike[str]) -> bool:
    """Whether a file's columns say that it is to generate from: conversations, or instructions with responses.

    Nothing but its first row is read.

    Raises:
        DataError: The file is missing or its beginning broken.
    """
    columns, _ = open_table(path).with_columns()
    asks = "instruction" in columns and any(name in columns for name in RESPONSE_COLUMNS)
    return asks or conversation_column(columns) is not None


def read_prompts(
    source: Source, *, prompt_column: str | None = None, input_column: str | None = None
) -> Iterator[dict[str, str]]:
    """Prompts to respond to, one after the other.

    Args:
        source: As in `files.read_source`.
        prompt_column: Column of the instruction; None takes the first of PROMPT_COLUMNS that the row has.
        input_column: Column of the input, which rows may lack; None takes the first of INPUT_COLUMNS, if there is one.

    Yields:
        `prompt` and `input` ("" where there is none) of every prompt.

    Raises:
        DataError: A file that is missing or empty, a row that is broken or whose prompt is empty.
    """
    prompts = partial(_prompts, prompt_column=prompt_column, input_column=input_column)
    columns = [column for column in (prompt_column, input_column) if column]
    known = [(name,) for name in PROMPT_COLUMNS]
    return read_source(source, prompts, columns=columns, pairs=False, known=known)


def _prompts(table: Table, prompt_column: str | None, input_column: str | None) -> Iterator[dict[str, str]]:
    _, table = table.with_columns()
    for row, values in table.rows:
        free = [column for column in values if column not in (prompt_column, input_column)]
        prompt = prompt_column or _known(table, row, free, PROMPT_COLUMNS, "prompt")
        context = input_column or _usual_input(free)
        (text,) = table.texts_of(row, values, (prompt,))
        yield {"prompt": text, "input": _optional_text(table, row, values, context)}


def _plain_texts(path: Path) -> InstructionDataset:
    if not path.exists():
        raise DataError("There is no such file or folder.", file=path, remedy="Check the path.")
    text = "".join(line for _, line in file_lines(path)).replace("\r\n", "\n")
    blocks: list[list[str]] = [[]]
    for line in text.split("\n"):
        if line.strip():
            blocks[-1].append(line)
        else:
            blocks.append([])
    while blocks and not blocks[-1]:  # a blank line at the end says nothing
        blocks.pop()
    if not blocks:
        raise DataError("There is no text in it.", file=path, remedy="Give at least one text.")
    texts = ["\n".join(block) for block in blocks if block] if len(blocks) > 1 else blocks[0]
    return InstructionDataset([""] * len(texts), [""] * len(texts), texts, str(path))


def _known(table: Table, row: int, columns: Sequence[str], known: Sequence[str], what: str) -> str:
    """The first of the known columns that is there."""
    found = next((name for name in known if name in columns), None)
    if found is None:
        problem = f"None of its columns is known to hold the {what}: {quoted(columns)}."
        raise table.error(row, problem, f"Name the column, or call it one of {quoted(known)}.")
    return found


def _usual_input(columns: Sequence[str]) -> str | None:
    """The first of INPUT_COLUMNS that is there, None where none is."""
    return next((name for name in INPUT_COLUMNS if name in columns), None)


def _optional_text(table: Table, row: int, values: Mapping[str, Any], column: str | None) -> str:
    value = None if column is None else values.get(column)
    if column is None or value is None or (isinstance(value, str) and not value.strip()):
        return ""
    return table.texts_of(row, values, (column,))[0]


def _read(
    table: Table, layouts: Sequence[PromptColumns], instruction: str, *, clean: bool = False
) -> InstructionDataset:
    """Every row of a table; broken ones raise, or are left out where the table collects them.

    Args:
        table: the rows.
        layouts: which columns hold what; the first that fits.
        instruction: of rows that have none.
        clean: whether what published files have around their texts is taken off; else texts are as they are written.
    """
    layout, table = table.with_layout(layouts)
    rows = list(table.usable(lambda number, values: _row(table, number, values, layout, clean)))
    if not rows:
        raise table.error(None, "No row of it can be used.", "Give a file with at least one whole row.")
    instructions, inputs, references = ([row[part] for row in rows] for part in range(3))
    return InstructionDataset(
        [asked or instruction for asked in instructions], inputs, references, table.file
    )


def _read_conversations(table: Table, column: str) -> InstructionDataset:
    data = InstructionDataset([], [], [], table.file, [], [])
    history, conversations = data.history or [], data.conversations or []
    turns = table.usable(lambda number, values: (number, read_turns(table, number, values, column)))
    for number, conversation in turns:
        for before, question, answer in answers(conversation):
            data.instructions.append(question)
            data.inputs.append("")
            data.references.append(answer)
            history.append(before)
            conversations.append(number)
    return replace(data, history=history, conversations=conversations)


def _row(
    table: Table, number: int, values: Mapping[str, Any], layout: PromptColumns, clean: bool
) -> tuple[str, str, str]:
    """Instruction ("" where the task has one for all rows), input and reference of a row."""
    prompt, reference = table.texts_of(number, values, layout.needed)
    if clean:
        prompt, reference = prompt.strip(), reference.strip().removesuffix(END_MARKER).rstrip()
    if not reference.strip():
        problem = f'The text in column "{layout.response}" is empty.'
        raise table.error(number, problem, f"Fill it in or remove the {table.unit}.")
    if layout.instruction is None:
        return "", prompt if layout.clean_input is None else layout.clean_input(prompt), reference
    if layout.split_prompt is not None:
        return *layout.split_prompt(prompt), reference
    context = layout.input or _usual_input([name for name in values if name not in layout.needed])
    context_text = _optional_text(table, number, values, context)
    return prompt, context_text.strip() if clean else context_text, reference


def _without_last(
    data: InstructionDataset, count: int
) -> tuple[InstructionDataset | None, InstructionDataset]:
    """All rows but the last, and the last `count`: a tenth of the rows where that would leave less than half."""
    count = count if 2 * count <= len(data) else max(1, len(data) // 10)
    first = len(data) - count
    train = replace(data.select(range(first)), source=f"{data.source}, all but the last {count} rows")
    evaluation = replace(data.select(range(first, len(data))), source=f"{data.source}, the last {count} rows")
    return train if len(train) else None, evaluation
