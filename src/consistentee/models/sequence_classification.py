"""Models: a classifier with an exit after every layer, and the plain one it is measured against.

`EarlyExitForSequenceClassification` has two ways to run. *With exits* (the default outside training): the batch goes
through the layers, rows that the criterion lets go exit, and the rest close up, so that later layers cost only what
their survivors cost. *All layers* (the default in training): every layer's classifier and policy speak for every row;
nothing exits, and choosing the exit afterwards is the slow oracle that the fast way must agree with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
from transformers.utils import ModelOutput
from typing_extensions import Self

from consistentee.backbones import encoders as backbones
from consistentee.backbones.cutting import keep_first_layers
from consistentee.backbones.precision import cast_parameters
from consistentee.functional.criteria import EXIT_CRITERIA, exit_scores
from consistentee.functional.exits import choose_exit_layer, ensemble_layers, ensemble_step
from consistentee.functional.losses import (
    flat_labels,
    layer_losses,
    mean_of_labelled,
    scale_gradient,
    weighted_sum_loss,
)
from consistentee.functional.tables import CLASSIFICATION
from consistentee.heads.classifiers import InternalClassifiers
from consistentee.heads.exit_signals import ExitSignals, LearntToExit
from consistentee.heads.original_head import build_original_head
from consistentee.heads.policy import PolicyNetwork
from consistentee.models.auto_pipelines import register_pipeline
from consistentee.models.backbone_model import BackboneModel, WithExits
from consistentee.models.configuration import (
    EarlyExitConfig,
    EncoderClassifierConfig,
    FullDepthConfig,
    fields_of_labels,
    opening_and_fields,
)
from consistentee.models.keeps_original import KeepsOriginal


@dataclass
class EarlyExitOutput(ModelOutput):
    """What `EarlyExitForSequenceClassification` returns.

    Attributes:
        loss: scalar, when labels are given: the weighted sum of all classifiers' losses where all layers ran, the
            cross-entropy at the exit layer otherwise.
        logits: (batch, classes), the prediction at the exit layer.
        exit_layer: (batch,), int64, 1-based: layers executed.
        layer_logits: (batch, layers, classes), every layer's prediction as an exit there gives it; all layers only.
        classifier_logits: (batch, layers, classes), every classifier's own logits before ensembling; all layers only.
        pooled: (batch, layers, hidden), the states; all layers only.
        exit_probs: (batch, layers), conditional exit probabilities; all layers only.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    exit_layer: Tensor | None = None
    layer_logits: Tensor | None = None
    classifier_logits: Tensor | None = None
    pooled: Tensor | None = None
    exit_probs: Tensor | None = None


class _EncoderClassifier(BackboneModel):
    """What both models share: a backbone run layer by layer, and how to put classifiers on a pretrained one."""

    config: EncoderClassifierConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, config: EncoderClassifierConfig, backbone: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.backbone = backbone if backbone is not None else backbones.build_backbone(config.backbone_config)

    @classmethod
    def from_backbone(
        cls,
        name_or_path: str | Path,
        *,
        num_labels: int | None = None,
        label_names: Sequence[str] | None = None,
        pooling: str = "auto",
        num_layers: int | None = None,
        **config_values: Any,
    ) -> Self:
        """A pretrained encoder with fresh classifiers, and policies where the model has them, in evaluation mode.

        Args:
            name_or_path: hub name or local folder of an encoder of a supported type.
            num_labels: number of classes; or give `label_names`.
            label_names: the classes' names in order of their index.
            pooling: `cls`, `mean`, or `auto` for what suits the backbone.
            num_layers: of the backbone to keep, from the first; None keeps all.
            **config_values: further fields of the model's configuration, such as `head` or `policy_input`, and options
                of opening the backbone, such as `revision` or `dtype`.

        Raises:
            ValueError: if the type is not supported, neither `num_labels` nor `label_names` is given, the backbone
                cannot be cut to `num_layers`, or a keyword is unknown.
            OSError: if there is no such model.
        """
        opening, config_values = opening_and_fields(cls.config_class, config_values)
        labels = fields_of_labels(num_labels, label_names)
        backbone = backbones.load_backbone(name_or_path, **opening)
        if num_layers is not None:
            keep_first_layers(backbone, num_layers)
        config_class: Any = cls.config_class
        config = config_class(
            encoder_config=backbone.config,
            # A new outer configuration would otherwise reset the backbone's.
            attn_implementation=backbone.config._attn_implementation,
            pooling=resolve_pooling(pooling, backbone),
            **labels,
            **config_values,
        )
        return cast_parameters(cls(config, backbone=backbone), backbone.dtype).eval()

    def _new_classifiers(self, num_layers: int) -> InternalClassifiers:
        return InternalClassifiers(
            num_layers=num_layers,
            hidden_size=self.config.hidden_size,
            num_labels=self.config.num_classes,
            head=self.config.head,
            pooling=self.config.pooling,
            num_queries=self.config.num_queries,
            width=self.config.pooled_size,
            dropout=self.config.head_dropout,
        )


class EarlyExitForSequenceClassification(KeepsOriginal, _EncoderClassifier, WithExits):
    """An encoder with a classifier and an exit policy after every layer.

    Example:
        >>> name = "google-bert/bert-base-uncased"
        >>> model = EarlyExitForSequenceClassification.from_backbone(name, num_labels=2)  # doctest: +SKIP
        >>> output = model(**tokenizer(["a fine film"], return_tensors="pt"))  # doctest: +SKIP
        >>> output.logits.argmax(-1), output.exit_layer  # doctest: +SKIP

    Source: ConsistentEE (AAAI 2024, arXiv:2312.11882).
    """

    task = CLASSIFICATION
    separate_layers = False
    """In training: gradients of an exit end at the exit before it, so that each trains the layers between."""
    exit_gradient_scale = 1.0
    """In training: share of the gradients of all exits but the last that goes on into the backbone."""
    joint_policy = False
    """In training: exit probabilities send gradients to the policy and through the states that it reads."""
    config_class = EarlyExitConfig
    config: EarlyExitConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, config: EarlyExitConfig, backbone: PreTrainedModel | None = None) -> None:
        super().__init__(config, backbone)
        self.classifiers = self._new_classifiers(self.num_layers)
        if config.original_head is not None:
            self.classifiers.layers[-1] = build_original_head(
                config.original_head, config.backbone_config, config.num_classes, config.pooled_size
            )
        self.policy = self.new_policy()
        self.learnt_to_exit = LearntToExit(config.pooled_size) if config.learnt_to_exit else None
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        threshold: float | None = None,
        criterion: str | None = None,
        all_layers: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> EarlyExitOutput | tuple[Any, ...]:
        """Classify a batch.

        Args:
            input_ids: (batch, tokens), int64; None with `inputs_embeds`.
            attention_mask: (batch, tokens), 1 for real tokens; all ones if missing.
            token_type_ids: (batch, tokens), for backbones that have them.
            labels: (batch,) or (batch, 1), int64; a loss is returned if given, in which -100 counts for nothing.
            inputs_embeds: (batch, tokens, embedding size), what the token embeddings gave, in place of `input_ids`.
            threshold: in place of the saved one.
            criterion: one of `criteria.CRITERIA`, in place of the saved one. A criterion other than the saved one needs
                its own threshold.
            all_layers: run every layer for every row; by default in training mode only.
            output_attentions, output_hidden_states: there are none to give; adapters of peft name both.
            return_dict: False returns a tuple of the fields that are set; None takes the configuration's.

        Raises:
            ValueError: if the threshold does not fit the criterion, rows are longer than the backbone's positions, or
                labels are not one a row.
        """
        _refuse_inner_states(output_attentions, output_hidden_states)
        rule, limit = self.criterion_and_threshold(criterion, threshold)
        state = backbones.embed(self.backbone, input_ids, attention_mask, token_type_ids, inputs_embeds)
        labels = flat_labels(labels, len(state.hidden_states))
        if self.training if all_layers is None else all_layers:
            output = self._run_all_layers(state, rule, limit)
            if labels is not None:
                losses = layer_losses(cast(Tensor, output.classifier_logits), labels)
                output.loss = mean_of_labelled(weighted_sum_loss(losses), labels)
        else:
            output = self._run_with_exits(state, rule, limit)
            if labels is not None:
                output.loss = nn.functional.cross_entropy(cast(Tensor, output.logits), labels)
        return _as_asked(output, return_dict, self.config)

    def set_policy(self, policy: PolicyNetwork) -> None:
        """Put another policy network into the model; the configuration follows."""
        self.config.policy_input = policy.policy_input
        self.policy = policy.to(self.device)
        self.unseen_changes += 1

    def exit_logits(self, pooled: Tensor, layer_logits: Tensor) -> Tensor:
        """The policy's exit logits for all layers: pooled (batch, layers, hidden) -> (batch, layers)."""
        return self.policy(pooled, self.policy.features(layer_logits))

    def layer_predictions(self, classifier_logits: Tensor, has_exit: Sequence[bool] | None = None) -> Tensor:
        """What an exit at each layer would predict, (batch, layers, classes).

        Args:
            classifier_logits: (batch, layers, classes), each classifier's own.
            has_exit: (layers,), which layers have an exit; None takes the configuration's.
        """
        return ensemble_layers(
            classifier_logits,
            self.config.ensemble_decay,
            last_alone=self.config.original_head is not None,
            has_exit=self.config.has_exit if has_exit is None else has_exit,
        )

    def layer_exit_probs(
        self, pooled: Tensor, layer_logits: Tensor, has_exit: Sequence[bool] | None = None
    ) -> Tensor:
        """The policy's exit probabilities, (batch, layers); 0 at layers without an exit.

        Args:
            pooled: (batch, layers, width), the states.
            layer_logits: (batch, layers, classes), of `layer_predictions` with the same `has_exit`.
            has_exit: (layers,); None takes the configuration's.
        """
        has_exit = self.config.has_exit if has_exit is None else has_exit
        if all(has_exit):
            return self.exit_logits(pooled, layer_logits).sigmoid()
        kept = torch.tensor(has_exit, device=pooled.device)
        features = self.policy.features(layer_logits[:, kept])
        if features is not None:
            everywhere = features.new_zeros(*layer_logits.shape[:2], features.shape[2])
            features = everywhere.index_copy(1, kept.nonzero().squeeze(1), features)
        return self.policy(pooled, features).sigmoid() * kept

    def set_fitted(
        self,
        *,
        temperatures: list[float] | None,
        layer_weights: list[float] | None,
        learnt_to_exit: LearntToExit | None,
    ) -> None:
        """Put in what training fits for some criteria, or take it out; the configuration follows."""
        self.config.temperatures, self.config.layer_weights = temperatures, layer_weights
        self.config.learnt_to_exit = learnt_to_exit is not None
        self.learnt_to_exit = None if learnt_to_exit is None else learnt_to_exit.to(self.device)
        self.unseen_changes += 1

    def exit_signals(self, reads: Sequence[str] | None = None) -> ExitSignals:
        """What gives what exit criteria read beside predictions and exit probabilities.

        Args:
            reads: names of `ExitCriterion.reads`, of which those count; None: all that there is.
        """
        return ExitSignals(
            self.classifiers,
            temperatures=self.config.temperatures,
            layer_weights=self.config.layer_weights,
            learnt_to_exit=self.learnt_to_exit,
            has_exit=self.config.has_exit,
            reads=reads,
        )

    def _run_all_layers(
        self, state: backbones.EncoderState, criterion: str, threshold: float
    ) -> EarlyExitOutput:
        pooled_layers: list[Tensor] = []
        logits_layers: list[Tensor] = []
        for index in range(self.num_layers):
            if self.separate_layers and index:
                state = state.without_history()
            state = backbones.run_layer(self.backbone, index, state)
            read = state.hidden_states
            if self.exit_gradient_scale < 1 and index < self.num_layers - 1 and not self.separate_layers:
                read = scale_gradient(read, self.exit_gradient_scale)
            pooled, logits = self.classifiers(index, read, state.attention_mask)
            pooled_layers.append(pooled)
            logits_layers.append(logits)
        pooled = torch.stack(pooled_layers, dim=1)  # (batch, layers, hidden)
        classifier_logits = torch.stack(logits_layers, dim=1).float()  # (batch, layers, classes)
        layer_logits = self.layer_predictions(classifier_logits)
        with torch.set_grad_enabled(self.joint_policy and torch.is_grad_enabled()):
            exit_probs = self.layer_exit_probs(pooled, layer_logits)
        with torch.no_grad():
            signals = self.exit_signals((*EXIT_CRITERIA[criterion].reads, "has_exit"))(
                pooled, classifier_logits
            )
            scores = exit_scores(criterion, layer_logits, exit_probs, **signals)
            exit_layer = choose_exit_layer(scores, threshold)
        chosen = (exit_layer - 1)[:, None, None].expand(-1, 1, layer_logits.shape[-1])
        return EarlyExitOutput(
            logits=layer_logits.gather(1, chosen).squeeze(1),
            exit_layer=exit_layer,
            layer_logits=layer_logits,
            classifier_logits=classifier_logits,
            pooled=pooled,
            exit_probs=exit_probs,
        )

    def _run_with_exits(
        self, state: backbones.EncoderState, criterion: str, threshold: float
    ) -> EarlyExitOutput:
        batch = state.hidden_states.shape[0]
        device = state.hidden_states.device
        rows = torch.arange(batch, device=device)  # which inputs are still inside
        output_logits = torch.empty(batch, self.config.num_classes, dtype=torch.float32, device=device)
        exit_layer = torch.full((batch,), self.num_layers, device=device)
        passed: Tensor | None = None  # (rows, layers passed, classes), the survivors' predictions so far
        # (rows, layers passed), their exit probabilities
        probs = torch.empty(batch, 0, dtype=torch.float32, device=device)
        reads_policy = EXIT_CRITERIA[criterion].reads_policy
        exit_signals = self.exit_signals(EXIT_CRITERIA[criterion].reads)
        for index, has_exit in enumerate(self.config.has_exit):
            state = backbones.run_layer(self.backbone, index, state)
            if not has_exit:
                continue
            pooled, classifier_logits = self.classifiers(index, state.hidden_states, state.attention_mask)
            is_last = index == self.num_layers - 1
            before = None if passed is None else passed[:, -1]
            decay = 0.0 if is_last and self.config.original_head is not None else self.config.ensemble_decay
            logits = ensemble_step(before, classifier_logits, decay)
            passed = logits[:, None] if passed is None else torch.cat([passed, logits[:, None]], dim=1)
            if is_last:
                output_logits[rows] = logits
                break
            if reads_policy:
                probs = torch.cat([probs, self._exit_probs_here(index, pooled, passed)], dim=1)
            signals = exit_signals(pooled[:, None], classifier_logits[:, None], index)
            signals["layers"] = torch.full((len(rows), 1), index + 1, device=device)
            exits = exit_scores(criterion, passed, probs, **signals)[:, -1] > threshold  # (rows,)
            if not bool(exits.any()):
                continue
            output_logits[rows[exits]] = logits[exits]
            exit_layer[rows[exits]] = index + 1
            stay = (~exits).nonzero().squeeze(1)
            if len(stay) == 0:
                break
            rows, passed, probs, state = rows[stay], passed[stay], probs[stay], state.select(stay)
        return EarlyExitOutput(logits=output_logits, exit_layer=exit_layer)

    def _exit_probs_here(self, index: int, pooled: Tensor, passed: Tensor) -> Tensor:
        """The policy's exit probabilities after one layer, (rows, 1)."""
        features = self.policy.features(passed)
        features = None if features is None else features[:, -1:]
        return self.policy(pooled[:, None], features, index).sigmoid()


class FullDepthForSequenceClassification(_EncoderClassifier):
    """The plain model: the same backbone with one classifier, of the same kind, at the top. The reference."""

    config_class = FullDepthConfig
    config: FullDepthConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, config: FullDepthConfig, backbone: PreTrainedModel | None = None) -> None:
        super().__init__(config, backbone)
        self.classifiers = self._new_classifiers(1)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """Classify a batch at full depth; shapes and errors as in `EarlyExitForSequenceClassification.forward`."""
        _refuse_inner_states(output_attentions, output_hidden_states)
        state = backbones.embed(self.backbone, input_ids, attention_mask, token_type_ids, inputs_embeds)
        for index in range(self.num_layers):
            state = backbones.run_layer(self.backbone, index, state)
        _, logits = self.classifiers(0, state.hidden_states, state.attention_mask)
        logits, labels = logits.float(), flat_labels(labels, len(logits))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return _as_asked(SequenceClassifierOutput(loss=loss, logits=logits), return_dict, self.config)


def _as_asked(output: Any, return_dict: bool | None, config: EncoderClassifierConfig) -> Any:
    """The output, or a tuple of its fields that are set."""
    return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()


def _refuse_inner_states(*wanted: bool | None) -> None:
    if any(wanted):
        raise ValueError(
            "output_attentions and output_hidden_states must not be set: layers run one by one and keep neither. "
            "Ask the backbone, model.backbone, for them."
        )


def resolve_pooling(pooling: str, backbone: PreTrainedModel) -> str:
    """`cls` or `mean`: the given one, or what suits the backbone's type if `auto`."""
    return backbones.architecture_of(backbone.config).pooling if pooling == "auto" else pooling


AutoConfig.register("consistentee", EarlyExitConfig, exist_ok=True)
AutoConfig.register("consistentee_full_depth", FullDepthConfig, exist_ok=True)
AutoModelForSequenceClassification.register(
    EarlyExitConfig, EarlyExitForSequenceClassification, exist_ok=True
)
AutoModelForSequenceClassification.register(
    FullDepthConfig, FullDepthForSequenceClassification, exist_ok=True
)
for _config_class, _model_class in (
    (EarlyExitConfig, EarlyExitForSequenceClassification),
    (FullDepthConfig, FullDepthForSequenceClassification),
):  # by this list pipelines know which models they can run
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES[_config_class.model_type] = _model_class.__name__
register_pipeline()
