"""The questions that an ablation answers: which switch is turned, and what is compared with what.

To add one, write its row; what it finds beside paired differences is a function of `answers.py` or `studies.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from consistentee.config import ClassificationTrainingConfig
from consistentee.errors import SettingError
from consistentee.evaluation.comparison.plan import OUR_METHOD

WEAK_EXITS = {"head": "shared_pooler", "pooling": "cls", "ensemble_decay": 0.0}
"""Linear classifiers on one pooler of `[CLS]` for all layers, each predicting alone: the paper's."""

Further = Literal["thirds", "rounds", "gradients", "policy_rows"]


@dataclass(frozen=True)
class Question:
    """A question.

    Attributes:
        words: it, as a person asks it.
        settings: of the variants, by label; the method itself needs none.
        pairs: (variant, what it is compared with), both labels.
        criteria: by which the two are compared, on the same exits' curves.
        further: what is found beside differences.
    """

    words: str
    settings: Mapping[str, Mapping[str, Any]]
    pairs: tuple[tuple[str, str], ...]
    criteria: tuple[str, ...] = ("policy",)
    further: Further | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """All methods that it needs."""
        return tuple(dict.fromkeys(label for pair in self.pairs for label in pair))


@dataclass(frozen=True)
class _Switch:
    """Variants of our method, by what stands behind the colon of their label, and how they are compared."""

    words: str
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    further: Further | None = None
    criteria: tuple[str, ...] = ("policy",)
    pairs: tuple[tuple[str, str], ...] = ()
    others: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])


_MEASURES = ("entropy", "forgetting_events", "final_loss", "el2n")
_ROLLOUTS = (1, 8, 32)

_SWITCHES: dict[str, _Switch] = {
    "reward": _Switch(
        "Does the reward need hardness?",
        {"uniform_reward": {"reward": "uniform"}},
        further="thirds",
    ),
    "hardness": _Switch(
        "Is the memorized layer the right measure of hardness?",
        {measure: {"hardness": measure} for measure in _MEASURES},
    ),
    "rounds": _Switch(
        "Does the iteration converge, and does it pay?",
        further="rounds",
    ),
    "estimator": _Switch(
        "What does sampling the exit layer cost against the exact gradient?",
        {f"sampled_{k}": {"estimator": "sampled", "num_rollouts": k} for k in _ROLLOUTS},
        further="gradients",
    ),
    "policy_rows": _Switch(
        "Must the policy learn from rows that the classifiers have not seen, and from how many?",
        {"seen_rows": {"policy_data": "seen"}},
        further="policy_rows",
    ),
    "objective": _Switch(
        "Is the consistent objective better than the weighted sum, with weak exits and with strong ones?",
        {"weak_exits": WEAK_EXITS},
        criteria=("policy", "confidence"),
        pairs=(
            ("weighted_sum", OUR_METHOD),
            ("weighted_sum:weak_exits", f"{OUR_METHOD}:weak_exits"),
            (f"{OUR_METHOD}:weak_exits", OUR_METHOD),
        ),
        others={"weighted_sum": {}, "weighted_sum:weak_exits": WEAK_EXITS},
    ),
}
QUESTIONS = tuple(_SWITCHES)
"""Names of all questions."""


def check_questions(names: Sequence[str]) -> None:
    """Raise SettingError unless these are questions, at least one, and each once."""
    if not names or len(set(names)) < len(names):
        raise SettingError(f"questions must be at least one, each once, got {', '.join(names) or 'none'}.")
    for name in names:
        if name not in _SWITCHES:
            raise SettingError(f'questions must be among {", ".join(QUESTIONS)}, got "{name}".')


def question(name: str, shared: Mapping[str, Any]) -> Question:
    """A question by its name, with settings that keep the shared budget.

    Args:
        name: one of `QUESTIONS`.
        shared: training settings of all methods, where they are not defaults.

    Raises:
        SettingError: there is no such question, or the shared settings leave it none of its variants.
    """
    check_questions([name])
    switch = _SWITCHES[name]
    config = ClassificationTrainingConfig.from_dict(dict(shared))
    variants: dict[str, Mapping[str, Any]] = dict(switch.variants)
    if name == "rounds":
        variants = _rounds(config.rounds, config.consistent_epochs)
    settings = {f"{OUR_METHOD}:{variant}": own for variant, own in variants.items()}
    same = [
        label
        for label, own in settings.items()
        if ClassificationTrainingConfig.from_dict({**shared, **own}) == config
    ]
    for label in same:  # the shared settings have it already
        del settings[label]
    if name == "hardness" and config.reward != "hardness":
        raise SettingError(
            f'The question "hardness" needs a reward that goes by it, got reward {config.reward}. Give --reward '
            "hardness."
        )
    pairs = switch.pairs or tuple((label, OUR_METHOD) for label in settings)
    if not pairs or (switch.pairs and same):
        raise SettingError(
            f'The question "{name}" has nothing to compare: all methods have {", ".join(same)}.'
        )
    return Question(switch.words, {**settings, **switch.others}, pairs, switch.criteria, switch.further)


def _rounds(rounds: int, consistent_epochs: float) -> dict[str, Mapping[str, Any]]:
    """The same epochs in one round, and in twice as many, none of which ends the training early."""
    epochs = rounds * consistent_epochs
    if not epochs:
        raise SettingError(
            f'The question "rounds" needs a consistent phase, got {rounds} rounds of '
            f"{consistent_epochs:g} epochs. Give --rounds and --consistent-epochs above 0."
        )
    twice = 2 * rounds
    return {
        "one_round": {"rounds": 1, "consistent_epochs": epochs},
        f"{twice}_rounds": {"rounds": twice, "consistent_epochs": epochs / twice, "patience": twice},
    }
