"""Settings that another one leaves without effect: given on the command line, they are refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal

from consistentee.config import ClassificationTrainingConfig
from consistentee.errors import SettingError
from consistentee.training.idle_settings import idle_among

Command = Literal["train", "finetune"]


def check_effects(
    given: Iterable[str],
    config: Any,
    command: Command,
    method: str | None = None,
    *,
    unlabelled: bool = False,
) -> None:
    """Refuse settings of the command line that change nothing; a recipe may hold them, as it is read by more commands.

    Args:
        given: names of the settings that were given.
        config: with these and all others in force.
        command: what it is for.
        method: of training; None for the command's own.
        unlabelled: whether there are texts without labels.

    Raises:
        SettingError: one of them has no effect.
    """
    method = method or ("consistent" if command == "train" else "plain")
    _check(given, config, method, unlabelled=unlabelled)


def check_retrofit(given: Iterable[str], config: Any) -> None:
    """As `check_effects`, for the settings of `retrofit`."""
    _check(given, config, "retrofit")


def _check(given: Iterable[str], config: Any, method: str, *, unlabelled: bool = False) -> None:
    words = {field.name: _option(field.name) for field in dataclasses.fields(config)} | {
        "method": "finetune" if method == "plain" else f"--method {method}",
        "consistent": "--method consistent",
        "texts": "--unlabelled-file",
    }
    classifier = isinstance(config, ClassificationTrainingConfig)
    for name, why in idle_among(given, config, method, classifier=classifier, unlabelled=unlabelled):
        both = ", or give both" if why.startswith("goes with") else ""
        raise SettingError(f"{_option(name)} {why.format(**words)}. Leave it out{both}.")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
