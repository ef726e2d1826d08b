"""Files and folders that are either there and whole, or not there: written beside their place, then moved into it.

What is to outlast a power cut is on the disk before it gets its name, and its name before anything relies on it.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` once the block ends without an error.

    Args:
        path: the file to be made or replaced; folders above it are made. A symbolic link keeps pointing where it
            points, and its target is replaced. What is there and is no regular file (a device, a named pipe, this
            process's own standard output) stays what it is: once the block has ended it is opened and written. So
            does a file that is a mount point, as one that is lent to a container.

    Yields:
        A temporary file in the same folder, with the same ending; it is removed if the block raises. For what is no
        regular file it lies in the folder for temporary files.

    Raises:
        IsADirectoryError: the path is a folder.
        OSError: the folder cannot be written to.
    """
    path = user_path(path)
    if not is_replaceable(path):
        with tempfile.TemporaryDirectory(prefix="consistentee-") as scratch:
            temporary = Path(scratch) / f"file{Path(path).suffix}"
            temporary.touch()
            yield temporary
            with temporary.open("rb") as source, open_in_place(path) as target:
                shutil.copyfileobj(source, target)
        return
    target = Path(os.path.realpath(path))
    make_folder(target.parent)
    temporary = target.parent / f".{target.stem}.{secrets.token_hex(6)}{target.suffix}"
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        with room_in(target.parent, "Make room, or give a file on another disk.", named=False):
            yield temporary
            _take_over_permissions(temporary, target)
            sync(temporary)
        try:
            os.replace(temporary, target)
        except OSError as error:
            if error.errno not in _CANNOT_MOVE or not target.is_file():
                raise
            _write_over(target, temporary)
        sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def user_path(path: str | os.PathLike[str]) -> Path:
    """A path with the user's folder in place of a "~" that it begins with; "~name" of nobody is a name as any other."""
    return Path(os.path.expanduser(path))


def is_replaceable(path: str | os.PathLike[str]) -> bool:
    """Whether a file of this name is made anew: there is none yet, or a regular one that is not our own output.

    Raises:
        IsADirectoryError: the path is a folder.
    """
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return True
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(f'"{os.fspath(path)}" is a folder. Give the name of a file.')
    return stat.S_ISREG(found.st_mode) and _own_output(found) is None


def open_in_place(path: str | os.PathLike[str]) -> IO[bytes]:
    """Open what is there for writing, without making a file; our own output goes on behind what was written to it."""
    descriptor = _own_output(os.stat(path))
    if descriptor is not None:
        stream = sys.stdout if descriptor == 1 else sys.stderr
        if stream is not None:
            stream.flush()
        return os.fdopen(os.dup(descriptor), "wb")
    return os.fdopen(os.open(path, os.O_WRONLY), "wb")


def _write_over(target: Path, source: Path) -> None:
    """Put a file's content into one that cannot be replaced."""
    with source.open("rb") as new, open_in_place(target) as old:
        shutil.copyfileobj(new, old)
        old.truncate()
    sync(target)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 file whole or not at all; bytes of a file's name that are no UTF-8 are escaped, as JSON does it."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write a JSON file whole or not at all; a figure that is not finite is an error, JSON has no name for it."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def atomic_folder(
    folder: str | os.PathLike[str], require_free: Callable[[Path], None], last: str
) -> Iterator[Path]:
    """A folder to write files to, which takes the place of `folder` once the block ends without an error.

    Where `folder` itself cannot be replaced (a mount point, the directory that this process works in, a parent that may
    not be written to), it stays, and the files take the places of those in it, one by one.

    Args:
        folder: to be made or replaced; folders above it are made. A symbolic link keeps pointing where it points. Who
            may do what with the folder that is replaced, and with files of the same name, stays as it is.
        require_free: raises for a folder that is not to be replaced; asked before the block and after it.
        last: the file that says that the others are there.

    Raises:
        FullDiskError: there is no room.
        OSError: the folder cannot be written to.
    """
    folder = user_path(folder).resolve()
    require_free(folder)
    make_folder(folder.parent)
    token = secrets.token_hex(6)
    inside = folder / f"{_WORKING}{token}"
    place, before = (folder.parent / f".{folder.name}.{token}.{end}" for end in ("new", "old"))
    if _has_to_stay(folder):
        place = inside
    place.mkdir()
    if place != inside and folder.exists():
        _take_over_permissions(place, folder, least=0o700)  # by now: files take the group of some folders
    try:
        with room_in(folder.parent, "Make room, or give a folder on another disk.", named=False):
            yield place
            require_free(folder)
            _take_over_all(place, folder, with_folder=place != inside)
            sync_tree(place)
            if place != inside and not _replace_folder(folder, place, before):
                shutil.copytree(place, inside)
                sync_tree(inside)
            if inside.exists():
                _move_up(inside, folder, last)
    finally:
        if not folder.exists() and before.exists():  # interrupted between its going and the new one's coming
            os.rename(before, folder)
        for leftover in (place, before, inside):
            shutil.rmtree(leftover, ignore_errors=True)


def names_in(folder: Path) -> list[str]:
    """What is in a folder, but for what `atomic_folder` is about to write there."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith(_WORKING))


_WORKING = ".consistentee-new-"
_CANNOT_MOVE = (errno.EBUSY, errno.EXDEV)
"""What renaming says of a mount point, and of a folder of an image that a container runs."""
_NO_PERMISSIONS = (errno.EPERM, errno.EACCES, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
"""What changing permissions says where they are those of the mount: network drives, object stores."""


def _has_to_stay(folder: Path) -> bool:
    if not folder.exists():
        return False
    return (
        os.path.samefile(folder, os.curdir)
        or os.path.ismount(folder)
        or not os.access(folder.parent, os.W_OK)
    )


def _take_over_all(place: Path, folder: Path, *, with_folder: bool) -> None:
    """`_take_over_permissions` of the files in a folder that is replaced, and with the folder its own."""
    for path in place.rglob("*"):
        before = folder / path.relative_to(place)
        if before.exists():
            _take_over_permissions(path, before)
    if with_folder and folder.exists():
        _take_over_permissions(place, folder)


def _replace_folder(folder: Path, place: Path, before: Path) -> bool:
    """Put one folder in place of another, which may not be there and goes to `before`; False where it cannot go."""
    if folder.exists():
        try:
            os.rename(folder, before)
        except OSError as error:
            if error.errno in _CANNOT_MOVE:
                return False
            raise
    os.rename(place, folder)
    return True


def _move_up(inside: Path, folder: Path, last: str) -> None:
    """Put the files of a folder in place of all those of the folder it is in."""
    new = names_in(inside)
    for name in new:
        if name != last:
            os.replace(inside / name, folder / name)
    for name in set(names_in(folder)) - {*new}:
        (folder / name).unlink()
    sync(folder)
    os.replace(inside / last, folder / last)
    sync(folder)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, so that they outlast a power cut; what is there stays."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for place in missing:
        sync(place.parent)


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Around changing a file by what was read in it: other processes that are about to do so in the folder wait.

    Nothing is left in the folder. Where the system or its file system locks no folders, nobody waits.
    """
    descriptor = None
    try:
        with suppress(ImportError, OSError):
            import fcntl

            descriptor = os.open(folder, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


GO_ON = "go on with --resume (compare and ablate: with the same command)"
"""How a training goes on that a disk or somebody's file has stopped."""


class FullDiskError(OSError):
    """There is no room, or no more of a user's share; the message says where."""


@contextmanager
def room_in(folder: Path, remedy: str = f"Make room, then {GO_ON}.", *, named: bool = True) -> Iterator[None]:
    """Around what is written into a folder: a full disk is said to be one, whatever the writer calls it.

    Args:
        folder: to be named.
        remedy: a sentence.
        named: whether errors that name a folder or a file already are to name this one.

    Raises:
        FullDiskError: there is no room.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _is_lack_of_room(error) or (not named and _names_a_place(error)):
            raise
        found = error.__cause__ if isinstance(error, FullDiskError) and error.__cause__ else error
        there = next((place for place in (folder, *folder.parents) if place.exists()), Path())
        free, cause = shutil.disk_usage(there).free, str(found).strip().splitlines()[0]
        raise FullDiskError(
            getattr(error, "errno", None) or errno.ENOSPC,
            f"{folder} could not be written to, {free / 1e6:,.0f} MB are free there: {cause}. {remedy}",
        ) from found


@contextmanager
def room_for_temporary_files(*files: IO[bytes]) -> Iterator[None]:
    """`room_in`, for Python's folder of temporary files; files that found none are closed."""
    remedy = "Make room, or name a folder on another disk in the variable TMPDIR."
    with room_in(Path(tempfile.gettempdir()), remedy):
        try:
            yield
        except OSError:
            for file in files:
                with suppress(OSError):  # it would write the rest once more
                    file.close()
            raise


def _names_a_place(error: Exception) -> bool:
    return isinstance(error, FullDiskError) or getattr(error, "filename", None) is not None


def _is_lack_of_room(error: Exception) -> bool:
    full = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError):
        return error.errno in full
    codes = re.findall(r"os error (\d+)", str(error))  # of safetensors
    return "inline_container" in str(error) or any(int(code) in full for code in codes)  # the former of torch


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    windows = os.name == "nt"
    if path.is_dir() and (windows or not os.access(path, os.R_OK)):  # such a folder cannot be opened
        return
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems do not know it
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """`sync` everything in a folder, and the folder."""
    for path in sorted(folder.rglob("*"), reverse=True):  # what is in a folder before the folder
        sync(path)
    sync(folder)


def remove_files(folder: Path, names: tuple[str, ...]) -> None:
    """Delete files by name, and what an interrupted writing of them left; then the folder, if nothing else is in it."""
    for name in names:
        (folder / name).unlink(missing_ok=True)
        plain = Path(name)
        for leftover in folder.glob(f".{plain.stem}.*{plain.suffix}"):
            leftover.unlink(missing_ok=True)
        if plain.suffix == ".safetensors":
            remove_unfinished_weights(folder)
    with suppress(OSError):  # it is not there, or something is in it
        folder.rmdir()


def remove_unfinished_weights(folder: Path) -> None:
    """Delete what safetensors left in a folder where it was killed: it names a file `.tmp` and six letters at first."""
    for leftover in folder.glob(".tmp" + "[0-9A-Za-z]" * 6):
        leftover.unlink(missing_ok=True)


def _own_output(found: os.stat_result) -> int | None:
    """The descriptor under which this process writes to that very file: standard output or error."""
    for descriptor in (1, 2):
        with suppress(OSError):  # closed
            if os.path.samestat(found, os.fstat(descriptor)):
                return descriptor
    return None


def _take_over_permissions(temporary: Path, target: Path, *, least: int = 0) -> None:
    """Those of what is replaced, its owner too where we may; else those of any new file.

    Args:
        temporary: what takes its place.
        target: what is replaced.
        least: permissions that are given in any case.
    """
    if not target.exists():
        give_usual_permissions(temporary)
        return
    before = target.stat()
    now = temporary.stat()
    if os.name == "posix" and (before.st_uid, before.st_gid) != (now.st_uid, now.st_gid):
        with suppress(OSError):
            os.chown(temporary, before.st_uid, before.st_gid)
    kept = 0o7777 if temporary.is_dir() else 0o777
    _give_permissions(temporary, before.st_mode & kept | least)


def give_usual_permissions(path: Path) -> None:
    """Those of any new file, whatever it was written with."""
    _give_permissions(path, 0o666 & ~_umask())


def _give_permissions(path: Path, mode: int) -> None:
    """Set them where the file system lets files have some of their own; elsewhere they are those of its mount."""
    try:
        path.chmod(mode)
    except OSError as error:
        if error.errno not in _NO_PERMISSIONS:
            raise


def _umask() -> int:
    """The process's mask of permissions."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
