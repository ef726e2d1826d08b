"""Timing that can be believed: competitors in turn within one run, devices synchronised, the environment on record."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
"""What decides how fast a processor multiplies matrices."""


def synchronised_seconds(device: torch.device) -> float:
    """The clock, once the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def time_in_turn(
    work: Mapping[str, Sequence[Callable[[], object]]],
    device: torch.device,
    repeats: int,
    tick: Callable[[], object] = lambda: None,
    *,
    untimed: bool = True,
) -> dict[str, list[list[float]]]:
    """Time several competitors' steps over and over, each repetition all of them, so that a drift hits all alike.

    Args:
        work: the steps (batches) of each competitor.
        device: synchronised around every step.
        repeats: how often, at least 1.
        tick: called after every pass of one competitor, the untimed ones too.
        untimed: whether a pass that is not timed comes before; False where all have just run.

    Returns:
        Seconds of each step, (repeats, steps) for each competitor. The order rotates from repetition to repetition.
    """
    names = list(work)
    seconds: dict[str, list[list[float]]] = {name: [] for name in names}
    for repeat in range(-1 if untimed else 0, repeats):
        turn = (repeat + 1) % len(names)
        for name in names[turn:] + names[:turn]:
            taken: list[float] = []
            for step in work[name]:
                start = synchronised_seconds(device)
                step()
                taken.append(synchronised_seconds(device) - start)
            if repeat >= 0:
                seconds[name].append(taken)
            tick()
    return seconds


def paired_ratio(
    slow: Sequence[Sequence[float]], fast: Sequence[Sequence[float]]
) -> tuple[float, float, float]:
    """How many times faster: median, first and third quartile of the repetitions' ratios of total seconds."""
    ratios = [sum(a) / sum(b) for a, b in zip(slow, fast, strict=True)]
    first, median, third = np.percentile(ratios, [25, 50, 75])
    return float(median), float(first), float(third)


def environment(device: torch.device, seed: int | None = None) -> dict[str, Any]:
    """What a figure depends on beside the code: hardware, versions, threads, and the seed where something is drawn."""
    import transformers

    import consistentee

    return {
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
        "cpu_flags": [flag for flag in CPU_FLAGS if flag in _cpu_info("flags").split()],
        "device": str(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "consistentee": consistentee.__version__,
        **({} if seed is None else {"seed": seed}),
    }


def processor_name() -> str:
    """The processor as it names itself."""
    return _cpu_info("model name") or platform.processor() or platform.machine()


def _cpu_info(key: str) -> str:
    """An entry of Linux's list of processors; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.split(":")[0].strip() == key), "")
