"""Configuration of an early-exit causal language model: what a saved folder needs to know to rebuild it."""

from __future__ import annotations

from typing import Any, ClassVar, cast, get_args

from transformers import AutoConfig, PreTrainedConfig

from consistentee.config import ExitHead, GenerationCriterion, GenerationMode, SkippedStates
from consistentee.errors import require_choice, require_number, require_range, require_thresholds
from consistentee.functional.token_criteria import check_generation_threshold
from consistentee.models.configuration import nested_config


class EarlyExitCausalLMConfig(PreTrainedConfig):
    """Configuration of an `EarlyExitForCausalLM`.

    Args:
        decoder_config: the causal language model's own configuration (nested), as an object or a dict with
            `model_type`.
        exit_head: `shared`, `low_rank` or `separate`, see `ExitHeads`.
        exit_head_rank: rank of `low_rank` adapters.
        policy_hidden_size: width of the policy network.
        policy_dropout: dropout on the state the policy reads, in [0, 1).
        initial_exit_bias: exit logit of an untrained policy; negative = go deep.
        criterion: the exit rule: `policy`, `softmax_margin`, `state_similarity`, `confidence_classifier` or `static`.
        threshold: a token leaves at the first layer whose exit score exceeds it; the number of layers for `static`.
        thresholds: of the other criteria, as training chose them.
        mode: how `generate` runs by default: `early-exit`, `full` or `lossless`.
        skipped_states: keys and values of skipped layers: `copy` (of the exit state) or `recompute` (exact, once a
            later token goes deeper).
        full_depth_first_token: whether the first token of a text is taken from the last layer, which the prompt went
            through in any case.
        min_exit_layer: the first layer, from 1, that a token may leave at; `static` and given exits have their own.
        draft_tokens: tokens that `lossless` drafts before it verifies, at most.
        draft_threshold: threshold of the policy while drafting; None takes `threshold`.
        prompt_template: what `templates.PromptTemplate.to_dict` gives; None for the tokenizer's chat template, or
            Alpaca's.
        task: name of the task it was trained for, or None.
        max_sequence_length: tokens of prompt and response together in training. (`max_length` is one of transformers'
            own settings of `generate`.)
    """

    model_type = "consistentee_causal_lm"
    sub_configs: ClassVar[dict[str, Any]] = {"decoder_config": AutoConfig}  # pyright: ignore[reportIncompatibleMethodOverride]

    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    decoder_config: PreTrainedConfig | dict[str, Any] | None = None
    exit_head: str = "shared"
    exit_head_rank: int = 16
    policy_hidden_size: int = 32
    policy_dropout: float = 0.5
    initial_exit_bias: float = -1.0
    criterion: str = "policy"
    threshold: float = 0.5
    thresholds: dict[str, float] | None = None
    mode: str = "early-exit"
    skipped_states: str = "copy"
    full_depth_first_token: bool = True
    min_exit_layer: int = 1
    draft_tokens: int = 4
    draft_threshold: float | None = None
    prompt_template: dict[str, Any] | None = None
    task: str | None = None
    max_sequence_length: int = 256

    def __post_init__(self, **kwargs: Any) -> None:
        self.decoder_config = nested_config(self.decoder_config, "llama")
        super().__post_init__(**kwargs)
        require_choice("exit_head", self.exit_head, get_args(ExitHead))
        require_choice("criterion", self.criterion, get_args(GenerationCriterion))
        require_choice("mode", self.mode, get_args(GenerationMode))
        require_choice("skipped_states", self.skipped_states, get_args(SkippedStates))
        require_range("policy_dropout", self.policy_dropout, 0, 1, open_end=True)
        require_number("threshold", self.threshold)
        require_thresholds("thresholds", self.thresholds)
        require_number("max_sequence_length", self.max_sequence_length, whole=True)
        check_generation_threshold(self.threshold, self.criterion)
        for name in ("exit_head_rank", "policy_hidden_size", "min_exit_layer", "draft_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")

    @property
    def decoder(self) -> PreTrainedConfig:
        """The causal language model's own configuration; `decoder_config` once it has been read."""
        return cast(PreTrainedConfig, self.decoder_config)

    @property
    def num_hidden_layers(self) -> int:
        """Number of layers, hence of possible exits."""
        return int(cast(Any, self.decoder).num_hidden_layers)

    @property
    def hidden_size(self) -> int:
        """Width of the states."""
        return int(cast(Any, self.decoder).hidden_size)

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary."""
        return int(cast(Any, self.decoder).vocab_size)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The configuration that transformers asks about heads, sizes and caches: the decoder's."""
        return self.decoder if isinstance(self.decoder_config, PreTrainedConfig) else self
