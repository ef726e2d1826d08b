"""Training text generators: what a response token is to the objectives, to phase 2 and to the record."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from consistentee.backbones.limits import check_depth, check_tokenizer, training_length
from consistentee.backbones.loading import load_tokenizer
from consistentee.config import GenerationTrainingConfig
from consistentee.data.batches import TokenizedPrompts, collate, with_more_tokens
from consistentee.data.rows import InstructionDataset
from consistentee.data.templates import prompt_template
from consistentee.data.tokenization import encode_rows
from consistentee.errors import SettingError
from consistentee.functional.criteria import GENERATION_CRITERIA
from consistentee.functional.hardness import hardness, memorized_layer
from consistentee.functional.rewards import reward_losses
from consistentee.functional.signals import static_scores
from consistentee.functional.tables import GENERATION
from consistentee.heads.exit_heads import ConfidenceClassifier
from consistentee.heads.policy import PolicyNetwork
from consistentee.models.causal_lm import EarlyExitForCausalLM, PublishedGenerationConfig
from consistentee.training.adapters import Adapters, add_adapters
from consistentee.training.criterion_fits import CriterionFit, foretelling
from consistentee.training.finite import require_finite
from consistentee.training.instances import Instances
from consistentee.training.policy_choice import PolicyChoice, PolicySearch
from consistentee.training.run import Parts, PolicyInstances, Run
from consistentee.training.steps import Figures, Objective
from consistentee.training.tasks.token_objectives import (
    TokenObjective,
    consistent_objective,
    full_depth_objective,
    response_counts,
    weighted_sum_objective,
)
from consistentee.training.tasks.token_states import TokenStates, run_token_states

VALIDATION_TOKENS = 30_000
"""Response tokens of validation rows by which epochs of the plain model are compared, at most."""


class GenerationTraining:
    """A `TrainingTask` of response tokens.

    Args:
        config: how to train.
        data: instructions with responses.
    """

    task, suffix, measure = GENERATION, "_generation", "token accuracy"
    unused_parameters = True  # a step touches the exits that it draws
    criteria, confidence = GENERATION_CRITERIA, "softmax_margin"
    policy_inputs = ("state",)

    def __init__(self, config: GenerationTrainingConfig, data: InstructionDataset) -> None:
        self.config, self.data = config, data
        self._adapters = Adapters(None)

    def prepare(self, backbone: str | Path, task_name: str | None, *, exits: bool) -> Parts:
        """As `TrainingTask` says."""
        config = self.config
        if exits and config.reward_target == "last_layer":
            self.measure = "token agreement"  # which is what right exits are then
        if not exits and config.backbone_training == "frozen":
            raise SettingError(
                "backbone_training must be full or lora to fine-tune the plain model, got frozen. "
                "A frozen backbone is its own reference."
            )
        tokenizer = load_tokenizer(backbone)
        template = prompt_template(
            config.prompt_template, tokenizer, parse_special_tokens=config.parse_special_tokens
        )
        model = EarlyExitForCausalLM.from_backbone(
            backbone,
            exit_head=config.exit_head if exits else "shared",
            exit_head_rank=config.exit_head_rank,
            policy_hidden_size=config.policy_hidden_size,
            policy_dropout=config.policy_dropout,
            initial_exit_bias=config.initial_exit_bias,
            prompt_template=template.to_dict(),
            task=task_name,
            max_sequence_length=config.max_length,
        )
        if exits:
            check_depth(model.num_layers)
        max_length = training_length(
            config.max_length,
            default=type(config).max_length,
            backbone=model.config.backbone_config,
            name=backbone,
        )
        check_tokenizer(tokenizer, model.get_input_embeddings(), backbone, pads=False)
        positions = getattr(model.config.backbone_config, "max_position_embeddings", None)
        if positions:  # pipelines cut by it (`handle_long_generation`); many tokenizers come without a length
            tokenizer.model_max_length = min(tokenizer.model_max_length, int(positions))
        model.config.min_exit_layer = first_exit_layer(config.min_exit_layer, model.num_layers)
        model.checkpoint_layers = config.gradient_checkpointing
        model.policy.requires_grad_(False)  # fitted on their own, on cached states
        model.confidence_classifier.requires_grad_(False)
        model.exit_heads.requires_grad_(exits)
        if config.backbone_training == "frozen":
            model.backbone.requires_grad_(False)
        elif config.backbone_training == "lora":
            torch.manual_seed(
                config.seed
            )  # for adapters that do not depend on how many numbers the policy took
            self._adapters = add_adapters(
                model.backbone, rank=config.lora_rank, alpha=config.lora_alpha, dropout=config.lora_dropout
            )
        kept, held = self.data.split(config.validation_fraction, config.seed)
        if exits and len(held) < 2:
            raise ValueError(
                f"validation rows must be at least 2, got {len(held)} of {len(self.data)} rows. "
                "Give more rows, or a higher validation_fraction."
            )
        lengths = {"max_length": max_length, "max_prompt_length": config.max_prompt_length}
        train_rows = encode_rows(self.data.select(kept), tokenizer, template, **lengths)
        end_texts_with(model, cast(int, tokenizer.eos_token_id))
        counts = response_counts(
            torch.from_numpy(train_rows.lengths), torch.from_numpy(train_rows.prompt_lengths)
        )
        return Parts(
            model=model,
            tokenizer=tokenizer,
            train_rows=train_rows,
            validation=encode_rows(self.data.select(held), tokenizer, template, **lengths),
            collate=partial(collate, tokenizer=tokenizer),
            max_length=max_length,
            row_weights=counts.float(),
            description=f"{model.num_layers} layers, {len(kept)} training rows ({int(counts.sum())} response tokens) "
            f"and {len(held)} validation rows, backbone {config.backbone_training}",
            data={"train_tokens": int(counts.sum())},
        )

    # The objectives.

    def weighted_sum(self) -> Objective:
        """As `TrainingTask` says."""
        return _inside_forward(weighted_sum_objective(**self._weights))

    def consistent(self) -> Objective:
        """As `TrainingTask` says."""
        share = self.config.weighted_sum_share
        return _inside_forward(consistent_objective(weighted_sum_share=share, **self._weights))

    def last_layer(self) -> Objective:
        """As `TrainingTask` says."""
        return _inside_forward(full_depth_objective(logit_rows=self.config.logit_rows))

    @property
    def _weights(self) -> dict[str, Any]:
        names = ("layers_per_step", "last_layer_share", "logit_rows")
        return {name: getattr(self.config, name) for name in names}

    def fixed_parts(self, model: Any) -> None:
        """As `TrainingTask` says."""
        model.policy.eval()
        model.confidence_classifier.eval()
        if not any(parameter.requires_grad for parameter in model.backbone.parameters()):
            model.backbone.eval()

    def exit_modules(self, model: Any) -> list[nn.Module]:
        """As `TrainingTask` says."""
        return [model.exit_heads]

    def warm_up_stops(self, run: Run, until: int) -> list[int]:
        """As `TrainingTask` says."""
        return [until]

    def observe(self, run: Run) -> None:
        """As `TrainingTask` says."""

    # Phase 2.

    def policy_data(self, run: Run, description: str) -> PolicyInstances:
        """As `TrainingTask` says."""
        config, rows = self.config, cast(TokenizedPrompts, run.parts.validation)
        if config.policy_data == "filled":
            rows = with_more_tokens(rows, run.parts.train_rows, config.policy_tokens, config.seed)
        states = self._states(
            run,
            rows,
            f"{description}: states",
            max_tokens=config.policy_tokens,
            target=config.reward_target,
            memory_limit_mb=config.max_cache_mb,
            scratch_dir=run.scratch_dir,
        )
        measure = config.hardness if config.reward == "hardness" else "uniform"
        held = len(run.parts.validation)
        instances = token_instances(states, config.reward_loss, measure)
        return PolicyInstances(instances, None, held, states.first_texts(held), fill_up=True)

    def _states(self, run: Run, rows: TokenizedPrompts, description: str, **how: Any) -> TokenStates:
        """Exits' outputs for response tokens, the same tokens every time; `how` as of `run_token_states`."""
        states = run_token_states(
            run.model,
            rows,
            collate=run.parts.collate,
            seed=self.config.seed,
            logit_rows=self.config.logit_rows,
            accelerator=run.accelerator,
            description=description,
            **how,
        )
        require_finite("loss", "after the last step", [states.losses])
        return states

    def new_policy(self, model: Any, policy_input: str) -> PolicyNetwork:
        """As `TrainingTask` says."""
        return model.new_policy()

    def criterion_fits(self, model: Any, search: PolicySearch) -> Mapping[str, CriterionFit]:
        """As `TrainingTask` says."""
        name = "confidence_classifier"
        new_network = partial(ConfidenceClassifier, model.num_layers, model.config.hidden_size)
        return {name: foretelling(name, new_network, search.foretell)}

    def install(self, model: Any, choice: PolicyChoice) -> None:
        """As `TrainingTask` says."""
        model.policy.load_state_dict(choice.policy.state_dict())
        for name, network in choice.fitted.items():
            getattr(model, name).load_state_dict(network.state_dict())

    def restore_policy(self, model: Any, policy_input: str) -> None:
        """As `TrainingTask` says."""

    # What is said and kept.

    def first_figures(self, run: Run, data: PolicyInstances) -> dict[str, Any]:
        """As `TrainingTask` says."""
        states: TokenStates = data.states
        return {
            "per_layer_accuracy": states.per_layer_accuracy,
            "per_layer_loss": states.losses.mean(0).tolist(),
            "commonest_token_share": float(torch.bincount(states.targets).max() / len(states)),
            "memorized_layer_histogram": torch.bincount(
                memorized_layer(states.right) - 1, minlength=run.model.num_layers
            ).tolist(),
        }

    def validate(self, run: Run) -> dict[str, Any]:
        """As `TrainingTask` says."""
        states = self._states(
            run,
            run.parts.validation,
            "validation",
            max_tokens=VALIDATION_TOKENS,
            keep_pooled=False,
            last_layer_only=True,
        )
        return {
            "accuracy": states.per_layer_accuracy[-1],
            "loss": float(states.losses[:, -1].mean()),
            "num_examples": len(states),
        }

    def record(
        self, run: Run, data: PolicyInstances | None, choice: PolicyChoice | None, criterion: str
    ) -> dict[str, Any]:
        """As `TrainingTask` says."""
        template = {"prompt_template": run.model.config.prompt_template}
        if data is None:
            return template
        return {**template, "validation": {"per_layer_loss": data.states.losses.mean(0).tolist()}}

    def finish(self, run: Run, choice: PolicyChoice | None, criterion: str) -> Any:
        """As `TrainingTask` says."""
        self._adapters.merge()
        if choice is None:
            return run.model.backbone
        config, thresholds = run.model.config, choice.thresholds
        config.criterion, config.threshold = criterion, thresholds.pop(criterion)
        config.thresholds = thresholds
        return run.model


def end_texts_with(model: EarlyExitForCausalLM, token: int) -> None:
    """Let `generate`, of a model and of its backbone, end a text at a token too: the one behind responses."""
    for part in (model, model.backbone):
        if part.generation_config is None:
            continue
        values: Any = PublishedGenerationConfig.of(part.generation_config)
        part.generation_config = values
        known = values.eos_token_id
        ends = [*known] if isinstance(known, (list, tuple)) else [known]
        if token not in ends:
            values.eos_token_id = token if known is None else [*ends, token]


def first_exit_layer(wanted: int | None, num_layers: int) -> int:
    """The first layer that tokens may exit at: the one that is wanted, or a sixth of all, rounded up.

    Raises:
        ValueError: the model is not that deep.

    Example:
        >>> first_exit_layer(None, 30), first_exit_layer(None, 4), first_exit_layer(3, 4)
        (5, 1, 3)
    """
    if wanted is None:
        return -(-num_layers // 6)
    if wanted > num_layers:
        raise SettingError(
            f"min_exit_layer must be at most {num_layers}, the number of layers, got {wanted}. Give a smaller one."
        )
    return wanted


def token_instances(states: TokenStates, reward_loss: str, measure: str) -> Instances:
    """Response tokens as instances.

    Args:
        states: one pass over them.
        reward_loss: what a bad exit costs (`rewards.REWARDS`).
        measure: of hardness (`hardness.HARDNESS`).
    """
    layers = torch.arange(1, states.right.shape[1] + 1, dtype=torch.float32)
    return Instances(
        correct=states.right,
        exit_cost=reward_losses(reward_loss, losses=states.losses, right=states.right, regret=states.regret),
        hardness=hardness(measure, right=states.right, losses=states.losses),
        group=states.rows,
        states=states.pooled,
        scores={
            **states.scores,
            "static": static_scores(layers).expand(len(states), -1),
        },
        targets={"confidence_classifier": states.agrees},
    )


def _inside_forward(objective: TokenObjective) -> Objective:
    """An objective that the model's `forward` calls in its middle, before logits of all layers would be made."""

    def outside(model: nn.Module, batch: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, Figures]:
        output = model(**batch, labels=labels, objective=objective)
        return output.losses, output.figures

    return outside
