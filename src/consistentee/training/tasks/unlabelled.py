"""Labelled rows, and texts without labels beside them: what exits and policy learn when the rounds are over.

The backbone and the last layer's classifier are finished then and stay as they are. The exits below go on learning the
last layer's own distribution from some of the texts, as in a retrofit. The policy learns from others, on which an exit
is wrong where it disagrees with the last layer, together with the labelled rows that it learns from anyway. What is
judged and chosen by are the labelled validation rows alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from consistentee.backbones.limits import LONGER_TRAINING, say_cuts, training_length
from consistentee.backbones.loading import load_config, load_tokenizer
from consistentee.config import ClassificationTrainingConfig
from consistentee.data.literal import read_special_tokens
from consistentee.data.rows import Text, TextDataset
from consistentee.data.sketches import text_sketch
from consistentee.data.spooled import JoinedRows, SpooledRows, SpooledTexts
from consistentee.errors import DataError
from consistentee.functional.losses import divergence_losses, weighted_sum_loss
from consistentee.training.cached_states import CachedStates, ExitsOnStates, collate_states
from consistentee.training.instances import Instances
from consistentee.training.policy_choice import PolicyChoice
from consistentee.training.run import Parts, PolicyInstances, Run
from consistentee.training.states import LayerStates
from consistentee.training.steps import Figures, Objective, OptimizerSteps, parameter_groups
from consistentee.training.tasks.classification import ClassificationTraining
from consistentee.training.tasks.retrofit import part_texts


class UnlabelledTraining(ClassificationTraining):
    """A `TrainingTask` of labelled rows with texts that have no labels.

    Args:
        config: how to train.
        data: the labelled rows.
        unlabelled: the texts, none of them among these rows.

    Raises:
        DataError: there are too few texts.
    """

    def __init__(
        self, config: ClassificationTrainingConfig, data: TextDataset, unlabelled: SpooledTexts
    ) -> None:
        super().__init__(config, data)
        self.unlabelled = unlabelled
        self.parts = part_texts(
            len(unlabelled),
            policy_texts=config.policy_texts,
            calibration_texts=0,
            report_texts=0,
            seed=config.seed,
        )

    @classmethod
    def read(
        cls,
        config: ClassificationTrainingConfig,
        data: TextDataset,
        texts: Iterable[Text],
        backbone: str | Path,
    ) -> UnlabelledTraining:
        """Read the texts, cut and tokenized as the labelled rows will be; those that are among them are dropped.

        Raises:
            DataError: texts where the labelled rows are pairs, or the other way round; too few of them, or one that
                cannot be read.
        """
        tokenizer = load_tokenizer(backbone)
        read_special_tokens(tokenizer, config.parse_special_tokens)
        longest = training_length(
            config.max_length,
            default=type(config).max_length,
            backbone=load_config(backbone),
            name=backbone,
        )
        spooled = SpooledTexts.read(texts, tokenizer, longest, source="The unlabelled file", known=data.texts)
        wanted = len(data.texts[0])
        if spooled.text_pairs != (wanted == 2):
            one, other = ("pairs", "single texts") if wanted == 2 else ("single texts", "pairs")
            raise DataError(
                f"Unlabelled rows must be {one} as the labelled rows are, got {other}.",
                remedy="Name other text columns, or give another file.",
            )
        return cls(config, data, spooled)

    def prepare(self, backbone: str | Path, task_name: str | None, *, exits: bool) -> Parts:
        """As `TrainingTask` says."""
        parts = super().prepare(backbone, task_name, exits=exits)
        texts = self.unlabelled
        say_cuts(
            int(texts.cut.sum()),
            len(texts),
            f"unlabelled texts were longer than {parts.max_length} tokens",
            LONGER_TRAINING,
        )
        dropped = [(texts.num_duplicates, "duplicates"), (texts.num_known, "of the labelled rows")]
        said = " and ".join(f"{count:,} {what}" for count, what in dropped if count)
        sketch = text_sketch(itertools.chain(self.data.texts, map(texts.text, range(len(texts)))))
        return replace(
            parts,
            description=f"{parts.description}, {len(self.parts.exits):,} unlabelled texts for the exits and "
            f"{len(self.parts.policy):,} for the policy" + (f" ({said} dropped)" if said else ""),
            data={**parts.data, "text_sketch": sketch},
        )

    # The exits.

    def exit_steps(self, run: Run) -> OptimizerSteps:
        """Freeze everything but the exits below the last layer, and give the steps that train these."""
        model, config, accelerator = run.model, self.config, run.accelerator
        model.train().requires_grad_(False)
        for module in self.exit_modules(model):
            module.requires_grad_(True)
        rows = CachedStates(
            model,
            SpooledRows(self.unlabelled, self.parts.exits),
            collate=run.parts.collate,
            memory_mb=config.max_cache_mb,
            disk_mb=config.max_disk_mb,
            passes=config.passes,
            min_steps=config.exit_min_steps,
            batch_size=config.batch_size,
            seed=config.seed,
            precision=str(accelerator.mixed_precision),
        )
        rows.folder = run.scratch_dir
        exits = ExitsOnStates(model)
        optimizer = torch.optim.AdamW(
            parameter_groups(exits, config.weight_decay), lr=config.head_learning_rate, fused=True
        )
        accelerator.free_memory()  # it forgets the optimizer before, which has the exits' parameters too
        prepared, optimizer = accelerator.prepare(exits, optimizer)
        return replace(
            run.steps,
            model=prepared,
            optimizer=optimizer,
            rows=rows,
            collate=cast(Any, collate_states),
            row_weights=None,
            given_batches=rows.batches,
            total_steps=len(rows.batches),
            step=0,
            steps_before=run.steps.total_steps,
            figures={},
        )

    def agreement(self) -> Objective:
        """Every exit learns the last layer's own distribution: the divergence from it, deeper layers weigh more."""

        def objective(model: nn.Module, batch: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, Figures]:
            exits = model(**batch)  # (rows, layers - 1, classes)
            agrees = exits[:, -1].argmax(-1) == labels.argmax(-1)
            return weighted_sum_loss(divergence_losses(exits, labels)), {"agreement": agrees.float()}

        return objective

    # The policy.

    def policy_data(self, run: Run, description: str) -> PolicyInstances:
        """As `TrainingTask` says; texts are learnt from behind the rounds, and never judged."""
        data = super().policy_data(run, description)
        if run.stage is None or data.judged is not None:
            return data
        return replace(data, judged_groups=len(run.parts.validation))

    def _learnt(self, run: Run, description: str) -> tuple[Instances, LayerStates]:
        if run.stage is None:
            return super()._learnt(run, description)
        if isinstance(learnt := run.stage.rows, CachedStates):
            learnt.release()
        labelled = self._learnt_rows(run)
        rows = JoinedRows(labelled, SpooledRows(self.unlabelled, self.parts.policy))
        both = self._states(run, cast(Any, rows), f"{description}: states", keep_pooled=True)
        states, others = both.part(0, len(labelled)), both.part(len(labelled), len(rows))
        others = replace(others, labels=others.layer_logits[:, -1].argmax(-1))
        return self._counted(run, states).and_more(self._uncounted(others), both.pooled), states

    def record(
        self, run: Run, data: PolicyInstances | None, choice: PolicyChoice | None, criterion: str
    ) -> dict[str, Any]:
        """As `TrainingTask` says."""
        found, texts = run.progress["unlabelled"], self.unlabelled
        figures = {
            "num_texts": len(texts),
            "num_exit_texts": len(self.parts.exits),
            "num_policy_texts": len(self.parts.policy),
            "num_duplicates": texts.num_duplicates,
            "num_known": texts.num_known,
            **{name: found[name] for name in ("score_before", "score_after", "kept")},
        }
        return {**super().record(run, data, choice, criterion), "unlabelled": figures}
