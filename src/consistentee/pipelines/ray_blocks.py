"""`consistentee predict --ray`: rows go through a pool of engines on a Ray cluster and come back as files of lines.

The rows are read once, where the command runs, and numbered. They are cut into blocks, which are the windows of
`Engine.windows`: every text has the same neighbours as on one machine. A block is finished when its file is there; a
run that is started again computes those that are not. Ray may finish blocks in any order, and computes those of a lost
node again; the numbers of the rows tell that every row came once, and where it belongs.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import signal
import tempfile
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch

from consistentee import __version__
from consistentee.atomic_files import make_folder, room_for_temporary_files, write_json, write_text
from consistentee.errors import DataError, SettingError, require_extra
from consistentee.models.loaded import LoadedClassifier
from consistentee.pipelines.classifier import WINDOW_ROWS, Engine, Prediction, window_sizes
from consistentee.pipelines.ray_data import PREDICTED_COLUMNS, RayPredictor

RUN_FILE = "run.json"
"""Says in a folder of blocks what they were made of."""


class NumberedRows:
    """Rows in a temporary file, cut into blocks; it goes with the object.

    Args:
        texts: tuples of one text or two.
        batch_size: as of `Engine.windows`, which decides how many rows a block has.

    Attributes:
        sizes: rows of each block.
        text_columns: what Ray calls the texts of a row.
        digest: hash of all rows in their order.
    """

    def __init__(self, texts: Iterable[tuple[str, ...]], batch_size: int | None = None) -> None:
        self._file = tempfile.NamedTemporaryFile(prefix="consistentee-", suffix=".jsonl")  # noqa: SIM115
        self.path = self._file.name
        self.sizes: list[int] = []
        self.text_columns: tuple[str, ...] = ("text",)
        self._ends = array("q", [0])  # bytes
        digest, rows = hashlib.sha256(), iter(texts)
        for size in itertools.repeat(WINDOW_ROWS) if batch_size == 1 else window_sizes(batch_size):
            window = list(itertools.islice(rows, size))
            if not window:
                break
            if len(window[0]) == 2:
                self.text_columns = ("text_a", "text_b")
            block = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in window)
            digest.update(block)
            with room_for_temporary_files(self._file):
                self._file.write(block)
            self.sizes.append(len(window))
            self._ends.append(self._ends[-1] + len(block))
        with room_for_temporary_files(self._file):
            self._file.flush()
        self.digest = digest.hexdigest()[:16]

    def items(self, blocks: Iterable[int]) -> list[dict[str, int]]:
        """Where the rows of blocks lie in the file, for `block_reader`."""
        return [
            {"block": block, "begin": self._ends[block], "end": self._ends[block + 1]} for block in blocks
        ]

    def close(self) -> None:
        """Remove the file."""
        self._file.close()


def block_reader(rows: NumberedRows) -> Callable[[Any], Any]:
    """A function for `map_batches` that takes `NumberedRows.items` and gives a table of the rows of these blocks.

    They have the columns `block`, `row` (in the block), and those of `text_columns`. Ray sends the function as code,
    not by its name: a process that reads rows need not import this library, and torch with it, which takes seconds.
    """
    path, names = rows.path, rows.text_columns

    def read(items: Any) -> Any:
        blocks: list[int] = []
        numbers: list[int] = []
        texts: list[tuple[str, ...]] = []
        with open(path, "rb") as stream:
            for item in items.to_pylist():
                stream.seek(item["begin"])
                lines = stream.read(item["end"] - item["begin"]).decode().split("\n")[:-1]
                texts += [json.loads(line) for line in lines]
                blocks += [item["block"]] * len(lines)
                numbers += range(len(lines))
        parts = zip(names, zip(*texts, strict=True), strict=True)
        return pa.table({"block": blocks, "row": numbers, **{name: list(part) for name, part in parts}})

    return read


class BlockPredictor(RayPredictor):
    """A `RayPredictor` that takes no other model than the one of the run.

    Args:
        model: as of `RayPredictor`.
        fingerprint: `model_fingerprint` of the run's model.
        **how: as of `RayPredictor`.

    Raises:
        SettingError: the model of this name is another one on this node.
    """

    def __init__(self, model: str, *, fingerprint: str, **how: Any) -> None:
        super().__init__(model, **how)
        if model_fingerprint(self.engine.saved) != fingerprint:
            raise SettingError(
                f'Model "{model}" must be the same on all nodes; a node has another one of this name. Put it into a '
                "folder that they share, or copy it to all of them."
            )


def model_fingerprint(saved: LoadedClassifier) -> str:
    """Hash of a model's weights, configuration and tokenizer, wherever it lies."""
    digest = hashlib.sha256()
    config = {
        name: value
        for name, value in saved.model.config.to_dict().items()
        if name not in ("_name_or_path", "transformers_version")
    }
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(saved.model.state_dict().items()):
        digest.update(f"\x1e{name}\x1f{tensor.dtype}\x1f{tuple(tensor.shape)}\x1f".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    digest.update(json.dumps(_how_texts_are_read(saved), sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def _how_texts_are_read(saved: LoadedClassifier) -> dict[str, Any]:
    """All of a tokenizer that decides on token ids, as plain values; no paths, and nothing that a call sets."""
    tokenizer = saved.tokenizer
    if tokenizer.is_fast:
        parts = json.loads(tokenizer.backend_tokenizer.to_str())
        of_kind = {name: value for name, value in parts.items() if name not in ("truncation", "padding")}
    else:
        settings = {
            name: value
            for name, value in tokenizer.init_kwargs.items()
            if not name.endswith(("_file", "name_or_path"))
        }
        of_kind = {"vocabulary": tokenizer.get_vocab(), "settings": settings}
    return {
        **of_kind,
        "max_length": saved.max_length,
        "truncation_side": tokenizer.truncation_side,
        "split_special_tokens": tokenizer.split_special_tokens,
    }


class BlockFolder:
    """A folder of finished blocks, one file each, and of what they were made of.

    Args:
        folder: made if it is missing.
        settings: everything that decides what the lines are.
        sizes: rows of each block.

    Raises:
        SettingError: the folder is of a run with other settings, or of no run and not empty.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], sizes: Sequence[int]) -> None:
        self.folder, self.sizes = folder, sizes
        found = _run_settings(folder)
        if found is None:
            make_folder(folder)
            write_json(folder / RUN_FILE, settings)
            return
        for name in dict.fromkeys([*settings, *found]):
            if settings.get(name) != found.get(name):
                raise SettingError(
                    f'Folder "{folder}" holds blocks of another run: its {name} is {found.get(name)}, that of this run '
                    f"{settings.get(name)}. Give another folder, or remove it."
                )

    def path(self, block: int) -> Path:
        """The file of a block."""
        return self.folder / f"{block:08d}.jsonl"

    def missing(self) -> list[int]:
        """Blocks that are not finished."""
        names = set(os.listdir(self.folder))
        return [block for block in range(len(self.sizes)) if self.path(block).name not in names]

    def chunks(self) -> Iterator[list[str]]:
        """The lines of one block after another, in the order of the input.

        Raises:
            DataError: somebody has changed a block.
        """
        for block, size in enumerate(self.sizes):
            path = self.path(block)
            lines = path.read_text(encoding="utf-8").split("\n")
            if len(lines) != size + 1:
                problem = f"The block must have {size} lines, got {len(lines) - 1}."
                raise DataError(problem, file=path, remedy="Remove it and start the run again.")
            yield [line + "\n" for line in lines[:-1]]


def _run_settings(folder: Path) -> dict[str, Any] | None:
    """What the blocks of a folder were made of; None where it is empty or missing."""
    if folder.exists() and not folder.is_dir():
        raise SettingError(f'The blocks must go into a folder, and "{folder}" is a file.')
    file = folder / RUN_FILE
    if not file.exists():
        others = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        if any(not name.startswith(".run.") for name in others):  # those a stopped start may leave
            raise SettingError(f'Folder "{folder}" must be empty or of a run before: it has no {RUN_FILE}.')
        return None
    try:
        found: object = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise SettingError(f'"{file}" must be a JSON object, as a run writes it. Give another folder.')
    return cast("dict[str, Any]", found)


class BlockWriter:
    """Puts rows that come in any order into the files of their blocks, each row once.

    Args:
        blocks: the folder.

    Raises:
        RuntimeError: a row came twice.
    """

    def __init__(self, blocks: BlockFolder) -> None:
        self._blocks = blocks
        self._open: dict[int, list[Any]] = {}
        self._missing = set(blocks.missing())

    def add(self, rows: Any) -> int:
        """Take the rows of a table in and write the blocks that are complete; returns how many rows were written."""
        written, numbers = 0, rows["block"].to_numpy()
        for block in np.unique(numbers).tolist():
            parts = self._open.setdefault(block, [])
            parts.append(rows.filter(pa.array(numbers == block)))
            count, size = sum(len(part) for part in parts), self._blocks.sizes[block]
            if block not in self._missing or count > size:
                raise RuntimeError(f"Ray handed over rows of block {block} twice.")
            if count == size:
                self._write(block, pa.concat_tables(self._open.pop(block)).sort_by("row"))
                written += size
        return written

    def _write(self, block: int, rows: Any) -> None:
        if rows["row"].to_pylist() != list(range(len(rows))):
            raise RuntimeError(f"Ray handed over rows of block {block} twice.")
        texts = zip(
            *(rows[name].to_pylist() for name in rows.column_names if name.startswith("text")), strict=True
        )
        values = zip(*(rows[name].to_pylist() for name in PREDICTED_COLUMNS), strict=True)
        lines = [Prediction(*found).line(parts) for parts, found in zip(texts, values, strict=True)]
        write_text(self._blocks.path(block), "".join(lines))
        self._missing.remove(block)


def predict_blocks(
    engine: Engine,
    texts: Iterable[tuple[str, ...]],
    folder: Path,
    *,
    address: str | None = None,
    workers: int | None = None,
    device: str = "auto",
    on_rows: Callable[[int], object] = lambda _: None,
    **how: Any,
) -> BlockFolder:
    """Predict on a Ray cluster, block by block, going on from the blocks that are finished.

    Args:
        engine: of the model, for its name and its checks; the actors of the cluster open their own.
        texts: read to their end first.
        folder: of the blocks.
        address: as of `ray_session`.
        workers: engines, each with one CPU, or with one GPU where the device says so; None: as many as the cluster has.
        device: `auto`, `cpu` or `cuda`.
        on_rows: is told how many rows more are finished, also by runs before.
        **how: `threshold`, `criterion`, `operating_point` and `batch_size`.

    Returns:
        The folder, with all blocks.

    Raises:
        MissingExtraError: Ray is not installed.
        SettingError: the folder is not of this run, or a value does not fit.
        DataError: a text is broken.
        RuntimeError: Ray gave up.
    """
    require_extra("ray", "ray.data")
    if device not in ("auto", "cpu", "cuda"):
        raise SettingError(f'device must be auto, cpu or cuda on Ray, which deals out GPUs, got "{device}".')
    saved, batch_size = engine.saved, how.get("batch_size")
    rule = engine.rule(how.get("criterion"), how.get("threshold"), how.get("operating_point"))
    rows = NumberedRows(engine.checked(texts), batch_size)
    try:
        model = os.path.abspath(saved.name) if os.path.isdir(saved.name) else saved.name
        named = {"dtype": engine.backend.dtype, "backend": engine.backend.name}
        fingerprint = model_fingerprint(saved)
        settings = {
            "model": fingerprint,
            "criterion": rule.criterion,
            "threshold": rule.threshold,
            "batch_size": batch_size,
            **named,
            "texts": rows.digest,
            "rows": sum(rows.sizes),
            "consistentee": __version__,
        }
        blocks = BlockFolder(folder, settings, rows.sizes)
        missing = blocks.missing()
        on_rows(sum(rows.sizes) - sum(rows.sizes[block] for block in missing))
        if missing:
            predictor = {**how, **named, "model": model, "fingerprint": fingerprint, "device": device}
            with ray_session(address, workers) as ray, _explained(ray, blocks):
                _run(ray, rows, missing, BlockWriter(blocks), predictor, workers, on_rows)
        return blocks
    finally:
        rows.close()


def _run(
    ray: Any,
    rows: NumberedRows,
    missing: Sequence[int],
    writer: BlockWriter,
    predictor: dict[str, Any],
    workers: int | None,
    on_rows: Callable[[int], object],
) -> None:
    """Stream the missing blocks through the actors into their files."""
    resources = ray.cluster_resources()
    on_gpu = predictor["device"] == "cuda" or (predictor["device"] == "auto" and resources.get("GPU", 0) >= 1)
    workers = workers or max(1, int(resources.get("GPU" if on_gpu else "CPU", 1)))
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    shown, context.enable_progress_bars = context.enable_progress_bars, False
    try:
        predicted = (
            ray.data.from_items(rows.items(missing), override_num_blocks=len(missing))
            .map_batches(
                block_reader(rows),
                batch_size=None,  # a task reads one block
                batch_format="pyarrow",
                num_cpus=0,  # all CPUs are for engines
                label_selector={
                    "ray.io/node-id": ray.get_runtime_context().get_node_id()
                },  # where the file is
                compute=ray.data.TaskPoolStrategy(size=1),
            )
            .map_batches(
                BlockPredictor,
                batch_size=None,
                batch_format="pyarrow",
                fn_constructor_kwargs={**predictor, "text_columns": rows.text_columns},
                num_cpus=1,
                num_gpus=1 if on_gpu else 0,
                compute=ray.data.ActorPoolStrategy(size=workers),
            )
        )
        for table in predicted.iter_batches(batch_size=None, batch_format="pyarrow"):
            on_rows(writer.add(table))
    finally:
        context.enable_progress_bars = shown


@contextmanager
def ray_session(address: str | None = None, workers: int | None = None) -> Iterator[Any]:
    """Ray for the time of a block; one that this process is connected to stays.

    Args:
        address: of a running cluster, `auto` for the one of this machine; None takes that of the environment's
            RAY_ADDRESS, else starts Ray here, on the loopback address.
        workers: CPUs that Ray is to know of here, at least, where it is started.

    Raises:
        MissingExtraError: Ray is not installed.
        SettingError: the address is one of Ray Client, which `ray.data` does not stream through.
        ConnectionError: there is no cluster at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anybody
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its log is no output of a command
    ray: Any = require_extra("ray", "ray")
    require_extra("ray", "ray.data")
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if address.startswith("ray://"):
        raise SettingError(
            f'The address must be that of a cluster which this machine is part of, got "{address}" of Ray Client. '
            'Run the command on a machine of the cluster, as `ray job submit` does, with the address "auto".'
        )
    if ray.is_initialized():
        yield ray
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if address == "local":
        cpus = max(os.cpu_count() or 1, workers or 1)
        options |= {"include_dashboard": False, "_node_ip_address": "127.0.0.1", "num_cpus": cpus}
    ends = signal.getsignal(signal.SIGTERM)
    ray.init(address=address, **options)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, ends)  # Ray takes the signal for itself
    try:
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def _explained(ray: Any, blocks: BlockFolder) -> Iterator[None]:
    """Errors of ours that Ray carried over come out as what they were, and others say what is finished."""
    try:
        yield
    except ray.exceptions.RayError as error:
        cause: BaseException | None = error
        while cause is not None:
            own = getattr(cause, "cause", cause)
            if isinstance(own, (ValueError, OSError, ImportError)) and not isinstance(
                own, ray.exceptions.RayError
            ):
                raise SettingError(str(own)) from error
            cause = cause.__cause__
        left = len(blocks.missing())
        raise RuntimeError(
            f"Ray gave up with {left} of {len(blocks.sizes)} blocks to go ({str(error).strip().splitlines()[-1]}). "
            "Start the run again: finished blocks stay."
        ) from error
