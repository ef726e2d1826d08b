"""Compare token policies on one trained generator's frozen exits: what they are paid, where they may leave, their data.

    python benchmarks/ablate_token_policies.py runs/generation/xsum-exits --task xsum --data-dir DATA/xsum \
        --json ablation.json

Policies learn on the rows that training kept from the model (cut again as the run cut them, from its record), some with
training rows on top, and then write texts for the task's evaluation rows, at thresholds where the references' tokens
leave at given depths. CALM's softmax margin and full depth stand beside them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from consistentee import (
    GenerationTrainingConfig,
    InstructionDataset,
    LoadedGenerator,
    load_generation_task,
    load_model,
)
from consistentee.atomic_files import write_json
from consistentee.data.batches import TokenizedPrompts, collate, with_more_tokens
from consistentee.data.rows import split_rows
from consistentee.data.tokenization import encode_rows
from consistentee.evaluation.teacher_forcing import ReferencePasses, reference_rows
from consistentee.evaluation.text_metrics import text_metrics
from consistentee.inference.timing import environment
from consistentee.pipelines.generator import TextGenerator
from consistentee.training.policy_phase import policy_search
from consistentee.training.tasks.generation import token_instances
from consistentee.training.tasks.token_states import TokenStates, run_token_states

PRICES = (0.002, 0.2)
REFERENCE = {"reward_target": "reference"}


@dataclass(frozen=True)
class Variant:
    """One policy.

    Args:
        changes: of the training settings.
        first: the first layer that it may leave at.
        filled: whether tokens of training rows fill up what it learns from.
    """

    changes: dict[str, Any]
    first: int = 1
    filled: bool = False


VARIANTS = {
    "error, reference": Variant({"reward_loss": "error", **REFERENCE}),
    "cross_entropy, hardness": Variant({"reward_loss": "cross_entropy", "reward": "hardness", **REFERENCE}),
    "cross_entropy": Variant({"reward_loss": "cross_entropy", **REFERENCE}),
    "regret": Variant({"reward_loss": "regret", **REFERENCE}),
    "regret, from layer 5": Variant({"reward_loss": "regret", **REFERENCE}, first=5),
    "regret, from layer 12": Variant({"reward_loss": "regret", **REFERENCE}, first=12),
    "regret, from layer 5, filled": Variant({"reward_loss": "regret", **REFERENCE}, first=5, filled=True),
}


def main() -> None:
    """Cache the states, fit every variant, write texts, print and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--task", required=True)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--variants", nargs="*", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--depths", type=float, nargs="*", default=[24.0, 20.0], help="of references' tokens")
    parser.add_argument("--policy-tokens", type=int, help="in place of the run's")
    parser.add_argument("--rows", type=int, default=100, help="prompts, at most")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    saved = load_model(options.model, LoadedGenerator, dtype=options.dtype)
    config = GenerationTrainingConfig.from_dict(saved.record["config"])
    if options.policy_tokens is not None:
        config = replace(config, policy_tokens=options.policy_tokens)
    train_data, evaluation = load_generation_task(options.task, options.data_dir, need_train=True)
    if train_data is None:
        raise SystemExit("There are no training rows.")
    kept, held = split_rows(len(train_data), config.validation_fraction, config.seed)
    held_rows, kept_rows = (_encoded(saved, train_data.select(part)) for part in (held, kept))
    filled_rows = with_more_tokens(held_rows, kept_rows, config.policy_tokens, config.seed)
    filled = _states(saved, filled_rows, config)
    alone = filled.first_texts(len(held_rows))
    judge = Judge(saved, evaluation.max_samples(options.rows, options.seed), options.depths)

    rows = [
        {"name": "full depth", "tokens": "", **judge.texts(None)},
        *({"name": "softmax margin", "tokens": "", **row} for row in judge.depths("softmax_margin")),
    ]
    for name in options.variants:
        variant = VARIANTS[name]
        states = filled if variant.filled else alone
        _fit(saved, states, replace(config, **{"reward": "uniform", **variant.changes}), variant.first)
        rows += ({"name": name, "tokens": len(states), **row} for row in judge.depths("policy"))
        Console(width=130).print(_table(rows))
    if options.json is not None:
        place = environment(torch.device("cpu"), options.seed)
        write_json(options.json, {"model": options.model.name, "environment": place, "rows": rows})


class Judge:
    """Writes texts with a model and says how good they are.

    Args:
        saved: the model.
        rows: prompts and references.
        depths: mean exit layers of references' tokens to look at.
    """

    def __init__(self, saved: LoadedGenerator, rows: InstructionDataset, depths: Sequence[float]) -> None:
        self._saved, self._rows, self._depths = saved, rows, depths
        self._references = reference_rows(saved, rows)

    def depths(self, criterion: str) -> list[dict[str, Any]]:
        """Figures of a rule, one row a depth."""
        passes = ReferencePasses(self._saved, self._references, batch_size=32)
        thresholds = [passes.threshold_for_depth(criterion, depth, refinements=3) for depth in self._depths]
        return [self.texts(criterion, threshold, passes) for threshold in thresholds]

    def texts(
        self, criterion: str | None, threshold: float = 1.0, passes: ReferencePasses | None = None
    ) -> dict[str, Any]:
        """Figures at one threshold; without a rule, of full depth."""
        passes = passes or ReferencePasses(self._saved, self._references, batch_size=32)
        references = passes.full_depth if criterion is None else passes.tokens(criterion, threshold)
        limits: dict[str, Any] = {"max_new_tokens": 128, "max_prompt_length": self._saved.max_length}
        if criterion is None:
            limits["mode"] = "full"
        else:
            limits |= {"criterion": criterion, "threshold": threshold}
        asked = list(zip(self._rows.instructions, self._rows.inputs, strict=True))
        texts = list(TextGenerator(self._saved).generate_texts(asked, batch_size=64, **limits))
        metrics = text_metrics([text.text.strip() for text in texts], self._rows.references)
        layers = [layer for text in texts for layer in text.exit_layers]
        return {
            "references' layer": references.mean_exit_layer,
            "right": references.token_accuracy,
            "perplexity": references.perplexity,
            "rougeL": metrics["rougeL"],
            "bleu": metrics["bleu"],
            "texts' layer": sum(layers) / len(layers),
            "cut": sum(len(text.exit_layers) == 128 for text in texts),
        }


def _encoded(saved: LoadedGenerator, rows: InstructionDataset) -> TokenizedPrompts:
    return encode_rows(rows, saved.tokenizer, saved.prompt_template(), max_length=saved.max_length)


def _states(saved: LoadedGenerator, rows: TokenizedPrompts, config: GenerationTrainingConfig) -> TokenStates:
    return run_token_states(
        saved.early_exit_model,
        rows,
        collate=partial(collate, tokenizer=saved.tokenizer),
        max_tokens=config.policy_tokens,
        seed=config.seed,
        description="states",
    )


def _fit(saved: LoadedGenerator, states: TokenStates, config: GenerationTrainingConfig, first: int) -> None:
    """Fit a policy on all tokens and put it into the model."""
    model = saved.early_exit_model
    if states.pooled is None:
        raise SystemExit("There are no states.")
    torch.manual_seed(config.seed)
    measure = config.hardness if config.reward == "hardness" else "uniform"
    policy = policy_search(config, (), layer_costs=PRICES).fit(
        model.new_policy().float(),
        token_instances(states, config.reward_loss, measure),
        layer_cost=(PRICES[0] * PRICES[1]) ** 0.5,
        layer_cost_range=PRICES,
        seed=config.seed,
        min_exit_layer=first,
    )
    model.policy.load_state_dict(policy.state_dict())
    model.config.min_exit_layer = first


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table("policy", *list(rows[0])[1:])
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    return table


if __name__ == "__main__":
    main()
