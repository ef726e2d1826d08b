"""What criteria read beside predictions: NSP's share against its own formula, and which parts are asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from consistentee.heads.exit_signals import SIGNALS, ExitSignals, NullSpace
from consistentee.models.sequence_classification import EarlyExitForSequenceClassification
from tiny import fit_at_random, tiny_backbone

LAYERS = 3


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_backbone(tmp_path_factory.mktemp("signals"), layers=LAYERS)


def build(backbone: Path, classes: int, head: str = "attention") -> EarlyExitForSequenceClassification:
    torch.manual_seed(classes)
    model = EarlyExitForSequenceClassification.from_backbone(backbone, num_labels=classes, head=head).eval()
    with torch.no_grad():
        for module in model.classifiers.layers:
            getattr(module, "output", module).bias.normal_()
    return model


def projected(states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The paper's way, in the space of states: shift, project onto the span of the weights, compare lengths."""
    states, weight, bias = states.double(), weight.double(), bias.double()
    shifted = states + torch.linalg.pinv(weight) @ bias
    seen = shifted @ torch.linalg.pinv(weight) @ weight
    return (1 - seen.square().sum(-1) / shifted.square().sum(-1)).clamp_min(0).sqrt()


@pytest.mark.parametrize("head", ["attention", "shared_pooler"])
@pytest.mark.parametrize("classes", [2, 7])
@torch.no_grad()
def test_shares_are_those_of_a_projection(backbone: Path, classes: int, head: str) -> None:
    model = build(backbone, classes, head)
    states = torch.randn(20, LAYERS, 32).tanh()
    outputs = [getattr(module, "output", module) for module in model.classifiers.layers]
    logits = torch.stack([output(states[:, layer]) for layer, output in enumerate(outputs)], dim=1)
    found = NullSpace.of(model.classifiers).shares(logits, states.square().sum(-1))
    for layer, output in enumerate(outputs):
        wanted = projected(states[:, layer], output.weight, output.bias)
        torch.testing.assert_close(found[:, layer].double(), wanted, atol=1e-4, rtol=1e-4)
    one = NullSpace.of(model.classifiers).shares(logits[:, 1:2], states[:, 1:2].square().sum(-1), 1)
    torch.testing.assert_close(one, found[:, 1:2])


@torch.no_grad()
def test_a_state_that_the_weights_span_has_nothing_outside(backbone: Path) -> None:
    model = build(backbone, 3)
    output = model.classifiers.layers[0].output
    inside = torch.randn(5, 3) @ output.weight - torch.linalg.pinv(output.weight) @ output.bias
    logits = output(inside)[:, None].expand(-1, LAYERS, -1)
    found = NullSpace.of(model.classifiers).shares(
        logits, inside.square().sum(-1)[:, None].expand(-1, LAYERS)
    )
    assert float(found[:, 0].max()) < 2e-2  # the root of the last digits of float32


@torch.no_grad()
def test_layers_without_an_exit_are_told_and_have_no_weight(backbone: Path) -> None:
    model = build(backbone, 2)
    model.config.exit_layers = [2, 3]
    pooled, logits = torch.randn(4, LAYERS, 32), torch.randn(4, LAYERS, 2)
    found = model.exit_signals()(pooled, logits)
    assert found["has_exit"].tolist() == [[False, True, True]] * 4
    torch.testing.assert_close(found["layer_weights"], torch.tensor([[0.2, 0.3]]).expand(4, -1))
    one = model.exit_signals(("has_exit", "layer_weights"))(pooled[:, 1:2], logits[:, 1:2], 1)
    assert one["has_exit"].tolist() == [[True]] * 4
    torch.testing.assert_close(one["layer_weights"], torch.tensor([[0.2]]).expand(4, -1))


@torch.no_grad()
def test_only_what_is_asked_for_and_there_is_given(backbone: Path) -> None:
    model = build(backbone, 2)
    pooled, logits = torch.randn(4, LAYERS, 32), torch.randn(4, LAYERS, 2)
    unfitted = model.exit_signals()(pooled, logits)
    assert set(unfitted) == {"classifier_logits", "null_shares", "layer_weights"}
    torch.testing.assert_close(unfitted["layer_weights"], torch.tensor([[0.1, 0.2, 0.3]]).expand(4, -1))
    fit_at_random(model)
    everything = model.exit_signals()(pooled, logits)
    assert tuple(everything) == tuple(name for name in SIGNALS if name != "has_exit")
    for name in everything:
        signals = model.exit_signals(("logits", name))
        assert signals.reads == (name,)
        assert signals.reads_pooled == (name in ("right_probs", "null_shares"))
        for found in (signals(pooled, logits), signals.on_host()(pooled, logits)):
            assert set(found) == {name}
            torch.testing.assert_close(found[name], everything[name])
        here = signals(pooled[:, 2:], logits[:, 2:], 2)
        from_first = name == "layer_weights"
        torch.testing.assert_close(here[name], everything[name] if from_first else everything[name][:, 2:])
    assert not model.exit_signals(("exit_probs",)).reads
    assert isinstance(model.exit_signals(), ExitSignals)
