"""How to train: one base of settings for both tasks, what each adds, and their checks.

Imports nothing heavy: the command line shows its help from here.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_type_hints

from typing_extensions import Self

from consistentee.errors import checked_setting, require_range, require_seed

Head = Literal["attention", "shared_pooler"]
Pooling = Literal["auto", "cls", "mean"]
PolicyInput = Literal["state", "log_odds", "state+log_odds"]
OLD_POLICY_INPUTS = ("signals", "state+signals")
"""Of models that 0.1.0 saved: nine signals and a small network on them, in place of the log-odds."""
PolicyInputChoice = Literal["auto", "state", "log_odds", "state+log_odds"]
PolicyData = Literal["held_out", "seen"]
Estimator = Literal["exact", "sampled"]
Reward = Literal["hardness", "uniform"]
RewardLoss = Literal["cross_entropy", "error"]
LayerCostMode = Literal["range", "each"]
HardnessMeasure = Literal["memorized_layer", "forgetting_events", "final_loss", "entropy", "el2n", "uniform"]
RetrofitHardness = Literal["memorized_layer", "final_loss", "entropy", "el2n", "uniform"]
ThresholdMetric = Literal["accuracy", "f1", "macro_f1", "matthews"]
Criterion = Literal[
    "policy",
    "confidence",
    "entropy",
    "calibrated_confidence",
    "patience",
    "confident_patience",
    "similar_patience",
    "expert_sum",
    "energy",
    "cap",
    "learnt_to_exit",
    "quantile",
    "static",
]
MixedPrecision = Literal["auto", "no", "bf16", "fp16"]
Schedule = Literal["linear", "constant"]
Tracker = Literal["none", "tensorboard", "wandb", "mlflow", "all"]

ExitHead = Literal["shared", "low_rank", "separate"]
GenerationCriterion = Literal[
    "policy", "softmax_margin", "state_similarity", "confidence_classifier", "static"
]
GenerationMode = Literal["early-exit", "full", "lossless"]
SkippedStates = Literal["copy", "recompute"]
BackboneTraining = Literal["full", "lora", "frozen"]
TuneBackbone = Literal["none", "lora", "full"]
RewardTarget = Literal["reference", "last_layer"]
TokenRewardLoss = Literal["regret", "error", "cross_entropy"]
TokenPolicyData = Literal["held_out", "filled"]
TokenHardness = Literal["memorized_layer", "final_loss", "uniform"]

# Where the numbers among the settings must lie, in whichever config has them.
_ABOVE_ZERO = (
    "max_length num_layers num_queries classifier_hidden_size policy_hidden_size max_prompt_length exit_head_rank "
    "lora_rank lora_alpha batch_size gradient_accumulation_steps learning_rate consistent_learning_rate "
    "head_learning_rate max_grad_norm warmup_epochs layers_per_step policy_epochs policy_min_steps "
    "exit_min_steps policy_batch_size policy_learning_rate patience checkpoint_every max_cache_mb logit_rows "
    "passes policy_texts calibration_texts report_texts"
)
_NOT_NEGATIVE = (
    "max_disk_mb weight_decay rounds consistent_epochs policy_weight_decay entropy_bonus threshold_margin"
)
_SHARES = "weighted_sum_share max_accuracy_loss last_layer_share exit_gradient_scale"
_SHARES_BELOW_ONE = "head_dropout ensemble_decay policy_dropout lora_dropout warmup_ratio layer_cost_warmup"
_AT_LEAST = {"num_rollouts": 1, "policy_folds": 2, "policy_tokens": 2, "min_exit_layer": 1}
_REMOVED = {"distillation": 0.0}
"""Settings of earlier versions, with the value that had no effect: recipes and records may still have that."""
RENAMED = {"prices": "layer_cost_mode", "price_warmup": "layer_cost_warmup"}
"""Settings of earlier versions that have another name today; recipes and records may still have the old one."""


@dataclass(frozen=True)
class TrainingConfig:
    """What the trainings of both tasks have in common; an instance is a row, or a token of a response.

    Every field is a command-line option of the same name and a key of a recipe. The defaults are what paired
    comparisons supported (docs/experiments.md); the paper's own values are in `recipes/`.
    """

    # Data
    max_length: int = 128
    """Tokens of an input (of a prompt with its response) at most, and no more than the backbone has positions; longer
    ones are cut."""
    parse_special_tokens: bool = False
    """Take special tokens that a text spells, such as [SEP], for special tokens; otherwise they are text."""
    validation_fraction: float = 0.2
    """Share of the training rows kept from the model: for selection, and for the policy if `held_out`."""

    # Optimisation
    batch_size: int = 32
    """Rows per optimizer step, over all processes and accumulation steps together."""
    gradient_accumulation_steps: int = 1
    """Parts a batch is cut into to save memory: the same result, but for what each draws (of text, and by `cosee`)."""
    learning_rate: float = 5e-5
    """Peak learning rate of the backbone, or of its adapters, in the warm-up."""
    consistent_learning_rate: float | None = None
    """Peak learning rate of the backbone in the consistent phase; by default the warm-up's."""
    head_learning_rate: float = 1e-3
    """Peak learning rate of new parameters: poolers and classifiers, or the exits' norms, adapters and heads."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay, on matrices only."""
    schedule: Schedule = "linear"
    """After the warm-up ramp: fall to zero at the planned end, or stay."""
    warmup_ratio: float = 0.1
    """Share of all steps over which the learning rate rises from zero."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    mixed_precision: MixedPrecision = "auto"
    """`auto`: bf16 where the hardware computes in it; else fp16 on a CUDA GPU, full precision on a processor."""
    group_by_length: bool = True
    """Batch inputs of similar length, so that little is padded."""

    # Phase 1: warm-up on the weighted sum of all classifiers' losses
    warmup_epochs: float = 2.0
    """Epochs of the warm-up."""

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
    """Exit layers drawn per instance by `sampled`; their mean reward is the baseline, a single one has none."""
    reward: Reward = "hardness"
    """The cost per layer falls with the instance's hardness, or is `uniform`."""
    layer_costs: tuple[float, ...] = (0.002, 0.2)
    """Costs of one layer: the ends of a range, or those to choose from; one value fixes it."""
    layer_cost_mode: LayerCostMode = "range"
    """`range`: one policy learns all costs from the lowest to the highest of `layer_costs`, and the threshold dials
    among them. `each`: one policy for each of `layer_costs` (the paper's), of which validation chooses."""
    policy_hidden_size: int = 32
    """Width of the policy network."""
    policy_dropout: float = 0.5
    """Dropout on the state that the policy reads."""
    policy_epochs: int = 40
    """Epochs of each policy fit on cached states, or more where these are fewer than `policy_min_steps`."""
    policy_min_steps: int = 100
    """Least number of steps of a policy fit: few instances need more epochs."""
    policy_batch_size: int = 128
    """Instances per step of a policy fit."""
    policy_learning_rate: float = 1e-3
    """Learning rate of a policy fit."""
    policy_weight_decay: float = 0.01
    """Weight decay of a policy fit."""
    entropy_bonus: float = 0.01
    """Weight of the exit distribution's entropy in the policy's objective, falling to zero over the fit."""
    layer_cost_warmup: float = 0.3
    """Share of a policy fit over which the layer cost rises from zero: quality first, then speed."""
    initial_exit_bias: float = -1.0
    """Exit logit of an untrained policy, to which one that reads log-odds adds these; negative = go deep."""
    policy_folds: int = 4
    """Folds of the cross-fitted policy, and of what other criteria fit; the tokens of one text are in one fold."""
    patience: int = 2
    """Stop after this many rounds in turn that are worse on validation rows by more than a standard error."""
    max_accuracy_loss: float = 0.005
    """Default thresholds may lose so much validation accuracy against the last layer (0.01 = one point). 0 for none."""
    threshold_margin: float = 0.5
    """Standard errors that the loss of a default threshold keeps clear of what is allowed: few rows to choose on make
    it shyer. 0 takes their word for it."""

    # Run
    seed: int = 0
    """Seed of splits, order, initial weights, dropout and drawn exits."""
    checkpoint_every: int = 200
    """Steps between checkpoints; the end of each phase is always one."""
    max_cache_mb: float = 1024.0
    """States above this size are kept in a memory-mapped file."""
    tracker: Tracker = "none"
    """Experiment tracker, through accelerate."""

    def __post_init__(self) -> None:
        for name, value in checked_settings(vars(self), type(self)).items():
            object.__setattr__(self, name, value)
        self._check_ranges()
        require_seed(self.seed)
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must be between 0 and 1, got {self.validation_fraction}.")
        if not self.layer_costs or not all(cost >= 0 for cost in self.layer_costs):
            raise ValueError(f"layer_costs must hold at least one cost >= 0, got {list(self.layer_costs)}.")
        if self.layer_cost_mode == "range" and min(self.layer_costs) == 0 < max(self.layer_costs):
            raise ValueError(
                f"layer_costs must be above 0 for a range of costs, got {list(self.layer_costs)}. "
                "Start it at a small cost such as 0.001, or take layer_cost_mode: each."
            )
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"batch_size must be a multiple of gradient_accumulation_steps, got {self.batch_size} "
                f"and {self.gradient_accumulation_steps}."
            )

    def _check_ranges(self) -> None:
        for name, value in vars(self).items():
            if value is None:
                continue
            if name in _ABOVE_ZERO.split() and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}.")
            if name in _NOT_NEGATIVE.split() and not value >= 0:
                raise ValueError(f"{name} must be >= 0, got {value}.")
            if name in _AT_LEAST and not value >= _AT_LEAST[name]:
                raise ValueError(f"{name} must be at least {_AT_LEAST[name]}, got {value}.")
            if name in (*_SHARES.split(), *_SHARES_BELOW_ONE.split()):
                require_range(name, value, 0, 1, open_end=name in _SHARES_BELOW_ONE.split())

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, ready for JSON or YAML."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Settings from plain values.

        Raises:
            ValueError: if a key is unknown (with the nearest known one) or a value has the wrong type.
        """
        return cls(**checked_settings(values, cls))


@dataclass(frozen=True)
class ClassificationTrainingConfig(TrainingConfig):
    """How a classifier with exits is trained."""

    # Model
    num_layers: int | None = None
    """Layers of the backbone to keep, from the first: a smaller model to begin with. By default all."""
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
    """What the policy reads: the pooled state, the log-odds of the predicted class, or both; `auto` lets validation
    decide whether the state earns its place beside the log-odds."""

    # Phases
    exit_gradient_scale: float = 1.0
    """Share of the exits' gradients, but for the last layer's, that the backbone takes; their own layers take all."""
    reward_loss: RewardLoss = "error"
    """What a bad exit costs: `cross_entropy` (the paper) or `error` (0 or 1)."""
    hardness: HardnessMeasure = "memorized_layer"
    """Measure behind the `hardness` reward."""
    policy_data: PolicyData = "held_out"
    """Rows the policy learns from: the validation rows, cross-fitted, or rows the classifiers have `seen`. Other
    criteria are fitted on the validation rows in either case."""
    threshold_metric: ThresholdMetric = "accuracy"
    """Metric of the validation rows by which default thresholds are chosen. `accuracy` hardly sees a rare class;
    `macro_f1` counts every class alike, `f1` is that of the second of two classes."""

    # Texts without labels, after the rounds
    passes: int = 5
    """Times that the exits learn every unlabelled text, from states that are computed once, or more where the steps are
    fewer than `exit_min_steps`."""
    exit_min_steps: int = 250
    """Least number of steps of exits on states that are computed once: few texts need more passes."""
    policy_texts: int = 20_000
    """Unlabelled texts that the policy learns from, at most, and at most a third of them."""
    max_disk_mb: float = 8192.0
    """The layers' states, which the exits learn from, go to a file of at most this size meanwhile, so that each pass is
    over all texts; of more texts a part at a time. 0: as many at a time as `max_cache_mb` holds in memory."""


@dataclass(frozen=True)
class AdapterSettings:
    """LoRA adapters of a backbone, for the settings of trainings that can have them."""

    lora_rank: int = 16
    """Rank of the LoRA adapters."""
    lora_alpha: float = 32.0
    """Scale of the LoRA adapters, divided by their rank."""
    lora_dropout: float = 0.05
    """Dropout before the LoRA adapters."""


@dataclass(frozen=True)
class RetrofitConfig(AdapterSettings, ClassificationTrainingConfig):
    """How a fine-tuned classifier gets exits that imitate it, without labels; an exit is right where it agrees."""

    max_length: int = 512
    """Tokens of an input at most, and no more than the model takes; longer ones are cut, as the model cuts them."""
    parse_special_tokens: bool | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    """Take special tokens that a text spells, such as [SEP], for special tokens; by default as the model does."""
    warmup_epochs: float = 1.0
    rounds: int = 0
    consistent_epochs: float = 0.0
    classifier_hidden_size: int | None = 64
    policy_hidden_size: int = 64
    policy_dropout: float = 0.0
    policy_epochs: int = 20
    policy_folds: int = 3
    max_accuracy_loss: float = 0.01
    """The default threshold may disagree with the model on this share of the texts (0.01 = one in a hundred)."""
    max_cache_mb: float = 256.0
    """States that are held in memory; beyond it they go to files (`max_disk_mb`)."""
    exits_only: bool = False
    """Save the exits alone, a few MB, to be put onto the model when they are opened; refused if that has changed."""
    tune_backbone: TuneBackbone = "none"
    """`none`: the model stays what it is. `lora`, `full`: shallow layers come to serve the exits, by adapters that are
    merged at the end (the model's head stays) or all weights tuned; the original's answers stay the target."""
    passes: int | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    """Times that the exits learn every text: by default 5 (more where the steps are fewer than `exit_min_steps`), or 2
    where the backbone is tuned and runs every time."""
    policy_texts: int = 20_000
    """Texts that the policy learns from, at most, and at most a third of them."""
    calibration_texts: int = 5_000
    """Texts that the certificate rests on, at most, and at most a tenth."""
    report_texts: int = 5_000
    """Texts that figures are reported on, at most, and at most a tenth."""
    hardness: RetrofitHardness = "memorized_layer"
    """Measure behind the `hardness` reward; forgetting events are counted in a warm-up on labelled rows alone."""

    def __post_init__(self) -> None:
        if self.passes is None:
            object.__setattr__(self, "passes", 5 if self.tune_backbone == "none" else 2)
        super().__post_init__()
        if self.exits_only and self.tune_backbone != "none":
            raise ValueError(
                f"exits_only must be false for tune_backbone {self.tune_backbone}, got true: it has to be saved, too."
            )
        if self.warmup_epochs > 1 or (self.rounds and self.consistent_epochs):
            raise ValueError(
                "warmup_epochs must be at most 1 and rounds 0 to retrofit, which has one epoch of all passes, got "
                f"{self.warmup_epochs:g} and {self.rounds}. Give more passes."
            )


@dataclass(frozen=True)
class GenerationTrainingConfig(AdapterSettings, TrainingConfig):
    """How a causal language model with exits is trained."""

    max_length: int = 256
    validation_fraction: float = 0.1
    batch_size: int = 16
    learning_rate: float = 1e-4
    warmup_ratio: float = 0.05
    warmup_epochs: float = 1.0
    rounds: int = 1
    num_rollouts: int = 4
    reward: Reward = "uniform"
    """Cost per layer: the same for all tokens, or falling with a token's `hardness` (the paper). What the last layer
    gets wrong, nearly half of a language model's tokens, is hardest, and would use all layers for nothing."""
    policy_epochs: int = 10
    policy_batch_size: int = 256
    policy_folds: int = 2
    max_accuracy_loss: float = 0.01
    max_cache_mb: float = 2048.0

    # Model
    exit_head: ExitHead = "shared"
    """What makes a token of a state below the last layer: a norm per layer and the model's head (`shared`), a small
    adapter per layer in between (`low_rank`), or a head per layer (`separate`, the paper's)."""
    exit_head_rank: int = 16
    """Rank of `low_rank` adapters."""

    # Data
    max_prompt_length: int | None = None
    """Tokens of a prompt at most; by default whatever leaves room for the response."""
    prompt_template: str = "auto"
    """`auto` (the tokenizer's chat template, else Alpaca's), `chat`, `alpaca`, `plain`, or a template file."""

    # What is trained of the backbone
    backbone_training: BackboneTraining = "lora"
    """`full`: all weights. `lora`: adapters, merged into the weights at the end. `frozen`: exits only."""
    gradient_checkpointing: bool = False
    """Compute layers again in the backward pass instead of keeping what is inside them: a third slower, far smaller."""
    logit_rows: int = 1024
    """Rows of logits that are held at once, one a token and layer: a few times logit_rows x vocabulary x 4 bytes is
    what the heads need, whatever the batch."""

    # Phases
    layers_per_step: int = 4
    """Layers below the last whose exits a step computes, drawn with probability proportional to their number."""
    last_layer_share: float = 0.3
    """Weight of the last layer's loss in the weighted sum; its own share by number would be 2 / (layers + 1), too
    little for the layer that every exit is measured against."""
    reward_loss: TokenRewardLoss = "regret"
    """What a bad exit costs. `regret`: how much likelier the last layer holds its own token, in nats, up to 10, over
    10: another good word costs little, a senseless one all. `error`: 1 where the token is not the target's.
    `cross_entropy`: of the reference token (the paper)."""
    reward_target: RewardTarget = "reference"
    """An exit is right where its token is the `reference`'s (the paper) or the `last_layer`'s; hardness and thresholds
    follow, and the `error`. What training says of validation tokens is then agreement, not accuracy."""
    hardness: TokenHardness = "memorized_layer"
    """Measure behind the `hardness` reward."""
    min_exit_layer: int | None = None
    """The first layer that a token may exit at; None takes a sixth of the layers. Exits below it hardly beat a guess,
    and one senseless word can spoil a text."""
    policy_tokens: int = 30_000
    """Response tokens that the policy learns from and that thresholds are chosen on, at most."""
    policy_data: TokenPolicyData = "filled"
    """`held_out`: these are of validation rows. `filled`: where those hold fewer, training rows fill up what the policy
    learns from; thresholds and figures rest on validation rows all the same."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_length < 2:
            raise ValueError(f"max_length must be at least 2, got {self.max_length}.")
        if self.backbone_training == "frozen" and self.last_layer_share == 1:
            raise ValueError(
                "last_layer_share must be below 1 for a frozen backbone, got 1. "
                "The last layer belongs to the backbone, and nothing would be trained."
            )
        if self.reward_target == "last_layer" and self.reward_loss == "cross_entropy":
            raise ValueError(
                'reward_loss must be regret or error for reward_target last_layer, got "cross_entropy". '
                "The cross-entropy is that of the reference token: set reward_target: reference for it."
            )


def checked_settings(values: Mapping[str, Any], config_class: type[TrainingConfig]) -> dict[str, Any]:
    """The given settings with each value in its field's type; raises ValueError on an unknown key or a wrong type."""
    hints = get_type_hints(config_class)
    settings: dict[str, Any] = {}
    for key, value in values.items():
        key = RENAMED.get(key, key)
        if key in settings:
            raise ValueError(f'"{key}" must be given once, got it under two names.')
        if key in _REMOVED and value == _REMOVED[key]:
            continue
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)
            suggestion = f' Did you mean "{near[0]}"?' if near else ""
            raise ValueError(f'"{key}" is not a training setting.{suggestion}')
        settings[key] = checked_setting(key, value, hints[key])
    return settings
