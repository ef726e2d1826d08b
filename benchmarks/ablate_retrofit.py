"""What retrofit's exits and policy gain from each choice: a frozen model's states once, then variant after variant.

    python benchmarks/ablate_retrofit.py MODEL --texts FILE... --judge FILE... [--json out.json] [--only NAME...]

MODEL and texts are what `consistentee retrofit` would be given; `--seed` shares them out as it does. Exits are trained
on `--exit-texts` of its texts for exits, a policy on `--policy-texts` of those for policies, and both are judged on its
reported texts and on each file of `--judge`, thresholds swept there for all rules alike: agreement (%) at 2x, 2.5x, 3x
and 4x, and the fastest exits at 99 % and 98 %. States of the model take 2 x (layers - 1) x hidden bytes a token; they
are kept in `--cache` for the next call.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from render_retrofit import figures
from torch import Tensor

from consistentee.atomic_files import write_text
from consistentee.config import RetrofitConfig
from consistentee.data.batches import LengthGroupedBatches, collate
from consistentee.data.files import read_texts
from consistentee.data.spooled import SpooledRows, SpooledTexts
from consistentee.functional.curves import trade_off_curve
from consistentee.functional.exits import (
    classifier_signals,
    ensemble_layers,
    exit_distribution,
)
from consistentee.functional.losses import weighted_sum_loss
from consistentee.heads.policy import PolicyNetwork
from consistentee.models.sequence_classification import EarlyExitForSequenceClassification
from consistentee.training.cached_states import CachedStates, ExitsOnStates, StatesInMemory, collate_states
from consistentee.training.instances import Instances
from consistentee.training.policy import fit_policy, policy_exit_probs
from consistentee.training.states import LayerStates
from consistentee.training.steps import parameter_groups, schedule_factor
from consistentee.training.tasks.classification import row_instances
from consistentee.training.train import retrofit_task

DEFAULTS: dict[str, Any] = {
    "classifier_hidden_size": 64,
    "num_queries": 4,
    "ensemble_decay": 0.5,
    "head_dropout": 0.1,
    "passes": 5,
    "learning_rate": 1e-3,
    "weight_decay": 0.01,
    "objective": "divergence",
    "policy_input": "state+log_odds",
    "width": 64,
    "dropout": 0.0,
    "epochs": 20,
}
EXITS: dict[str, dict[str, Any]] = {
    "default": {},
    "16 wide": {"classifier_hidden_size": 16},
    "32 wide": {"classifier_hidden_size": 32},
    "128 wide": {"classifier_hidden_size": 128},
    "256 wide": {"classifier_hidden_size": 256},
    "1 query": {"num_queries": 1},
    "2 queries": {"num_queries": 2},
    "8 queries": {"num_queries": 8},
    "no ensemble": {"ensemble_decay": 0.0},
    "ensemble 0.3": {"ensemble_decay": 0.3},
    "ensemble 0.7": {"ensemble_decay": 0.7},
    "1 pass": {"passes": 1},
    "3 passes": {"passes": 3},
    "8 passes": {"passes": 8},
    "no dropout in exits": {"head_dropout": 0.0},
    "dropout 0.3 in exits": {"head_dropout": 0.3},
    "weight decay 0.1": {"weight_decay": 0.1},
    "learning rate 0.0003": {"learning_rate": 3e-4},
    "divergence, all layers alike": {"objective": "alike"},
    "divergence of the ensemble": {"objective": "ensemble"},
    "error-weighted divergence": {"objective": "error_weighted"},
    "cross-entropy of the model's label": {"objective": "label"},
    "consistent, last 2 of 5 passes": {"objective": "consistent"},
    **{f"{rows:,} texts for exits": {"exit_texts": rows} for rows in (2000, 5000, 28_000, 50_000)},
    "38,000 texts for exits, 10,000 for the policy": {"exit_texts": 38_000, "policy_texts": 10_000},
    "43,000 texts for exits, 5,000 for the policy": {"exit_texts": 43_000, "policy_texts": 5000},
}
POLICIES: dict[str, dict[str, Any]] = {
    "policy: dropout 0.1": {"dropout": 0.1},
    "policy: dropout 0.5, 32 wide (train's)": {"dropout": 0.5, "width": 32},
    "policy: dropout 0.3, 64 wide": {"dropout": 0.3},
    "policy: 128 wide": {"width": 128},
    "policy: 40 epochs": {"epochs": 40},
    "policy: 10 epochs": {"epochs": 10},
    "policy: state alone": {"policy_input": "state"},
    "policy: log-odds alone": {"policy_input": "log_odds"},
    "policy: state and nine signals": {"policy_input": "state+signals"},
    **{f"policy: {rows:,} texts": {"policy_texts": rows} for rows in (500, 1000, 2000, 5000, 10_000, 20_000)},
}
VARIANTS = EXITS | POLICIES
COSTS = (0.002, 0.2)
SPREAD = 0.3  # share of the weighted sum in the consistent objective, as in `train`


class KeptStates(CachedStates):
    """All states at once, in a file that the next call opens again."""

    def __init__(self, file: Path | None, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, memory_mb=1e9, passes=1, batch_size=1, seed=0)
        store = self._store = StatesInMemory(self._shape)
        if file is not None and file.is_file():
            store.states, self._logits = torch.load(file, mmap=True)
        else:
            self._load(0, shown=True)
            if file is not None:
                torch.save((store.states, self._logits), file)
        self._loaded = 0


def main() -> None:
    """Run every variant with every seed, and print a Markdown table as it grows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?")
    parser.add_argument("--texts", nargs="+", default=[])
    parser.add_argument("--judge", nargs="*", default=[], help="files of further texts to judge on")
    parser.add_argument("--exit-texts", type=int, default=16_000)
    parser.add_argument("--policy-texts", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0, help="of the retrofit")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of exits and policies")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--cache", type=Path, help="folder to keep states in")
    parser.add_argument("--json", type=Path, help="figures; variants in it are not run again")
    parser.add_argument(
        "--render", action="store_true", help="print the table of what --json holds, and run nothing"
    )
    options = parser.parse_args()
    found: dict[str, Any] = {}
    if options.json is not None and options.json.is_file():
        found = json.loads(options.json.read_text(encoding="utf-8"))
    if options.render:
        print(render(found))
        return
    if options.model is None or not options.texts:
        parser.error("MODEL and --texts are needed")
    bench = Bench(options)
    for name in options.only:
        for seed in options.seeds:
            if f"{seed}" in found.get(name, {}):
                continue
            start = time.perf_counter()
            result = bench.run({**vars(options), **DEFAULTS, **VARIANTS[name]}, seed)
            found.setdefault(name, {})[f"{seed}"] = result
            shown = " | ".join(
                " ".join(f"{value:.2f}" for value in rules["policy"]) for rules in result.values()
            )
            print(f"| {name} | {seed} | {shown} | {time.perf_counter() - start:.0f} s |", flush=True)
            if options.json is not None:
                write_text(options.json, json.dumps(found, indent=1) + "\n")


def render(found: dict[str, Any]) -> str:
    """A row a variant, in the order of `VARIANTS`: the policy's figures, means over seeds; confidence's at 99 %."""
    judged = list(next(iter(next(iter(found.values())).values())))
    heads = ["variant", "seeds"]
    for name in judged:
        heads += [f"{name}: at 2x", "2.5x", "3x", "4x", "fastest at 99 %", "98 %", "confidence at 99 %"]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---|" * (len(heads) - 1)]
    for name in VARIANTS:
        if name in found:
            runs = list(found[name].values())
            cells = [name, f"{len(runs)}"]
            for judge in judged:
                policy = np.mean([run[judge]["policy"] for run in runs], axis=0)
                cells += [f"{value:.2f}" for value in policy[:4]] + [f"{value:.2f}x" for value in policy[4:]]
                cells.append(f"{np.mean([run[judge]['confidence'][4] for run in runs]):.2f}x")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


class Bench:
    """States of all texts, and what is learnt on them; exits that were trained are kept for the next policy."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.model_name, self.seed = options.model, options.seed
        texts = itertools.chain.from_iterable(read_texts(file) for file in options.texts)
        task = retrofit_task(options.model, texts, RetrofitConfig(seed=options.seed), source="texts")
        parts = task.parts
        # The texts for exits come first, then all others that nothing is reported on: more for exits, if asked for.
        self.exit_rows = np.concatenate([shuffled(parts.exits), parts.calibration, shuffled(parts.policy)])
        self.all_policy_rows = shuffled(parts.policy)
        model = EarlyExitForSequenceClassification.from_classifier(options.model)
        keep = partial(
            KeptStates,
            model=model,
            collate=partial(collate, tokenizer=task.original.tokenizer),
        )
        if options.cache is not None:
            options.cache.mkdir(parents=True, exist_ok=True)
        at = options.cache
        all_rows = SpooledRows(task.data, np.arange(len(task.data)))
        self.states = keep(None if at is None else at / f"{task.data.fingerprint()}.pt", rows=all_rows)
        self.judged: dict[str, tuple[Any, NDArray[np.int64]]] = {"reported": (self.states, parts.report)}
        for file in options.judge:
            longest = min(task.config.max_length, task.original.max_length)
            spooled = SpooledTexts.read(read_texts(file), task.original.tokenizer, longest, source=file)
            rows = SpooledRows(spooled, np.arange(len(spooled)))
            states = keep(None if at is None else at / f"{spooled.fingerprint()}.pt", rows=rows)
            self.judged[Path(file).stem] = (states, np.arange(len(rows)))
        self._trained: dict[str, Any] = {}

    def run(self, how: dict[str, Any], seed: int) -> dict[str, dict[str, list[float]]]:
        """Figures by judged rows and rule."""
        of_exits = {name: how[name] for name in (*list(DEFAULTS)[:8], "exit_texts")} | {"seed": seed}
        key = json.dumps(of_exits)
        if self._trained.get("key") != key:
            self._trained = {"key": key} | self._train_exits(how, seed)
        learnt, judged = self._trained["learnt"], self._trained["judged"]
        signals = how["policy_input"].endswith("signals")
        policy = self._policy(instances(learnt, signals=signals), how, seed)
        found: dict[str, dict[str, list[float]]] = {}
        for name, states in judged.items():
            rows = instances(states, signals=signals)
            scores = {"policy": policy_exit_probs(policy, rows), **{r: rows.scores[r] for r in RULES}}
            found[name] = {rule: swept(scores[rule], rows.correct, rule) for rule in scores}
        return found

    def _policy(self, rows: Instances, how: dict[str, Any], seed: int) -> PolicyNetwork:
        torch.manual_seed(seed)
        policy = PolicyNetwork(
            num_layers=rows.correct.shape[1],
            hidden_size=rows.kept_states.shape[2],
            policy_input=how["policy_input"],
            policy_hidden_size=how["width"],
            dropout=how["dropout"],
            initial_exit_bias=-1.0,
        )
        return fit_policy(
            policy,
            rows,
            layer_cost=math.sqrt(math.prod(COSTS)),
            layer_cost_range=COSTS,
            epochs=how["epochs"],
            seed=seed,
            rows=torch.arange(min(how["policy_texts"], len(rows))),
        )

    def new_exits(self, model: EarlyExitForSequenceClassification) -> Any:
        """Untrained exits."""
        return ExitsOnStates(model)

    def _train_exits(self, how: dict[str, Any], seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        names = ("num_queries", "classifier_hidden_size", "head_dropout", "ensemble_decay")
        model = EarlyExitForSequenceClassification.from_classifier(
            self.model_name, **{name: how[name] for name in names}
        )
        model.requires_grad_(False)
        for exit_ in model.classifiers.layers[:-1]:
            exit_.requires_grad_(True)
        exits, decay = self.new_exits(model).train(), how["ensemble_decay"]
        rows = self.exit_rows[: how["exit_texts"]]
        # A policy learns from texts that the exits did not: many for exits leave few for it.
        policy_rows = self.all_policy_rows[~np.isin(self.all_policy_rows, rows)]
        loss = partial(OBJECTIVES.get(how["objective"], divergence), decay=decay)
        consistent = how["objective"] == "consistent"
        passes = how["passes"] - (2 if consistent else 0)
        self._steps(exits, rows, loss, how, range(passes), seed)
        if consistent:
            policy = self._policy(instances(self._states(exits, self.states, policy_rows, decay)), how, seed)
            loss = partial(at_exits, decay=decay, policy=policy)
            self._steps(exits, rows, loss, how, range(passes, how["passes"]), seed)
        return {
            "learnt": self._states(exits, self.states, policy_rows, decay),
            "judged": {
                name: self._states(exits, states, rows, decay) for name, (states, rows) in self.judged.items()
            },
        }

    def _steps(
        self,
        exits: Any,
        rows: NDArray[np.int64],
        loss: Callable[..., Tensor],
        how: dict[str, Any],
        epochs: range,
        seed: int,
    ) -> None:
        optimizer = torch.optim.AdamW(
            parameter_groups(exits, how["weight_decay"]), lr=how["learning_rate"], fused=True
        )
        batches = LengthGroupedBatches(self.states.lengths[rows], 32, seed=seed)
        total, step = len(batches) * len(epochs), 0
        for epoch in epochs:
            batches.set_epoch(epoch)
            for batch in batches:
                items = collate_states([self.states[int(row)] for row in rows[batch]])
                for group in optimizer.param_groups:
                    group["lr"] = how["learning_rate"] * schedule_factor(step, total, 0.1, "linear")
                value = loss(exits, items).mean()
                optimizer.zero_grad(set_to_none=True)
                value.backward()
                torch.nn.utils.clip_grad_norm_(exits.parameters(), 1.0)
                optimizer.step()
                step += 1

    @torch.no_grad()
    def _states(self, exits: Any, states: Any, rows: NDArray[np.int64], decay: float) -> LayerStates:
        """What exits say about rows; the last layer's pooled state is not read by anything."""
        exits.eval()
        order = np.argsort(states.lengths[rows], kind="stable")
        logits: list[Tensor] = [torch.empty(0)] * len(rows)
        pooled: list[Tensor] = [torch.empty(0)] * len(rows)
        for start in range(0, len(rows), 128):
            part = order[start : start + 128]
            items = collate_states([states[int(row)] for row in rows[part]])
            both = [
                exits.classifiers(index, layer, items["attention_mask"])
                for index, layer in enumerate(items["states"].unbind(2))
            ]
            last = items["labels"]
            outputs = torch.stack([*(output for _, output in both), last], dim=1)
            kept = torch.stack([*(state for state, _ in both), torch.zeros_like(both[0][0])], dim=1)
            for place, row in enumerate(part):
                logits[row], pooled[row] = outputs[place], kept[place]
        exits.train()
        classifier_logits = torch.stack(logits).float()
        layer_logits = ensemble_layers(classifier_logits, decay, last_alone=True)
        answers = layer_logits[:, -1].argmax(-1)
        zeros = torch.zeros(layer_logits.shape[:2])
        # No variant exits by what a classifier does not see of a state.
        return LayerStates(
            classifier_logits, layer_logits, zeros, answers, torch.stack(pooled), null_shares=zeros
        )


RULES = ("confidence", "patience")


def shuffled(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows in an order of their own, so that the first of them are a sample."""
    return np.random.default_rng(len(rows)).permutation(rows)


def instances(states: LayerStates, *, signals: bool = False) -> Instances:
    """Rows whose labels are the model's own answers."""
    rows = row_instances(states, "error", "memorized_layer")
    if not signals:
        return rows
    return Instances(**{**vars(rows), "features": classifier_signals(states.layer_logits)})


def swept(scores: Tensor, correct: Tensor, criterion: str) -> list[float]:
    """Agreements (%) at speed-ups, then speed-ups at agreements."""
    points = trade_off_curve(scores, correct, criterion, limit=400)
    curve = [{"agreement": point.accuracy, "layer_speedup": point.layer_speedup} for point in points]
    return [value for value, _ in figures(curve)]


# Objectives: (exits, batch) -> loss of every row.


def layer_divergences(logits: Tensor, labels: Tensor) -> Tensor:
    """Divergence of every exit from the model, (rows, layers - 1)."""
    wanted = labels.log_softmax(-1)[:, None]
    return (wanted.exp() * (wanted - logits.log_softmax(-1))).sum(-1)


def divergence(exits: Any, batch: dict[str, Tensor], decay: float) -> Tensor:
    """The default: deeper layers weigh more."""
    return weighted_sum_loss(
        layer_divergences(exits(batch["states"], batch["attention_mask"]), batch["labels"])
    )


def alike(exits: Any, batch: dict[str, Tensor], decay: float) -> Tensor:
    """All layers weigh the same."""
    return layer_divergences(exits(batch["states"], batch["attention_mask"]), batch["labels"]).mean(1)


def ensemble(exits: Any, batch: dict[str, Tensor], decay: float) -> Tensor:
    """Of what an exit answers after the layers before it have had their say."""
    logits = ensemble_layers(exits(batch["states"], batch["attention_mask"]), decay)
    return weighted_sum_loss(layer_divergences(logits, batch["labels"]))


def error_weighted(exits: Any, batch: dict[str, Tensor], decay: float) -> Tensor:
    """A row weighs at a layer by the chance that the exit there disagrees, and a tenth at least."""
    logits = exits(batch["states"], batch["attention_mask"])
    answers = batch["labels"].argmax(-1)[:, None, None].expand(-1, logits.shape[1], 1)
    weight = 0.1 + 0.9 * (1 - logits.detach().softmax(-1).gather(2, answers).squeeze(2))
    return weighted_sum_loss(weight / weight.mean(0) * layer_divergences(logits, batch["labels"]))


def label(exits: Any, batch: dict[str, Tensor], decay: float) -> Tensor:
    """Cross-entropy of the label that the model gives."""
    logits = exits(batch["states"], batch["attention_mask"]).log_softmax(-1)
    answers = batch["labels"].argmax(-1)[:, None, None].expand(-1, logits.shape[1], 1)
    return weighted_sum_loss(-logits.gather(2, answers).squeeze(2))


def at_exits(exits: Any, batch: dict[str, Tensor], decay: float, policy: PolicyNetwork) -> Tensor:
    """The consistent objective: the ensemble's divergence where the policy exits, mixed with the weighted sum."""
    both = [
        exits.classifiers(index, layer, batch["attention_mask"])
        for index, layer in enumerate(batch["states"].unbind(2))
    ]
    logits = torch.stack([output for _, output in both], dim=1)
    layer_logits = ensemble_layers(logits, decay)
    with torch.no_grad():
        pooled = torch.stack([*(state for state, _ in both), torch.zeros_like(both[0][0])], dim=1)
        seen = torch.cat([layer_logits, batch["labels"][:, None]], dim=1)
        probs = policy(pooled, policy.features(seen)).sigmoid()
        weights = exit_distribution(probs)[:, :-1]  # the last layer answers as the model does
    losses = layer_divergences(layer_logits, batch["labels"])
    everywhere = weighted_sum_loss(layer_divergences(logits, batch["labels"]))
    return SPREAD * everywhere + (1 - SPREAD) * (weights * losses).sum(1)


OBJECTIVES: dict[str, Callable[..., Tensor]] = {
    "divergence": divergence,
    "alike": alike,
    "ensemble": ensemble,
    "error_weighted": error_weighted,
    "label": label,
}


if __name__ == "__main__":
    main()
