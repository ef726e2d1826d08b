"""Settings that another one leaves without effect: given on the command line, they are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from consistentee.config import ClassificationTrainingConfig
from consistentee.errors import SettingError
from consistentee.training.idle_settings import OF_CONSISTENT, OF_POLICY_FITS, SCALE, WITHOUT_TEXTS, of_exits
from consistentee.training.methods import METHODS

Command = Literal["train", "finetune"]


@dataclass(frozen=True)
class _Rule:
    """Settings, when they have no effect, and what they go with instead."""

    settings: str
    idle: Callable[[Any], bool]
    goes_with: str


_SHARED = (
    _Rule("num_rollouts", lambda c: c.estimator == "exact", "--estimator sampled"),
    _Rule("hardness", lambda c: c.reward == "uniform" and c.hardness != "uniform", "--reward hardness"),
    _Rule(
        "consistent_epochs consistent_learning_rate weighted_sum_share patience",
        lambda c: c.rounds == 0,
        "--rounds above 0",
    ),
    _Rule(
        "rounds consistent_learning_rate weighted_sum_share patience",
        lambda c: c.consistent_epochs == 0,
        "--consistent-epochs above 0",
    ),
    _Rule("layer_cost_warmup", lambda c: max(c.layer_costs) == 0, "--layer-costs above 0"),
)
_CLASSIFIERS = (
    *_SHARED,
    _Rule("num_queries classifier_hidden_size", lambda c: c.head == "shared_pooler", "--head attention"),
    _Rule("pooling", lambda c: c.head == "attention", "--head shared_pooler"),
    _Rule(
        "policy_dropout policy_hidden_size",
        lambda c: c.policy_input == "log_odds",
        "a --policy-input that has the state",
    ),
)
_GENERATORS = (
    *_SHARED,
    _Rule("exit_head_rank", lambda c: c.exit_head != "low_rank", "--exit-head low_rank"),
    _Rule(
        "lora_rank lora_alpha lora_dropout",
        lambda c: c.backbone_training != "lora",
        "--backbone-training lora",
    ),
    _Rule(
        "learning_rate consistent_learning_rate gradient_checkpointing",
        lambda c: c.backbone_training == "frozen",
        "--backbone-training full or lora",
    ),
)
_RETROFIT = (
    *_CLASSIFIERS,
    _Rule("learning_rate", lambda c: c.tune_backbone == "none", "--tune-backbone lora or full"),
    _Rule("lora_rank lora_alpha lora_dropout", lambda c: c.tune_backbone != "lora", "--tune-backbone lora"),
    _Rule("exit_min_steps max_disk_mb", lambda c: c.tune_backbone != "none", "--tune-backbone none"),
)


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
    classifier = isinstance(config, ClassificationTrainingConfig)
    rules = _CLASSIFIERS if classifier else _GENERATORS
    given, exits = list(given), of_exits(classifier=classifier)
    for name in given:
        if command == "finetune" and name in exits:
            what = "finetune" if method in (None, "plain") else f"--method {method}"
            raise SettingError(f"{_option(name)} is about exits, which {what} does not train. Leave it out.")
        if command == "train" and method not in (None, "consistent") and name in OF_CONSISTENT:
            raise SettingError(
                f"{_option(name)} goes with --method consistent and has no effect here. Leave it out, or give both."
            )
        if name == SCALE and method is not None and not METHODS[method].shared_layers:
            raise SettingError(
                f"{_option(name)} is about layers that learn from several exits, which --method {method} has not. "
                "Leave it out."
            )
        if name in WITHOUT_TEXTS and not unlabelled:
            raise SettingError(
                f"{_option(name)} goes with --unlabelled-file and has no effect here. Leave it out, or give both."
            )
        if method is not None and METHODS[method].joint_policy and name in OF_POLICY_FITS:
            raise SettingError(
                f"{_option(name)} is about fits of the policy, which --method {method} does not make. Leave it out."
            )
    _check_rules(given, config, rules)


def check_retrofit(given: Iterable[str], config: Any) -> None:
    """As `check_effects`, for the settings of `retrofit`."""
    _check_rules(given, config, _RETROFIT)


def _check_rules(given: Iterable[str], config: Any, rules: Sequence[_Rule]) -> None:
    for name in given:
        for rule in rules:
            if name in rule.settings.split() and rule.idle(config):
                raise SettingError(
                    f"{_option(name)} goes with {rule.goes_with} and has no effect here. Leave it out, or give both."
                )


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
