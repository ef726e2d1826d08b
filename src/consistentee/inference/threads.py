"""How many processors this process may use: what it is pinned to and what its container's quota grants.

torch counts the processors it is pinned to, but not the quota, and threads beyond a quota wait for each other: they are
stopped for the rest of every period, the one that the others wait for among them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import torch

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Where one of them is set, the user has chosen."""


def limit_threads() -> None:
    """Give torch no more threads than there are processors for them, unless a `THREAD_VARIABLES` says how many."""
    threads = usable_threads()
    if threads < torch.get_num_threads():
        torch.set_num_threads(threads)


def usable_threads() -> int:
    """The number of torch's threads, or fewer, where it counts on processors that this process may not use."""
    threads = torch.get_num_threads()
    if any(os.environ.get(name) for name in THREAD_VARIABLES):
        return threads
    return min(threads, usable_processors())


def threads_of_each(processes: int) -> int:
    """Threads of each of some processes that compute side by side: their share of `usable_threads`, at least 1."""
    return max(1, usable_threads() // processes)


def settle_after_fork(device: torch.device, backend: str = "torch") -> None:
    """Let torch compute in a forked process: alone, as the threads it had stayed behind and would be waited for.

    Raises:
        RuntimeError: a device or a backend that does not live on in a forked process.
    """
    if device.type != "cpu" or backend != "torch":
        raise RuntimeError(
            f'A model on device "{device}" with backend "{backend}" must be used in the process that opened it, got '
            'one forked from it. Open it there, start processes by "spawn", or take backend torch on cpu.'
        )
    torch.set_num_threads(1)


def usable_processors(root: Path = Path("/")) -> int:
    """Whole processors that this process may use, at least 1: by its affinity and by its control groups' quotas.

    Args:
        root: where `/proc` and `/sys` are looked for.
    """
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        count = os.cpu_count() or 1
    return max(1, min([count, *(int(quota) for quota in _quotas(root))]))


def _quotas(root: Path) -> Iterator[float]:
    """Processors' worth of time that each control group above this process grants."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        mounts = root / "sys/fs/cgroup"
        if not controllers:  # version 2
            bases, quota_of = [mounts, mounts / "unified"], _unified_quota
        elif "cpu" in controllers.split(","):
            bases, quota_of = [mounts / controllers, mounts / "cpu"], _quota
        else:
            continue
        group = PurePosixPath(
            path.lstrip("/")
        )  # in a container it may be the host's path, of which only "." is there
        for base in bases:
            for part in [group, *group.parents]:
                quota = quota_of(base / part)
                if quota is not None:
                    yield quota


def _unified_quota(group: Path) -> float | None:
    quota, _, period = _text(group / "cpu.max").partition(" ")
    return float(quota) / float(period) if quota not in ("", "max") else None


def _quota(group: Path) -> float | None:
    quota, period = _text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us")
    return float(quota) / float(period) if quota and period and float(quota) > 0 else None


def _text(path: Path) -> str:
    """The file's text; "" where it is not there or not for us to read."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
