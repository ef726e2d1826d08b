"""Predictions: the oracle's, in the order of the input, lazily, and with complaints that say which text."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import accelerate
import pandas
import pytest
import torch
from torch.nn.utils import prune
from transformers import BertConfig, BertForSequenceClassification, pipeline

from consistentee.errors import DataError, SettingError
from consistentee.models.loaded import LoadedClassifier, load_model
from consistentee.pipelines.classifier import Engine, Prediction
from consistentee.pipelines.layer_views import view_layers
from tiny import (
    LABEL_NAMES,
    save,
    tiny_backbone,
    tiny_dataset,
    tiny_full_depth_model,
    tiny_model,
    tiny_tokenizer,
)

TEXTS = [text for (text,) in tiny_dataset(40, seed=5).texts]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("prediction")
    backbone = tiny_backbone(root / "backbone")
    torch.manual_seed(2)
    tiny_full_depth_model(root / "plain", backbone)
    return tiny_model(root / "model", backbone, initial_exit_bias=0.0)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine.from_pretrained(folder, device="cpu")


def oracle(engine: Engine, text: str, threshold: float) -> Prediction:
    """Run all layers for one text, then choose."""
    with torch.no_grad():
        output = engine.saved.model(
            **engine.saved.tokenizer(text, return_tensors="pt"), all_layers=True, threshold=threshold
        )
    score, label = output.logits.softmax(-1).max(-1)
    return Prediction(LABEL_NAMES[int(label)], float(score), int(output.exit_layer))


@pytest.mark.parametrize("batch_size", [1, 4, 200])
def test_agrees_with_the_oracle_in_the_order_of_the_input(engine: Engine, batch_size: int) -> None:
    with torch.no_grad():
        inputs = engine.saved.tokenizer(TEXTS, return_tensors="pt", padding=True)
        first = engine.saved.model(**inputs, all_layers=True).exit_probs[:, 0].sort().values
    threshold = float(
        first[len(TEXTS) // 2 - 1 : len(TEXTS) // 2 + 1].mean()
    )  # half of them leave at layer 1
    predictions = engine.predict(TEXTS, threshold=threshold, batch_size=batch_size)
    assert len({prediction.exit_layer for prediction in predictions}) > 1
    for text, prediction in zip(TEXTS, predictions, strict=True):
        wanted = oracle(engine, text, threshold)
        assert (prediction.label, prediction.exit_layer) == (wanted.label, wanted.exit_layer)
        assert prediction.score == pytest.approx(wanted.score, abs=1e-5)


def test_threshold_turns_depth(engine: Engine) -> None:
    assert {p.exit_layer for p in engine.predict(TEXTS[:5], threshold=0.0)} == {1}
    assert {p.exit_layer for p in engine.predict(TEXTS[:5], threshold=1.0)} == {3}
    assert {p.exit_layer for p in engine.predict(TEXTS[:5], threshold=9, criterion="patience")} == {3}


def test_streams_without_an_end(engine: Engine) -> None:
    read = 0

    def endless() -> Iterator[str]:
        nonlocal read
        for text in itertools.cycle(TEXTS):
            read += 1
            yield text

    found = list(itertools.islice(engine.stream(endless(), batch_size=4), 10))
    assert [p.exit_layer for p in found] == [p.exit_layer for p in engine.predict(TEXTS[:10])]
    assert read == 12  # windows of 4 and 8


def test_windows_grow_and_keep_texts_beside_predictions(engine: Engine) -> None:
    windows = list(engine.windows(TEXTS[:20], batch_size=4))
    assert [len(texts) for texts, _ in windows] == [4, 8, 8]
    assert [text for texts, _ in windows for (text,) in texts] == TEXTS[:20]


def test_no_texts_give_no_predictions(engine: Engine) -> None:
    assert engine.predict([]) == []


def test_pairs(engine: Engine) -> None:
    one, other = engine.predict([("a film", "good"), ("good film and it was dull", "bad")])
    assert one.label in LABEL_NAMES
    assert 0.5 <= other.score <= 1


def test_complaints_say_which_text(engine: Engine) -> None:
    with pytest.raises(ValueError, match=r"Text 3 is empty. Leave it out"):
        engine.predict(["good", "bad", " \n"])
    with pytest.raises(ValueError, match="Text 2 must be a string or a pair of strings, got 7"):
        engine.predict(["good", 7])
    half = r"Text 2: Character 5 is half a surrogate pair \('\\ud83d'\), which is no character. Decode its source"
    for row in ("bad \ud83d", ("good", "bad \ud83d"), ("bad \ud83d\ud83d", "good")):
        with pytest.raises(DataError, match=half):
            engine.predict([("good", "é 😀") if isinstance(row, tuple) else "é 😀", row])
    with pytest.raises(ValueError, match="texts must be a list of texts, got one text"):
        engine.predict("good")
    for table in ({"text": "good", "text_pair": "bad"}, pandas.DataFrame({"text": ["good", "bad"]})):
        with pytest.raises(
            ValueError, match=rf"got columns by name \({type(table).__name__}\)\. Give a column"
        ):
            engine.predict(table)
    column = pandas.Series(["good", "bad"])
    assert [one.label for one in engine.predict(column)] == [
        one.label for one in engine.predict(["good", "bad"])
    ]


def test_options_are_checked_before_anything_is_read(engine: Engine) -> None:
    with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\] for policy, got 2"):
        engine.stream(["good"], threshold=2)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        engine.stream(["good"], batch_size=0)
    with pytest.raises(ValueError, match='no threshold for criterion "entropy"'):
        engine.stream(["good"], criterion="entropy")


def test_plain_model_runs_all_its_layers(folder: Path) -> None:
    plain = Engine.from_pretrained(folder.parent / "plain", device="cpu")
    assert {prediction.exit_layer for prediction in plain.predict(TEXTS[:3])} == {3}
    with pytest.raises(
        ValueError, match="has no exits: threshold, criterion and operating point must not be given"
    ):
        plain.predict(["good"], threshold=0.5)


def shaken(model: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    return {name: value + 0.3 * torch.randn_like(value) for name, value in model.state_dict().items()}


def train_with_a_fused_optimizer(model: Any) -> None:
    model.train()
    weights = list(model.parameters())
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    torch.optim.AdamW(weights, lr=0.3, fused=True).step()
    model.eval()


def train_a_part(model: Any) -> None:
    model.policy.train()
    weights = list(model.parameters())
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    torch.optim.AdamW(weights, lr=0.3, fused=True).step()
    model.eval()


def prune_twice(model: Any) -> None:
    for share in (0.3, 0.5):
        for layer in model.backbone.modules():
            if isinstance(layer, torch.nn.Linear):
                prune.l1_unstructured(layer, "weight", share)


def put_other_data_in_twice(model: Any) -> None:
    for weight in model.parameters():
        weight.data = weight.data + 0.3
        weight.data = weight.data.flip(0) * 1.1  # may lie where the first lay


CHANGES: dict[str, Callable[[Any], Any]] = {
    "load_state_dict": lambda model: model.load_state_dict(shaken(model)),
    "assign": lambda model: model.load_state_dict(shaken(model), assign=True),
    "fused": train_with_a_fused_optimizer,
    "part": train_a_part,
    "data": put_other_data_in_twice,
    "prune": prune_twice,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("model_type", ["bert", "modernbert"])
@pytest.mark.parametrize("batch_size", [None, 1])
def test_weights_that_change_are_followed(
    tmp_path: Path, model_type: str, batch_size: int | None, change: str
) -> None:
    folder = tiny_model(tmp_path / "model", tiny_backbone(tmp_path / "backbone", model_type))
    saved = load_model(folder, LoadedClassifier)
    made_before = Engine(saved)
    scores = made_before.exit_scores(made_before.rule())
    before = made_before.predict(TEXTS, batch_size=batch_size)
    saved.model.eval()
    assert made_before.predict(TEXTS, batch_size=batch_size) == before
    assert made_before.exit_scores(made_before.rule()) is scores  # nothing is made twice
    CHANGES[change](saved.model)
    found = made_before.predict(TEXTS, batch_size=batch_size)
    assert found == Engine(saved).predict(TEXTS, batch_size=batch_size) != before


def test_parts_put_into_the_model_are_followed(folder: Path) -> None:
    saved = load_model(folder, LoadedClassifier)
    model: Any = saved.model
    engine = Engine(saved)
    before = engine.predict(TEXTS)
    policy = copy.deepcopy(model.policy)
    torch.nn.init.constant_(policy.exit_bias, 9.0)
    model.set_policy(policy)
    assert engine.predict(TEXTS) == Engine(saved).predict(TEXTS) != before
    found = []
    for temperature in (1.0, 0.01):
        model.set_fitted(temperatures=[temperature] * 3, layer_weights=None, learnt_to_exit=None)
        found.append(engine.predict(TEXTS, criterion="calibrated_confidence", threshold=0.6))
        assert found[-1] == Engine(saved).predict(TEXTS, criterion="calibrated_confidence", threshold=0.6)
    assert found[0] != found[1]


def test_pruning_that_goes_on_is_followed(folder: Path) -> None:
    """Of what is pruned once more torch changes the mask alone, and of what is trained then the weight under it."""
    saved = load_model(folder, LoadedClassifier)
    model: Any = saved.model
    engine = Engine(saved)
    prune_twice(model)
    before = engine.predict(TEXTS)
    dense = model.backbone.encoder.layer[0].intermediate.dense
    prune.l1_unstructured(dense, "weight", 0.9)
    pruned = engine.predict(TEXTS)
    assert pruned == Engine(saved).predict(TEXTS) != before
    with torch.no_grad():
        dense.weight_orig.mul_(-3.0)
    trained = engine.predict(TEXTS)
    batch = saved.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**batch)
    assert [answer.exit_layer for answer in trained] == expected.exit_layer.tolist()
    scores = expected.logits.softmax(-1).amax(-1)
    torch.testing.assert_close(torch.tensor([answer.score for answer in trained]), scores, atol=1e-4, rtol=0)
    assert trained != pruned


@pytest.mark.parametrize(
    "name, values, how",
    [
        ("exit_layers", ([2, 3], None), {}),
        ("ensemble_decay", (0.0, 0.9), {}),
        ("temperatures", ([0.1, 2.0, 1.0], [2.0, 0.1, 1.0]), {"criterion": "calibrated_confidence"}),
        ("layer_weights", ([0.1, 2.0, 1.0], [2.0, 0.1, 1.0]), {"criterion": "expert_sum"}),
    ],
)
def test_a_configuration_that_changes_is_followed(
    folder: Path, name: str, values: tuple[Any, ...], how: dict[str, str]
) -> None:
    saved = load_model(folder, LoadedClassifier)
    engine = Engine(saved)
    options: dict[str, Any] = {**how, "threshold": 0.55}
    for value in values:
        setattr(saved.model.config, name, value)
        found = engine.predict(TEXTS, **options)
        assert found == Engine(saved).predict(TEXTS, **options)


def test_weights_that_an_engine_cannot_read_are_named(folder: Path) -> None:
    saved = load_model(folder, LoadedClassifier)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised: Any = torch.ao.quantization.quantize_dynamic(saved.model, {torch.nn.Linear})
    message = r'must have floating point weights, got "backbone\..*query", a torch\..*Linear\..*dtype="int8"'
    with pytest.raises(ValueError, match=message):
        Engine(replace(saved, model=quantised))
    accelerate.cpu_offload(saved.model, torch.device("cpu"))
    with pytest.raises(
        ValueError, match=r"all its weights in memory, got \d+ elsewhere, such as .backbone\."
    ):
        Engine(saved)


@pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # peft asks for it
def test_adapters_put_on_later_are_refused_until_they_are_merged(folder: Path) -> None:
    peft = pytest.importorskip("peft")
    saved = load_model(folder, LoadedClassifier)
    engine = Engine(saved)
    before = engine.predict(TEXTS)
    lora = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], init_lora_weights=False)
    adapted = peft.get_peft_model(cast(Any, saved.model), lora).eval()
    for _ in range(2):
        with pytest.raises(ValueError, match="has adapters beside its weights, which an engine copies"):
            engine.predict(TEXTS)
    adapted.merge_and_unload().eval()
    assert engine.predict(TEXTS) == Engine(saved).predict(TEXTS) != before


def test_a_model_pickled_by_an_earlier_version_is_followed(folder: Path) -> None:
    saved = load_model(folder, LoadedClassifier)
    vars(saved.model).pop("unseen_changes", None)
    engine, other = (pickle.loads(pickle.dumps(Engine(saved))) for _ in range(2))  # noqa: S301
    before = engine.predict(TEXTS)
    assert copy.deepcopy(other).predict(TEXTS) == before
    train_with_a_fused_optimizer(engine.saved.model)
    assert engine.predict(TEXTS) == Engine(engine.saved).predict(TEXTS) != other.predict(TEXTS) == before


def test_a_model_in_training_mode_is_refused(folder: Path) -> None:
    saved = load_model(folder, LoadedClassifier)
    engine = Engine(saved)
    saved.model.train()
    message = "must be in evaluation mode, got training mode"
    with pytest.raises(SettingError, match=message):
        engine.predict(TEXTS)
    with pytest.raises(SettingError, match=message):
        engine.pool()
    with pytest.raises(SettingError, match=message):
        Engine(saved)


@pytest.mark.parametrize("model_type", ["bert", "modernbert"])
def test_autocast_around_it_changes_nothing(tmp_path: Path, model_type: str) -> None:
    engine = Engine.from_pretrained(
        tiny_model(tmp_path / "model", tiny_backbone(tmp_path / "backbone", model_type))
    )
    expected = engine.predict(TEXTS)
    (row, *_), _ = engine.tokenize(TEXTS)
    views = [view.probs.tolist() for view in view_layers(engine, row, "policy")]
    with torch.autocast("cpu", torch.bfloat16):
        assert engine.predict(TEXTS) == expected
        assert [view.probs.tolist() for view in view_layers(engine, row, "policy")] == views
        assert torch.is_autocast_enabled("cpu")


def test_rotary_positions_keep_their_precision(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", tiny_backbone(tmp_path / "backbone", "modernbert"))
    backend: Any = Engine.from_pretrained(folder, dtype="bfloat16").backend
    opened = load_model(folder, LoadedClassifier, dtype="bfloat16").model
    buffers = dict(opened.named_buffers())
    assert any(name.endswith("inv_freq") for name in buffers)
    for name, buffer in backend.model.named_buffers():
        assert buffer.dtype == buffers[name].dtype, name
        assert buffer.equal(buffers[name]), name
    assert {weight.dtype for weight in backend.model.parameters()} == {torch.bfloat16}


def test_other_models_are_refused(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=200, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    save(BertForSequenceClassification(config), tiny_tokenizer(), tmp_path)
    with pytest.raises(ValueError, match=r"was not saved by this library .* `consistentee retrofit`"):
        Engine.from_pretrained(tmp_path)


def test_pipeline_gives_the_same_labels(folder: Path, engine: Engine) -> None:
    classify = pipeline("text-classification", model=str(folder), device="cpu")
    found = [row["label"] for row in classify(TEXTS[:8])]
    assert found == [prediction.label for prediction in engine.predict(TEXTS[:8])]
