"""Settings of token-level early exit, and how such a model is trained. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from consistentee.config import (
    Estimator,
    MixedPrecision,
    Prices,
    Reward,
    TrainingConfig,
    check_fields,
    check_shared_fields,
    checked_settings,
    plain_values,
)

ExitHead = Literal["shared", "low_rank", "separate"]
GenerationCriterion = Literal[
    "policy", "softmax_margin", "state_similarity", "confidence_classifier", "static"
]
GenerationMode = Literal["early-exit", "full", "lossless"]
SkippedStates = Literal["copy", "recompute"]
BackboneTraining = Literal["full", "lora", "frozen"]
RewardTarget = Literal["reference", "last_layer", "both"]
TokenRewardLoss = Literal["regret", "error", "cross_entropy"]
TokenPolicyData = Literal["held_out", "filled"]
TokenHardness = Literal["memorized_layer", "final_loss", "uniform"]


@dataclass(frozen=True)
class GenerationTrainingConfig:
    """How a causal language model with exits is trained. Every field is a command-line option and a key of a recipe.

    Fields that mean the same as in `TrainingConfig` are called the same. The paper's own values are in `recipes/`.
    """

    # Model
    exit_head: ExitHead = "shared"
    """What makes a token of a state below the last layer: a norm per layer and the model's head (`shared`), a small
    adapter per layer in between (`low_rank`), or a head per layer (`separate`, the paper's)."""
    exit_head_rank: int = 16
    """Rank of `low_rank` adapters."""
    policy_hidden_size: int = 32
    """Width of the policy network."""
    policy_dropout: float = 0.5
    """Dropout on the state that the policy reads."""

    # Data
    max_length: int = 256
    """Tokens of a row, prompt and response together; of longer rows the input is cut first."""
    max_prompt_length: int | None = None
    """Tokens of a prompt at most; by default whatever leaves room for the response."""
    validation_fraction: float = 0.1
    """Share of the training rows kept from the model: for the policy and for selection."""
    prompt_template: str = "auto"
    """`auto` (the tokenizer's chat template, else Alpaca's), `chat`, `alpaca`, `plain`, or a template file."""
    parse_special_tokens: bool = False
    """Take special tokens that a text spells, such as [SEP], for special tokens; otherwise they are text."""

    # What is trained of the backbone
    backbone_training: BackboneTraining = "lora"
    """`full`: all weights. `lora`: adapters, merged into the weights at the end. `frozen`: exits only."""
    lora_rank: int = 16
    """Rank of the LoRA adapters."""
    lora_alpha: float = 32.0
    """Scale of the LoRA adapters, divided by their rank."""
    lora_dropout: float = 0.05
    """Dropout before the LoRA adapters."""

    # Optimisation
    batch_size: int = 16
    """Texts per optimizer step, over all processes and accumulation steps together."""
    gradient_accumulation_steps: int = 1
    """Parts a batch is cut into to save memory."""
    learning_rate: float = 1e-4
    """Peak learning rate of the backbone or of its adapters."""
    head_learning_rate: float = 1e-3
    """Peak learning rate of the exits' norms, adapters and heads."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay, on matrices only."""
    schedule: Literal["linear", "constant"] = "linear"
    """After the warm-up ramp: fall to zero at the planned end, or stay."""
    warmup_ratio: float = 0.05
    """Share of all steps over which the learning rate rises from zero."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    mixed_precision: MixedPrecision = "auto"
    """`auto`: bf16 where the hardware computes in it, full precision elsewhere."""
    group_by_length: bool = True
    """Batch texts of similar length, so that little is padded."""
    gradient_checkpointing: bool = False
    """Compute layers again in the backward pass instead of keeping what is inside them: a third slower, far smaller."""

    # Phase 1: warm-up on the weighted sum of all exits' losses
    warmup_epochs: float = 1.0
    """Epochs of the warm-up."""
    layers_per_step: int = 4
    """Layers below the last whose exits a step computes, drawn with probability proportional to their number."""
    last_layer_share: float = 0.3
    """Weight of the last layer's loss in the weighted sum; its own share by number would be 2 / (layers + 1), too
    little for the layer that every exit is measured against."""

    # Phases 2 and 3: policy, then exits and backbone; repeated
    rounds: int = 1
    """How often phases 2 and 3 are repeated."""
    consistent_epochs: float = 0.5
    """Epochs of the consistent phase in each round."""
    weighted_sum_share: float = 0.3
    """Share of the weighted-sum loss mixed into the consistent loss, 0 (the paper) to 1."""
    estimator: Estimator = "exact"
    """Policy gradient: the exact one, or REINFORCE from `num_rollouts` samples."""
    num_rollouts: int = 4
    """Exit layers drawn per token by `sampled`."""
    reward: Reward = "uniform"
    """Price per layer: the same for all tokens, or falling with a token's `hardness` (the paper). What the last layer
    gets wrong, nearly half of a language model's tokens, is hardest, and would use all layers for nothing."""
    reward_loss: TokenRewardLoss = "regret"
    """What a bad exit costs. `regret`: how much likelier the last layer holds its own token, in nats, up to 10, over
    10: another good word costs little, a senseless one all. `error`: 1 where the token is not the target's.
    `cross_entropy`: of the reference token (the paper)."""
    reward_target: RewardTarget = "reference"
    """An exit is right where its token is the `reference`'s (the paper) or the `last_layer`'s; hardness and thresholds
    follow, and the `error`, which also knows half and half (`both`)."""
    min_exit_layer: int | None = None
    """The first layer that a token may leave at; None takes a sixth of the layers. Exits below it hardly beat a guess,
    and one senseless word can spoil a text."""
    hardness: TokenHardness = "memorized_layer"
    """Measure behind the `hardness` reward."""
    layer_costs: tuple[float, ...] = (0.002, 0.2)
    """Prices of one layer: the ends of a range, or those to choose from; one value fixes it."""
    prices: Prices = "range"
    """`range`: one policy learns all prices from the lowest to the highest of `layer_costs`, and the threshold dials
    among them. `each`: one policy for each of `layer_costs` (the paper's), of which validation chooses."""
    policy_tokens: int = 30_000
    """Response tokens that the policy learns from and that thresholds are chosen on, at most."""
    policy_data: TokenPolicyData = "filled"
    """`held_out`: these are of validation rows. `filled`: where those hold fewer, training rows fill up what the policy
    learns from; thresholds and figures rest on validation rows all the same."""
    policy_epochs: int = 10
    """Epochs of each policy fit on cached states, or more where these are fewer than `policy_min_steps`."""
    policy_min_steps: int = 100
    """Least number of steps of a policy fit."""
    policy_batch_size: int = 256
    """Tokens per step of a policy fit."""
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
    policy_folds: int = 2
    """Folds of the cross-fitted policy; the tokens of one text are in one fold."""
    patience: int = 2
    """Stop after this many rounds in turn that are worse on validation rows by more than a standard error."""
    max_accuracy_loss: float = 0.01
    """Thresholds may lose this much token accuracy (0.01 = one point) against the last layer."""

    # Run
    seed: int = 0
    """Seed of splits, order, initial weights, dropout and drawn exits."""
    checkpoint_every: int = 200
    """Steps between checkpoints; the end of each phase is always one."""
    max_cache_mb: float = 2048.0
    """Token states above this size are kept in a memory-mapped file."""
    logit_rows: int = 1024
    """Rows of logits that are held at once, one a token and layer: a few times logit_rows x vocabulary x 4 bytes is
    what the heads need, whatever the batch."""
    tracker: Literal["none", "tensorboard", "wandb", "mlflow", "all"] = "none"
    """Experiment tracker, through accelerate."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer_costs", tuple(float(cost) for cost in self.layer_costs))
        check_fields(
            self,
            positive=(
                "exit_head_rank policy_hidden_size lora_rank lora_alpha batch_size gradient_accumulation_steps "
                "learning_rate head_learning_rate max_grad_norm warmup_epochs layers_per_step policy_tokens "
                "policy_epochs policy_min_steps policy_batch_size policy_learning_rate patience checkpoint_every "
                "max_cache_mb logit_rows"
            ),
            not_negative="weight_decay rounds consistent_epochs policy_weight_decay entropy_bonus",
            shares="weighted_sum_share max_accuracy_loss last_layer_share",
            shares_below_one="policy_dropout lora_dropout warmup_ratio price_warmup",
        )
        if self.max_length < 2:
            raise ValueError(f"max_length must be at least 2, got {self.max_length}.")
        if self.max_prompt_length is not None and not self.max_prompt_length > 0:
            raise ValueError(f"max_prompt_length must be above 0, got {self.max_prompt_length}.")
        if self.backbone_training == "frozen" and self.last_layer_share == 1:
            raise ValueError(
                "last_layer_share must be below 1 for a frozen backbone, got 1. "
                "The last layer belongs to the backbone, and nothing would be trained."
            )
        if self.reward_target == "both" and self.reward_loss != "error":
            raise ValueError(
                f'reward_loss must be error for reward_target both, got "{self.reward_loss}". '
                "Only errors have halves: set reward_target: reference or last_layer."
            )
        if self.reward_target == "last_layer" and self.reward_loss == "cross_entropy":
            raise ValueError(
                'reward_loss must be regret or error for reward_target last_layer, got "cross_entropy". '
                "The cross-entropy is that of the reference token: set reward_target: reference for it."
            )
        if self.min_exit_layer is not None and self.min_exit_layer < 1:
            raise ValueError(f"min_exit_layer must be at least 1, got {self.min_exit_layer}.")
        check_shared_fields(self)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, ready for JSON or YAML."""
        return plain_values(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GenerationTrainingConfig:
        """Settings from plain values.

        Raises:
            ValueError: if a key is unknown (with the nearest known one) or a value has the wrong type.
        """
        return cls(**checked_settings(values, cls))


AnyTrainingConfig = TrainingConfig | GenerationTrainingConfig
"""What the steps and the policy fits, which serve both kinds of training, read their settings from."""
