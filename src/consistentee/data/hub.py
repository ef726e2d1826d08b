"""What the library `datasets` reads: data sets of the hub by name, folders that it saved, Parquet with its features."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from consistentee.data.parsing import Numbered, quoted
from consistentee.data.tables import Table
from consistentee.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

FORMATS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
"""File ending to format; for prediction every other ending is plain text, one text a line."""

HUB_PREFIX = "hf:"
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.\[\]:%+-]+)?")


@dataclass(frozen=True)
class HubSource:
    """A data set on the hub, or a folder with the files of one.

    Args:
        repository: Its name, `user/name`, or the folder.
        config: Its configuration; None for the only one.
        split: Its split; None for a usual one.
    """

    repository: str
    config: str | None = None
    split: str | None = None


def hub_source(path: str | os.PathLike[str]) -> HubSource | None:
    """What a path names on the hub: `hf:user/name`, `hf:user/name/config`, each perhaps with `:split` behind it.

    Without `hf:` it is `user/name` or `user/name:split`, where there is no such file, nor a folder `user`.

    Returns:
        The data set; None for a path.

    Example:
        >>> hub_source("hf:nyu-mll/glue/sst2:validation")
        HubSource(repository='nyu-mll/glue', config='sst2', split='validation')
        >>> hub_source("somewhere/rows.csv") is None
        True
    """
    spec = os.fspath(path)
    if not spec.startswith(HUB_PREFIX):
        is_path = Path(path).exists() or Path(path).suffix.lower() in (*FORMATS, ".txt")
        if is_path or Path(path).parent.is_dir() or _HUB_NAME.fullmatch(spec) is None:
            return None
    name, _, split = spec.removeprefix(HUB_PREFIX).partition(":")
    config = None
    if name.count("/") == 2 and not Path(name).is_dir():
        name, _, config = name.rpartition("/")
    return HubSource(name, config, split or None)


def table_of(dataset: Dataset, file: str, *, skip_broken: bool = False) -> Table:
    """The rows of a `datasets.Dataset`, with class indices turned into class names (-1, no label, into None)."""
    names = _declared_names(dataset.features)
    stored = dataset.with_format("arrow")  # all columns as they are: nothing is decoded or made a tensor
    batches: Any = stored.iter(batch_size=128)  # Arrow tables; rows may hold pictures
    rows = enumerate((values for batch in batches for values in batch.to_pylist()), start=1)
    return Table(file, _named_classes(rows, names, file), "row", names, [] if skip_broken else None)


def parquet_table(path: Path) -> Table:
    """The rows of a Parquet file, with class indices turned into the class names that `datasets` left in it."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise DataError(
            f"This is not a Parquet file: {error}.", file=path, remedy="Check the file."
        ) from None
    columns: list[str] = file.schema_arrow.names
    twice = next((name for name in columns if columns.count(name) > 1), None)
    if twice is not None:
        raise DataError(f'Column "{twice}" is there twice.', file=path, remedy="Rename one of them.")
    schema = file.schema_arrow  # whose columns may have changed since `datasets` described them
    features = _stored_features(schema.metadata)
    indices = {field.name for field in schema if pyarrow.types.is_integer(field.type)}
    names = _declared_names({column: features[column] for column in features if column in indices})

    def rows() -> Numbered:
        done = 0
        with file:
            batches = file.iter_batches(batch_size=1024)
            while True:
                try:
                    values = next(batches, None)
                except OSError as error:  # pyarrow's errors of damaged pages are of this kind, too
                    remedy = "Write the file anew."
                    raise DataError(
                        f"It is damaged behind row {done}: {error}".rstrip(".") + ".",
                        file=path,
                        remedy=remedy,
                    ) from error
                if values is None:
                    return
                yield from enumerate(values.to_pylist(), start=done + 1)
                done += len(values)

    return Table(str(path), _named_classes(rows(), names, str(path)), "row", names)


def datasets_folder(path: Path, splits: Sequence[str]) -> Table:
    """The rows of a folder of `datasets.save_to_disk`, or of a hub's data set, downloaded."""
    import datasets

    if not any((path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json", "state.json")):
        if any(file.suffix.lower() in FORMATS for file in path.rglob("*")):
            return hub_table(HubSource(str(path)), str(path), splits)
        remedy = "Give a file, or a folder written by datasets.save_to_disk."
        raise DataError("This folder is not a saved datasets folder.", file=path, remedy=remedy)
    remedy = f"Save it with a split named {' or '.join(splits)}, or give one split's own folder."
    try:
        loaded = datasets.load_from_disk(str(path))
    except ValueError as error:  # such as a feature type of a later release
        raise DataError(
            f"datasets {datasets.__version__} cannot open this folder: {' '.join(str(error).split())}",
            file=path,
            remedy="Upgrade datasets, or save the rows as Parquet or JSON lines.",
        ) from error
    return _one_split(loaded, str(path), splits, remedy)


def hub_table(source: HubSource, name: str, splits: Sequence[str]) -> Table:
    """The rows of a data set on the hub, of the first of the splits that is there.

    `skipped` collects broken ones, but for a folder by its own name: its rows can be corrected.
    """
    import datasets

    try:
        options = _as_written(source) if Path(source.repository).is_dir() else {}
        loaded: Any = datasets.load_dataset(source.repository, source.config, split=source.split, **options)
    except Exception as error:  # whatever the network, the hub, the cache or a file comes up with
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        is_folder = Path(source.repository).is_dir()
        place = (
            "It" if is_folder else f'"{source.repository}" is no file or folder here, and the hub\'s data set'
        )
        remedy = (
            "Give one of its files."
            if is_folder
            else "Check the name (hf:user/name, hf:user/name/config, either with :split) and the network, log in to "
            "the hub where it is private, or give a file."
        )
        raise DataError(f"{place} could not be loaded: {reason}.", file=name, remedy=remedy) from error
    if source.split is not None:
        splits = (source.split,)
    place = "/".join(part for part in (source.repository, source.config) if part)
    table = _one_split(loaded, name, splits, f"Name one of them: {HUB_PREFIX}{place}:SPLIT.")
    own = Path(name).is_dir()  # without `hf:`, whose rows nobody can correct
    return table if own else replace(table, skipped=[])


def _as_written(source: HubSource) -> dict[str, Any]:
    """What keeps a folder's CSV files from being guessed at: "NA" and "null" are texts, and "01" is not 1."""
    import datasets

    builder = datasets.load_dataset_builder(source.repository, source.config)
    if builder.name != "csv":
        return {}
    options: dict[str, Any] = {"keep_default_na": False}
    config: Any = builder.config
    file = Path(next(files for files in config.data_files.values() if files)[0])
    if builder.info.features is None and file.suffix.lower() in FORMATS:  # else its README says what they are
        with file.open(encoding=config.encoding or "utf-8-sig", newline="") as stream:
            columns = next(csv.reader(stream, delimiter=config.sep), [])
        options["features"] = datasets.Features({name: datasets.Value("string") for name in columns})
    return options


def _one_split(
    loaded: Dataset | Mapping[Any, Dataset], name: str, splits: Sequence[str], remedy: str
) -> Table:
    """The first of the splits that is there, or the data set that has none."""
    if not isinstance(loaded, Mapping):
        return table_of(loaded, name)
    split = next((split for split in splits if split in loaded), None)
    if split is None:
        problem = f"It has only the splits {quoted(str(split) for split in loaded)}."
        raise DataError(problem, file=name, remedy=remedy)
    table = table_of(loaded[split], f"{name}{'/' if Path(name).is_dir() else ' '}{split}")
    return replace(table, split=split) if len(loaded) > 1 else table


def _declared_names(features: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    from datasets import ClassLabel

    return {
        column: tuple(str(name).strip() for name in feature.names)
        for column, feature in features.items()
        if isinstance(feature, ClassLabel)
    }


def _named_classes(
    rows: Iterable[tuple[int, Any]], names: Mapping[str, tuple[str, ...]], file: str
) -> Numbered:
    for number, values in rows:
        named: dict[str, str | None] = {}
        for column, by_index in names.items():
            index = values[column]
            if index is not None and index >= len(by_index):
                problem = (
                    f'Class {index} of column "{column}" has no name; the file names {len(by_index)} classes: '
                    f"{quoted(by_index)}."
                )
                remedy = "Correct the label, or write the file without metadata (replace_schema_metadata of pyarrow)."
                raise DataError(problem, file=file, row=number, unit="row", remedy=remedy)
            named[column] = by_index[index] if index is not None and index >= 0 else None
        yield number, {**values, **named}


def _stored_features(metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    """The features that `datasets` left in a Parquet file, without those whose type this release of it does not know.

    Args:
        metadata: of the file's Arrow schema.
    """
    from datasets import Features

    try:
        columns = json.loads((metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        stored = dict(columns)
    except (ValueError, KeyError, TypeError):  # not what `datasets` writes: the columns speak for themselves
        return {}
    features: dict[str, Any] = {}
    for column, feature in stored.items():
        with suppress(ValueError, KeyError, TypeError, AttributeError):
            features.update(Features.from_dict({column: feature}))
    return features
