"""How to train: one file a method, and one row of the table here. Each is read top to bottom."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Method:
    """A row of `METHODS`.

    Attributes:
        module: of this package; its function `train_` with that name takes a `Run` and returns the folder of the saved
            model.
        source: where it comes from.
        exits: whether a model with exits comes out; else the plain one.
        unused_parameters: whether it leaves parameters out of some steps, which several processes must be told.
        labels: whether it learns from labelled rows; else from texts alone.
    """

    module: str
    source: str
    exits: bool = True
    unused_parameters: bool = False
    labels: bool = True

    def load(self) -> Callable[[Any], Path]:
        """The method itself."""
        method: Callable[[Any], Path] = getattr(
            importlib.import_module(f"{__name__}.{self.module}"), f"train_{self.module}"
        )
        return method


METHODS = {
    "consistent": Method("consistent", "ConsistentEE (arXiv:2312.11882)"),
    "deebert": Method("deebert", "DeeBERT (arXiv:2004.12993)", unused_parameters=True),
    "plain": Method("plain", "fine-tuning without exits", exits=False),
    "retrofit": Method("retrofit", "ours: exits for a model that is not to change", labels=False),
}


def method_of(name: str) -> Method:
    """A method that learns from labels, by name.

    Raises:
        ValueError: there is none of that name.
    """
    known = [row for row, method in METHODS.items() if method.labels]
    if name not in known:
        raise ValueError(f'method must be one of {", ".join(known)}, got "{name}".')
    return METHODS[name]
