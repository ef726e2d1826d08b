"""Where the rows of a task come from: its data set on the hub, or files in a local folder."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from consistentee.data.encodings import file_lines
from consistentee.data.files import open_table
from consistentee.data.hub import table_of
from consistentee.data.parsing import Numbered, quoted
from consistentee.data.tables import Table
from consistentee.data.tasks import ClassificationTask, GenerationTask, plain_name
from consistentee.errors import DataError

LOCAL_ENDINGS = (".tsv", ".jsonl", ".csv", ".parquet", ".json")

_SHARD = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<ending>\.\w+)")

AnyTask = ClassificationTask | GenerationTask


def task_tables(task: AnyTask, data_dir: str | os.PathLike[str] | None) -> tuple[Table | None, Table | None]:
    """The training and the evaluation table of a task; one of them may be missing.

    A folder inside `data_dir` that has the task's name comes before `data_dir` itself. In a folder a file is the one of
    its name ("train", "dev"), else the only one whose name begins so, what is to be learned in it before one without
    (GLUE-like test files have no labels); for tasks that cut evaluation rows from training rows also the only file.
    The shards of a file (`train-00000-of-00002.parquet`) are read as one.

    Args:
        task: A row of `tasks.TASKS`.
        data_dir: The task's folder, or the folder that holds it; None loads from the hub.

    Raises:
        DataError: Nothing there, or several files that may be meant.
    """
    return _hub_tables(task) if data_dir is None else _local_tables(task, Path(data_dir))


def no_training_rows(task: AnyTask, data_dir: str | os.PathLike[str] | None, reason: str) -> DataError:
    """The error about a folder without a training file."""
    return DataError(
        f'There is no training file of task "{task.name}" {reason}.',
        file=data_dir,
        remedy=f"Put {' or '.join('train' + ending for ending in LOCAL_ENDINGS)} there.",
    )


def _hub_tables(task: AnyTask) -> tuple[Table, Table | None]:
    if task.hub_path is None:
        raise DataError(
            f'Task "{task.name}" has no canonical home on the hub.',
            remedy="Give --data-dir with train.tsv, dev.tsv and test.tsv of text<TAB>label; "
            f"the data are at {task.home}.",
        )
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


def _local_tables(task: AnyTask, root: Path) -> tuple[Table | None, Table | None]:
    if not root.is_dir():
        raise DataError("There is no such folder.", file=root, remedy="Check --data-dir.")
    names = {plain_name(name) for name in (task.name, *task.aliases)}
    inner = sorted(path for path in root.iterdir() if path.is_dir() and plain_name(path.name) in names)
    cuts = task.evaluation_rows is not None
    for folder in (*inner, root):  # the folder with the task's name is the surer one
        there = sorted(path for path in folder.iterdir() if path.is_file())
        files = [path for ending in LOCAL_ENDINGS for path in there if path.suffix.lower() == ending]
        train = _first_table(task, files, ("train",))
        evaluation = _first_table(task, files, task.evaluation_files)
        if cuts and train is None and evaluation is None and len(_without_notes(files)) == 1:
            train = _open(task, _without_notes(files))
        if evaluation is not None or (cuts and train is not None):
            return train, evaluation
    stems = (*(["train"] if cuts else []), *task.evaluation_files)
    raise DataError(
        f'There is no {"" if cuts else "evaluation "}file of task "{task.name}" in it or in its folder "{task.name}".',
        file=root,
        remedy=f"Give the folder that holds one of {', '.join(stem + LOCAL_ENDINGS[0] for stem in stems)} (or "
        f"{', '.join(LOCAL_ENDINGS[1:])}){', or a single file' if cuts else ''}.",
    )


def _first_table(task: AnyTask, files: Sequence[Path], stems: Sequence[str]) -> Table | None:
    """The first file of these names that is there, one that has what is to be learned before one without."""
    without: Table | None = None
    for paths in (paths for stem in stems for paths in _files_of(files, stem)):
        columns, table = _open(task, paths).with_columns()
        if any(layout.needed[-1] in columns for layout in task.layouts):
            return table
        without = without or table
    return without


def _files_of(files: Sequence[Path], stem: str) -> list[Sequence[Path]]:
    """The files whose name is the stem, or the only one, or the shards, whose name begins with it."""
    exact = [path for path in files if path.stem.lower() == stem]
    begin = [path for path in _without_notes(files) if path.stem.lower().startswith(stem)]
    shards = [] if exact else _shards(begin)
    if shards:
        return [shards]
    if len(begin) > 1 and not exact:
        remedy = f"Keep one, or name the one to read {stem}{begin[0].suffix}."
        names = quoted(sorted(path.name for path in begin))
        raise DataError(f"Several files begin with {stem}: {names}.", file=begin[0].parent, remedy=remedy)
    return [[path] for path in exact or begin]


def _shards(files: Sequence[Path]) -> list[Path]:
    """The shards of one file in their order, none where the files are something else.

    Raises:
        DataError: Some of them are missing.
    """
    found = [match for path in files if (match := _SHARD.fullmatch(path.name))]
    if (
        not found
        or len(found) < len(files)
        or len({match.group("name", "count", "ending") for match in found}) > 1
    ):
        return []
    name, count, ending = found[0].group("name", "count", "ending")
    wanted = [files[0].with_name(f"{name}-{number:05}-of-{count}{ending}") for number in range(int(count))]
    missing = [path.name for path in wanted if path not in files]
    if missing:
        problem = f"Of {int(count)} shards there are missing {quoted(missing)}."
        remedy = "Put all of them there, or give one file with all rows."
        raise DataError(problem, file=files[0].parent, remedy=remedy)
    return wanted


def _without_notes(files: Sequence[Path]) -> Sequence[Path]:
    """All but JSON files, which may also describe the others, where there are others."""
    return [path for path in files if path.suffix.lower() != ".json"] or files


def _open(task: AnyTask, paths: Sequence[Path]) -> Table:
    """The rows of a file, or of its shards, which are then counted through."""
    first = _open_one(task, paths[0])
    if len(paths) == 1:
        return first

    def rows() -> Numbered:
        numbers = itertools.count(1)
        for table in itertools.chain([first], (_open_one(task, path) for path in paths[1:])):
            yield from ((next(numbers), values) for _, values in table.rows)
            if first.skipped is not None and table is not first:
                first.skipped.extend(table.skipped or ())

    name = re.sub(r"-\d{5}-of-", "-*-of-", paths[0].name)
    return replace(first, file=str(paths[0].with_name(name)), rows=rows(), unit="row")


def _open_one(task: AnyTask, path: Path) -> Table:
    header = task.local_header if path.suffix.lower() == ".tsv" else None
    if header is not None:
        names = {name.strip() for name in next(file_lines(path), (1, ""))[1].split("\t")}
        if any(set(layout.needed) <= names for layout in task.layouts):
            header = None
    return open_table(path, header=header, skip_broken=task.skip_broken_rows)
