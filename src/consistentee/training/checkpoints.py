"""Where an interrupted training run goes on: one folder per checkpoint, complete or not there at all.

A checkpoint holds the weights (safetensors), the optimizer's state (read back with `weights_only`), and the progress of
the run as JSON. Random states need not be kept: every step seeds itself from the run's seed and its own number.

All of it lies in a folder that nobody else has a reason to make, beside a file that says whose it is. Only what this
module writes is ever deleted, by its name.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from consistentee.atomic_files import (
    GO_ON,
    make_folder,
    remove_files,
    remove_unfinished_weights,
    room_in,
    sync,
    sync_tree,
    write_json,
)
from consistentee.errors import DataError
from consistentee.training.locks import is_lack_of_locks, release_and_remove, try_lock

FOLDER = "consistentee-checkpoints"
EARLIER_FOLDER = "checkpoints"
"""Its name in version 0.1.0."""
MARKER, BEST, STAGING, LOCK = "run.json", "best.safetensors", "model", "run.lock"
WEIGHTS, OPTIMIZER, PROGRESS = "model.safetensors", "optimizer.pt", "progress.json"
CHECKPOINT_FILES = (PROGRESS, WEIGHTS, OPTIMIZER)
"""In the order in which they are removed: without progress it is no checkpoint."""


def hold(output_dir: Path) -> Callable[[], None]:
    """Keep an output folder to one run, where its file system knows locks; gives what lets go of it.

    Raises:
        FileExistsError: another run has it.
    """
    is_new, folder = not output_dir.exists(), output_dir / FOLDER
    make_folder(folder)
    path, lock = folder / LOCK, None
    try:
        lock = try_lock(path)
        if lock is None:
            raise FileExistsError(
                f"Output folder {output_dir} is in use by another run. Wait for it, or choose another."
            )
    except (NotImplementedError, OSError) as error:
        if not is_lack_of_locks(error):
            raise

    def let_go() -> None:
        if lock is None:
            path.unlink(missing_ok=True)
        elif lock.is_locked:
            release_and_remove(lock)
        with suppress(OSError):  # it is not there, or something is in it
            folder.rmdir()
            if is_new:
                output_dir.rmdir()

    return let_go


def claim(output_dir: Path) -> None:
    """Mark an output folder as that of a run of ours."""
    if not is_claimed(output_dir):
        make_folder(output_dir / FOLDER)
        write_marker(output_dir, [])


def is_claimed(output_dir: Path) -> bool:
    """Whether an output folder is that of an unfinished run of ours."""
    return _marker(output_dir) is not None


def write_marker(output_dir: Path, model_files: list[str]) -> None:
    """Say that the folder is ours, and so are these of the files beside it: the finished model's, on their way."""
    write_json(output_dir / FOLDER / MARKER, {"written_by": "consistentee", "model_files": model_files})


def model_files(output_dir: Path) -> list[str]:
    """Files that a run has begun to move from its checkpoints to their place, relative to it."""
    return (_marker(output_dir) or {}).get("model_files", [])


def save_checkpoint(
    output_dir: Path,
    number: int,
    *,
    weights: dict[str, Tensor],
    optimizer: dict[str, Any],
    progress: dict[str, Any],
) -> None:
    """Write checkpoint `number` (rising within a run) and remove the ones before it.

    Raises:
        OSError: there is no room for it; those before it are still there.
    """
    folder = output_dir / FOLDER
    final, partial = folder / f"{number:09d}", folder / f"{number:09d}.partial"
    remove_files(partial, CHECKPOINT_FILES)
    try:
        with room_in(folder):
            make_folder(partial)
            save_file(_separate(weights), partial / WEIGHTS)
            torch.save(optimizer, partial / OPTIMIZER)
            write_json(partial / PROGRESS, progress)
            sync_tree(partial)
    except OSError:
        remove_files(partial, CHECKPOINT_FILES)
        raise
    remove_files(final, CHECKPOINT_FILES)
    os.replace(partial, final)
    sync(folder)
    for old in _numbered(folder):
        if old != final:
            remove_files(old, CHECKPOINT_FILES)


def latest_checkpoint(output_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    complete = [path for path in _numbered(output_dir / FOLDER) if _is_complete(path)]
    return max(complete, key=lambda path: int(path.name), default=None)


def take_over_earlier(output_dir: Path) -> None:
    """Move what version 0.1.0 left of an unfinished run to where it is looked for today; strangers' files stay."""
    earlier = output_dir / EARLIER_FOLDER
    found = _earlier_checkpoints(output_dir)
    if not found:
        return
    claim(output_dir)
    for path in (earlier / BEST, *found):  # the checkpoints last: they prove that the rest is ours
        if path.exists():
            os.replace(path, output_dir / FOLDER / path.name)
    sync(output_dir / FOLDER)
    remove_files(earlier, ("best.partial",))


def is_earlier_run(output_dir: Path) -> bool:
    """Whether version 0.1.0 left checkpoints of an unfinished run here."""
    return bool(_earlier_checkpoints(output_dir))


def latest_earlier(output_dir: Path) -> Path | None:
    """The newest complete checkpoint that version 0.1.0 left, or None."""
    return max(_earlier_checkpoints(output_dir), key=lambda path: int(path.name), default=None)


def _earlier_checkpoints(output_dir: Path) -> list[Path]:
    folders = _numbered(output_dir / EARLIER_FOLDER)
    return [path for path in folders if _is_complete(path) and _is_ours(path)]


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Weights, optimizer state and progress of a checkpoint folder; DataError where a file of it is broken."""
    with _whole(folder / OPTIMIZER):
        optimizer = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
    with _whole(folder / WEIGHTS):
        weights = load_file(folder / WEIGHTS)
    return weights, optimizer, read_progress(folder)


def read_progress(folder: Path) -> dict[str, Any]:
    """The progress that a checkpoint folder keeps; DataError where it is broken."""
    with _whole(folder / PROGRESS):
        progress: object = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
        if not isinstance(progress, dict):
            raise ValueError("no object")
    return cast("dict[str, Any]", progress)


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Around reading a file of a checkpoint: a broken one is named, whatever its reader calls it.

    Raises:
        DataError: the file is missing, cut off or changed.
    """
    try:
        yield
    except (OSError, ValueError, EOFError, RuntimeError, SafetensorError, UnpicklingError) as error:
        missing = isinstance(error, FileNotFoundError)
        if isinstance(error, OSError) and not missing and error.errno != errno.EINVAL:
            raise  # the disk's own
        if isinstance(error, RuntimeError) and "PytorchStreamReader" not in str(error):
            raise  # there is no memory, for one
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"The checkpoint is broken ({cause}).",
            file=path,
            remedy=f"Restore the file, or remove {path.parent}: the run then goes on from the checkpoint before, or "
            "begins anew where there is none.",
        ) from error


def save_weights(path: Path, weights: dict[str, Tensor]) -> None:
    """Write weights atomically as safetensors."""
    make_folder(path.parent)
    remove_unfinished_weights(path.parent)
    partial = path.with_suffix(".partial")
    try:
        with room_in(path.parent):
            save_file(_separate(weights), partial)
            sync(partial)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    os.replace(partial, path)
    sync(path.parent)


def load_weights(path: Path) -> dict[str, Tensor]:
    """Read weights that `save_weights` wrote."""
    with _whole(path):
        return load_file(path)


def place_model(output_dir: Path, last: str) -> None:
    """Move a finished model from `STAGING` among the checkpoints to its place.

    Args:
        output_dir: the run's folder.
        last: the file whose being there says that the model is complete.

    Raises:
        FileExistsError: somebody has put a file of the same name there since the run began.
    """
    staged = output_dir / FOLDER / STAGING
    files = [path for path in staged.rglob("*") if path.is_file() and not path.name.startswith(".")]
    names = sorted(
        (path.relative_to(staged).as_posix() for path in files), key=lambda name: (name == last, name)
    )
    ours = model_files(output_dir)
    for name in names:
        if name not in ours and os.path.lexists(output_dir / name):
            raise FileExistsError(
                f"{output_dir / name} has come there since the run began, and the model's would overwrite it. Move it "
                f"away, then {GO_ON}."
            )
    sync_tree(staged)
    write_marker(output_dir, names)
    for name in names:
        make_folder((output_dir / name).parent)
        if name == last:
            for folder in {(output_dir / other).parent for other in names}:
                sync(folder)
        os.replace(staged / name, output_dir / name)
    sync(output_dir)


def remove_checkpoints(output_dir: Path) -> None:
    """Delete all checkpoints of a finished run; what others put among them stays."""
    folder = output_dir / FOLDER
    for path in _numbered(folder):
        remove_files(path, CHECKPOINT_FILES)
    staged = folder / STAGING
    for name in model_files(output_dir):  # left where moving the model was interrupted
        remove_files((staged / name).parent, ((staged / name).name,))
    remove_files(staged, ())
    remove_files(folder, (BEST, "best.partial", MARKER))


def _marker(output_dir: Path) -> dict[str, Any] | None:
    """What `write_marker` wrote, or None."""
    try:
        marker = json.loads((output_dir / FOLDER / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return marker if isinstance(marker, dict) and marker.get("written_by") == "consistentee" else None


def _numbered(folder: Path) -> list[Path]:
    """The folders that `save_checkpoint` makes, complete or not."""
    if not folder.is_dir():
        return []
    return [
        path for path in folder.iterdir() if path.is_dir() and path.name.removesuffix(".partial").isdigit()
    ]


def _is_complete(folder: Path) -> bool:
    return folder.name.isdigit() and (folder / PROGRESS).is_file()


def _is_ours(folder: Path) -> bool:
    """Whether the progress in a numbered folder is that of a run, as only `Run.checkpoint` writes it."""
    try:
        progress = read_progress(folder)
    except ValueError:
        return False
    identity = progress.get("identity") if isinstance(progress, dict) else None
    return isinstance(identity, dict) and {"kind", "backbone", "config", "data"} <= identity.keys()


def _separate(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Own storage for every tensor: safetensors refuses tensors that share memory."""
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in weights.items()}
