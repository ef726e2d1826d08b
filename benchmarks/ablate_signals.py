"""What the policy's signals buy: nine figures about the classifiers against the log-odds alone, with and without state.

    python benchmarks/ablate_signals.py runs/ablation/minilm-6l_m-cid_default_1 runs/ablation/e5-12l_mrpc_default_1 \
        --data DATA --seeds 0 1 2 --json signals.json

Takes models that `ablate_training.py` has trained. Policies learn on the rows kept from the classifiers and are judged
on the task's evaluation rows, and once more together with training rows that no run used, by `curve_score` and by the
best accuracy at a layer speed-up or more. Differences are paired by model and seed of the policy.

The policies are this script's own, so that it does not matter which of them the package has: the log-odds of the top
class, weighted and added to a bias per layer, and on top of that, as the names say, a small network on some signals
and one per layer on the pooled state. In all the networks begin at zero: untrained, a policy is the confidence
criterion.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from ablate_training import PRICES, cached_states
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from consistentee import ClassificationTrainingConfig
from consistentee.atomic_files import write_json
from consistentee.functional.criteria import exit_scores
from consistentee.functional.curves import BUDGETS, curve_score, trade_off_curve
from consistentee.functional.exits import LOG_ODDS_SCALE, SIGNAL_NAMES, classifier_signals
from consistentee.training.policy_phase import policy_search
from consistentee.training.states import LayerStates
from consistentee.training.tasks.classification import row_instances

WIDTH = 32


@dataclass(frozen=True)
class Inputs:
    """What a policy reads beside the log-odds.

    Args:
        state: whether it reads the pooled state.
        signals: those that its network reads; none for no such network.
    """

    state: bool
    signals: tuple[str, ...]


NINE, ONE = SIGNAL_NAMES, ("log_odds",)
VARIANTS = {
    "nine signals": Inputs(state=False, signals=NINE),
    "log-odds": Inputs(state=False, signals=ONE),
    "log-odds, linear": Inputs(state=False, signals=()),
    "state + nine signals": Inputs(state=True, signals=NINE),
    "state + log-odds": Inputs(state=True, signals=ONE),
    "state + log-odds, linear": Inputs(state=True, signals=()),
}
PAIRS = (
    ("log-odds", "nine signals"),
    ("log-odds, linear", "nine signals"),
    ("state + log-odds", "state + nine signals"),
    ("state + log-odds, linear", "state + nine signals"),
    ("nine signals", "confidence"),
    ("state + nine signals", "confidence"),
    ("state + log-odds, linear", "confidence"),
)


class Policy(nn.Module):
    """Exit logits, (batch, layers), of states and signals side by side, (batch, layers, hidden + signals)."""

    def __init__(
        self, num_layers: int, hidden_size: int, inputs: Inputs, config: ClassificationTrainingConfig
    ) -> None:
        super().__init__()
        self.inputs, self.hidden_size = inputs, hidden_size
        if inputs.state:
            self.state_dropout = nn.Dropout(config.policy_dropout)
            self.state_weight = nn.Parameter(torch.empty(num_layers, hidden_size, WIDTH))
            self.state_bias = nn.Parameter(torch.zeros(num_layers, WIDTH))
            self.state_output = nn.Parameter(torch.zeros(num_layers, WIDTH))
            nn.init.normal_(self.state_weight, std=hidden_size**-0.5)
        self.confidence_weight = nn.Parameter(torch.tensor(1.0))
        if inputs.signals:
            self.places = [SIGNAL_NAMES.index(name) for name in inputs.signals]
            self.signal_hidden = nn.Linear(len(inputs.signals), WIDTH)
            self.signal_output = nn.Linear(WIDTH, 1)
            nn.init.zeros_(self.signal_output.weight)
            nn.init.zeros_(self.signal_output.bias)
        self.exit_bias = nn.Parameter(torch.full((num_layers,), config.initial_exit_bias))

    def forward(self, states_and_signals: Tensor, _: Tensor | None = None) -> Tensor:
        """Exit logits of all layers."""
        state, signals = states_and_signals.split([self.hidden_size, len(SIGNAL_NAMES)], dim=-1)
        log_odds = LOG_ODDS_SCALE * signals[..., SIGNAL_NAMES.index("log_odds")]
        logits = self.exit_bias + self.confidence_weight * log_odds
        if self.inputs.state:
            if self.training:
                state = state * self.state_dropout(state.new_ones(len(state), 1, self.hidden_size))
            hidden = torch.einsum("blh,lhw->blw", state, self.state_weight) + self.state_bias
            logits = logits + (nn.functional.gelu(hidden) * self.state_output).sum(-1)
        if self.inputs.signals:
            hidden = nn.functional.gelu(self.signal_hidden(signals[..., self.places]))
            logits = logits + self.signal_output(hidden).squeeze(-1)
        return logits


def main() -> None:
    """Fit every variant on every model with every seed, and print scores and paired differences."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the data sets")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--spare-rows-too", action="store_true", help="fit the policies on the spare rows as well"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    cells: list[dict[str, Any]] = []
    for folder in options.models:
        saved, held, judged, parts = cached_states(folder, options.data, folder.name.split("_")[1])
        config = ClassificationTrainingConfig.from_dict(saved.record["config"])
        if options.spare_rows_too:
            count = parts["evaluation"].stop
            held = joined(held, rows_from(judged, slice(count, None)))
            judged, parts = rows_from(judged, parts["evaluation"]), {"evaluation": parts["evaluation"]}
        surest = exit_scores("confidence", judged.layer_logits, None)
        scores = {("confidence", seed): ("confidence", surest) for seed in options.seeds}
        for name, inputs in VARIANTS.items():
            for seed in options.seeds:
                scores[name, seed] = ("policy", exit_probs(inputs, held, judged, config, seed))
        for (name, seed), (criterion, values) in scores.items():
            cell = {"model": folder.name, "variant": name, "seed": seed}
            cells.append(
                cell | {part: figures(values, judged, rows, criterion) for part, rows in parts.items()}
            )
        if options.json is not None:
            write_json(options.json, {"torch": torch.__version__, "cells": cells})
    for part in [part for part in cells[0] if part.startswith("evaluation")]:
        for table in _tables(cells, part):
            Console(width=150).print(table)


def exit_probs(
    inputs: Inputs, held: LayerStates, judged: LayerStates, config: ClassificationTrainingConfig, seed: int
) -> Tensor:
    """Exit probabilities of the judged rows under a policy for the range of prices, fitted on the held-out ones."""
    torch.manual_seed(seed)
    features = with_signals(held)
    policy: Any = Policy(features.shape[1], features.shape[2] - len(SIGNAL_NAMES), inputs, config)
    policy_search(config, (), layer_costs=PRICES).fit(
        policy,
        replace(row_instances(held, "error", "memorized_layer"), states=features),
        layer_cost=(PRICES[0] * PRICES[1]) ** 0.5,
        layer_cost_range=PRICES,
        seed=seed,
    )
    with torch.no_grad():
        return policy(with_signals(judged)).sigmoid()


def rows_from(states: LayerStates, rows: slice) -> LayerStates:
    """Some rows of cached states."""
    return LayerStates(**{name: value[rows] for name, value in vars(states).items() if value is not None})


def joined(first: LayerStates, second: LayerStates) -> LayerStates:
    """The rows of both."""
    names = [name for name, value in vars(first).items() if value is not None]
    return LayerStates(**{name: torch.cat([getattr(first, name), getattr(second, name)]) for name in names})


def with_signals(states: LayerStates) -> Tensor:
    """Pooled states and signals side by side, (rows, layers, hidden + signals)."""
    if states.pooled is None:
        raise SystemExit("There are no states.")
    return torch.cat([states.pooled.float(), classifier_signals(states.layer_logits)], dim=-1)


def figures(scores: Tensor, judged: LayerStates, rows: slice, criterion: str) -> dict[str, Any]:
    """Score, and the best accuracy at each budget, on some of the judged rows."""
    curve = trade_off_curve(scores[rows], judged.outcomes["right"][rows], criterion)
    return {
        "score": curve_score(curve),
        "accuracy_at": {
            str(budget): max((p.accuracy for p in curve if p.layer_speedup >= budget), default=0.0)
            for budget in BUDGETS
        },
    }


def _tables(cells: list[dict[str, Any]], part: str) -> Sequence[Table]:
    """Scores by model, and paired differences over all models."""
    models = list(dict.fromkeys(cell["model"] for cell in cells))
    names = list(dict.fromkeys(cell["variant"] for cell in cells))
    seeds = list(dict.fromkeys(cell["seed"] for cell in cells))
    found = {(cell["variant"], cell["model"], cell["seed"]): cell[part] for cell in cells}
    scores = Table(
        "policy", *(model.rsplit("_", 2)[0] for model in models), "mean", title=f"score, {part} rows"
    )
    for name in names:
        means = [
            100 * statistics.mean(found[name, model, seed]["score"] for seed in seeds) for model in models
        ]
        scores.add_row(name, *(f"{value:.2f}" for value in [*means, statistics.mean(means)]))
    measures = ("score", *(str(budget) for budget in BUDGETS))
    title = f"differences in points, {part} rows, mean over models ± standard error over models"
    changes = Table("policy", "minus", *measures, *(model.rsplit("_", 2)[0] for model in models), title=title)
    for name, base in PAIRS:
        line = [name, base]
        for measure in measures:
            by_model = [_mean_change(found, name, base, model, seeds, measure) for model in models]
            error = statistics.stdev(by_model) / len(models) ** 0.5 if len(models) > 1 else float("nan")
            line.append(f"{statistics.mean(by_model):+.2f} ± {error:.2f}")
        line += [f"{_mean_change(found, name, base, model, seeds, 'score'):+.2f}" for model in models]
        changes.add_row(*line)
    return scores, changes


def _mean_change(
    found: dict[tuple[str, str, int], dict[str, Any]],
    name: str,
    base: str,
    model: str,
    seeds: Sequence[int],
    measure: str,
) -> float:
    def points(variant: str, seed: int) -> float:
        here = found[variant, model, seed]
        return 100 * (here["score"] if measure == "score" else here["accuracy_at"][measure])

    return statistics.mean(points(name, seed) - points(base, seed) for seed in seeds)


if __name__ == "__main__":
    main()
