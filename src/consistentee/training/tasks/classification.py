"""Training classifiers: what a row is to the objectives, to phase 2 and to the record."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from consistentee.backbones.cutting import layers_of
from consistentee.backbones.limits import check_depth, check_tokenizer, training_length
from consistentee.backbones.loading import load_tokenizer
from consistentee.config import ClassificationTrainingConfig
from consistentee.data.batches import TokenizedDataset, collate
from consistentee.data.literal import read_special_tokens
from consistentee.data.rows import TextDataset, stratified_split
from consistentee.data.sketches import text_sketch
from consistentee.data.tokenization import tokenize
from consistentee.functional.criteria import CRITERIA, EXIT_CRITERIA
from consistentee.functional.exits import choose_exit_layer, exit_distribution, log_odds
from consistentee.functional.hardness import hardness, memorized_layer
from consistentee.functional.losses import consistent_loss, layer_losses, weighted_sum_loss
from consistentee.functional.metrics import METRICS, check_threshold_metric, effects_of_changes
from consistentee.functional.recall import recall_by_class, recall_warnings
from consistentee.functional.rewards import reward_losses
from consistentee.functional.tables import CLASSIFICATION
from consistentee.heads.exit_signals import LearntToExit
from consistentee.heads.policy import PolicyNetwork
from consistentee.models.sequence_classification import (
    EarlyExitForSequenceClassification,
    FullDepthForSequenceClassification,
)
from consistentee.training.criterion_fits import (
    CriterionFit,
    accuracy_weights,
    foretelling,
    temperature_calibration,
)
from consistentee.training.exit_objective import exit_objective
from consistentee.training.finite import require_finite
from consistentee.training.instances import Instances
from consistentee.training.policy_choice import PolicyChoice, PolicySearch
from consistentee.training.run import Parts, PolicyInstances, Run
from consistentee.training.states import LayerStates, run_all_layers, run_full_depth
from consistentee.training.steps import Figures, Objective

AUTO_INPUTS = ("log_odds", "state+log_odds")
FITTED = ("learnt_to_exit", "calibrated_confidence", "expert_sum")
FORGETTING_CHECKS = 8  # looks at the policy's rows during warm-up, for the forgetting-events measure
FORETELLING_EPOCHS, FORETELLING_RATE = 5, 1e-2  # one linear map of all layers needs no more
MAX_SEEN_ROWS = 10_000  # of the rows the classifiers have seen, at most these teach the policy


class ClassificationTraining:
    """A `TrainingTask` of labelled rows.

    Args:
        config: how to train.
        data: the rows.

    Raises:
        ValueError: `threshold_metric` does not fit the classes.
    """

    task, suffix, measure, unused_parameters = CLASSIFICATION, "", "accuracy", False
    criteria, confidence = CRITERIA, "entropy"

    def __init__(self, config: ClassificationTrainingConfig, data: TextDataset) -> None:
        check_threshold_metric(config.threshold_metric, len(data.label_names))
        self.config, self.data = config, data
        self.policy_inputs = AUTO_INPUTS if config.policy_input == "auto" else (config.policy_input,)
        self._policy_rows: TokenizedDataset | None = None  # that the classifiers have seen

    def prepare(self, backbone: str | Path, task_name: str | None, *, exits: bool) -> Parts:
        """As `TrainingTask` says."""
        config, data = self.config, self.data
        head: dict[str, Any] = {
            "label_names": data.label_names,
            "num_layers": config.num_layers,
            "pooling": config.pooling,
            "head": config.head,
            "num_queries": config.num_queries,
            "classifier_hidden_size": config.classifier_hidden_size,
            "head_dropout": config.head_dropout,
            "parse_special_tokens": config.parse_special_tokens,
            "text_pairs": len(data.texts[0]) == 2,
        }
        model: EarlyExitForSequenceClassification | FullDepthForSequenceClassification
        if exits:
            model = EarlyExitForSequenceClassification.from_backbone(
                backbone,
                **head,
                ensemble_decay=config.ensemble_decay,
                policy_input=self.policy_inputs[-1],
                policy_hidden_size=config.policy_hidden_size,
                policy_dropout=config.policy_dropout,
                initial_exit_bias=config.initial_exit_bias,
            )
            check_depth(model.num_layers)
            model.policy.requires_grad_(False)  # fitted on its own, on cached states
            model.exit_gradient_scale = config.exit_gradient_scale
        else:
            model = FullDepthForSequenceClassification.from_backbone(backbone, **head)
        tokenizer = load_tokenizer(backbone)
        max_length = training_length(
            config.max_length,
            default=type(config).max_length,
            backbone=model.config.backbone_config,
            name=backbone,
        )
        check_tokenizer(tokenizer, model.get_input_embeddings(), backbone)
        read_special_tokens(tokenizer, config.parse_special_tokens)
        kept, held = stratified_split(data.labels, config.validation_fraction, config.seed)
        if len(held) < 2:
            raise ValueError(
                f"validation rows must be at least 2, got {len(held)} of {len(data)} rows. "
                "Give more rows, or a higher validation_fraction."
            )
        train_part = data.select(kept)
        if config.policy_data == "seen" and exits:
            seen = train_part.max_samples(MAX_SEEN_ROWS, config.seed)
            self._policy_rows = tokenize(seen, tokenizer, max_length)
        model.config.task, model.config.max_length = task_name, config.max_length
        return Parts(
            model=model,
            tokenizer=tokenizer,
            train_rows=tokenize(train_part, tokenizer, max_length),
            validation=tokenize(data.select(held), tokenizer, max_length),
            collate=partial(collate, tokenizer=tokenizer),
            max_length=max_length,
            row_weights=None,
            description=f"{model.num_layers} layers, {len(data.label_names)} classes, {len(kept)} training and "
            f"{len(held)} validation rows",
            data={
                "text_pairs": len(data.texts[0]) == 2,
                "text_sketch": text_sketch(data.texts),
                **({} if config.num_layers is None else {"backbone_layers": layers_of(backbone)}),
            },
        )

    # The objectives.

    def weighted_sum(self) -> Objective:
        """As `TrainingTask` says."""
        return exit_objective(lambda losses, output, labels: weighted_sum_loss(losses))

    def consistent(self) -> Objective:
        """As `TrainingTask` says."""
        share = self.config.weighted_sum_share

        def objective(model: nn.Module, batch: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, Figures]:
            output = model(**batch)
            at_exit = consistent_loss(layer_losses(output.layer_logits, labels), output.exit_probs)
            everywhere = weighted_sum_loss(layer_losses(output.classifier_logits, labels))
            probability = exit_distribution(output.exit_probs)  # (rows, layers)
            layers = torch.arange(
                1, probability.shape[1] + 1, device=probability.device, dtype=probability.dtype
            )
            correct = (output.layer_logits.argmax(-1) == labels[:, None]).float()
            figures = {
                "exit_layer": probability @ layers,
                "accuracy": (probability * correct).sum(1),
                "reward": -at_exit.detach(),
            }
            return share * everywhere + (1 - share) * at_exit, figures

        return objective

    def last_layer(self) -> Objective:
        """As `TrainingTask` says."""

        def objective(model: nn.Module, batch: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, Figures]:
            output = model(**batch)
            logits = output.logits if "classifier_logits" not in output else output.classifier_logits[:, -1]
            losses = nn.functional.cross_entropy(logits, labels, reduction="none")
            return losses, {"accuracy": (logits.argmax(-1) == labels).float()}

        return objective

    def fixed_parts(self, model: Any) -> None:
        """As `TrainingTask` says."""
        if isinstance(model, EarlyExitForSequenceClassification) and not model.joint_policy:
            model.policy.eval()
        if not any(parameter.requires_grad for parameter in model.backbone.parameters()):
            model.backbone.eval()

    def exit_modules(self, model: Any) -> list[nn.Module]:
        """As `TrainingTask` says."""
        return list(model.classifiers.layers[:-1])

    # The warm-up of the forgetting-events measure, which looks now and then at which of the policy's rows are right.

    def warm_up_stops(self, run: Run, until: int) -> list[int]:
        """As `TrainingTask` says."""
        checks = FORGETTING_CHECKS if self.config.hardness == "forgetting_events" else 1
        return [round(until * part / checks) for part in range(1, checks + 1)]

    def observe(self, run: Run) -> None:
        """As `TrainingTask` says."""
        if self.config.hardness == "forgetting_events":
            states = self._states(run, self._learnt_rows(run), "forgetting events")
            right = (states.layer_logits[:, -1].argmax(-1) == states.labels).int().tolist()
            run.progress["forgetting"].append(right)

    # Phase 2.

    def policy_data(self, run: Run, description: str) -> PolicyInstances:
        """As `TrainingTask` says."""
        learnt, states = self._learnt(run, description)
        judged = None
        if self._policy_rows is not None:
            states = self._states(run, run.parts.validation, f"{description}: validation", keep_pooled=True)
            judged = self._uncounted(states)
        quality, effects = self._qualities(states)
        return PolicyInstances(learnt, judged, None, states, quality, effects)

    def _learnt(self, run: Run, description: str) -> tuple[Instances, LayerStates]:
        """What the policy learns from, and the pass over its labelled rows."""
        states = self._states(run, self._learnt_rows(run), f"{description}: states", keep_pooled=True)
        return self._counted(run, states), states

    def _counted(self, run: Run, states: LayerStates) -> Instances:
        """Rows that forgetting is counted on."""
        measure = self.config.hardness if self.config.reward == "hardness" else "uniform"
        counts = forgetting_counts(run.progress["forgetting"])
        return row_instances(states, self.config.reward_loss, measure, counts)

    def _uncounted(self, states: LayerStates) -> Instances:
        """Others: they pay by their memorized layer in place of it."""
        measure = self.config.hardness if self.config.reward == "hardness" else "uniform"
        measure = "memorized_layer" if measure == "forgetting_events" else measure
        return row_instances(states, self.config.reward_loss, measure)

    def _learnt_rows(self, run: Run) -> TokenizedDataset:
        return run.parts.validation if self._policy_rows is None else self._policy_rows

    def _states(
        self, run: Run, rows: TokenizedDataset, description: str, *, keep_pooled: bool = False
    ) -> LayerStates:
        states = run_all_layers(
            run.model,
            rows,
            collate=run.parts.collate,
            accelerator=run.accelerator,
            keep_pooled=keep_pooled,
            memory_limit_mb=self.config.max_cache_mb,
            scratch_dir=run.scratch_dir,
            description=description,
        )
        require_finite("logits", "after the last step", [states.classifier_logits])
        return states

    def _qualities(
        self, states: LayerStates
    ) -> tuple[Callable[[Tensor], float] | None, Callable[[Tensor], Tensor] | None]:
        """`quality` and `effects` of exit layers by the configured metric; None and None for the accuracy."""
        metric, labels = self.config.threshold_metric, states.labels.numpy()
        if metric == "accuracy":
            return None, None
        predictions = states.layer_logits.argmax(-1)
        last = predictions[:, -1].numpy()

        def given(exit_layer: Tensor) -> Any:
            return predictions.gather(1, exit_layer[:, None] - 1).squeeze(1).numpy()

        def quality(exit_layer: Tensor) -> float:
            return METRICS[metric](given(exit_layer), labels)

        def effects(exit_layer: Tensor) -> Tensor:
            return torch.from_numpy(effects_of_changes(metric, given(exit_layer), last, labels))

        return quality, effects

    def new_policy(self, model: Any, policy_input: str) -> PolicyNetwork:
        """As `TrainingTask` says."""
        return model.new_policy(policy_input)

    def criterion_fits(self, model: Any, search: PolicySearch) -> Mapping[str, CriterionFit]:
        """As `TrainingTask` says."""
        name, new_network = "learnt_to_exit", partial(LearntToExit, model.config.pooled_size)
        foretell = partial(search.foretell, epochs=FORETELLING_EPOCHS, learning_rate=FORETELLING_RATE)
        return {
            name: foretelling(name, new_network, foretell),
            "calibrated_confidence": temperature_calibration(),
            "expert_sum": accuracy_weights(),
        }

    def install(self, model: Any, choice: PolicyChoice) -> None:
        """As `TrainingTask` says."""
        model.set_policy(choice.policy.requires_grad_(False))

    def restore_policy(self, model: Any, policy_input: str) -> None:
        """As `TrainingTask` says."""
        model.set_policy(model.new_policy(policy_input).requires_grad_(False))

    # What is said and kept.

    def first_figures(self, run: Run, data: PolicyInstances) -> dict[str, Any]:
        """As `TrainingTask` says."""
        states: LayerStates = data.states
        correct = states.classifier_logits.argmax(-1) == states.labels[:, None]
        return {
            "per_layer_accuracy": correct.double().mean(0).tolist(),
            "majority_share": float(torch.bincount(states.labels).max() / len(states)),
            "memorized_layer_histogram": torch.bincount(
                memorized_layer(correct) - 1, minlength=correct.shape[1]
            ).tolist(),
        }

    def validate(self, run: Run) -> dict[str, Any]:
        """As `TrainingTask` says."""
        rows = run.parts.validation
        logits = run_full_depth(
            run.model,
            rows,
            collate=run.parts.collate,
            accelerator=run.accelerator,
            description="validation",
        )
        require_finite("logits", "after the last step", [logits])
        return {
            "accuracy": float((logits.argmax(-1) == rows.labels).double().mean()),
            "num_examples": len(rows),
        }

    def record(
        self, run: Run, data: PolicyInstances | None, choice: PolicyChoice | None, criterion: str
    ) -> dict[str, Any]:
        """As `TrainingTask` says."""
        if data is None or choice is None:
            return {}
        states: LayerStates = data.states
        threshold, names = choice.thresholds[criterion], self.data.label_names
        exit_layer = choose_exit_layer(choice.exit_scores[criterion], threshold)
        predictions = states.layer_logits.argmax(-1)
        at_exit = predictions.gather(1, exit_layer[:, None] - 1).squeeze(1)
        classes = recall_by_class(at_exit, predictions[:, -1], states.labels, names)
        for line in recall_warnings(classes, threshold, threshold_metric=self.config.threshold_metric):
            run.say(f"Warning, on validation rows: {line}")
        return {"validation": {"class_recall": [asdict(found) for found in classes]}}

    def finish(self, run: Run, choice: PolicyChoice | None, criterion: str) -> Any:
        """As `TrainingTask` says."""
        run.parts.tokenizer.model_max_length = run.model.config.max_input_length
        if choice is not None:
            keep_choice(run.model, choice, criterion)
        return run.model


def keep_choice(model: EarlyExitForSequenceClassification, choice: PolicyChoice, criterion: str) -> None:
    """Put into a finished model what phase 2 chose and fitted beside the policy, which is in it."""
    model.config.criterion, model.config.threshold = criterion, choice.thresholds[criterion]
    model.set_fitted(
        temperatures=choice.fitted["calibrated_confidence"].tolist(),
        layer_weights=choice.fitted["expert_sum"].tolist(),
        learnt_to_exit=choice.fitted["learnt_to_exit"].requires_grad_(False),
    )


def row_instances(
    states: LayerStates, reward_loss: str, measure: str, counts: Tensor | None = None
) -> Instances:
    """Rows as instances.

    Args:
        states: one pass over them.
        reward_loss: what a bad exit costs (`rewards.REWARDS`).
        measure: of hardness (`hardness.HARDNESS`).
        counts: (rows,), how often each was forgotten, for that measure.
    """
    outcomes = states.outcomes
    return Instances(
        correct=outcomes["right"],
        exit_cost=reward_losses(reward_loss, **outcomes),
        hardness=hardness(measure, **outcomes, forgetting_counts=counts),
        group=torch.arange(len(states)),
        states=states.pooled,
        features=log_odds(states.layer_logits)[..., None],
        layer_logits=states.layer_logits,
        labels=states.labels,
        scores={
            criterion: states.exit_scores(criterion)
            for criterion in CRITERIA
            if not EXIT_CRITERIA[criterion].reads_policy and criterion not in FITTED
        },
        targets={"learnt_to_exit": outcomes["right"]},
    )


def forgetting_counts(checks: Sequence[Sequence[int]]) -> Tensor | None:
    """How often each row went from right to wrong between checks; a row that was never right counts as every time."""
    if not checks:
        return None
    right = torch.tensor(checks)  # (checks, rows)
    forgotten = ((right[:-1] == 1) & (right[1:] == 0)).sum(0)
    return torch.where(right.sum(0) == 0, torch.full_like(forgotten, len(checks)), forgotten)
