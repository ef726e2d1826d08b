"""Settings without effect: those that a method never reads, and those that another setting leaves idle.

Two runs that differ in no others than a method's are one and the same. A setting of either kind that somebody gives for
one training is refused; the words for that are here but for the names of options.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from consistentee.training.methods import METHODS

_POLICY_FITS = (
    "policy_data policy_epochs policy_learning_rate entropy_bonus layer_cost_warmup estimator num_rollouts reward "
    "reward_loss hardness layer_costs layer_cost_mode"
)
_CRITERION_FITS = "policy_min_steps policy_batch_size policy_weight_decay policy_folds"  # and the policy's
_CONSISTENT = "consistent_learning_rate weighted_sum_share patience"
_TEXTS = "passes exit_min_steps policy_texts max_disk_mb"

WITHOUT_TEXTS = frozenset(_TEXTS.split())
"""What is about texts without labels."""
OF_CONSISTENT = frozenset(_CONSISTENT.split())
"""What only the method `consistent` reads, of the settings that classifiers and generators share."""
OF_POLICY_FITS = frozenset(_POLICY_FITS.split())
"""What is about fits of the policy alone, which methods do not make that train it with everything else.

Fits for other criteria they make; the reward that is reported of the policy is no figure that anything is chosen by."""

SCALE = "exit_gradient_scale"
"""What methods do not read in which no layer learns from several exits."""

_EXITS = (
    f"{_POLICY_FITS} {_CRITERION_FITS} {_CONSISTENT} {_TEXTS} policy_hidden_size policy_dropout initial_exit_bias "
    "max_accuracy_loss threshold_margin max_cache_mb"
)
_CLASSIFIER_EXITS = frozenset(f"{_EXITS} policy_input ensemble_decay threshold_metric {SCALE}".split())
_GENERATOR_EXITS = frozenset(
    f"{_EXITS} policy_tokens exit_head exit_head_rank head_learning_rate layers_per_step last_layer_share "
    "reward_target min_exit_layer".split()
)


def of_exits(*, classifier: bool) -> frozenset[str]:
    """Names of the settings that a method without exits leaves alone, for a classifier or a text generator."""
    return _CLASSIFIER_EXITS if classifier else _GENERATOR_EXITS


def idle_settings(method: str, *, classifier: bool, unlabelled: bool) -> frozenset[str]:
    """Names of the settings that make no difference to a run.

    Args:
        method: a name of `METHODS`.
        classifier: whether it trains a classifier, not a text generator.
        unlabelled: whether it has texts without labels.
    """
    row, idle = METHODS[method], frozenset[str]()
    if not row.shared_layers:
        idle |= {SCALE}
    if not row.labels:
        return idle
    if not row.exits:
        idle |= of_exits(classifier=classifier)
    if method != "consistent":
        idle |= OF_CONSISTENT
    if row.joint_policy:
        idle |= OF_POLICY_FITS
    return idle if unlabelled else idle | WITHOUT_TEXTS


@dataclass(frozen=True)
class _Rule:
    """Settings, when they have no effect, and what they go with instead; names of settings are in braces."""

    settings: str
    idle: Callable[[Any], bool]
    goes_with: str


_SHARED = (
    _Rule("num_rollouts", lambda c: c.estimator == "exact", "{estimator} sampled"),
    _Rule("hardness", lambda c: c.reward == "uniform" and c.hardness != "uniform", "{reward} hardness"),
    _Rule(
        "consistent_epochs consistent_learning_rate weighted_sum_share patience",
        lambda c: c.rounds == 0,
        "{rounds} above 0",
    ),
    _Rule(
        "rounds consistent_learning_rate weighted_sum_share patience",
        lambda c: c.consistent_epochs == 0,
        "{consistent_epochs} above 0",
    ),
    _Rule("layer_cost_warmup", lambda c: max(c.layer_costs) == 0, "{layer_costs} above 0"),
)
_CLASSIFIERS = (
    *_SHARED,
    _Rule("num_queries classifier_hidden_size", lambda c: c.head == "shared_pooler", "{head} attention"),
    _Rule("pooling", lambda c: c.head == "attention", "{head} shared_pooler"),
    _Rule(
        "policy_dropout policy_hidden_size",
        lambda c: c.policy_input == "log_odds",
        "a {policy_input} that has the state",
    ),
)
_GENERATORS = (
    *_SHARED,
    _Rule("exit_head_rank", lambda c: c.exit_head != "low_rank", "{exit_head} low_rank"),
    _Rule(
        "lora_rank lora_alpha lora_dropout",
        lambda c: c.backbone_training != "lora",
        "{backbone_training} lora",
    ),
    _Rule(
        "learning_rate consistent_learning_rate gradient_checkpointing",
        lambda c: c.backbone_training == "frozen",
        "{backbone_training} full or lora",
    ),
)
_RETROFIT = (
    *_CLASSIFIERS,
    _Rule("learning_rate", lambda c: c.tune_backbone == "none", "{tune_backbone} lora or full"),
    _Rule("lora_rank lora_alpha lora_dropout", lambda c: c.tune_backbone != "lora", "{tune_backbone} lora"),
    _Rule("exit_min_steps max_disk_mb", lambda c: c.tune_backbone != "none", "{tune_backbone} none"),
)


def idle_among(
    given: Iterable[str], settings: Any, method: str, *, classifier: bool, unlabelled: bool = False
) -> Iterator[tuple[str, str]]:
    """Which of the settings that were given for one training change nothing there, and why.

    Args:
        given: their names.
        settings: all in force, these and others, as attributes.
        method: a name of `METHODS`.
        classifier: whether it trains a classifier, not a text generator.
        unlabelled: whether it has texts without labels.

    Yields:
        A setting's name, and what to say behind it. In braces there are names of settings, `{method}` (which one it
        is), `{consistent}` (that of this name) and `{texts}` (those without labels).
    """
    row, given = METHODS[method], list(given)
    if not row.labels:
        return _beside(given, settings, _RETROFIT)
    rules = _CLASSIFIERS if classifier else _GENERATORS
    of_method = _of_method(given, method, classifier=classifier, unlabelled=unlabelled)
    return itertools.chain(of_method, _beside(given, settings, rules))


def _of_method(
    given: Iterable[str], method: str, *, classifier: bool, unlabelled: bool
) -> Iterator[tuple[str, str]]:
    """Those that it never reads."""
    row, exits = METHODS[method], of_exits(classifier=classifier)
    for name in given:
        if not row.exits and name in exits:
            yield name, "is about exits, which {method} does not train"
        elif method != "consistent" and name in OF_CONSISTENT:
            yield name, "goes with {consistent} and has no effect here"
        elif not row.shared_layers and name == SCALE:
            yield name, "is about layers that learn from several exits, which {method} has not"
        elif not unlabelled and name in WITHOUT_TEXTS:
            yield name, "goes with {texts} and has no effect here"
        elif row.joint_policy and name in OF_POLICY_FITS:
            yield name, "is about fits of the policy, which {method} does not make"


def _beside(given: Iterable[str], settings: Any, rules: Iterable[_Rule]) -> Iterator[tuple[str, str]]:
    """Those that another one leaves without effect."""
    for name in given:
        for rule in rules:
            if name in rule.settings.split() and rule.idle(settings):
                yield name, f"goes with {rule.goes_with} and has no effect here"
