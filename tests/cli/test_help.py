"""What the commands say of themselves."""

from __future__ import annotations

import re

import pytest

from consistentee.cli.main import app, main

COMMANDS = sorted(name for name in app if not name.startswith("-"))
CLASSIFIERS_ONLY = ("calibrate", "compare", "ablate", "export", "predict", "probe", "report", "retrofit")


@pytest.fixture(params=COMMANDS)
def told(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """A command's name and its help in one line."""
    assert main([request.param, "--help"]) == 0
    return request.param, " ".join(re.sub("[│─╭╮╰╯]", " ", capsys.readouterr().out).split())


def test_a_choice_is_named_once(told: tuple[str, str]) -> None:
    assert "|CHOICE" not in told[1]
    for choices in re.findall(r"\[choices: ([^\]]+)\]", told[1]):
        names = choices.split(", ")
        assert len(set(names)) == len(names) > 1


def test_only_what_has_an_effect(told: tuple[str, str]) -> None:
    name, text = told
    of_generators = [word for word in ("--prompt-column", "--response-column", "alpaca") if word in text]
    assert of_generators == [] or name not in CLASSIFIERS_ONLY
    assert ("keys of a recipe" in text) == ("--config " in text)


def test_those_of_classifiers_are_there() -> None:
    assert set(CLASSIFIERS_ONLY) < set(COMMANDS)
