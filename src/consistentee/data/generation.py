"""Prompts and their reference responses: loading them by task or from files, and splitting them."""

from __future__ import annotations

import itertools
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from consistentee.data.classification import BROKEN_SHARE
from consistentee.data.conversations import CONVERSATION_COLUMNS, answers, read_turns
from consistentee.data.encodings import decoded_lines, file_lines
from consistentee.data.files import FORMATS, HUB_PREFIX, Table, json_format, open_table, table_of
from consistentee.data.instructions import InstructionDataset, split_rows
from consistentee.data.parsing import Numbered, parse, quoted, raise_or_skip
from consistentee.data.tasks import END_MARKER, GenerationTask, PromptColumns, get_task, plain_name
from consistentee.errors import DataError

__all__ = [
    "InstructionDataset",
    "conversation_column",
    "holds_text_to_generate",
    "load_generation_files",
    "load_generation_task",
    "read_prompts",
    "split_rows",
]

_log = logging.getLogger(__name__)

LOCAL_ENDINGS = (".jsonl", ".csv", ".parquet", ".json")
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
    tables = _hub_tables(task) if data_dir is None else _local_tables(task, Path(data_dir))
    sets = [_read(table, task.layouts, task.instruction) for table in tables if table is not None]
    if tables[1] is None:
        train, evaluation = _without_last(sets[0], task.evaluation_rows)
    else:
        train, evaluation = (sets[0] if len(sets) == 2 else None), sets[-1]
    if need_train and train is None:
        raise DataError(
            f'There are no training rows of task "{task.name}".',
            file=data_dir,
            remedy=f"Put {' or '.join('train' + ending for ending in LOCAL_ENDINGS)} there.",
        )
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
            to learn: one a line, or, where there are blank lines, one between two of them. None for none.
        eval_file: The same; of a folder with several splits, "validation" is read, else "test".
        prompt_column: Column of the instruction; None takes the first of PROMPT_COLUMNS that the file has.
        input_column: Column of the input; None takes the first of INPUT_COLUMNS, if there is one.
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
        context = input_column or next((name for name in INPUT_COLUMNS if name in free), INPUT_COLUMNS[0])
        for column in (prompt, response, *([] if input_column is None else [input_column])):
            if column not in columns:
                raise table.error(1, f'There is no column "{column}".', f"Columns here: {quoted(columns)}.")
        return _read(table, (PromptColumns(response, prompt, context),), "")

    return rows(train_file), rows(eval_file, ("validation", "test"))


def conversation_column(columns: Sequence[str], named: Sequence[str] = ()) -> str | None:
    """The column that holds conversations: one that is named, or, where none is, the usual; None where none does."""
    looked_at = named or columns
    return next((name for name in CONVERSATION_COLUMNS if name in looked_at and name in columns), None)


def holds_text_to_generate(path: str | os.PathLike[str]) -> bool:
    """Whether a file's columns say that it is to generate from: conversations, or instructions with responses.

    Nothing but its first row is read; what cannot be read is none.
    """
    try:
        columns, _ = open_table(path).with_columns()
    except DataError:
        return False
    asks = "instruction" in columns and any(name in columns for name in RESPONSE_COLUMNS)
    return asks or conversation_column(columns) is not None


def read_prompts(
    source: str | os.PathLike[str] | IO[str] | IO[bytes],
    *,
    prompt_column: str | None = None,
    input_column: str | None = None,
) -> Iterator[dict[str, str]]:
    """Prompts to respond to, one after the other, without ever holding the whole input.

    Args:
        source: A file, "-" for standard input, or an open stream. `.jsonl`, `.csv`, `.tsv` and `.parquet` hold columns,
            every other file one prompt a line. A stream is JSON lines if it starts with "{".
        prompt_column: Column of the instruction; None takes the first of PROMPT_COLUMNS that the row has.
        input_column: Column of the input, which rows may lack; None takes the first of INPUT_COLUMNS, if there is one.

    Yields:
        `prompt` and `input` ("" where there is none) of every prompt.

    Raises:
        DataError: A file that is missing or empty, a row that is broken or whose prompt is empty.
    """
    if isinstance(source, (str, os.PathLike)) and os.fspath(source).startswith(HUB_PREFIX):
        table = open_table(source, splits=("test", "validation", "train"))
        return _prompts(table, prompt_column, input_column)
    if isinstance(source, (str, os.PathLike)) and os.fspath(source) != "-":
        path = Path(source)
        if not path.is_file():
            remedy = 'Check the path, or give "-" for standard input.'
            raise DataError("There is no such file.", file=path, remedy=remedy)
        if path.suffix.lower() in FORMATS:
            table = open_table(path)
        else:
            table = Table(str(path), _one_a_line(file_lines(path), str(path), "prompt"))
        return _prompts(table, prompt_column, input_column)
    if isinstance(source, (str, os.PathLike)):
        stream, file = getattr(sys.stdin, "buffer", sys.stdin), "standard input"
    else:
        stream, file = source, str(getattr(source, "name", "the stream"))
    return _prompts_of_stream(decoded_lines(stream, file), file, prompt_column, input_column)


def _prompts(table: Table, prompt_column: str | None, input_column: str | None) -> Iterator[dict[str, str]]:
    _, table = table.with_columns()
    for row, values in table.rows:
        free = [column for column in values if column not in (prompt_column, input_column)]
        prompt = prompt_column or _known(table, row, free, PROMPT_COLUMNS, "prompt")
        context = input_column or next((name for name in INPUT_COLUMNS if name in free), None)
        (text,) = table.texts_of(row, values, (prompt,))
        yield {"prompt": text, "input": _optional_text(table, row, values, context)}


def _prompts_of_stream(
    lines: Numbered, file: str, prompt_column: str | None, input_column: str | None
) -> Iterator[dict[str, str]]:
    first = next(lines, None)
    if first is not None:
        lines = itertools.chain([first], lines)
    file_format = json_format("" if first is None else first[1])
    rows = _one_a_line(lines, file, "prompt") if file_format is None else parse(lines, file, file_format)
    table = Table(file, rows, "row" if file_format == "json array" else "line")
    yield from _prompts(table, prompt_column, input_column)


def _one_a_line(lines: Numbered, file: str, column: str) -> Numbered:
    """Lines as rows of one column; blank ones may only stand at the end."""
    blank: int | None = None
    for number, line in lines:
        text = line.removesuffix("\n").removesuffix("\r")
        if not text.strip():
            blank = blank or number
            continue
        if blank is not None:
            raise DataError("The line is empty.", file=file, row=blank, remedy="Remove it.")
        yield number, {column: text}


def _plain_texts(path: Path) -> InstructionDataset:
    if not path.is_file():
        raise DataError("There is no such file or folder.", file=path, remedy="Check the path.")
    text = "".join(line for _, line in file_lines(path)).replace("\r\n", "\n").strip("\n")
    blocks: list[list[str]] = [[]]
    for line in text.split("\n"):
        if line.strip():
            blocks[-1].append(line)
        elif blocks[-1]:
            blocks.append([])
    blocks = [block for block in blocks if block]
    if not blocks:
        raise DataError("There is no text in it.", file=path, remedy="Give at least one text.")
    texts = ["\n".join(block) for block in blocks] if len(blocks) > 1 else blocks[0]
    return InstructionDataset([""] * len(texts), [""] * len(texts), texts, str(path))


def _known(table: Table, row: int, columns: Sequence[str], known: Sequence[str], what: str) -> str:
    """The first of the known columns that is there."""
    found = next((name for name in known if name in columns), None)
    if found is None:
        problem = f"None of its columns is known to hold the {what}: {quoted(columns)}."
        raise table.error(row, problem, f"Name the column, or call it one of {quoted(known)}.")
    return found


def _optional_text(table: Table, row: int, values: Mapping[str, Any], column: str | None) -> str:
    value = None if column is None else values.get(column)
    if column is None or value is None or (isinstance(value, str) and not value.strip()):
        return ""
    return table.texts_of(row, values, (column,))[0].strip()


def _read(table: Table, layouts: Sequence[PromptColumns], instruction: str) -> InstructionDataset:
    """Every row of a table; broken ones raise, or are left out where the table collects them."""
    columns, table = table.with_columns()
    layout = next((layout for layout in layouts if set(layout.needed) <= set(columns)), None)
    if layout is None:
        wanted = " or ".join(f"({quoted(layout.needed)})" for layout in layouts)
        remedy = f"Columns here: {quoted(columns)}. Rename those of the file."
        raise table.error(1, f"It has none of the sets of columns {wanted}.", remedy)
    data = InstructionDataset([], [], [], table.file)
    for number, values in table.rows:
        try:
            asked, context, reference = _row(table, number, values, layout)
        except DataError as error:
            raise_or_skip(error, table.skipped)
            continue
        data.instructions.append(asked or instruction)
        data.inputs.append(context)
        data.references.append(reference)
    if table.skipped:
        if len(table.skipped) > BROKEN_SHARE * (len(data) + len(table.skipped)):
            raise table.skipped[0]
        _log.warning("Broken rows skipped: %d. The first: %s", len(table.skipped), table.skipped[0])
    if not data:
        raise table.error(None, "No row of it can be used.", "Give a file with at least one whole row.")
    return data


def _read_conversations(table: Table, column: str) -> InstructionDataset:
    data = InstructionDataset([], [], [], table.file, [], [])
    history, conversations = data.history or [], data.conversations or []
    for number, values in table.rows:
        for before, question, answer in answers(read_turns(table, number, values, column)):
            data.instructions.append(question)
            data.inputs.append("")
            data.references.append(answer)
            history.append(before)
            conversations.append(number)
    return replace(data, history=history, conversations=conversations)


def _row(table: Table, number: int, values: Mapping[str, Any], layout: PromptColumns) -> tuple[str, str, str]:
    """Instruction ("" where the task has one for all rows), input and reference of a row."""
    prompt, reference = (text.strip() for text in table.texts_of(number, values, layout.needed))
    reference = reference.removesuffix(END_MARKER).rstrip()
    if not reference:
        problem = f'The text in column "{layout.response}" is empty.'
        raise table.error(number, problem, f"Fill it in or remove the {table.unit}.")
    if layout.instruction is None:
        return "", prompt if layout.clean_input is None else layout.clean_input(prompt), reference
    if layout.split_prompt is not None:
        return *layout.split_prompt(prompt), reference
    return prompt, _optional_text(table, number, values, layout.input), reference


def _without_last(
    data: InstructionDataset, count: int
) -> tuple[InstructionDataset | None, InstructionDataset]:
    """All rows but the last, and the last `count`: a tenth of the rows where that would leave less than half."""
    count = count if 2 * count <= len(data) else max(1, len(data) // 10)
    first = len(data) - count
    train = replace(data.select(range(first)), source=f"{data.source}, all but the last {count} rows")
    evaluation = replace(data.select(range(first, len(data))), source=f"{data.source}, the last {count} rows")
    return train if len(train) else None, evaluation


def _hub_tables(task: GenerationTask) -> tuple[Table, Table | None]:
    import datasets

    name = "/".join(part for part in (task.hub_path, task.hub_config) if part is not None)
    split = task.evaluation_split
    try:
        splits = datasets.load_dataset(task.hub_path, task.hub_config)
        train, evaluation = splits["train"], None if split is None else splits[split]
    except Exception as error:  # whatever the network, the hub or the cache comes up with
        reason = " ".join(str(error).split()) or type(error).__name__
        remedy = "Check the network, or give --data-dir with the task's files."
        raise DataError(
            f"It could not be loaded from the hub: {reason}.", file=name, remedy=remedy
        ) from error
    return (
        table_of(train, f"{name} train", skip_broken=True),  # nobody can correct the rows of the hub
        None if evaluation is None else table_of(evaluation, f"{name} {split}", skip_broken=True),
    )


def _local_tables(task: GenerationTask, root: Path) -> tuple[Table | None, Table | None]:
    if not root.is_dir():
        raise DataError("There is no such folder.", file=root, remedy="Check --data-dir.")
    names = {plain_name(name) for name in (task.name, *task.aliases)}
    inner = sorted(path for path in root.iterdir() if path.is_dir() and plain_name(path.name) in names)
    for folder in (*inner, root):  # the folder with the task's name is the surer one
        files = sorted(
            path for path in folder.iterdir() if path.is_file() and path.suffix.lower() in LOCAL_ENDINGS
        )
        lines = [
            path for path in files if path.suffix.lower() != ".json"
        ]  # which may also describe the others
        files = lines or files
        train = _one_file(files, "train")
        evaluation = next(filter(None, (_one_file(files, stem) for stem in task.evaluation_files)), None)
        if train is None and evaluation is None and len(files) == 1:
            train = files[0]
        if train is not None or evaluation is not None:
            return (
                None if train is None else open_table(train, skip_broken=True),
                None if evaluation is None else open_table(evaluation, skip_broken=True),
            )
    looked_for = ", ".join(f"{stem}{LOCAL_ENDINGS[0]}" for stem in ("train", *task.evaluation_files))
    raise DataError(
        f'There is no file of task "{task.name}" in it or in its folder "{task.name}".',
        file=root,
        remedy=f"Give the folder that holds {looked_for} (or {', '.join(LOCAL_ENDINGS[1:])}), or a single file.",
    )


def _one_file(files: Sequence[Path], stem: str) -> Path | None:
    """The file whose name is the stem, or the only one whose name begins with it."""
    begin = [path for path in files if path.stem.lower().startswith(stem)]
    exact = [path for path in begin if path.stem.lower() == stem]
    found = exact or begin
    if len(found) > 1:
        remedy = f"Keep one, or name the one to read {stem}{found[0].suffix}."
        names = quoted(path.name for path in found)
        raise DataError(f"Several files begin with {stem}: {names}.", file=found[0].parent, remedy=remedy)
    return found[0] if found else None
