"""Files that one process at a time has; the system lets go of them when it ends, however it does."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


def is_lack_of_locks(error: Exception) -> bool:
    """Whether the file system knows no locks, by what `try_lock` raised."""
    return (
        isinstance(error, (NotImplementedError, OSError))
        and getattr(error, "errno", errno.ENOSYS) in _NO_LOCKS
    )


def try_lock(path: Path) -> BaseFileLock | None:
    """A lock that is held now; None where another holds it."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    return lock


def release_and_remove(lock: BaseFileLock) -> None:
    """Let go of a lock, and leave no file."""
    path = Path(lock.lock_file)
    if os.name == "nt":  # no open file is removed there
        lock.release()
        path.unlink(missing_ok=True)
        return
    path.unlink(missing_ok=True)  # first: it may be another's as soon as it is let go of
    lock.release()
