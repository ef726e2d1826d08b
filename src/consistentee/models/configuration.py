"""Configurations of the models: what a saved folder needs to know to rebuild them."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar, get_args

from transformers import AutoConfig, PreTrainedConfig

from consistentee.backbones.limits import longest_input
from consistentee.backbones.loading import HUB_OPTIONS
from consistentee.config import (
    OLD_POLICY_INPUTS,
    Criterion,
    ExitHead,
    GenerationCriterion,
    GenerationMode,
    Head,
    PolicyInput,
    SkippedStates,
)
from consistentee.errors import require_choice, require_number, require_range, require_thresholds
from consistentee.functional.criteria import check_threshold
from consistentee.models.operating_points import require_operating_points


class BackboneConfig(PreTrainedConfig):
    """What all configurations share: a backbone's own configuration, nested, and its sizes.

    Args:
        task: name of the task it was trained for, or None.
    """

    sub_configs: ClassVar[dict[str, Any]] = {}  # pyright: ignore[reportIncompatibleMethodOverride]
    backbone_key: ClassVar[str]
    """Name of the field that holds the backbone's configuration: an object, a dict as in config.json, or None."""
    backbone_type: ClassVar[str]
    """Model type of a dict that names none, and of None."""

    task: str | None = None

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As Hugging Face's.

        Raises:
            ValueError: another type of model is found.
        """
        values, rest = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        found = values.get("model_type", cls.model_type)
        if found != cls.model_type:
            raise ValueError(
                f'Model "{pretrained_model_name_or_path}" must be of type "{cls.model_type}" here, got "{found}". '
                + (
                    f"Open it with {_OPENED_BY[found]}.from_pretrained()."
                    if found in _OPENED_BY
                    else f"Make one of it with {_MADE_BY[cls.model_type]}."
                )
            )
        return values, rest

    def __post_init__(self, **kwargs: Any) -> None:
        nested = getattr(self, self.backbone_key)
        if not isinstance(nested, PreTrainedConfig):
            if not isinstance(nested, dict | None):
                raise TypeError(f"{self.backbone_key} must be a JSON object, got {nested!r}.")
            values: dict[str, Any] = dict(nested or {})
            nested = AutoConfig.for_model(values.pop("model_type", self.backbone_type), **values)
            setattr(self, self.backbone_key, nested)
        super().__post_init__(**kwargs)

    def _require_positive(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")

    @property
    def backbone_config(self) -> Any:
        """The backbone's own configuration."""
        return getattr(self, self.backbone_key)

    @property
    def num_hidden_layers(self) -> int:
        """Number of layers of the backbone, hence of possible exits."""
        return int(self.backbone_config.num_hidden_layers)

    @property
    def hidden_size(self) -> int:
        """Width of the backbone's states."""
        return int(getattr(self.backbone_config, "hidden_size", None) or self.backbone_config.dim)

    @property
    def vocab_size(self) -> int:
        """Size of the backbone's vocabulary."""
        return int(self.backbone_config.vocab_size)


class ExitConfig(BackboneConfig):
    """What the configurations of models with exits share.

    Args:
        policy_hidden_size: width of the policy network.
        policy_dropout: dropout on the state the policy reads, in [0, 1).
        initial_exit_bias: exit logit of an untrained policy; negative = go deep.
        criterion: the exit rule that the threshold belongs to.
        threshold: exit at the first layer whose exit score exceeds it.
    """

    policy_hidden_size: int = 32
    policy_dropout: float = 0.5
    initial_exit_bias: float = -1.0
    criterion: str = "policy"
    threshold: float = 0.5

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self._require_positive("policy_hidden_size")
        require_range("policy_dropout", self.policy_dropout, 0, 1, open_end=True)
        require_number("threshold", self.threshold)

    @property
    def pooled_size(self) -> int:
        """Width of the states that the policy reads."""
        return self.hidden_size


class EncoderClassifierConfig(BackboneConfig):
    """What the configurations of both classifiers share.

    Args:
        encoder_config: the backbone's own configuration, as an object or a dict with `model_type`.
        head: `attention` (own query pooling per layer) or `shared_pooler` (the paper's).
        pooling: `cls` or `mean`, what `shared_pooler` reads.
        num_queries: learned queries per layer of `attention`.
        classifier_hidden_size: width of the pooled states, the hidden layer of `attention`; None: the backbone's. The
            map to them is most of what an exit costs at small batches.
        head_dropout: dropout before each classifier's last layer, in [0, 1).
        max_length: tokens per input in training; longer inputs are cut to it.
        parse_special_tokens: whether special tokens that a text spells, such as [SEP], are special tokens; else they
            are text.
        text_pairs: whether an input is a pair of texts, or one text; None where it is not known (models of 0.1.0).
    """

    sub_configs: ClassVar[dict[str, Any]] = {"encoder_config": AutoConfig}
    backbone_key: ClassVar[str] = "encoder_config"
    backbone_type: ClassVar[str] = "bert"
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
    max_length: int = 128
    parse_special_tokens: bool = False
    text_pairs: bool | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self._check()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As Hugging Face's.

        Raises:
            ValueError: a field breaks its rule, whether in the dictionary or beside it.
        """
        found: Any = super().from_dict(config_dict, **kwargs)
        config = found[0] if isinstance(found, tuple) else found
        config._check()  # those beside it were set afterwards
        return found

    def _check(self) -> None:
        """Raise ValueError for a field that breaks its rule."""
        if self.num_classes < 2:
            raise ValueError(f"num_labels must be at least 2, got {self.num_classes}.")
        require_choice("head", self.head, get_args(Head))
        require_choice("pooling", self.pooling, ("cls", "mean"))
        require_range("head_dropout", self.head_dropout, 0, 1, open_end=True)
        require_number("max_length", self.max_length, whole=True)
        self._require_positive("num_queries")
        if self.classifier_hidden_size is not None:
            self._require_positive("classifier_hidden_size")

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.id2label or {})

    @property
    def max_input_length(self) -> int:
        """Tokens that texts are cut to: `max_length`, or fewer where the backbone has not as many positions."""
        longest = longest_input(self.backbone_config)
        return self.max_length if longest is None else min(self.max_length, longest)

    @property
    def pooled_size(self) -> int:
        """Width of the pooled states, which classifiers and policy read."""
        width = self.classifier_hidden_size if self.head == "attention" else None
        return width or self.hidden_size


class EarlyExitConfig(EncoderClassifierConfig, ExitConfig):
    """Configuration of an `EarlyExitForSequenceClassification`; see also what it is made of.

    Args:
        ensemble_decay: share of the previous layers' running prediction in a layer's prediction, in [0, 1). 0 means
            that every layer speaks for itself alone.
        policy_input: what the policy reads: `state`, `log_odds` or `state+log_odds`; in models that 0.1.0 saved also
            `signals` or `state+signals`.
        original_head: of a model that kept its own head on the last layer: what makes it, `model_type` and perhaps
            more (`heads.original_head`). The last layer then speaks for itself alone.
        original: which model that was: `name`, `fingerprint`, `revision`, `license`; and where its backbone was tuned
            for the exits, so that these weights are no longer its own, how: `tuned`, `lora` or `full`.
        operating_points: criteria and thresholds by name, see `operating_points.py`; None for none.
        exits_only: whether a saved folder holds the exits alone, and is put onto the original when it is opened.
        temperatures: (layers,), of the criterion `calibrated_confidence`; None where none were fitted.
        layer_weights: (layers,), of the criterion `expert_sum`; None for weights by depth.
        learnt_to_exit: whether there is a network for the criterion of that name.
        exit_layers: the layers that have an exit, from 1, rising, the last among them; None: all. What the others would
            cost, their classifier and the decision, is not spent.
    """

    model_type = "consistentee"
    ensemble_decay: float = 0.5
    policy_input: str = "state+log_odds"
    original_head: dict[str, Any] | None = None
    original: dict[str, Any] | None = None
    operating_points: dict[str, Any] | None = None
    exits_only: bool = False
    temperatures: list[float] | None = None
    layer_weights: list[float] | None = None
    learnt_to_exit: bool = False
    exit_layers: list[int] | None = None

    def _check(self) -> None:
        super()._check()
        if self.exit_layers is not None:
            check_exit_layers(self.exit_layers, self.num_hidden_layers)
        require_choice("policy_input", self.policy_input, (*get_args(PolicyInput), *OLD_POLICY_INPUTS))
        require_choice("criterion", self.criterion, get_args(Criterion))
        require_range("ensemble_decay", self.ensemble_decay, 0, 1, open_end=True)
        require_operating_points(self.operating_points)
        for name, least in (("temperatures", "above 0"), ("layer_weights", "at least 0")):
            values = getattr(self, name)
            if values is None:
                continue
            if (
                len(values) != self.num_hidden_layers
                or min(values) < 0
                or (least == "above 0" and 0 in values)
            ):
                raise ValueError(
                    f"{name} must be {self.num_hidden_layers} numbers {least}, one a layer, got {values}."
                )
        if self.exits_only and (self.original_head is None or self.original is None):
            raise ValueError(
                "exits_only must be False for a model without an original to be put onto, got True."
            )
        if self.exits_only and self.is_tuned:
            raise ValueError("exits_only must be False for exits of a backbone that was tuned, got True.")
        if self.original_head is not None and self.head != "attention":
            raise ValueError(f'head must be attention beside an original_head, got "{self.head}".')

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As Hugging Face's; `original` beside the dictionary is a place, and for the class that opens the model."""
        place = kwargs.pop("original", None)
        found: Any = super().from_dict(config_dict, **kwargs)
        if place is None or not kwargs.get("return_unused_kwargs"):
            return found
        config, rest = found
        return config, {**rest, "original": place}

    @property
    def has_exit(self) -> list[bool]:
        """Which layers have an exit, (layers,).

        Raises:
            ValueError: `exit_layers` was set to what no model can have.
        """
        if self.exit_layers is not None:
            check_exit_layers(self.exit_layers, self.num_hidden_layers)
        every = range(1, self.num_hidden_layers + 1)
        return [self.exit_layers is None or layer in self.exit_layers for layer in every]

    @property
    def is_tuned(self) -> bool:
        """Whether the original's weights were tuned for the exits: full depth then is another model."""
        return bool((self.original or {}).get("tuned"))


def check_exit_layers(layers: Sequence[int], num_layers: int) -> None:
    """Raise ValueError unless these are layers of a model, from 1, rising, the last among them."""
    rising = all(one < other for one, other in itertools.pairwise(layers))
    if not layers or not rising or layers[0] < 1 or layers[-1] != num_layers:
        raise ValueError(
            f"exit_layers must be rising numbers of layers from 1 on, {num_layers}, the last, among them, "
            f"got {list(layers)}."
        )


class FullDepthConfig(EncoderClassifierConfig):
    """Configuration of a `FullDepthForSequenceClassification`: the plain model, one classifier at the top."""

    model_type = "consistentee_full_depth"


class EarlyExitCausalLMConfig(ExitConfig):
    """Configuration of an `EarlyExitForCausalLM`; see also `ExitConfig`.

    Args:
        decoder_config: the causal language model's own configuration, as an object or a dict with `model_type`.
        exit_head: `shared`, `low_rank` or `separate`, see `ExitHeads`.
        exit_head_rank: rank of `low_rank` adapters.
        criterion: the exit rule: `policy`, `softmax_margin`, `state_similarity`, `confidence_classifier` or `static`,
            whose threshold is the number of layers.
        thresholds: of the other criteria, as training chose them.
        mode: how `generate` runs by default: `early-exit`, `full` or `lossless`.
        skipped_states: keys and values of skipped layers: `copy` (of the exit state) or `recompute` (exact, once a
            later token goes deeper).
        full_depth_first_token: whether the first token of a text is taken from the last layer, which the prompt went
            through in any case.
        min_exit_layer: the first layer, from 1, that a token may exit at; `static` and given exits have their own.
        draft_tokens: tokens that `lossless` drafts before it verifies, at most.
        draft_threshold: threshold of the policy while drafting; None takes `threshold`.
        prompt_template: what `templates.PromptTemplate.to_dict` gives; None for the tokenizer's chat template, or
            Alpaca's.
        max_sequence_length: tokens of prompt and response together in training. (`max_length` is one of transformers'
            own settings of `generate`.)
    """

    model_type = "consistentee_causal_lm"
    sub_configs: ClassVar[dict[str, Any]] = {"decoder_config": AutoConfig}
    backbone_key: ClassVar[str] = "decoder_config"
    backbone_type: ClassVar[str] = "llama"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache", "past_key_values"]
    policy_input: ClassVar[str] = "state"

    decoder_config: PreTrainedConfig | dict[str, Any] | None = None
    exit_head: str = "shared"
    exit_head_rank: int = 16
    thresholds: dict[str, float] | None = None
    mode: str = "early-exit"
    skipped_states: str = "copy"
    full_depth_first_token: bool = True
    min_exit_layer: int = 1
    draft_tokens: int = 4
    draft_threshold: float | None = None
    prompt_template: dict[str, Any] | None = None
    max_sequence_length: int = 256

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        require_choice("exit_head", self.exit_head, get_args(ExitHead))
        require_choice("criterion", self.criterion, get_args(GenerationCriterion))
        require_choice("mode", self.mode, get_args(GenerationMode))
        require_choice("skipped_states", self.skipped_states, get_args(SkippedStates))
        require_thresholds("thresholds", self.thresholds)
        require_number("max_sequence_length", self.max_sequence_length, whole=True)
        check_threshold(self.threshold, self.criterion)
        self._require_positive("exit_head_rank", "min_exit_layer", "draft_tokens")

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The configuration that transformers asks about heads, sizes and caches: the decoder's."""
        return self.decoder_config if isinstance(self.decoder_config, PreTrainedConfig) else self


_OPENED_BY = {
    EarlyExitConfig.model_type: "EarlyExitForSequenceClassification",
    FullDepthConfig.model_type: "FullDepthForSequenceClassification",
    EarlyExitCausalLMConfig.model_type: "EarlyExitForCausalLM",
}
_EXITS, _PLAIN, _GENERATOR = _OPENED_BY.values()
_MADE_BY = {
    EarlyExitConfig.model_type: f"{_EXITS}.from_backbone(), or from_classifier() for a fine-tuned classifier",
    FullDepthConfig.model_type: f"{_PLAIN}.from_backbone()",
    EarlyExitCausalLMConfig.model_type: f"{_GENERATOR}.from_backbone()",
}
_OPENING = (*HUB_OPTIONS, "dtype", "torch_dtype", "attn_implementation")


def opening_and_fields(config_class: Any, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of opening a model, and fields of a configuration, apart.

    Raises:
        ValueError: a name that is neither.
    """
    known = [*_OPENING, *(field.name for field in fields(config_class))]
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f' Did you mean "{close[0]}"?' if close else ""
            raise ValueError(
                f'Keywords must be fields of {config_class.__name__} or options of opening a model, got "{name}".{hint}'
            )
    opening = {name: value for name, value in given.items() if name in _OPENING}
    if "torch_dtype" in opening:  # its name of old
        opening.setdefault("dtype", opening.pop("torch_dtype"))
    return opening, {name: value for name, value in given.items() if name not in _OPENING}


def fields_of_labels(num_labels: int | None, label_names: Sequence[str] | None) -> dict[str, Any]:
    """The fields that name classes, from their number or their names.

    Raises:
        ValueError: neither is given, both are and differ, or there are fewer than two.
    """
    if label_names is None:
        if num_labels is None:
            raise ValueError("num_labels or label_names must be given, got neither.")
        label_names = [f"LABEL_{index}" for index in range(num_labels)]
    elif num_labels is not None and num_labels != len(label_names):
        raise ValueError(
            f"num_labels must equal the number of label_names, got {num_labels} and {len(label_names)}."
        )
    if len(label_names) < 2:
        raise ValueError(f"num_labels must be at least 2, got {len(label_names)}.")
    return {
        "id2label": dict(enumerate(label_names)),
        "label2id": {name: index for index, name in enumerate(label_names)},
    }
