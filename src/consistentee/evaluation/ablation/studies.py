"""Studies on the cached states of one trained model: the noise of sampled gradients, and rows for the policy.

Policies learn on the rows that training kept from the classifiers, cut again as the run cut them, and are judged on
the evaluation rows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from consistentee.config import ClassificationTrainingConfig
from consistentee.data.rows import TextDataset, stratified_split
from consistentee.data.tokenization import tokenize
from consistentee.evaluation.classification import run_tokenized
from consistentee.functional.curves import area_under_curve, trade_off_curve
from consistentee.functional.losses import exact_policy_loss, sampled_policy_loss
from consistentee.functional.rewards import rewards
from consistentee.heads.policy import PolicyNetwork
from consistentee.models.loaded import LoadedClassifier
from consistentee.training.instances import Instances
from consistentee.training.policy import policy_exit_probs
from consistentee.training.policy_choice import PolicySearch
from consistentee.training.policy_phase import policy_search
from consistentee.training.states import LayerStates
from consistentee.training.tasks.classification import row_instances

ROLLOUTS = (1, 8, 32)
BATCHES, DRAWS = 16, 16  # of the gradient's noise: batches of instances, and draws of exit layers for each
FEWEST_POLICY_ROWS = 500  # that a policy learns from, then twice as many each time


@dataclass(frozen=True)
class Studied:
    """A trained model's instances, and what fits policies as its run did.

    Attributes:
        model: with exits.
        search: what is tried, with its run's settings.
        seed: its run's.
        batch_size: instances of a policy's step.
        learnt: rows that the classifiers have not seen.
        judged: evaluation rows.
        confidence_area: area under the curve of confidence on these.
    """

    model: Any
    search: PolicySearch
    seed: int
    batch_size: int
    learnt: Instances
    judged: Instances
    confidence_area: float

    def new_policy(self, seed: int) -> PolicyNetwork:
        """An untrained one that reads what the run's reads."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.model.new_policy(self.model.policy.policy_input)

    def fitted(self, *, rows: Tensor | None = None, **settings: Any) -> PolicyNetwork:
        """A policy fitted on some rows, or all, perhaps with other settings of the fit."""
        search, seed = self.search, self.seed
        (cost, *_) = search.fitted_costs
        costs = {"layer_cost": cost, "layer_cost_range": search.layer_cost_range}
        return search.fit(self.new_policy(seed), self.learnt, **costs, seed=seed, rows=rows, **settings)

    def area(self, policy: PolicyNetwork) -> float:
        """Of a policy's curve on the judged rows."""
        return _area(policy_exit_probs(policy, self.judged), self.judged.correct, "policy")


def studied(saved: LoadedClassifier, train_data: TextDataset, evaluation: TextDataset) -> Studied:
    """Run a trained model over the rows that its training kept from the classifiers, and over those to report on.

    Args:
        saved: what `train` wrote, with its record.
        train_data, evaluation: of its run.
    """
    config = ClassificationTrainingConfig.from_dict(saved.record["config"])
    _, held = stratified_split(train_data.labels, config.validation_fraction, config.seed)

    def states(rows: TextDataset, description: str) -> LayerStates:
        tokenized = tokenize(rows, saved.tokenizer, saved.max_length)
        return run_tokenized(saved, tokenized, keep_pooled=True, description=description)

    measure = "uniform" if config.reward == "uniform" else config.hardness
    if (
        measure == "forgetting_events"
    ):  # counted while training; its fits here take the measure it is nearest to
        measure = "memorized_layer"
    on_held, on_judged = states(train_data.select(held), "held-out rows"), states(evaluation, "judged rows")
    learnt, judged = (row_instances(rows, config.reward_loss, measure) for rows in (on_held, on_judged))
    confidence = _area(on_judged.exit_scores("confidence"), judged.correct, "confidence")
    chosen = config.layer_costs
    if config.layer_cost_mode == "each":  # the run fitted a policy for each of them, and kept one
        chosen = (saved.record["policy"]["layer_cost"],)
    return Studied(
        model=saved.early_exit_model,
        search=policy_search(config, (), layer_costs=chosen),
        seed=config.seed,
        batch_size=config.policy_batch_size,
        learnt=learnt,
        judged=judged,
        confidence_area=confidence,
    )


def gradient_study(rows: Studied) -> dict[str, Any]:
    """How far policy gradients from sampled exit layers are from the exact one, and what fits by them come to.

    A gradient's noise is its mean squared distance: of a sampled one to the exact gradient of the same batch, of a
    batch's exact one to that of all rows. Dropout is off.

    Returns:
        Plain values: `noise` with an entry for a policy that is untrained and one that is fitted (`squared_gradient`,
        `batch_noise`, None where a batch is all rows, `sampling_noise` by K), and `fits`, by `exact` and K: `area` and
        `seconds`.
    """
    stages = {"untrained": rows.new_policy(rows.seed), "fitted": rows.fitted()}
    noise = {name: _gradient_noise(rows, policy.eval()) for name, policy in stages.items()}
    fits: dict[str, Any] = {}
    for k in (0, *ROLLOUTS):
        started = time.perf_counter()
        policy = rows.fitted(estimator="sampled" if k else "exact", num_rollouts=max(k, 1))
        seconds = time.perf_counter() - started
        fits[str(k) if k else "exact"] = {"area": rows.area(policy), "seconds": seconds}
    return {"noise": noise, "fits": fits, "confidence_area": rows.confidence_area}


def policy_rows_study(rows: Studied) -> dict[str, Any]:
    """What a policy gains over confidence when it learns from more and more rows.

    Returns:
        Plain values: `areas`, a list of `rows` and `area`, and `confidence_area`.
    """
    count = len(rows.learnt)
    generator = torch.Generator().manual_seed(rows.seed)
    order = torch.randperm(count, generator=generator)
    areas = [
        {"rows": some, "area": rows.area(rows.fitted(rows=order[:some].sort().values))}
        for some in row_counts(count)
    ]
    return {"areas": areas, "confidence_area": rows.confidence_area}


STUDIES: Mapping[str, Callable[[Studied], dict[str, Any]]] = {
    "gradients": gradient_study,
    "policy_rows": policy_rows_study,
}


def row_counts(count: int) -> Sequence[int]:
    """Numbers of rows to learn from: 500, twice as many each time, and all; fewer than 1,000 are halved twice."""
    if count < 2 * FEWEST_POLICY_ROWS:
        return sorted({max(2, count // 4), max(2, count // 2), count})
    doublings = range(int(math.log2(count / FEWEST_POLICY_ROWS)) + 1)
    return sorted({*(FEWEST_POLICY_ROWS * 2**power for power in doublings), count})


def _gradient_noise(rows: Studied, policy: PolicyNetwork) -> dict[str, Any]:
    instances, seed = rows.learnt, rows.seed
    (cost, *_) = rows.search.fitted_costs
    reward = rewards(instances.exit_cost, cost, instances.hardness)
    parameters = list(policy.parameters())
    draws = torch.Generator().manual_seed(seed)

    def gradient(chosen: Tensor, k: int) -> Tensor:
        features = None if instances.features is None else instances.features[chosen]
        exit_logits = policy(instances.kept_states[chosen].float(), features)
        if k:
            loss = sampled_policy_loss(exit_logits, reward[chosen], k, draws)
        else:
            loss = exact_policy_loss(exit_logits, reward[chosen])
        found = torch.autograd.grad(loss.mean(), parameters, allow_unused=True)
        return torch.cat([part.flatten() for part in found if part is not None])

    everything = gradient(torch.arange(len(instances)), 0)
    order = torch.Generator().manual_seed(seed)
    size = min(rows.batch_size, len(instances))
    batch_noise: list[float] = []
    sampling_noise: dict[int, list[float]] = {k: [] for k in ROLLOUTS}
    for _ in range(BATCHES):
        chosen = torch.randperm(len(instances), generator=order)[:size]
        exact = gradient(chosen, 0)
        batch_noise.append(float((exact - everything).square().sum()))
        for k in ROLLOUTS:
            sampling_noise[k] += [float((gradient(chosen, k) - exact).square().sum()) for _ in range(DRAWS)]
    return {
        "squared_gradient": float(everything.square().sum()),
        "batch_noise": None if size == len(instances) else sum(batch_noise) / len(batch_noise),
        "sampling_noise": {str(k): sum(values) / len(values) for k, values in sampling_noise.items()},
    }


def _area(scores: Tensor, correct: Tensor, criterion: str) -> float:
    points = trade_off_curve(scores, correct, criterion)
    accuracy, speedup = (
        torch.tensor([getattr(point, name) for point in points], dtype=torch.float64)
        for name in ("accuracy", "layer_speedup")
    )
    return float(area_under_curve(accuracy, speedup))
