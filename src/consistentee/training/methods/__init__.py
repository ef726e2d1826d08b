"""How to train: one file a method, and one row of the table here. Each is read top to bottom."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from consistentee.config import Criterion
from consistentee.errors import SettingError
from consistentee.functional.tables import BOTH_TASKS, CLASSIFICATION, GENERATION


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
        tasks: what it trains.
        joint_policy: whether steps train the policy together with everything else.
        needs: settings that it cannot do without and that have no default.
        unlabelled: whether texts without labels can be given beside labelled rows.
        warms_up: whether it has a warm-up, in which what is forgotten can be counted.
        begins_with: the objective of its first phase, whose steps trainings can share (`warm_ups.py`), by a name that
            all methods with this phase give it; nothing where it shares none.
        one_phase: whether all its steps are of that phase; else those of the warm-up's epochs.
        shared_layers: whether layers of the backbone learn from several exits, whose gradients can be scaled.
    """

    module: str
    source: str
    exits: bool = True
    unused_parameters: bool = False
    labels: bool = True
    tasks: tuple[str, ...] = BOTH_TASKS
    joint_policy: bool = False
    needs: tuple[str, ...] = ()
    unlabelled: bool = False
    warms_up: bool = False
    begins_with: str = ""
    one_phase: bool = False
    shared_layers: bool = True

    def load(self) -> Callable[[Any], Path]:
        """The method itself."""
        method: Callable[[Any], Path] = getattr(
            importlib.import_module(f"{__name__}.{self.module}"), f"train_{self.module}"
        )
        return method


_ROWS = (CLASSIFICATION,)
METHODS = {
    "consistent": Method(
        "consistent",
        "ConsistentEE (arXiv:2312.11882)",
        unlabelled=True,
        warms_up=True,
        begins_with="weighted_sum",
    ),
    "deebert": Method(
        "deebert",
        "DeeBERT (arXiv:2004.12993)",
        unused_parameters=True,
        begins_with="last_layer",
        shared_layers=False,
    ),
    "weighted_sum": Method(
        "weighted_sum", "PABEE (arXiv:2006.04152)", begins_with="weighted_sum", one_phase=True
    ),
    "right_tool": Method("right_tool", "The Right Tool for the Job (arXiv:2004.07453)", tasks=_ROWS),
    "fastbert": Method(
        "fastbert",
        "FastBERT (arXiv:2004.02178)",
        unused_parameters=True,
        tasks=_ROWS,
        begins_with="last_layer",
        shared_layers=False,
    ),
    "berxit": Method("berxit", "BERxiT (EACL 2021)", tasks=_ROWS),
    "palbert": Method("palbert", "PALBERT (arXiv:2204.03276)", tasks=_ROWS, joint_policy=True),
    "sweet": Method("sweet", "SWEET (arXiv:2306.02307)", tasks=_ROWS, shared_layers=False),
    "cosee": Method("cosee", "COSEE (arXiv:2412.13236)", tasks=_ROWS),
    "nsp": Method("nsp", "NSP/CAP (arXiv:2506.17249)", tasks=_ROWS),
    "beem": Method(
        "beem", "BEEM (arXiv:2502.00745)", tasks=_ROWS, begins_with="weighted_sum", one_phase=True
    ),
    "plain": Method("plain", "fine-tuning without exits", exits=False),
    "static": Method("static", "a smaller model", exits=False, tasks=_ROWS, needs=("num_layers",)),
    "retrofit": Method(
        "retrofit", "ours: exits for a model that is not to change", labels=False, shared_layers=False
    ),
}

PUBLISHED_NAMES = {
    "consistentee": ("consistent", "policy"),
    "pabee": ("weighted_sum", "patience"),
    "pcee": ("weighted_sum", "confident_patience"),
    "fpabee": ("weighted_sum", "similar_patience"),
    "lte": ("berxit", "learnt_to_exit"),
    "qexit": ("palbert", "quantile"),
    "cap": ("nsp", "cap"),
}
"""Names of papers that are no rows here, in small letters alone: the method that trains so, and the exit criterion."""


def method_of(name: str) -> Method:
    """A method that learns from labels, by name.

    Raises:
        ValueError: there is none of that name.
    """
    known = [row for row, method in METHODS.items() if method.labels]
    if name not in known:
        raise ValueError(f'method must be one of {", ".join(known)}, got "{name}".{_meant(name, known)}')
    return METHODS[name]


def _meant(name: str, known: list[str]) -> str:
    """Another sentence for who took something else's name for a method's."""
    plain = "".join(letter for letter in name.lower() if letter.isalnum())
    if plain in PUBLISHED_NAMES:
        method, criterion = PUBLISHED_NAMES[plain]
        return f" It is {method} with the exit criterion {criterion}."
    if name in METHODS:
        return f" It learns from texts alone: consistentee {name}."
    if name in get_args(Criterion):
        return " That is an exit criterion, and no training: the exits of several methods can be read by it."
    close = difflib.get_close_matches(name.lower(), known, n=1)
    return f' Did you mean "{close[0]}"?' if close else ""


def check_method(name: str, task: str, settings: Any) -> None:
    """See that a method can train what is to be trained.

    Args:
        name: of a method.
        task: `CLASSIFICATION` or `GENERATION`.
        settings: of the run, read for what the method needs.

    Raises:
        SettingError: it trains another kind of model, or a setting is missing.
        ValueError: there is none of that name.
    """
    method = method_of(name)
    if task not in method.tasks:
        others = [row for row, other in METHODS.items() if other.labels and task in other.tasks]
        what = "a text generator" if task == GENERATION else "a classifier"
        raise SettingError(f'method must be one of {", ".join(others)} for {what}, got "{name}".')
    for setting in method.needs:
        if getattr(settings, setting) is None:
            raise SettingError(f"{setting} must be given for the method {name}, got none.")
    counts = method.warms_up or getattr(settings, "reward", None) != "hardness"
    if method.exits and not counts and settings.hardness == "forgetting_events":
        raise SettingError(
            f"hardness must be another one than forgetting_events for the method {name}, which has no warm-up to count "
            "them in. Take memorized_layer, or --method consistent."
        )
