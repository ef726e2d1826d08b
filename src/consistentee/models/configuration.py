"""Configurations of the models: what a saved folder needs to know to rebuild them."""

from __future__ import annotations

from typing import Any, ClassVar, cast, get_args

from transformers import AutoConfig, PreTrainedConfig

from consistentee.backbones.limits import longest_input
from consistentee.config import Criterion, Head, PolicyInput
from consistentee.errors import require_choice, require_number, require_range


def nested_config(config: PreTrainedConfig | dict[str, Any] | None, default: str) -> PreTrainedConfig:
    """The configuration inside a configuration, as an object.

    Args:
        config: an object, the dict that a config.json holds, or None.
        default: model type of a dict that names none, and of None.

    Raises:
        TypeError: it is something else.
        ValueError: its model type is unknown.
    """
    if isinstance(config, PreTrainedConfig):
        return config
    if not isinstance(config, dict | None):
        raise TypeError(f"A nested configuration must be a JSON object, got {config!r}.")
    values = dict(config or {})
    return AutoConfig.for_model(values.pop("model_type", default), **values)


class EncoderClassifierConfig(PreTrainedConfig):
    """What the configurations of both models share: a nested encoder configuration and its sizes."""

    sub_configs: ClassVar[dict[str, Any]] = {"encoder_config": AutoConfig}  # pyright: ignore[reportIncompatibleMethodOverride]

    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "exit_layer",
        "layer_logits",
        "classifier_logits",
        "pooled",
        "exit_probs",
    ]
    """Fields of the output that are no predictions: what transformers' `Trainer` evaluates is the logits."""

    encoder_config: PreTrainedConfig | dict[str, Any] | None = None
    head: str = "attention"
    pooling: str = "mean"
    num_queries: int = 4
    classifier_hidden_size: int | None = None
    head_dropout: float = 0.1
    task: str | None = None
    max_length: int = 128
    parse_special_tokens: bool = False
    text_pairs: bool | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.encoder_config = nested_config(self.encoder_config, "bert")
        super().__post_init__(**kwargs)
        require_choice("head", self.head, get_args(Head))
        require_choice("pooling", self.pooling, ("cls", "mean"))
        require_range("head_dropout", self.head_dropout, 0, 1, open_end=True)
        require_number("max_length", self.max_length, whole=True)
        if self.num_queries < 1:
            raise ValueError(f"num_queries must be at least 1, got {self.num_queries}.")
        if self.classifier_hidden_size is not None and self.classifier_hidden_size < 1:
            raise ValueError(
                f"classifier_hidden_size must be at least 1, or None, got {self.classifier_hidden_size}."
            )

    @property
    def encoder(self) -> PreTrainedConfig:
        """The backbone's own configuration; `encoder_config` once it has been read."""
        return cast(PreTrainedConfig, self.encoder_config)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.id2label or {})

    @property
    def num_hidden_layers(self) -> int:
        """Number of layers of the backbone, hence of possible exits."""
        return int(self.encoder.num_hidden_layers)

    @property
    def hidden_size(self) -> int:
        """Width of the backbone's states."""
        return int(getattr(self.encoder, "hidden_size", None) or self.encoder.dim)

    @property
    def vocab_size(self) -> int:
        """Size of the backbone's vocabulary."""
        return int(cast(Any, self.encoder).vocab_size)

    @property
    def max_input_length(self) -> int:
        """Tokens that texts are cut to: `max_length`, or fewer where the backbone has not as many positions."""
        longest = longest_input(self.encoder)
        return self.max_length if longest is None else min(self.max_length, longest)

    @property
    def pooled_size(self) -> int:
        """Width of the pooled states, which classifiers and policy read."""
        width = self.classifier_hidden_size if self.head == "attention" else None
        return width or self.hidden_size


class EarlyExitConfig(EncoderClassifierConfig):
    """Configuration of an `EarlyExitForSequenceClassification`.

    Args:
        encoder_config: the backbone's own configuration (nested), as an object or a dict with `model_type`.
        head: `attention` (own query pooling per layer) or `shared_pooler` (the paper's).
        pooling: `cls` or `mean`, what `shared_pooler` reads.
        num_queries: learned queries per layer of `attention`.
        classifier_hidden_size: width of the pooled states, the hidden layer of `attention`; None: the backbone's. The
            map to them is most of what an exit costs at small batches.
        head_dropout: dropout before each classifier's last layer, in [0, 1).
        ensemble_decay: share of the previous layers' running prediction in a layer's prediction, in [0, 1). 0 means
            that every layer speaks for itself alone.
        policy_input: what the policy reads: `state`, `signals` or `state+signals`.
        policy_hidden_size: width of the policy network.
        policy_dropout: dropout on the state the policy reads, in [0, 1).
        initial_exit_bias: exit logit of an untrained policy; negative = go deep.
        threshold: an input leaves at the first layer whose exit score exceeds it.
        criterion: the exit rule the threshold belongs to.
        task: name of the task it was trained for, or None.
        max_length: tokens per input in training; longer inputs are cut to it.
        parse_special_tokens: whether special tokens that a text spells, such as [SEP], are special tokens; else they
            are text.
        text_pairs: whether an input is a pair of texts, or one text; None where it is not known (models of 0.1.0).
    """

    model_type = "consistentee"
    ensemble_decay: float = 0.5
    policy_input: str = "state+signals"
    policy_hidden_size: int = 32
    policy_dropout: float = 0.5
    initial_exit_bias: float = -1.0
    threshold: float = 0.5
    criterion: str = "policy"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        require_choice("policy_input", self.policy_input, get_args(PolicyInput))
        require_choice("criterion", self.criterion, get_args(Criterion))
        require_number("threshold", self.threshold)
        for name in ("ensemble_decay", "policy_dropout"):
            require_range(name, getattr(self, name), 0, 1, open_end=True)


class FullDepthConfig(EncoderClassifierConfig):
    """Configuration of a `FullDepthForSequenceClassification`: the plain model, one classifier at the top.

    Args:
        encoder_config, head, pooling, num_queries, classifier_hidden_size, head_dropout, task, max_length,
        parse_special_tokens, text_pairs: as in `EarlyExitConfig`.
    """

    model_type = "consistentee_full_depth"
