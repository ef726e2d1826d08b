"""Work that several processes share out among them: each takes what no other has, and waits for the rest at last."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import TypeVar

from consistentee.atomic_files import make_folder
from consistentee.training.locks import is_lack_of_locks, try_lock
from consistentee.training.run import Report

LOCKS = ".locks"
POLL_SECONDS = 5.0
"""How often it is asked whether other processes have finished what they took."""

T = TypeVar("T")


def taken_in_turns(
    work: Mapping[str, T],
    output_dir: Path,
    report: Report,
    *,
    better_later: Callable[[str], bool] = lambda name: False,
) -> Generator[tuple[str, T]]:
    """One piece of work after another, each kept to this process until the next one is asked for.

    What another process has comes last, when that one lets go of it: it may be finished by then, so look before you do
    it. The system holds the locks, on empty files, and lets go of them when a process ends, however it does. Where the
    file system knows no locks, every process takes all. Close the iterator (`contextlib.closing`) to let go of a piece
    that failed.

    Args:
        work: by a name that is the same in all processes, and a file's.
        output_dir: the folder that they share.
        report: is told when nothing is left but to wait.
        better_later: whether a piece of that name had better wait for what others do at present; it is taken once
            nothing else is there to be taken.
    """
    folder = output_dir / LOCKS
    if work:
        make_folder(folder)
    waiting, told, patient = dict(work), False, True
    while waiting:
        of_others: dict[str, T] = {}
        for name, piece in waiting.items():
            put_off = patient and better_later(name)
            let_go = None if put_off else _take(folder / f"{name}.lock")
            if let_go is None:
                of_others[name] = piece
                continue
            patient = True
            try:
                yield name, piece
            finally:
                let_go()
        if len(of_others) == len(waiting):
            if patient and any(map(better_later, waiting)):
                patient = False
                continue
            if not told:
                report(f"Waiting for other commands, which make {', '.join(waiting)}.")
                told = True
            time.sleep(POLL_SECONDS)
            patient = True
        waiting = of_others


def is_shared_now(output_dir: Path, own: str = "") -> bool:
    """Whether other processes work on something in a folder, but for what this one does."""
    locks = (output_dir / LOCKS).glob("*.lock")
    return any(is_taken(path.stem, output_dir) for path in locks if path.stem != own)


def is_taken(name: str, output_dir: Path) -> bool:
    """Whether another process works on a piece of work."""
    path = output_dir / LOCKS / f"{name}.lock"
    let_go = _take(path) if path.exists() else lambda: None
    if let_go is None:
        return True
    let_go()
    return False


def _take(path: Path) -> Callable[[], object] | None:
    """Hold a lock; gives what lets go of it, None where another process holds it."""
    try:
        lock = try_lock(path)
    except (NotImplementedError, OSError) as error:
        if not is_lack_of_locks(error):
            raise
        return lambda: None
    return None if lock is None else lock.release
