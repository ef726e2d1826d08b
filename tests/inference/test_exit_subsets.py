"""Exits on some layers alone: every way to run agrees with computing all layers and looking at those that have one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_packed_layers import build
from torch import Tensor

from consistentee.functional.criteria import CRITERIA, EXIT_CRITERIA, exit_scores
from consistentee.functional.exits import choose_exit_layer, ensemble_layers
from consistentee.inference.encoder.layer_pool import LayerPool, PoolRow
from consistentee.inference.encoder.scheduler import ExitRule
from consistentee.models.loaded import LoadedClassifier
from consistentee.models.sequence_classification import EarlyExitForSequenceClassification
from consistentee.pipelines.classifier import Engine
from consistentee.pipelines.layer_views import view_layers
from tiny import fit_at_random

SUBSETS = ([2, 4], [1, 3, 4])
LAYER_SIGNALS = ("classifier_logits", "temperatures", "layer_weights", "right_probs", "null_shares")


@pytest.fixture
def model(tmp_path: Path) -> Any:
    model: Any = build(tmp_path, "bert", ensemble_decay=0.5)
    fit_at_random(model)
    return model


def rows_of(count: int, seed: int = 0) -> list[dict[str, list[int]]]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 21, count)
    return [{"input_ids": rng.integers(4, 60, length).tolist()} for length in lengths]


def tensors_of(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        count = len(row["input_ids"])
        ids[place, :count], mask[place, :count] = torch.tensor(row["input_ids"]), 1
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def by_hand(model: Any, rows: Any, criterion: str, subset: list[int]) -> tuple[Tensor, Tensor]:
    """Predictions (rows, exits, classes) and scores (rows, exits) of a model that has these exits and no others.

    Every layer's classifier and state from a model with all exits; of these the columns of the subset, as if they were
    all layers there are.
    """
    assert model.config.exit_layers is None
    output = model(**tensors_of(rows), criterion="static", threshold=99.0, all_layers=True)
    columns = [layer - 1 for layer in subset]
    logits = ensemble_layers(output.classifier_logits[:, columns], model.config.ensemble_decay)
    features = model.policy.features(logits)
    probs = torch.cat(
        [
            model.policy(output.pooled[:, [c]], None if features is None else features[:, [place]], c)
            for place, c in enumerate(columns)
        ],
        dim=1,
    ).sigmoid()
    signals = model.exit_signals(LAYER_SIGNALS)(output.pooled, output.classifier_logits)
    signals = {name: value[:, columns] for name, value in signals.items()}
    layers = torch.tensor(subset).expand(len(rows), -1)
    return logits, exit_scores(criterion, logits, probs, layers=layers, **signals)


def expected(
    model: Any, rows: Any, criterion: str, subset: list[int], threshold: float | None = None
) -> tuple[float, list[int], Tensor]:
    """A threshold, exit layers and logits there."""
    logits, scores = by_hand(model, rows, criterion, subset)
    if threshold is None:
        found = scores.flatten().unique()
        middle = (len(found) - 1) // 2
        threshold = float(found[middle : middle + 2].mean())  # between two scores
    place = choose_exit_layer(scores, threshold) - 1
    chosen = logits.gather(1, place[:, None, None].expand(-1, 1, logits.shape[2])).squeeze(1)
    return threshold, [subset[p] for p in place.tolist()], chosen


@pytest.mark.parametrize("criterion", CRITERIA)
def test_all_ways_agree(model: Any, criterion: str) -> None:
    rows = rows_of(20)
    some_exit_early = False
    for subset in (*SUBSETS, *([[4], [1, 2, 3, 4]] if criterion == "policy" else [])):
        model.config.exit_layers = None
        fixed = 2.0 if criterion == "static" else None
        threshold, layers, logits = expected(model, rows, criterion, subset, fixed)
        some_exit_early |= min(layers) < 4
        model.config.exit_layers = subset
        with torch.no_grad():
            for all_layers in (True, False):
                output = model(
                    **tensors_of(rows), criterion=criterion, threshold=threshold, all_layers=all_layers
                )
                assert output.exit_layer.tolist() == layers
                torch.testing.assert_close(output.logits, logits, rtol=1e-4, atol=1e-5)
        engine = Engine(LoadedClassifier(model, None, {}, "tiny"))
        rule = ExitRule(criterion, threshold)
        for batch_size in (None, 1, 8):
            answers = engine.run(rows, batch_size=batch_size, rule=rule)
            assert answers.exit_layers == layers
            assert answers.labels == logits.argmax(1).tolist()
        pool = LayerPool(engine.backend, model.config.num_classes)
        pool.add([PoolRow(i, row, threshold) for i, row in enumerate(rows)], engine.exit_scores(rule))
        found: dict[Any, int] = {}
        while len(pool):
            found |= {answer.key: answer.exit_layer for answer in pool.step()[0]}
        assert [found[i] for i in range(len(rows))] == layers
    assert some_exit_early


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_graph_agrees(model: Any, criterion: str) -> None:
    pytest.importorskip("onnxruntime")
    from test_onnx_exits import graph_of, session_of

    rows = rows_of(20)
    feed = {name: values.numpy() for name, values in tensors_of(rows).items()}
    if model.config.backbone_config.type_vocab_size > 1:
        feed["token_type_ids"] = np.zeros_like(feed["input_ids"])
    for subset in SUBSETS:
        model.config.exit_layers = None
        fixed = 2.0 if criterion == "static" else None
        threshold, layers, logits = expected(model, rows, criterion, subset, fixed)
        model.config.exit_layers = subset
        proto = graph_of(model, criterion, threshold)
        found, exits = (np.asarray(value) for value in session_of(proto).run(None, feed))
        assert exits.tolist() == layers
        np.testing.assert_allclose(found, logits.numpy(), atol=2e-4, rtol=1e-3)


def test_a_dropped_exit_is_not_computed(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.config.exit_layers = [2, 4]
    engine = Engine(LoadedClassifier(model, None, {}, "tiny"))
    seen: list[int] = []
    classify = engine.backend.classify

    def counted(layer_index: int, *arguments: Any, **options: Any) -> Tensor:
        seen.append(layer_index)
        return classify(layer_index, *arguments, **options)

    monkeypatch.setattr(engine.backend, "classify", counted)
    engine.run(rows_of(3), batch_size=3, rule=ExitRule("policy", 0.999999))
    assert seen == [1, 3]
    assert [view.layer for view in view_layers(engine, rows_of(1)[0], "confidence")] == [2, 4]


def test_fixed_exits_must_be_there(model: Any) -> None:
    model.config.exit_layers = [2, 4]
    engine = Engine(LoadedClassifier(model, None, {}, "tiny"))
    with pytest.raises(ValueError, match=r"exit_layers must be among \[2, 4\], which have an exit, got 3"):
        engine.run(rows_of(1), batch_size=1, rule=ExitRule.fixed([3]))
    assert engine.run(rows_of(1), batch_size=1, rule=ExitRule.fixed([2])).exit_layers == [2]


def test_scores_without_exits_are_below_every_threshold(model: Any) -> None:
    model.config.exit_layers = [3, 4]
    with torch.no_grad():
        output = model(**tensors_of(rows_of(8)), all_layers=True)
    assert (output.exit_probs[:, :2] == 0).all()
    for criterion in CRITERIA:
        signals = model.exit_signals((*EXIT_CRITERIA[criterion].reads, "has_exit"))
        found = signals(output.pooled, output.classifier_logits)
        scores = exit_scores(criterion, output.layer_logits, output.exit_probs, **found)
        assert (scores[:, :2] < EXIT_CRITERIA[criterion].thresholds.low).all()


@pytest.mark.parametrize("wrong", [[], [1, 2], [0, 4], [3, 2, 4], [2, 2, 4], [2, 5]])
def test_wrong_layers(model: Any, wrong: list[int]) -> None:
    values = {**model.config.to_dict(), "exit_layers": wrong}
    with pytest.raises(
        ValueError, match="exit_layers must be rising numbers of layers from 1 on, 4, the last"
    ):
        type(model.config)(**values)


def test_wrong_layers_beside_a_folder_and_set_later(model: Any, tmp_path: Path) -> None:
    """Nothing would be written for rows that reach the last layer without an exit there."""
    model.save_pretrained(tmp_path)
    message = "exit_layers must be rising numbers of layers from 1 on, 4, the last"
    with pytest.raises(ValueError, match=message):
        EarlyExitForSequenceClassification.from_pretrained(tmp_path, exit_layers=[2])
    with pytest.raises(ValueError, match=r"ensemble_decay must be in \[0, 1\), got 2.0"):
        EarlyExitForSequenceClassification.from_pretrained(tmp_path, ensemble_decay=2.0)
    changed = EarlyExitForSequenceClassification.from_pretrained(tmp_path, exit_layers=[2, 4])
    assert changed.config.has_exit == [False, True, False, True]
    changed.config.exit_layers = [2]
    with pytest.raises(ValueError, match=message):
        changed(torch.tensor([[5, 6, 7]]))
