"""Questions to cells that are there: asked with the settings that these were made with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from consistentee.config import ClassificationTrainingConfig
from consistentee.errors import SettingError
from consistentee.evaluation.ablation.questions import Question, check_questions, question
from consistentee.evaluation.comparison.cells import Cell, settings_read
from consistentee.evaluation.comparison.plan import OUR_METHOD


def kept_questions(
    names: Sequence[str], cells: Sequence[Cell], given: Mapping[str, Any]
) -> dict[str, Question]:
    """Questions by name, as the command asked them that made the cells of our method.

    Those that have nothing to compare with these cells' settings are left out where others have.

    Args:
        names: of questions.
        cells: kept ones.
        given: training settings that are said once more; all that there are where no cell is of our method.

    Raises:
        SettingError: no such question; a setting that the cells were not made with; a question that compares other
            variants on one set than on another; or nothing to compare for any.
    """
    check_questions(names)
    kept = {(cell["backbone"], cell["set"]): _settings(cell) for cell in cells if cell["label"] == OUR_METHOD}
    if not kept:
        return {name: question(name, given) for name in names}
    _check_given(given, kept)
    asked: dict[str, Question] = {}
    refusals: list[SettingError] = []
    for name in names:
        found = {place: _asked(name, settings) for place, settings in kept.items()}
        refusals += [one for one in found.values() if isinstance(one, SettingError)]
        by_place = {place: one for place, one in found.items() if isinstance(one, Question)}
        if by_place:
            asked[name] = _shared(name, by_place)
    if not asked:
        raise refusals[0]
    return asked


def _asked(name: str, settings: Mapping[str, Any]) -> Question | SettingError:
    """The question, or why it has nothing to compare."""
    try:
        return question(name, settings)
    except SettingError as error:
        return error


def _settings(cell: Cell) -> dict[str, Any]:
    """What our method reads of a cell's settings, as training takes them."""
    read = settings_read(cell)
    values = ClassificationTrainingConfig.from_dict(read).to_dict()
    return {name: values[name] for name in values if name in read}


def _check_given(given: Mapping[str, Any], kept: Mapping[tuple[str, str], Mapping[str, Any]]) -> None:
    values = ClassificationTrainingConfig.from_dict(dict(given)).to_dict()
    for name in given:
        found = {place: settings[name] for place, settings in kept.items() if name in settings}
        if found and values[name] not in found.values():
            theirs = "; ".join(f"{value} on {_words(place)}" for place, value in found.items())
            raise SettingError(
                f"{name} must be that of the kept cells of {OUR_METHOD}, {theirs}, got {values[name]}. Leave it out: "
                "--render asks with the settings that cells were made with."
            )


def _shared(name: str, by_place: Mapping[tuple[str, str], Question]) -> Question:
    """The question, which must compare the same on all sets."""
    (first, asked), *others = by_place.items()
    for place, other in others:
        if other.pairs != asked.pairs:
            raise SettingError(
                f'The question "{name}" must have the same variants on all sets, got {_variants(asked)} on '
                f"{_words(first)} and {_variants(other)} on {_words(place)}. Name other --questions, or keep the cells "
                "of one of them in another folder."
            )
    return asked


def _variants(asked: Question) -> str:
    return ", ".join(dict.fromkeys(variant for variant, _ in asked.pairs))


def _words(place: tuple[str, str]) -> str:
    """Backbone and set, the set first."""
    return f"{place[1]} ({place[0]})"
