"""Pools for worker processes, which import this module: slow ones, of which a threshold kills the process."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from consistentee.inference.encoder.layer_pool import PoolAnswer
from consistentee.pipelines.classifier import Engine

POISON = 0.4321
"""A text with this threshold kills the process that takes it in."""


class MortalPool:
    """An engine's pool whose steps take two milliseconds more, so that texts are on their way."""

    def __init__(self, engine: Engine) -> None:
        self.pool: Any = engine.pool()

    def add(self, rows: Any, exit_scores: Any) -> None:
        if any(row.threshold == POISON for row in rows):
            os.kill(os.getpid(), signal.SIGKILL)
        self.pool.add(rows, exit_scores)

    def step(self) -> tuple[list[PoolAnswer], int]:
        time.sleep(0.002)
        return self.pool.step()

    def drop(self, keys: Any) -> None:
        self.pool.drop(keys)

    def __len__(self) -> int:
        return len(self.pool)


def threads_and_modules(engine: Any, row: Any, point: Any) -> tuple[int, set[str]]:
    """A view: what the process that computes it has."""
    import torch

    return torch.get_num_threads(), set(sys.modules)


def broken(engine: Any, row: Any, point: Any) -> None:
    """A view that fails."""
    raise RuntimeError("a layer broke")
