"""Files as rows: CSV, TSV, JSON lines, Parquet, `datasets` folders and plain text, read one row at a time.

Every complaint names the file, the row counted from 1, and what to do. How lines become rows is in `parsing`.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from consistentee.data.encodings import decoded_lines, file_lines
from consistentee.data.parsing import Numbered, parse, quoted
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
_ARRAY_BEGINS = re.compile(r"\s*\[\s*(\{|$)")

KNOWN_TEXT_COLUMNS = (
    ("text_a", "text_b"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("premise", "hypothesis"),
    ("text",),
    ("sentence",),
)
"""Columns that are taken for the text where none are named."""


@dataclass(frozen=True)
class Table:
    """Rows of one file, read as they are asked for.

    Args:
        file: Name for messages.
        rows: Pairs of the row's number, from 1, and its values by column.
        unit: What the number counts, "line" or "row".
        class_labels: Class names by column, where the file itself declares them (`datasets.ClassLabel`).
        skipped: Collects the errors of broken rows, which are then left out; None raises the first.
    """

    file: str
    rows: Iterator[tuple[int, Mapping[str, Any]]]
    unit: str = "line"
    class_labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    skipped: list[DataError] | None = None

    def error(self, row: int | None, problem: str, remedy: str) -> DataError:
        """The error that is to be raised about a row of this table."""
        return DataError(problem, file=self.file, row=row, unit=self.unit, remedy=remedy)

    def with_columns(self) -> tuple[tuple[str, ...], Table]:
        """The columns of the first row, and the same table with that row still to come.

        Raises:
            DataError: There is no row.
        """
        rows = iter(self.rows)
        first = next(rows, None)
        if first is None:
            raise self.error(None, "There is no row of data in it.", "Give a file with at least one row.")
        return tuple(first[1]), replace(self, rows=itertools.chain([first], rows))

    def texts_of(self, row: int, values: Mapping[str, Any], columns: Sequence[str]) -> tuple[str, ...]:
        """The text columns of a row, checked to be text that is not empty."""
        return tuple(self._text(row, column, self.value_of(row, values, column)) for column in columns)

    def value_of(self, row: int, values: Mapping[str, Any], column: str) -> Any:
        """One column of a row.

        Raises:
            DataError: The row has no such column; the message lists those it has.
        """
        if column not in values:
            raise self.error(row, f'There is no column "{column}".', f"Columns here: {quoted(values)}.")
        return values[column]

    def _text(self, row: int, column: str, value: Any) -> str:
        if value is None or value == "" or (isinstance(value, str) and not value.strip()):
            raise self.error(
                row, f'The text in column "{column}" is empty.', f"Fill it in or remove the {self.unit}."
            )
        if not isinstance(value, str):
            raise self.error(
                row,
                f'Column "{column}" must hold text, got {type(value).__name__} {str(value)[:40]!r}.',
                "Name the column that holds the text, or write the value as a string.",
            )
        if not value.isascii():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError:
                problem = f'The text in column "{column}" holds half a surrogate pair, which is no character.'
                raise self.error(row, problem, "Write the character as UTF-8.") from None
        return value


def open_table(
    path: str | os.PathLike[str],
    *,
    splits: Sequence[str] = ("train",),
    header: Sequence[str] | None = None,
    skip_broken: bool = False,
) -> Table:
    """The rows of a CSV, TSV, JSON or Parquet file or of a folder written by `datasets.save_to_disk`.

    Args:
        path: File or folder, or a data set on the hub (`hub_source`). JSON is objects, one a line or in one array. A
            folder may also be a hub's data set, downloaded.
        splits: Where there are several splits, the first of these that is there is read.
        header: Column names of a TSV file without a header line.
        skip_broken: Whether broken rows are left out and kept in the table's `skipped`, rather than raised.

    Returns:
        The table. Errors inside the file are raised while its rows are read.

    Raises:
        DataError: The file is missing, or of no known format, or the hub's data set cannot be loaded.
    """
    on_hub = hub_source(path)
    if on_hub is not None:
        return _hub_table(on_hub, os.fspath(path), splits)
    path = Path(path)
    if not path.exists():
        raise DataError("There is no such file or folder.", file=path, remedy="Check the path.")
    if path.is_dir():
        return _datasets_folder(path, splits)
    match FORMATS.get(path.suffix.lower()):
        case "parquet":
            return _parquet(path)
        case "csv" | "tsv" | "jsonl":
            return _text_table(path, header, [] if skip_broken else None)
        case _:
            remedy = f"Give a file that ends in {', '.join(FORMATS)}, or a folder written by datasets.save_to_disk."
            raise DataError(f'The ending "{path.suffix}" is not known.', file=path, remedy=remedy)


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
    return Table(
        file, _named_classes(enumerate(dataset, start=1), names), "row", names, [] if skip_broken else None
    )


def read_texts(
    source: str | os.PathLike[str] | IO[str] | IO[bytes],
    text_columns: Sequence[str] | None = None,
    *,
    pairs: bool | None = None,
) -> Iterator[tuple[str, ...]]:
    """Texts to predict, one after the other, without ever holding the whole input.

    Args:
        source: A file, "-" for standard input, an open stream, or `hf:user/name` (`hub_source`). Files go by their
            ending: `.csv` and `.tsv` with a header line, `.jsonl` and `.json` (objects, one a line or in one array),
            `.parquet`, anything else plain text. A stream is JSON lines if it starts with "{", an array if with "[{",
            else plain text, or, where `text_columns` are named, a table with a header line (TSV if that has a tab).
            Plain text holds one text a line, or, separated by a tab, the two of a pair.
        text_columns: One or two columns; by default the first of KNOWN_TEXT_COLUMNS that the input has.
        pairs: Whether every row is a pair of texts. If not, a tab is part of a text. None lets the input decide.

    Yields:
        Tuples of one text, or of two for pairs; the same number throughout.

    Raises:
        DataError: A file that is missing or empty, a row that is broken or whose text is empty, bytes that are no text
            (`encodings`), or no column that can be taken for the text.
    """
    if text_columns is not None and len(text_columns) not in (1, 2):
        raise ValueError(f"text_columns must be one column or two, got {len(text_columns)}.")
    if text_columns is not None and pairs is not None and len(text_columns) != 1 + pairs:
        wanted = "two columns for pairs of texts" if pairs else "one column for single texts"
        raise ValueError(f"text_columns must be {wanted}, got {len(text_columns)}.")
    if isinstance(source, (str, os.PathLike)) and os.fspath(source).startswith(HUB_PREFIX):
        return _texts(open_table(source, splits=("test", "validation", "train")), text_columns, pairs)
    if isinstance(source, (str, os.PathLike)) and os.fspath(source) != "-":
        path = Path(source)
        if not path.is_file():
            raise DataError(
                "There is no such file.", file=path, remedy='Check the path, or give "-" for standard input.'
            )
        is_parquet = FORMATS.get(path.suffix.lower()) == "parquet"
        table = _parquet(path) if is_parquet else _text_table(path, pairs=pairs)
        return _texts(table, text_columns, pairs)
    if isinstance(source, (str, os.PathLike)):
        stream, file = getattr(sys.stdin, "buffer", sys.stdin), "standard input"
    else:
        stream, file = source, str(getattr(source, "name", "the stream"))
    return _texts_of_stream(decoded_lines(stream, file), file, text_columns, pairs)


def json_format(begin: str) -> str | None:
    """The format of a text by how it begins: "jsonl" or "json array", None where it is neither."""
    if begin.lstrip().startswith("{"):
        return "jsonl"
    return "json array" if _ARRAY_BEGINS.match(begin) else None


def _text_table(
    path: Path,
    header: Sequence[str] | None = None,
    skipped: list[DataError] | None = None,
    pairs: bool | None = None,
) -> Table:
    """The rows of a file of lines; the JSON lines of a file may also be one array."""
    file_format = FORMATS.get(path.suffix.lower(), "text")
    unit = "line"
    if file_format == "jsonl":
        with path.open("rb") as stream:
            begin = stream.read(1024).lstrip(b"\xef\xbb\xbf\xff\xfe").replace(b"\0", b"")
        if begin.lstrip().startswith(b"["):
            file_format, unit = "json array", "row"
    rows = parse(file_lines(path), str(path), file_format, header, skipped, pairs)
    return Table(str(path), rows, unit, skipped=skipped)


def _texts(table: Table, text_columns: Sequence[str] | None, pairs: bool | None) -> Iterator[tuple[str, ...]]:
    columns, table = table.with_columns()
    if text_columns is None:
        fitting = [
            known
            for known in KNOWN_TEXT_COLUMNS
            if set(known) <= set(columns) and pairs in (None, len(known) == 2)
        ]
        if not fitting:
            raise table.error(
                None,
                f"None of its columns is known to hold the {'pair of texts' if pairs else 'text'}; it has "
                f"{quoted(columns)}.",
                "Name the two text columns." if pairs else "Name the text columns.",
            )
        text_columns = fitting[0]
    for row, values in table.rows:
        yield table.texts_of(row, values, text_columns)


def _texts_of_stream(
    lines: Numbered, file: str, text_columns: Sequence[str] | None, pairs: bool | None
) -> Iterator[tuple[str, ...]]:
    first = next(lines, None)
    if first is None:
        raise DataError("There is nothing in it.", file=file, remedy="Give at least one text.")
    table_format = "text" if text_columns is None else "tsv" if "\t" in first[1] else "csv"
    file_format = json_format(first[1]) or table_format
    rows = parse(itertools.chain([first], lines), file, file_format, pairs=pairs)
    table = Table(file, rows, "row" if file_format == "json array" else "line")
    yield from _texts(table, text_columns, pairs)


def _parquet(path: Path) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise DataError(
            f"This is not a Parquet file: {error}.", file=path, remedy="Check the file."
        ) from None
    names = _declared_names(_stored_features(file.schema_arrow.metadata))

    def rows() -> Numbered:
        with file:
            batches = file.iter_batches(batch_size=1024)
            yield from enumerate((values for batch in batches for values in batch.to_pylist()), start=1)

    return Table(str(path), _named_classes(rows(), names), "row", names)


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


def _datasets_folder(path: Path, splits: Sequence[str]) -> Table:
    import datasets

    if not any((path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json", "state.json")):
        if any(file.suffix.lower() in FORMATS for file in path.rglob("*")):
            return _hub_table(HubSource(str(path)), str(path), splits)
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


def _hub_table(source: HubSource, name: str, splits: Sequence[str]) -> Table:
    import datasets

    try:
        loaded: Any = datasets.load_dataset(source.repository, source.config, split=source.split)
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
    return _one_split(loaded, name, splits, f"Name one of them: hf:{source.repository}:SPLIT.")


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
    return table_of(loaded[split], f"{name}{'/' if Path(name).is_dir() else ' '}{split}")


def _declared_names(features: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    from datasets import ClassLabel

    return {
        column: tuple(str(name).strip() for name in feature.names)
        for column, feature in features.items()
        if isinstance(feature, ClassLabel)
    }


def _named_classes(rows: Iterable[tuple[int, Any]], names: Mapping[str, tuple[str, ...]]) -> Numbered:
    for number, values in rows:
        named = {
            column: by_index[values[column]] if values[column] is not None and values[column] >= 0 else None
            for column, by_index in names.items()
        }
        yield number, {**values, **named}
