"""The engine is the oracle that runs all layers and then chooses: whatever the rows, batches, exits and backbones."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from consistentee.backbones.encoders import SUPPORTED_MODEL_TYPES
from consistentee.data.tokenization import encode_texts
from consistentee.functional.criteria import CRITERIA, EXIT_CRITERIA, exit_scores
from consistentee.functional.exits import choose_exit_layer
from consistentee.inference.encoder import scheduler
from consistentee.inference.encoder.backend import Answers
from consistentee.inference.encoder.prepacked_linear import has_int8
from consistentee.inference.encoder.scheduler import ExitRule
from consistentee.inference.encoder.torch_backend import PackedBackend
from consistentee.pipelines.classifier import Engine
from tiny import NEGATIVE, NEUTRAL, POSITIVE, fit_at_random, tiny_backbone, tiny_model

LAYERS = 4
ROWS = 24
CPU = torch.device("cpu")


class Oracle:
    """A model, some rows, and what every layer says about each of them alone."""

    def __init__(self, folder: Path, model_type: str) -> None:
        backbone = tiny_backbone(folder / "backbone", model_type, layers=LAYERS, seed=3)
        torch.manual_seed(4)
        path = tiny_model(folder / "model", backbone, initial_exit_bias=0.0, policy_input="state+log_odds")
        self.engine = Engine.from_pretrained(path, device="cpu")
        fit_at_random(cast(Any, self.engine.saved.model))
        words = (*NEUTRAL, *POSITIVE, *NEGATIVE)
        texts = [
            (" ".join(words[(7 * row + i) % len(words)] for i in range(1 + row * row % 29)),)
            for row in range(ROWS)
        ]
        self.texts = [texts[0], *texts[1:]]
        self.rows = encode_texts(self.texts, self.engine.saved.tokenizer, self.engine.saved.max_length)[0]
        model: Any = self.engine.saved.model
        with torch.no_grad():
            outputs = [
                model(**{name: torch.tensor([value]) for name, value in row.items()}, all_layers=True)
                for row in self.rows
            ]
        self.layer_logits = torch.cat([output.layer_logits for output in outputs])  # (rows, layers, classes)
        self.exit_probs = torch.cat([output.exit_probs for output in outputs])
        signals = [model.exit_signals()(output.pooled, output.classifier_logits) for output in outputs]
        self.signals = {name: torch.cat([found[name] for found in signals]) for name in signals[0]}

    def scores(self, criterion: str) -> Tensor:
        """(rows, layers)."""
        return exit_scores(criterion, self.layer_logits, self.exit_probs, **self.signals)

    def thresholds(self, criterion: str) -> list[float]:
        """Values between the scores, none so near to one that rounding decides; and beyond all of them."""
        values = self.scores(criterion).flatten().unique().tolist()
        gaps = [(a + b) / 2 for a, b in pairwise(values) if b - a > 1e-4]
        known = EXIT_CRITERIA[criterion].thresholds
        return [known.low, *gaps, LAYERS + 0.5 if known.layers else known.high]

    def check(
        self, answers: Answers, chosen: Sequence[int], exit_layers: Sequence[int], tolerance: float = 1e-4
    ) -> None:
        assert answers.exit_layers == list(exit_layers)
        probabilities = self.layer_logits[list(chosen), torch.tensor(exit_layers) - 1].softmax(-1)
        wanted = probabilities.max(-1)
        assert answers.scores == pytest.approx(wanted.values.tolist(), abs=tolerance)
        sure = (probabilities[:, 0] - probabilities[:, 1]).abs() > 2 * tolerance
        labels = torch.tensor(answers.labels)
        assert torch.equal(labels[sure], wanted.indices[sure])
        lengths = [len(self.rows[row]["input_ids"]) for row in chosen]
        real = sum(length * layer for length, layer in zip(lengths, exit_layers, strict=True))
        assert answers.real_tokens == real <= answers.computed_tokens


@pytest.fixture(scope="module")
def oracles(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @functools.cache
    def oracle(model_type: str) -> Oracle:
        return Oracle(tmp_path_factory.mktemp(model_type.replace("-", "_")), model_type)

    return oracle


def few_tokens(tokens: int) -> Any:
    """Throughput mode with small batches, so that even a few rows fill many and survivors join."""
    return mock.patch.dict(scheduler.BATCH_TOKENS, {"cpu": tokens})


@contextmanager
def working_ahead(batches_ahead: int) -> Iterator[None]:
    """As on a GPU: later batches are submitted before an earlier one is collected, and batches go as two halves."""
    with (
        mock.patch.dict(scheduler.AHEAD, {"cpu": batches_ahead}),
        mock.patch.object(scheduler, "SPLIT_TOKENS", 1),
    ):
        yield


CHOSEN = st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=12)
BATCH_SIZES = st.one_of(st.none(), st.integers(1, 13))
BATCH_TOKENS = st.sampled_from([1, 16, 40, 100, 1024])
AHEAD = st.sampled_from([0, 1, 3])


@pytest.mark.parametrize("model_type", SUPPORTED_MODEL_TYPES)
@given(CHOSEN, BATCH_SIZES, BATCH_TOKENS, AHEAD, st.sampled_from(CRITERIA), st.data())
def test_any_rows_batches_criteria_and_thresholds(
    oracles: Any,
    model_type: str,
    chosen: list[int],
    batch_size: int | None,
    tokens: int,
    ahead: int,
    criterion: str,
    data: st.DataObject,
) -> None:
    oracle: Oracle = oracles(model_type)
    threshold = data.draw(st.sampled_from(oracle.thresholds(criterion)))
    wanted = choose_exit_layer(oracle.scores(criterion)[chosen], threshold).tolist()
    with few_tokens(tokens), working_ahead(ahead):
        answers = oracle.engine.run(
            [oracle.rows[row] for row in chosen], batch_size=batch_size, rule=ExitRule(criterion, threshold)
        )
    oracle.check(answers, chosen, wanted)


@pytest.mark.parametrize("model_type", SUPPORTED_MODEL_TYPES)
@pytest.mark.parametrize("batch_size", [None, 1, 8, 100])
@pytest.mark.parametrize("pattern", ["first", "last", "straggler", "in turn", "all but one stay"])
def test_patterns_of_exits(oracles: Any, model_type: str, batch_size: int | None, pattern: str) -> None:
    oracle: Oracle = oracles(model_type)
    layers = {
        "first": [1] * ROWS,
        "last": [LAYERS] * ROWS,
        "straggler": [LAYERS if row == 7 else 1 for row in range(ROWS)],
        "in turn": [1 + row % LAYERS for row in range(ROWS)],
        "all but one stay": [1 if row == 7 else LAYERS for row in range(ROWS)],
    }[pattern]
    with few_tokens(64):
        answers = oracle.engine.run(oracle.rows, batch_size=batch_size, rule=ExitRule.fixed(layers))
    oracle.check(answers, range(ROWS), layers)


@pytest.mark.parametrize("batch_size", [None, 8])
def test_the_next_batch_is_submitted_before_the_host_decides(oracles: Any, batch_size: int | None) -> None:
    oracle: Oracle = oracles("bert")
    events: list[str] = []
    submit, collect = scheduler._Run._submit, scheduler._Run._collect

    def submitted(*values: Any) -> Any:
        events.append("submit")
        return submit(*values)

    def collected(*values: Any) -> Any:
        events.append("collect")
        return collect(*values)

    with (
        few_tokens(64),
        working_ahead(1),
        mock.patch.object(scheduler._Run, "_submit", submitted),
        mock.patch.object(scheduler._Run, "_collect", collected),
    ):
        rule = ExitRule.fixed([LAYERS] * ROWS)
        answers = oracle.engine.run(oracle.rows, batch_size=batch_size, rule=rule)
    oracle.check(answers, range(ROWS), [LAYERS] * ROWS)
    underway = list(itertools.accumulate(1 if event == "submit" else -1 for event in events))
    alone = sum(event == "collect" and left == 0 for event, left in zip(events, underway, strict=True))
    assert max(underway) >= 2
    assert alone == (
        1 if batch_size is None else ROWS // batch_size
    )  # only the very last of a window or batch


@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_where_nobody_can_exit_only_what_counts_is_computed(
    tmp_path: Path, criterion: str, decay: float
) -> None:
    backbone = tiny_backbone(tmp_path / "backbone", layers=LAYERS)
    path = tiny_model(tmp_path / "model", backbone, initial_exit_bias=0.0, ensemble_decay=decay)
    engine = Engine.from_pretrained(path, device="cpu")
    model: Any = engine.saved.model
    rows = encode_texts([("good film",), ("a bad day",)], engine.saved.tokenizer, engine.saved.max_length)[0]
    classified: list[int] = []
    classify = PackedBackend.classify

    def noted(backend: PackedBackend, layer_index: int, batch: Any, **options: Any) -> Any:
        classified.append(layer_index)
        return classify(backend, layer_index, batch, **options)

    known = EXIT_CRITERIA[criterion].thresholds
    threshold = {"patience": LAYERS - 1.0, "static": LAYERS - 0.5}.get(criterion, known.high)
    with mock.patch.object(PackedBackend, "classify", noted), torch.no_grad():
        answers = engine.run(rows, batch_size=2, rule=ExitRule(criterion, threshold))
        for row, score in zip(rows, answers.scores, strict=True):
            inputs = {name: torch.tensor([value]) for name, value in row.items()}
            wanted = model(**inputs, all_layers=True).layer_logits[0, -1].softmax(-1).max()
            assert score == pytest.approx(float(wanted), abs=1e-5)
    assert answers.exit_layers == [LAYERS, LAYERS]
    assert classified == ([LAYERS - 1] if decay == 0 else list(range(LAYERS)))
    assert not ExitRule(criterion, threshold - 0.01).never_exits(LAYERS)


@pytest.mark.parametrize("model_type", SUPPORTED_MODEL_TYPES)
def test_full_depth_runs_every_layer(oracles: Any, model_type: str) -> None:
    oracle: Oracle = oracles(model_type)
    for batch_size in (None, 5):
        answers = oracle.engine.run(oracle.rows, batch_size=batch_size, rule=ExitRule.full_depth())
        assert answers.exit_layers == [LAYERS] * ROWS
        # Without the ensemble over the layers passed: nobody asked them.
        model: Any = oracle.engine.saved.model
        with torch.no_grad():
            outputs = [
                model(**{name: torch.tensor([value]) for name, value in row.items()}, all_layers=True)
                for row in oracle.rows
            ]
        last = torch.cat([output.classifier_logits[:, -1] for output in outputs]).softmax(-1).amax(-1)
        assert answers.scores == pytest.approx(last.tolist(), abs=1e-4)


def test_survivors_share_batches(oracles: Any) -> None:
    """With every second row gone the rest need half the batches, not as many half-full ones."""
    oracle: Oracle = oracles("bert")
    backend: Any = oracle.engine.backend
    sizes: list[list[int]] = [[] for _ in range(LAYERS)]
    run_layer = type(backend).run_layer

    def counted(layer_index: int, batch: Any) -> Any:
        sizes[layer_index].append(batch.layout.tokens)
        return run_layer(backend, layer_index, batch)

    with few_tokens(64), mock.patch.object(backend, "run_layer", counted):
        layers = [1 if row % 2 else LAYERS for row in range(ROWS)]
        oracle.engine.run(oracle.rows, batch_size=None, rule=ExitRule.fixed(layers))
    assert sizes[1] == sizes[-1]
    assert max(sizes[1]) <= 64
    assert all(a + b > 64 for a, b in pairwise(sizes[1]))
    assert len(sizes[1]) < len(sizes[0])


@pytest.mark.parametrize("model_type", ["bert", "mpnet", "deberta-v2", "modernbert"])
def test_two_threads_use_one_engine(oracles: Any, model_type: str) -> None:
    oracle: Oracle = oracles(model_type)
    threshold = oracle.thresholds("policy")[len(oracle.thresholds("policy")) // 2]
    rule = ExitRule("policy", threshold)
    wanted = choose_exit_layer(oracle.scores("policy"), threshold).tolist()

    def work(turn: int) -> tuple[list[int], Answers]:
        chosen = [(turn + row) % ROWS for row in range(ROWS)]
        rows = [oracle.rows[row] for row in chosen]
        return chosen, oracle.engine.run(rows, batch_size=(None, 1, 4)[turn % 3], rule=rule)

    with ThreadPoolExecutor(4) as pool:
        for chosen, answers in pool.map(work, range(24)):
            oracle.check(answers, chosen, [wanted[row] for row in chosen])


@pytest.mark.parametrize("model_type", SUPPORTED_MODEL_TYPES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_other_precisions_are_close(oracles: Any, model_type: str, dtype: str) -> None:
    oracle: Oracle = oracles(model_type)
    if dtype == "int8" and not has_int8(CPU):
        pytest.skip("no int8 engine")
    if dtype == "int8" and model_type in ("deberta-v2", "modernbert"):
        with pytest.raises(
            ValueError, match=f'dtype "int8" is there for bert, .* got a model of type "{model_type}"'
        ):
            Engine(oracle.engine.saved, dtype=dtype)
        return
    engine = Engine(oracle.engine.saved, dtype=dtype)
    assert engine.backend.dtype == dtype
    layers = [1 + row % LAYERS for row in range(ROWS)]
    answers = engine.run(oracle.rows, batch_size=8, rule=ExitRule.fixed(layers))
    oracle.check(
        answers, range(ROWS), layers, tolerance={"bfloat16": 0.06, "float16": 0.01, "int8": 0.06}[dtype]
    )


def test_no_rows(oracles: Any) -> None:
    for batch_size in (None, 4):
        answers = oracles("bert").engine.run([], batch_size=batch_size, rule=ExitRule("policy", 0.5))
        assert answers == Answers([], [], [], 0, 0)


def test_one_very_long_text_among_short_ones(oracles: Any) -> None:
    engine: Engine = oracles("bert").engine
    texts = ["good film", "the plot " * 5000, "bad"]
    for batch_size in (None, 1, 3):
        found = engine.predict(texts, batch_size=batch_size, threshold=1.0)
        assert [p.label for p in found] == [engine.predict([text], threshold=1.0)[0].label for text in texts]


def test_a_thousand_empty_texts_are_refused(oracles: Any) -> None:
    with pytest.raises(ValueError, match="Text 1 is empty"):
        oracles("bert").engine.predict([""] * 1000)


def test_forced_exits_must_fit(oracles: Any) -> None:
    engine, rows = oracles("bert").engine, oracles("bert").rows
    with pytest.raises(ValueError, match="exit_layers must be one for each of 24 rows, got 1 of them"):
        engine.run(rows, batch_size=1, rule=ExitRule.fixed([1]))
    with pytest.raises(ValueError, match=r"exit_layers must be in \[1, 4\], got 5"):
        engine.run(rows[:1], batch_size=1, rule=ExitRule.fixed([5]))


@pytest.mark.parametrize(
    "values,message",
    [
        ({"dtype": "float8"}, 'dtype must be one of float32, bfloat16, float16, int8, got "float8"'),
        (
            {"dtype": "auto"},
            'dtype and backend must be named, got "auto". `consistentee benchmark MODEL --dtype auto',
        ),
        ({"backend": "auto"}, 'dtype and backend must be named, got "auto"'),
        ({"backend": "tensorrt"}, 'backend must be .*got "tensorrt"'),
        ({"device": "quantum"}, "quantum"),
    ],
)
def test_wrong_options(oracles: Any, values: dict[str, str], message: str) -> None:
    folder = oracles("bert").engine.saved.name
    with pytest.raises(ValueError, match=message):
        Engine.from_pretrained(folder, **values)
