"""Settings that a method of training never reads: two runs that differ in no others are one and the same."""

from __future__ import annotations

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
