"""How to train: `TrainingConfig` and its checks. Imports nothing heavy."""

from __future__ import annotations

import dataclasses
import difflib
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

Head = Literal["attention", "shared_pooler"]
Pooling = Literal["auto", "cls", "mean"]
PolicyInput = Literal["state", "signals", "state+signals"]
PolicyInputChoice = Literal["auto", "state", "signals", "state+signals"]
PolicyData = Literal["held_out", "seen"]
Estimator = Literal["exact", "sampled"]
Reward = Literal["hardness", "uniform"]
RewardLoss = Literal["cross_entropy", "error"]
Prices = Literal["range", "each"]
HardnessMeasure = Literal["memorized_layer", "forgetting_events", "final_loss", "entropy", "el2n", "uniform"]
ThresholdMetric = Literal["accuracy", "f1", "macro_f1", "matthews"]
Criterion = Literal["policy", "confidence", "entropy", "patience"]
MixedPrecision = Literal["auto", "no", "bf16", "fp16"]


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained. Every field is a command-line option of the same name and a key of a recipe.

    The defaults are what paired comparisons supported (docs/experiments.md); the paper's own values are in `recipes/`.
    """

    # Model
    head: Head = "attention"
    """Internal classifier: `attention` (own query pooling per layer) or `shared_pooler` (the paper's)."""
    pooling: Pooling = "auto"
    """What a shared pooler reads: `cls`, `mean`, or what suits the backbone (`auto`)."""
    num_queries: int = 4
    """Learned queries per layer of an `attention` head."""
    classifier_hidden_size: int | None = None
    """Width of the hidden layer of an `attention` head; by default the backbone's. Narrower exits cost less."""
    head_dropout: float = 0.1
    """Dropout before each classifier's last layer."""
    ensemble_decay: float = 0.5
    """Share of the layers before in a layer's prediction, 0 (alone) up to 1 (exclusive)."""
    policy_input: PolicyInputChoice = "auto"
    """What the policy reads: the pooled state, the classifiers' signals, or both; `auto` lets validation decide
    whether the state earns its place beside the signals."""
    policy_hidden_size: int = 32
    """Width of the policy network."""
    policy_dropout: float = 0.5
    """Dropout on the pooled state that the policy reads."""

    # Data
    max_length: int = 128
    """Tokens per input, at most as many as the backbone has positions; longer inputs are cut."""
    parse_special_tokens: bool = False
    """Take special tokens that a text spells, such as [SEP], for special tokens; otherwise they are text."""
    validation_fraction: float = 0.2
    """Share of the training rows kept from the classifiers: for selection, and for the policy if `held_out`."""
    policy_data: PolicyData = "held_out"
    """Rows the policy learns from: the validation rows, cross-fitted, or rows the classifiers have `seen`."""

    # Optimisation
    batch_size: int = 32
    """Instances per optimizer step, over all processes and accumulation steps together."""
    gradient_accumulation_steps: int = 1
    """Parts a batch is cut into to save memory; does not change the result."""
    learning_rate: float = 5e-5
    """Peak learning rate of the backbone in the warm-up."""
    consistent_learning_rate: float | None = None
    """Peak learning rate of the backbone in the consistent phase; by default the warm-up's."""
    head_learning_rate: float = 1e-3
    """Peak learning rate of new parameters (poolers and classifiers)."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay, on matrices only."""
    schedule: Literal["linear", "constant"] = "linear"
    """After the warm-up ramp: fall to zero at the planned end, or stay."""
    warmup_ratio: float = 0.1
    """Share of all steps over which the learning rate rises from zero."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    mixed_precision: MixedPrecision = "auto"
    """`auto`: bf16 where the hardware computes in it, full precision elsewhere."""
    group_by_length: bool = True
    """Batch inputs of similar length, so that little is padded."""

    # Phase 1: warm-up on the weighted sum of all classifiers' losses
    warmup_epochs: float = 2.0
    """Epochs of the warm-up."""
    distillation: float = 0.0
    """Weight of KL(last layer || layer) in the warm-up."""

    # Phases 2 and 3: policy, then classifiers and backbone; repeated
    rounds: int = 2
    """How often phases 2 and 3 are repeated."""
    consistent_epochs: float = 0.5
    """Epochs of the consistent phase in each round."""
    weighted_sum_share: float = 0.3
    """Share of the weighted-sum loss mixed into the consistent loss, 0 (the paper) to 1."""
    estimator: Estimator = "exact"
    """Policy gradient: the exact one, or REINFORCE from `num_rollouts` samples."""
    num_rollouts: int = 8
    """Exit layers drawn per instance by `sampled`."""
    reward: Reward = "hardness"
    """Price per layer falls with the instance's hardness, or is `uniform`."""
    reward_loss: RewardLoss = "error"
    """What a bad exit costs: `cross_entropy` (the paper) or `error` (0 or 1)."""
    hardness: HardnessMeasure = "memorized_layer"
    """Measure behind the `hardness` reward."""
    layer_costs: tuple[float, ...] = (0.002, 0.2)
    """Prices of one layer: the ends of a range, or those to choose from; one value fixes it."""
    prices: Prices = "range"
    """`range`: one policy learns all prices from the lowest to the highest of `layer_costs`, and the threshold dials
    among them. `each`: one policy for each of `layer_costs` (the paper's), of which validation chooses."""
    policy_epochs: int = 40
    """Epochs of each policy fit on cached states, or more where these are fewer than `policy_min_steps`."""
    policy_min_steps: int = 100
    """Least number of steps of a policy fit: few rows need more epochs."""
    policy_batch_size: int = 128
    """Instances per step of a policy fit."""
    policy_learning_rate: float = 1e-3
    """Learning rate of a policy fit."""
    policy_weight_decay: float = 0.01
    """Weight decay of a policy fit."""
    entropy_bonus: float = 0.01
    """Weight of the exit distribution's entropy in the policy's objective, falling to zero over the fit."""
    price_warmup: float = 0.3
    """Share of a policy fit over which the price rises from zero: quality first, then speed."""
    initial_exit_bias: float = -1.0
    """Exit logit of an untrained policy; negative = go deep."""
    policy_folds: int = 4
    """Folds of the cross-fitted policy on held-out rows."""
    patience: int = 2
    """Stop after this many rounds in turn that are worse on validation rows by more than a standard error."""
    threshold_metric: ThresholdMetric = "accuracy"
    """Metric of the validation rows by which default thresholds are chosen. `accuracy` hardly sees a rare class;
    `macro_f1` counts every class alike, `f1` is that of the second of two classes."""
    max_accuracy_loss: float = 0.0
    """The default threshold may lose this much validation accuracy (0.01 = one point), or of the `threshold_metric`,
    against the last layer."""

    # Run
    seed: int = 0
    """Seed of splits, order, initial weights and dropout."""
    checkpoint_every: int = 200
    """Steps between checkpoints; the end of each phase is always one."""
    max_cache_mb: float = 1024.0
    """Pooled states above this size are kept in a memory-mapped file."""
    tracker: Literal["none", "tensorboard", "wandb", "mlflow", "all"] = "none"
    """Experiment tracker, through accelerate."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer_costs", tuple(float(cost) for cost in self.layer_costs))
        check_fields(
            self,
            positive=(
                "num_queries policy_hidden_size max_length batch_size gradient_accumulation_steps learning_rate "
                "head_learning_rate max_grad_norm warmup_epochs policy_epochs policy_min_steps policy_batch_size "
                "policy_learning_rate patience checkpoint_every max_cache_mb"
            ),
            not_negative="weight_decay distillation rounds consistent_epochs policy_weight_decay entropy_bonus",
            shares="weighted_sum_share max_accuracy_loss",
            shares_below_one="head_dropout ensemble_decay policy_dropout warmup_ratio price_warmup",
        )
        if self.classifier_hidden_size is not None and not self.classifier_hidden_size > 0:
            raise ValueError(f"classifier_hidden_size must be above 0, got {self.classifier_hidden_size}.")
        if self.consistent_learning_rate is not None and not self.consistent_learning_rate > 0:
            raise ValueError(
                f"consistent_learning_rate must be above 0, got {self.consistent_learning_rate}."
            )
        check_shared_fields(self)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, ready for JSON or YAML."""
        return plain_values(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainingConfig:
        """Settings from plain values.

        Raises:
            ValueError: if a key is unknown (with the nearest known one) or a value has the wrong type.
        """
        return cls(**checked_settings(values))


def checked_settings(values: Mapping[str, Any], config_class: type[Any] = TrainingConfig) -> dict[str, Any]:
    """The given settings with each value in its field's type; raises ValueError on an unknown key or a wrong type."""
    hints = get_type_hints(config_class)
    settings: dict[str, Any] = {}
    for key, value in values.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)
            suggestion = f' Did you mean "{near[0]}"?' if near else ""
            raise ValueError(f'"{key}" is not a training setting.{suggestion}')
        settings[key] = _checked_value(key, value, hints[key])
    return settings


def _checked_value(key: str, value: Any, hint: Any) -> Any:
    if key == "layer_costs":
        costs = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_checked_value("each of layer_costs", cost, float) for cost in costs)
    kinds = get_args(hint) or (hint,)
    if value is None and type(None) in kinds:
        return None
    if bool in kinds:
        if not isinstance(value, bool):
            raise ValueError(f"{key} must be true or false, got {value!r}.")
        return value
    if int in kinds:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{key} must be a whole number, got {value!r}.")
        return value
    if float in kinds:
        try:
            if isinstance(value, bool) or not isinstance(value, (int, float, str)):
                raise TypeError
            return float(value)  # YAML reads 1e-5 as text
        except (TypeError, ValueError):
            raise ValueError(f"{key} must be a number, got {value!r}.") from None
    if str in kinds:
        if not isinstance(value, str):
            raise ValueError(f"{key} must be text, got {value!r}.")
        return value
    require_choice(key, value, kinds)
    return value


def plain_values(config: Any) -> dict[str, Any]:
    """The settings of a training config as plain values, ready for JSON or YAML."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(config).items()
    }


def check_fields(
    config: Any, *, positive: str, not_negative: str, shares: str, shares_below_one: str
) -> None:
    """Raise ValueError unless all choices are among theirs and the named fields lie where they must.

    Args:
        config: a training config.
        positive: names of fields that must be above 0, separated by spaces.
        not_negative: of fields that must be >= 0.
        shares: of fields that must be in [0, 1].
        shares_below_one: of fields that must be in [0, 1).
    """
    hints = get_type_hints(type(config))
    for field_ in dataclasses.fields(config):
        choices = get_args(hints[field_.name])
        if choices and all(isinstance(choice, str) for choice in choices):
            require_choice(field_.name, getattr(config, field_.name), choices)
    for name in shares_below_one.split():
        require_range(name, getattr(config, name), 0, 1, open_end=True)
    for name in shares.split():
        require_range(name, getattr(config, name), 0, 1)
    if not 0 < config.validation_fraction < 1:
        raise ValueError(f"validation_fraction must be between 0 and 1, got {config.validation_fraction}.")
    for name in positive.split():
        if not getattr(config, name) > 0:
            raise ValueError(f"{name} must be above 0, got {getattr(config, name)}.")
    for name in not_negative.split():
        if not getattr(config, name) >= 0:
            raise ValueError(f"{name} must be >= 0, got {getattr(config, name)}.")


def check_shared_fields(config: Any) -> None:
    """Raise ValueError unless rollouts, folds, prices and the parts of a batch make sense, in either config."""
    require_seed(config.seed)
    if config.num_rollouts < 2:
        raise ValueError(f"num_rollouts must be at least 2, got {config.num_rollouts}.")
    if config.policy_folds < 2:
        raise ValueError(f"policy_folds must be at least 2, got {config.policy_folds}.")
    if not config.layer_costs or not all(cost >= 0 for cost in config.layer_costs):
        raise ValueError(f"layer_costs must hold at least one price >= 0, got {list(config.layer_costs)}.")
    if config.prices == "range" and min(config.layer_costs) == 0 < max(config.layer_costs):
        raise ValueError(
            f"layer_costs must be above 0 for a range of prices, got {list(config.layer_costs)}. "
            "Start it at a small price such as 0.001, or take prices: each."
        )
    if config.batch_size % config.gradient_accumulation_steps:
        raise ValueError(
            f"batch_size must be a multiple of gradient_accumulation_steps, got {config.batch_size} "
            f"and {config.gradient_accumulation_steps}."
        )


def require_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raise ValueError unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f'{name} must be one of {", ".join(map(str, choices))}, got "{value}".')


def require_number(name: str, value: Any, *, whole: bool = False) -> None:
    """Raise ValueError unless the value is a number, as one that was read from a file need not be."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral if whole else numbers.Real):
        raise ValueError(f"{name} must be a {'whole ' if whole else ''}number, got {value!r}.")


def require_thresholds(name: str, values: Any) -> None:
    """Raise ValueError unless they are numbers by name; None stands for no thresholds."""
    if values is not None and not isinstance(values, Mapping):
        raise ValueError(f"{name} must be numbers by the name of their criterion, got {values!r}.")
    for criterion, value in (values or {}).items():
        require_number(f"{name}.{criterion}", value)


def require_seed(seed: int) -> None:
    """Raise ValueError unless every generator of random numbers takes the seed."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be from 0 to {2**32 - 1}, got {seed}.")


def require_range(name: str, value: float, low: float, high: float, open_end: bool = False) -> None:
    """Raise ValueError unless low <= value <= high (below high with `open_end`)."""
    if not (low <= value < high if open_end else low <= value <= high):
        raise ValueError(f"{name} must be in [{low}, {high}{')' if open_end else ']'}, got {value}.")
