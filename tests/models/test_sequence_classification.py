"""The models: running with exits against running all layers and choosing, saving, Auto classes, pipelines."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, pipeline

import tiny
from consistentee.backbones import encoders as backbones
from consistentee.backbones.encoders import SUPPORTED_MODEL_TYPES
from consistentee.functional.criteria import CRITERIA, EXIT_CRITERIA, exit_scores
from consistentee.functional.exits import choose_exit_layer, ensemble_layers, ensemble_step
from consistentee.functional.losses import layer_losses, weighted_sum_loss
from consistentee.models.configuration import EarlyExitConfig, FullDepthConfig
from consistentee.models.sequence_classification import (
    EarlyExitForSequenceClassification,
    FullDepthForSequenceClassification,
)

LAYERS = 4
LABELS = ("bad", "so-so", "good")
EVERY_TYPE = pytest.mark.parametrize("model_type", SUPPORTED_MODEL_TYPES)
TEXTS = [texts[0] for texts in tiny.tiny_dataset(5).texts] + ["fine", "a very very dull and bland plot of it"]

Build = Callable[..., EarlyExitForSequenceClassification]


@pytest.fixture(scope="module")
def backbone_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """One random encoder of each type, made when it is first asked for."""
    folders: dict[str, Path] = {}

    def folder(model_type: str = "bert") -> Path:
        if model_type not in folders:
            path = tmp_path_factory.mktemp(model_type)
            folders[model_type] = tiny.tiny_backbone(path, model_type, layers=LAYERS)
        return folders[model_type]

    return folder


@pytest.fixture
def build(backbone_folder: Callable[[str], Path]) -> Build:
    """A model with random heads whose classifiers disagree and whose policy is undecided."""

    def build(model_type: str = "bert", **config_values: Any) -> EarlyExitForSequenceClassification:
        values = {"label_names": LABELS, "initial_exit_bias": 0.0, **config_values}
        model = EarlyExitForSequenceClassification.from_backbone(backbone_folder(model_type), **values).eval()
        tiny.unsettle(model)
        with torch.no_grad():
            for parameter in (*model.classifiers.layers.parameters(), *model.policy.parameters()):
                parameter.mul_(2)
        tiny.fit_at_random(model)
        return model

    return build


def batch_of(texts: list[str], model_type: str = "bert") -> dict[str, Tensor]:
    batch = tiny.tiny_tokenizer(model_type)(texts, padding=True, return_tensors="pt")
    return dict(batch)


def mixed_threshold(scores: Tensor, criterion: str) -> float:
    """A threshold that lets some leave early and keeps some, away from every score."""
    if EXIT_CRITERIA[criterion].thresholds.layers:
        return 1.5
    early = scores[:, :-1].flatten().sort().values
    middle = early[len(early) // 2 : -len(early) // 5]
    gap = int(middle.diff().argmax())
    return float(middle[gap] + middle[gap + 1]) / 2


def row_by_row(
    model: EarlyExitForSequenceClassification,
    texts: list[str],
    criterion: str,
    threshold: float,
    model_type: str,
) -> tuple[Tensor, Tensor]:
    """The slow oracle: one text at a time, without padding, Hugging Face's layers, every head; then choose."""
    logits_rows, layers = [], []
    for text in texts:
        batch = batch_of([text], model_type)
        mask = batch["attention_mask"]
        states = model.backbone(**batch, output_hidden_states=True)
        hidden = [*states.hidden_states[1:-1], states.last_hidden_state]
        pooled, logits = zip(*(model.classifiers(i, h, mask) for i, h in enumerate(hidden)), strict=True)
        layer_logits = ensemble_layers(torch.stack(logits, dim=1), model.config.ensemble_decay)
        states, own = torch.stack(pooled, dim=1), torch.stack(logits, dim=1)
        exit_probs = model.exit_logits(states, layer_logits).sigmoid()
        signals = model.exit_signals()(states, own)
        scores = exit_scores(criterion, layer_logits, exit_probs, **signals)[0].tolist()
        layer = next((t for t, score in enumerate(scores, start=1) if score > threshold), LAYERS)
        logits_rows.append(layer_logits[0, layer - 1])
        layers.append(layer)
    return torch.stack(logits_rows), torch.tensor(layers)


# --- Exits ---


@EVERY_TYPE
@torch.no_grad()
def test_leaving_early_agrees_with_running_all_layers_and_choosing(model_type: str, build: Build):
    model = build(model_type)
    batch = batch_of(TEXTS, model_type)
    everything = model(**batch, threshold=0.5, all_layers=True)
    assert len(set(batch["attention_mask"].sum(1).tolist())) > 2  # unequal lengths, padded
    kinds = set()
    for criterion in CRITERIA:
        signals = model.exit_signals()(everything.pooled, everything.classifier_logits)
        scores = exit_scores(criterion, everything.layer_logits, everything.exit_probs, **signals)
        mixed = mixed_threshold(scores, criterion)
        known = EXIT_CRITERIA[criterion].thresholds
        ends = (known.low + 0.5, LAYERS + 0.5) if known.layers else (known.low, known.high)
        for threshold in (mixed, *ends):
            expected_layers = choose_exit_layer(scores, threshold)
            expected = everything.layer_logits[torch.arange(len(TEXTS)), expected_layers - 1]
            kinds.add(tuple(sorted(set(expected_layers.tolist()))))
            options = {"criterion": criterion, "threshold": threshold}

            output = model(**batch, **options)
            assert torch.equal(output.exit_layer, expected_layers)
            torch.testing.assert_close(output.logits, expected, atol=1e-5, rtol=1e-4)

            chosen = model(**batch, **options, all_layers=True)
            assert torch.equal(chosen.exit_layer, expected_layers)
            assert torch.equal(chosen.logits, expected)

            one = model(**{name: value[3:4] for name, value in batch.items()}, **options)
            assert torch.equal(one.exit_layer, expected_layers[3:4])
            torch.testing.assert_close(one.logits, expected[3:4], atol=1e-5, rtol=1e-4)
    assert {(1,), (LAYERS,)} <= kinds  # all leave at once, none leaves early,
    assert max(map(len, kinds)) > 1  # and some of each


@EVERY_TYPE
@torch.no_grad()
def test_leaving_early_agrees_with_hugging_face_row_by_row(model_type: str, build: Build):
    model = build(model_type)
    probs = model(**batch_of(TEXTS, model_type), threshold=0.5, all_layers=True).exit_probs
    threshold = mixed_threshold(probs, "policy")
    logits, layers = row_by_row(model, TEXTS, "policy", threshold, model_type)
    output = model(**batch_of(TEXTS, model_type), threshold=threshold)
    assert torch.equal(output.exit_layer, layers)
    torch.testing.assert_close(output.logits, logits, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "policy_input, head, decay",
    [
        ("state", "shared_pooler", 0.0),  # the paper's
        ("log_odds", "attention", 0.5),
        ("state+log_odds", "attention", 0.9),
        ("state+signals", "shared_pooler", 0.5),
    ],
)
@torch.no_grad()
def test_every_kind_of_head_and_policy_agrees_with_the_oracle(
    policy_input: str, head: str, decay: float, build: Build
):
    model = build(policy_input=policy_input, head=head, ensemble_decay=decay)
    everything = model(**batch_of(TEXTS), threshold=0.5, all_layers=True)
    for criterion in CRITERIA:
        signals = model.exit_signals()(everything.pooled, everything.classifier_logits)
        scores = exit_scores(criterion, everything.layer_logits, everything.exit_probs, **signals)
        threshold = mixed_threshold(scores, criterion)
        logits, layers = row_by_row(model, TEXTS, criterion, threshold, "bert")
        output = model(**batch_of(TEXTS), criterion=criterion, threshold=threshold)
        assert torch.equal(output.exit_layer, layers)
        torch.testing.assert_close(output.logits, logits, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_rows_that_have_left_are_not_computed(build: Build, monkeypatch: pytest.MonkeyPatch):
    model = build()
    batch = batch_of(TEXTS)
    probs = model(**batch, all_layers=True, threshold=0.5).exit_probs
    computed = count_rows(monkeypatch)
    output = model(**batch, threshold=mixed_threshold(probs, "policy"))
    inside = [int((output.exit_layer >= layer).sum()) for layer in range(1, LAYERS + 1)]
    assert 0 < inside[1] < inside[0]
    assert computed == [rows for rows in inside if rows]  # once all have left, no layer runs
    computed.clear()
    model(**batch, threshold=0.0)
    assert computed == [len(TEXTS)]  # all left after the first layer: the others do not run


@torch.no_grad()
def test_results_stay_in_the_inputs_order(build: Build):
    model = build()
    threshold = mixed_threshold(model(**batch_of(TEXTS), all_layers=True, threshold=0.5).exit_probs, "policy")
    whole = model(**batch_of(TEXTS), threshold=threshold)
    order = [4, 0, 2, 6, 1, 3, 5]
    shuffled = model(**batch_of([TEXTS[i] for i in order]), threshold=threshold)
    assert torch.equal(shuffled.exit_layer, whole.exit_layer[order])
    torch.testing.assert_close(shuffled.logits, whole.logits[order], atol=1e-5, rtol=1e-4)


def count_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count how many rows each call of a layer computes."""
    rows: list[int] = []
    run_layer = backbones.run_layer

    def counting(backbone: Any, layer_index: int, state: backbones.EncoderState) -> backbones.EncoderState:
        rows.append(len(state.hidden_states))
        return run_layer(backbone, layer_index, state)

    monkeypatch.setattr(backbones, "run_layer", counting)
    return rows


# --- Forward ---


def test_training_mode_runs_all_layers(build: Build):
    model = build()
    batch = batch_of(TEXTS)
    assert model.train()(**batch).layer_logits.shape == (7, LAYERS, 3)
    output = model.eval()(**batch)
    assert output.layer_logits is None
    assert output.logits.shape == (7, 3)
    everything = model(**batch, all_layers=True)
    assert everything.classifier_logits.shape == (7, LAYERS, 3)
    assert everything.pooled.shape == (7, LAYERS, 32)
    assert everything.exit_probs.shape == (7, LAYERS)
    assert model.train()(**batch, all_layers=False).layer_logits is None


def test_labels_count_alike_on_every_path(build: Build, backbone_folder: Callable[[str], Path]):
    """One a row, in a column as well; rows with -100 count for nothing."""
    model, batch, labels = build(), batch_of(TEXTS), torch.arange(7) % 3
    plain = FullDepthForSequenceClassification.from_backbone(backbone_folder("bert"), num_labels=3)
    paths = (
        lambda labels, **rows: model(**rows, labels=labels, all_layers=True).loss,
        lambda labels, **rows: model(**rows, labels=labels).loss,
        lambda labels, **rows: plain(**rows, labels=labels).loss,
    )
    some = labels.clone()
    some[2:4] = -100
    counted = some != -100
    for loss in paths:
        expected = loss(labels, **batch)
        for given in (labels[:, None], labels.int()):
            assert torch.equal(loss(given, **batch), expected)
        kept = {name: value[counted] for name, value in batch.items()}
        torch.testing.assert_close(loss(some, **batch), loss(labels[counted], **kept))
        assert loss(torch.full((7,), -100), **batch).isnan()
        for given, got in ((labels[:2], r"\(2,\)"), (torch.zeros(7, 3), r"\(7, 3\) of torch.float32")):
            with pytest.raises(
                ValueError, match=f"labels must be a class for each of the 7 inputs, .*got {got}"
            ):
                loss(given, **batch)


def test_labels_give_a_loss(build: Build):
    model = build()
    batch, labels = batch_of(TEXTS), torch.arange(7) % 3
    everything = model(**batch, labels=labels, all_layers=True)
    expected = weighted_sum_loss(layer_losses(everything.classifier_logits, labels)).mean()
    torch.testing.assert_close(everything.loss, expected)
    output = model(**batch, labels=labels)
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(output.logits, labels))
    assert model(**batch).loss is None


def test_the_loss_reaches_backbone_and_classifiers_but_not_the_policy(build: Build):
    model = build().train()
    model(**batch_of(TEXTS), labels=torch.arange(7) % 3).loss.backward()
    missing = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is None}
    assert missing == {"policy", "learnt_to_exit"}  # both are fitted afterwards, on finished exits
    assert all(p.grad is None for part in missing for p in getattr(model, part).parameters())


def test_return_dict_false_gives_a_tuple(build: Build):
    model = build()
    logits, exit_layer = model(**batch_of(TEXTS), return_dict=False)
    assert logits.shape == (7, 3)
    assert exit_layer.dtype == torch.int64


def test_the_configuration_says_what_is_returned(build: Build, tmp_path: Path):
    """As of Hugging Face's models; an argument wins."""
    build().save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, return_dict=False).eval()
    assert isinstance(model(**batch_of(TEXTS)), tuple)
    assert model(**batch_of(TEXTS), return_dict=True).logits.shape == (7, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_nothing(build: Build, dtype: torch.dtype):
    model = build()
    expected = model(**batch_of(TEXTS))
    torch.set_default_dtype(dtype)
    try:
        found = model(**batch_of(TEXTS))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.exit_layer, expected.exit_layer)


@EVERY_TYPE
def test_layers_can_be_computed_again_in_the_backward_pass(build: Build, model_type: str):
    """`gradient_checkpointing` of transformers' `Trainer`, where the backbone knows it."""
    gradients: list[dict[str, Tensor]] = []
    for checkpointed in (False, True):
        torch.manual_seed(1)
        model: Any = build(model_type, head_dropout=0.0).train()
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        assert model.supports_gradient_checkpointing == (model_type not in ("albert", "mpnet"))
        if checkpointed and not model.supports_gradient_checkpointing:
            with pytest.raises(ValueError, match="does not support"):
                enable()
            return
        if checkpointed:
            enable()
        model(**batch_of(TEXTS), labels=torch.arange(7) % 3).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_a_missing_attention_mask_means_every_token_is_real(build: Build):
    model = build()
    batch = batch_of(["a fine film"])
    torch.testing.assert_close(model(batch["input_ids"]).logits, model(**batch).logits)


def test_a_threshold_that_does_not_fit_is_an_error(build: Build):
    model, batch = build(), batch_of(["fine"])
    with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\] for policy, got 1.3"):
        model(**batch, threshold=1.3)
    with pytest.raises(ValueError, match="threshold must be above 0 for patience"):
        model(**batch, threshold=0, criterion="patience")
    with pytest.raises(
        ValueError, match=r'criterion "entropy" has no saved threshold. Give one with threshold=.'
    ):
        model(**batch, criterion="entropy")
    with pytest.raises(ValueError, match=r'criterion must be one of policy, .*, got "luck"'):
        model(**batch, criterion="luck", threshold=0.5)


def test_the_saved_rule_is_used_and_can_be_replaced(build: Build):
    model = build(threshold=0.7, criterion="confidence")
    assert model.criterion_and_threshold(None, None) == ("confidence", 0.7)
    assert model.criterion_and_threshold(None, 0.9) == ("confidence", 0.9)
    assert model.criterion_and_threshold("patience", 3) == ("patience", 3.0)
    batch = batch_of(TEXTS)
    saved, same = model(**batch), model(**batch, criterion="confidence", threshold=0.7)
    assert torch.equal(saved.exit_layer, same.exit_layer)


# --- Ensemble ---


def test_ensemble_by_hand():
    logits = torch.tensor([[[0.9, 0.1], [0.5, 0.5], [0.2, 0.8]]]).log()
    layers = ensemble_layers(logits, 0.5)[0]
    torch.testing.assert_close(layers[0], logits[0, 0])
    torch.testing.assert_close(layers[1], 0.5 * logits[0, 0] + 0.5 * logits[0, 1])
    torch.testing.assert_close(layers[2], 0.25 * logits[0, 0] + 0.25 * logits[0, 1] + 0.5 * logits[0, 2])


def test_without_decay_every_layer_speaks_for_itself():
    logits = torch.randn(3, 4, 2)
    assert torch.equal(ensemble_layers(logits, 0.0), logits)


def test_ensemble_of_a_prefix_is_the_prefix_of_the_ensemble():
    logits = torch.randn(3, 4, 2)
    running = None
    for layer in range(4):
        running = ensemble_step(running, logits[:, layer], 0.7)
        torch.testing.assert_close(running, ensemble_layers(logits, 0.7)[:, layer])


# --- Making a model ---


def test_from_backbone_takes_the_backbones_weights_and_suits_its_pooling(
    backbone_folder: Callable[[str], Path],
):
    weights = load_file(backbone_folder("bert") / "model.safetensors")
    model = EarlyExitForSequenceClassification.from_backbone(backbone_folder("bert"), num_labels=2)
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, weights[name]), name
    assert model.config.pooling == "cls"
    assert model.config.num_hidden_layers == model.num_layers == LAYERS
    mpnet = EarlyExitForSequenceClassification.from_backbone(backbone_folder("mpnet"), num_labels=2)
    assert mpnet.config.pooling == "mean"
    chosen = EarlyExitForSequenceClassification.from_backbone(
        backbone_folder("mpnet"), num_labels=2, pooling="cls"
    )
    assert chosen.config.pooling == "cls"


@pytest.mark.parametrize(
    "model_class", [EarlyExitForSequenceClassification, FullDepthForSequenceClassification]
)
@pytest.mark.parametrize(
    "values, message",
    [
        ({}, "num_labels or label_names must be given, got neither"),
        ({"num_labels": 1}, "num_labels must be at least 2, got 1"),
        ({"label_names": ("only",)}, "num_labels must be at least 2, got 1"),
        (
            {"num_labels": 3, "label_names": ("a", "b")},
            "num_labels must equal the number of label_names, got 3 and 2",
        ),
        ({"num_labels": 2, "head": "linear"}, 'head must be one of attention, shared_pooler, got "linear"'),
        ({"num_labels": 2, "pooling": "max"}, 'pooling must be one of cls, mean, got "max"'),
        ({"num_labels": 2, "num_queries": 0}, "num_queries must be at least 1, got 0"),
        ({"num_labels": 2, "classifier_hidden_size": 0}, "classifier_hidden_size must be at least 1"),
        ({"num_labels": 2, "head_dropout": 1.0}, r"head_dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_wrong_values_are_named(
    model_class: Any, values: dict[str, Any], message: str, backbone_folder: Callable[[str], Path]
):
    with pytest.raises(ValueError, match=message):
        model_class.from_backbone(backbone_folder("bert"), **values)


@pytest.mark.parametrize(
    "values, message",
    [
        (
            {"policy_input": "logits"},
            r'policy_input must be one of state, log_odds, state\+log_odds, signals, state\+signals, got "logits"',
        ),
        ({"criterion": "luck"}, 'criterion must be one of policy, .*, static, got "luck"'),
        ({"num_labels": 1}, "num_labels must be at least 2, got 1"),
        ({"ensemble_decay": 1.0}, r"ensemble_decay must be in \[0, 1\), got 1.0"),
        ({"policy_dropout": -0.1}, r"policy_dropout must be in \[0, 1\), got -0.1"),
    ],
)
def test_wrong_values_of_early_exit_are_named(values: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        EarlyExitConfig(encoder_config={"model_type": "bert"}, **values)


# --- Saving ---


@EVERY_TYPE
@torch.no_grad()
def test_a_saved_model_comes_back_bit_for_bit(model_type: str, build: Build, tmp_path: Path):
    model = build(model_type, threshold=0.62, task="mrpc", max_length=48)
    tiny.save(model, tiny.tiny_tokenizer(model_type), tmp_path)
    loaded = EarlyExitForSequenceClassification.from_pretrained(tmp_path)
    assert not loaded.training
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    buffers = dict(loaded.named_buffers())
    assert [name for name, value in model.named_buffers() if not torch.equal(value, buffers[name])] == []
    batch = batch_of(TEXTS, model_type)
    for all_layers in (False, True):
        expected, got = model(**batch, all_layers=all_layers), loaded(**batch, all_layers=all_layers)
        assert expected.keys() == got.keys()
        # Not bit for bit: weights may lie elsewhere in memory, and BLAS sums in another order there.
        torch.testing.assert_close(dict(got), dict(expected), rtol=1e-5, atol=1e-6)
    assert loaded.config.id2label == dict(enumerate(LABELS))
    assert loaded.config.label2id == {name: index for index, name in enumerate(LABELS)}
    assert loaded.config.encoder_config.model_type == model_type
    assert (loaded.config.threshold, loaded.config.criterion) == (0.62, "policy")
    assert (loaded.config.task, loaded.config.max_length) == ("mrpc", 48)


def test_the_saved_folder_holds_safetensors_and_nothing_that_can_run(build: Build, tmp_path: Path):
    tiny.save(build(), tiny.tiny_tokenizer(), tmp_path)
    suffixes = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert ".safetensors" in suffixes
    assert suffixes <= {".safetensors", ".json", ".txt"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "consistentee"
    assert "auto_map" not in config


@pytest.mark.parametrize("head", ["attention", "shared_pooler"])
def test_auto_classes_open_the_folder(head: str, build: Build, tmp_path: Path):
    model = build(head=head, policy_input="state", ensemble_decay=0.25, threshold=0.3)
    tiny.save(model, tiny.tiny_tokenizer(), tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, EarlyExitConfig)
    assert (config.head, config.policy_input, config.ensemble_decay) == (head, "state", 0.25)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert isinstance(loaded, EarlyExitForSequenceClassification)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_another_policy_can_be_put_in_and_is_saved(build: Build, tmp_path: Path):
    model = build(policy_input="state+log_odds")
    assert model.new_policy().policy_input == "state+log_odds"
    policy = model.new_policy("log_odds").eval()
    before = model(**batch_of(TEXTS), all_layers=True)
    model.set_policy(policy)
    assert model.config.policy_input == "log_odds"
    after = model(**batch_of(TEXTS), all_layers=True)
    assert torch.equal(after.layer_logits, before.layer_logits)
    assert not torch.allclose(after.exit_probs, before.exit_probs)
    tiny.save(model, tiny.tiny_tokenizer(), tmp_path)
    loaded = EarlyExitForSequenceClassification.from_pretrained(tmp_path)
    found = loaded(**batch_of(TEXTS), all_layers=True).exit_probs
    torch.testing.assert_close(found, after.exit_probs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("head", ["attention", "shared_pooler"])
def test_what_a_folder_lacks_begins_as_in_a_new_model(
    head: str, backbone_folder: Callable[[str], Path], tmp_path: Path
):
    values = {"head": head, "learnt_to_exit": True, "policy_input": "state+log_odds"}
    tiny.tiny_model(tmp_path, backbone_folder("bert"), **values)
    saved = load_file(tmp_path / "model.safetensors")
    kept = {name: weight for name, weight in saved.items() if name.startswith("backbone.")}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    fresh = EarlyExitForSequenceClassification(EarlyExitConfig.from_pretrained(tmp_path)).state_dict()
    opened = EarlyExitForSequenceClassification.from_pretrained(tmp_path)
    for name, weight in opened.state_dict().items():
        if name in kept:
            assert weight.equal(kept[name]), name
            continue
        like = fresh[name]
        if like.numel() < 8 or like.std() == 0:  # what begins with one value
            assert weight.equal(like) or (weight.numel() < 8 and weight.abs().max() < 1), name
        else:
            assert float(weight.std() / like.std()) == pytest.approx(1, abs=0.5), name
            assert not weight.equal(like), name


def test_another_number_of_classes(backbone_folder: Callable[[str], Path], tmp_path: Path):
    folder = tiny.tiny_model(tmp_path, backbone_folder("bert"))
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=3, ignore_mismatched_sizes=True
    )
    saved = load_file(folder / "model.safetensors")
    for name, weight in model.state_dict().items():
        same = weight.shape == saved[name].shape
        assert weight.equal(saved[name]) if same else weight.abs().max() < 1, name
    assert model(**batch_of(TEXTS)).logits.shape == (len(TEXTS), 3)


def test_who_may_read_the_folder_may_read_its_weights(build: Build, tmp_path: Path):
    before = os.umask(0o027)
    try:
        build().save_pretrained(tmp_path)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.glob("*.safetensors")} == {0o640}


def test_push_to_hub_is_hugging_faces_own():
    for model_class in (EarlyExitForSequenceClassification, FullDepthForSequenceClassification):
        assert "repo_id" in inspect.signature(model_class.push_to_hub).parameters


# --- Pipelines ---


@torch.no_grad()
def test_pipeline_gives_the_models_labels_and_really_exits(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = build()
    probs = model(**batch_of(TEXTS), all_layers=True, threshold=0.5).exit_probs
    model.config.threshold = mixed_threshold(probs, "policy")
    tiny.save(model, tiny.tiny_tokenizer(), tmp_path)
    expected, exit_layers = row_by_row(model, TEXTS, "policy", model.config.threshold, "bert")
    assert len(set(exit_layers.tolist())) > 1
    computed = count_rows(monkeypatch)
    for batch_size in (1, 4):
        computed.clear()
        classify = pipeline("text-classification", model=str(tmp_path), batch_size=batch_size)
        results = classify(list(TEXTS))
        assert [result["label"] for result in results] == [LABELS[index] for index in expected.argmax(-1)]
        scores = torch.tensor([result["score"] for result in results])
        torch.testing.assert_close(scores, expected.softmax(-1).amax(-1), atol=1e-4, rtol=1e-3)
        assert sum(computed) == int(exit_layers.sum()) < len(TEXTS) * LAYERS


# --- The plain model ---


@EVERY_TYPE
@torch.no_grad()
def test_the_plain_model_saves_loads_and_classifies_at_the_top(
    model_type: str, backbone_folder: Callable[[str], Path], tmp_path: Path
):
    folder = tiny.tiny_full_depth_model(tmp_path, backbone_folder(model_type))
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert isinstance(model, FullDepthForSequenceClassification)
    assert isinstance(model.config, FullDepthConfig)
    batch, labels = batch_of(TEXTS, model_type), torch.arange(7) % 2
    top = model.backbone(**batch).last_hidden_state
    _, expected = model.classifiers(0, top, batch["attention_mask"])
    output = model(**batch, labels=labels)
    torch.testing.assert_close(output.logits, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(output.logits, labels))
    again = FullDepthForSequenceClassification.from_pretrained(folder)
    torch.testing.assert_close(again(**batch).logits, output.logits, rtol=1e-5, atol=1e-6)
    (logits,) = model(**batch, return_dict=False)
    assert torch.equal(logits, output.logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_exits_are_scaled_but_the_lasts(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = tiny.tiny_backbone(tmp_path, layers=3)
    model = EarlyExitForSequenceClassification.from_backbone(folder, num_labels=2).to(dtype)
    model.eval()
    ids = torch.randint(4, 20, (2, 6))

    def gradients(layer: int, scale: float) -> tuple[Tensor, dict[str, Tensor]]:
        model.exit_gradient_scale = scale
        model.zero_grad(set_to_none=True)
        logits = model(ids, all_layers=True).classifier_logits
        logits[:, layer, 0].sum().backward()
        return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    for layer, expected in ((0, 0.25), (1, 0.25), (2, 1.0)):
        logits, whole = gradients(layer, 1.0)
        scaled_logits, scaled = gradients(layer, 0.25)
        assert torch.equal(scaled_logits, logits)
        assert scaled.keys() == whole.keys()
        for name, gradient in whole.items():
            of_backbone = name.startswith("backbone")
            torch.testing.assert_close(scaled[name], gradient * (expected if of_backbone else 1.0))
