"""Exit scores layer by layer equal those that see all layers at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from consistentee.functional import exits
from consistentee.functional.criteria import CRITERIA, EXIT_CRITERIA, exit_scores
from consistentee.functional.exits import ensemble_layers
from consistentee.heads.policy import exit_feature_map
from consistentee.inference.encoder.incremental_scores import (
    ExitHistory,
    IncrementalExitScores,
    gelu,
    host_log_odds,
)
from consistentee.models.sequence_classification import EarlyExitForSequenceClassification
from tiny import fit_at_random, tiny_backbone, unsettle

LAYERS = 5


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_backbone(tmp_path_factory.mktemp("scores"), layers=LAYERS)


def build(backbone: Path, classes: int, **values: object) -> EarlyExitForSequenceClassification:
    model = EarlyExitForSequenceClassification.from_backbone(backbone, num_labels=classes, **values).eval()
    unsettle(model)
    with torch.no_grad():
        model.policy.exit_bias.normal_()
        if model.policy.reads_log_odds:
            model.policy.confidence_weight.fill_(0.3)
        if model.policy.reads_signals:
            model.policy.signal_output.bias.fill_(0.2)
    fit_at_random(model)
    return model


def scores_of(model: EarlyExitForSequenceClassification, criterion: str) -> IncrementalExitScores:
    config = model.config
    return IncrementalExitScores(
        criterion,
        model.policy,
        num_classes=config.num_classes,
        ensemble_decay=config.ensemble_decay,
        signals=model.exit_signals(EXIT_CRITERIA[criterion].reads),
    )


def exit_features(
    model: EarlyExitForSequenceClassification, layer: int, pooled: torch.Tensor, logits: torch.Tensor
) -> NDArray[np.float32]:
    """Given logits in place of the classifier's own, beside what the policy reads, and the states."""
    weight, bias = exit_feature_map(model.classifiers, model.policy, layer)
    found = torch.nn.functional.linear(pooled, weight, bias)
    found[:, : logits.shape[1]] = logits
    return torch.cat([found, pooled], dim=1).numpy()


@pytest.mark.parametrize("classes", [2, 7])
@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize(
    "criterion,policy_input",
    [
        *(
            (criterion, policy_input)
            for criterion in ("policy", "quantile")
            for policy_input in ("state", "log_odds", "state+log_odds", "state+signals")
        ),
        *((name, "log_odds") for name in CRITERIA if name not in ("policy", "quantile")),
    ],
)
@torch.no_grad()
def test_step_by_step_as_all_at_once(
    backbone: Path, classes: int, decay: float, criterion: str, policy_input: str
) -> None:
    model = build(backbone, classes, ensemble_decay=decay, policy_input=policy_input)
    for rows in (1, 6, 50):
        pooled = torch.randn(rows, LAYERS, 32)
        logits = 3 * torch.randn(rows, LAYERS, classes)
        logits[0, 2:] = logits[0, 1] * 8  # a run of one class, sure to the last digit of float32
        layer_logits = ensemble_layers(logits, decay)
        exit_probs = model.exit_logits(pooled, layer_logits).sigmoid()
        wanted = exit_scores(criterion, layer_logits, exit_probs, **model.exit_signals()(pooled, logits))
        scores = scores_of(model, criterion)
        history = scores.begin(rows)
        for layer in range(LAYERS):
            found = scores.step(history, exit_features(model, layer, pooled[:, layer], logits[:, layer]))
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, wanted[:, layer].numpy(), rtol=1e-4, atol=2e-5)
            np.testing.assert_allclose(history.prediction_logits, layer_logits[:, layer].numpy(), atol=1e-5)
        assert history.layers == LAYERS


@pytest.mark.parametrize("policy_input", ["state+log_odds", "state+signals"])
@pytest.mark.parametrize("criterion", CRITERIA)
@torch.no_grad()
def test_rows_that_exit_and_rows_that_join_take_their_history_along(
    backbone: Path, policy_input: str, criterion: str
) -> None:
    model = build(backbone, 3, policy_input=policy_input)
    pooled, logits = torch.randn(7, LAYERS, 32), 2 * torch.randn(7, LAYERS, 3)
    layer_logits = ensemble_layers(logits, 0.5)
    exit_probs = model.exit_logits(pooled, layer_logits).sigmoid()
    signals = model.exit_signals()(pooled, logits)
    wanted = exit_scores(criterion, layer_logits, exit_probs, **signals).numpy()
    scores = scores_of(model, criterion)

    def pass_layers(rows: list[int], first: int, last: int, history: ExitHistory) -> None:
        for layer in range(first, last):
            found = scores.step(
                history, exit_features(model, layer, pooled[rows, layer], logits[rows, layer])
            )
            np.testing.assert_allclose(found, wanted[rows, layer], rtol=1e-4, atol=2e-5)

    one, other = scores.begin(4), scores.begin(3)
    pass_layers([0, 1, 2, 3], 0, 2, one)
    pass_layers([4, 5, 6], 0, 2, other)
    joined = ExitHistory.merge([one.select([1, 3]), other.select([2])])
    assert joined.layers == 2
    pass_layers([1, 3, 6], 2, LAYERS, joined)
    alone = one.select([0])
    pass_layers([0], 2, LAYERS, alone)


def test_extreme_logits_give_finite_scores(backbone: Path) -> None:
    model = build(backbone, 2, policy_input="log_odds")
    for rows in (1, 3):
        scores = scores_of(model, "policy")
        history = scores.begin(rows)
        for value in (1e4, -1e4, 0.0):
            logits = torch.tensor([[value, -value]]).repeat(rows, 1)
            assert np.isfinite(scores.step(history, logits.numpy())).all()


def test_gelu_is_torchs() -> None:
    values = torch.linspace(-12, 12, 4801)
    found = gelu(values.numpy())
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, torch.nn.functional.gelu(values.double()).numpy(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("classes", [2, 20])
@pytest.mark.parametrize("scale", [0.1, 3.0, 12.0, 500.0])
def test_log_odds_are_those_that_the_policy_learnt_from(classes: int, scale: float) -> None:
    logits = scale * torch.randn(2000, classes)
    expected = exits.log_odds(logits)
    probability = logits.double().softmax(-1).amax(-1)
    # Of a probability next to 1 float32 has a few digits left of what is missing, here as there.
    allowed = 1e-4 + 4 * torch.finfo(torch.float32).eps / (1 - probability).clamp_min(1e-7)
    found = torch.from_numpy(host_log_odds(logits.numpy()))
    assert found.dtype == torch.float32
    assert bool(((found - expected).abs() <= allowed).all())


def test_log_odds_of_equal_and_of_hopeless_classes() -> None:
    logits = np.array([[0.0, 0.0], [1e30, -1e30], [-80.0, 0.0], [5.0, 5.0]], dtype=np.float32)
    assert host_log_odds(logits).tolist() == [0.0, 10.0, 10.0, 0.0]
