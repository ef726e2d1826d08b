"""What is fitted for criteria once the exits are finished: temperatures, and networks that foretell."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from consistentee.functional.signals import calibrated_confidence_scores, expert_sum_scores
from consistentee.heads.exit_signals import LearntToExit
from consistentee.training.criterion_fits import (
    TEMPERATURES,
    CriterionFit,
    accuracy_weights,
    fit_criteria,
    fit_temperatures,
    foretelling,
    temperature_calibration,
)
from consistentee.training.instances import Instances, group_folds
from consistentee.training.policy import fit_foretelling

LAYERS, WIDTH = 3, 6


def outputs(rows: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits that are right more often with depth, and too sure of it."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (rows,), generator=generator)
    depth = torch.arange(1, LAYERS + 1)[None, :, None]
    right = torch.nn.functional.one_hot(labels, classes)[:, None] * depth
    return 3 * (right + 1.5 * torch.randn(rows, LAYERS, classes, generator=generator)), labels


def cross_entropy(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    scores = (logits.double() / temperature).log_softmax(-1)
    return -scores.gather(2, labels[:, None, None].expand(-1, LAYERS, 1)).squeeze(2).mean(0)


@pytest.mark.parametrize("classes", [2, 9])
def test_temperatures_have_the_least_cross_entropy(classes: int) -> None:
    logits, labels = outputs(200, classes)
    found = fit_temperatures(logits, labels)
    assert found.dtype == torch.float32
    assert len(set(found.tolist())) == LAYERS
    for layer, temperature in enumerate(found.tolist()):
        least = cross_entropy(logits, labels, temperature)[layer]
        for other in (0.99 * temperature, 1.01 * temperature, *torch.logspace(-1, 1, 15).tolist()):
            assert cross_entropy(logits, labels, other)[layer] >= least - 1e-9


def test_temperatures_of_layers_that_are_always_right_or_always_wrong() -> None:
    labels = torch.tensor([0, 1, 0, 1])
    right = torch.nn.functional.one_hot(labels, 2).float()
    logits = torch.stack([4 * right, -4 * right, 4 * right], dim=1)
    low, high = TEMPERATURES
    assert fit_temperatures(logits, labels).tolist() == pytest.approx([low, high, low], rel=1e-3)
    assert fit_temperatures(torch.zeros(4, LAYERS, 2), labels).isfinite().all()


def instances_of(rows: int, seed: int = 0) -> Instances:
    """The state says by one of its numbers whether an exit is right."""
    logits, labels = outputs(rows, 2, seed)
    correct = logits.argmax(-1) == labels[:, None]
    states = torch.randn(rows, LAYERS, WIDTH, generator=torch.Generator().manual_seed(seed + 1))
    states[..., 2] = correct.float() * 2 - 1
    return Instances(
        correct=correct,
        exit_cost=(~correct).float(),
        hardness=torch.zeros(rows),
        group=torch.arange(rows),
        states=states.half(),
        layer_logits=logits,
        labels=labels,
        targets={"learnt_to_exit": correct},
    )


def fits() -> dict[str, CriterionFit]:
    def fit_network(network: LearntToExit, states: Tensor, target: Tensor, *, rows: Tensor | None) -> object:
        how = {"epochs": 20, "min_steps": 1, "batch_size": 32, "learning_rate": 0.1, "weight_decay": 0.0}
        return fit_foretelling(network, states, target, rows=rows, seed=0, **how)

    return {
        "learnt_to_exit": foretelling("learnt_to_exit", lambda: LearntToExit(WIDTH), fit_network),
        "calibrated_confidence": temperature_calibration(),
        "expert_sum": accuracy_weights(),
    }


def test_a_row_is_scored_by_what_has_not_seen_it() -> None:
    """Each fold's scores are those of a fit on the rest alone; what is kept has seen all."""
    instances = instances_of(90)
    folds = [*group_folds(instances.group, 3, 0)]
    counted: list[None] = []
    found = fit_criteria(fits(), instances, folds, lambda: counted.append(None))
    assert len(counted) == 3 * (3 + 1)
    assert instances.layer_logits is not None
    assert instances.labels is not None
    for inside, outside in folds:
        temperatures = fit_temperatures(instances.layer_logits[inside], instances.labels[inside])
        wanted = calibrated_confidence_scores(instances.layer_logits[outside], temperatures)
        torch.testing.assert_close(found.scores["calibrated_confidence"][outside], wanted)
        accuracy = instances.correct[inside].float().mean(0).expand(len(outside), -1)
        wanted = expert_sum_scores(instances.layer_logits[outside], accuracy)
        torch.testing.assert_close(found.scores["expert_sum"][outside], wanted)
    torch.testing.assert_close(
        found.fitted["calibrated_confidence"], fit_temperatures(instances.layer_logits, instances.labels)
    )
    torch.testing.assert_close(found.fitted["expert_sum"], instances.correct.float().mean(0))
    says = found.scores["learnt_to_exit"]
    assert ((says > 0.5) == instances.correct).float().mean() > 0.9
    whole = found.fitted["learnt_to_exit"](instances.kept_states.float()).sigmoid().detach()
    assert not torch.equal(says, whole)
    assert float((says - whole).abs().mean()) < 0.1


def test_nothing_to_fit() -> None:
    instances = instances_of(9)
    assert fit_criteria({}, instances, group_folds(instances.group, 3, 0)).scores == {}
