"""The pool: whatever arrives when, and beside whom, the answers are those of the engine."""

from __future__ import annotations

import random
from collections.abc import Hashable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from consistentee.inference.encoder.backend import Answers
from consistentee.inference.encoder.layer_pool import LayerPool, PoolAnswer, PoolRow
from consistentee.inference.encoder.scheduler import ExitRule
from consistentee.pipelines.classifier import Engine
from tiny import tiny_backbone, tiny_dataset, tiny_full_depth_model, tiny_model

TEXTS = [text for (text,) in tiny_dataset(24, seed=5).texts]


@pytest.fixture(scope="module", params=["bert", "deberta-v2"])  # packed, padded
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    root = tmp_path_factory.mktemp("pool")
    torch.manual_seed(4)
    backbone = tiny_backbone(root / "backbone", request.param, layers=4)
    folder = tiny_model(root / "model", backbone, initial_exit_bias=0.0, ensemble_decay=0.3)
    return Engine.from_pretrained(folder, device="cpu")


def rows_of(engine: Engine) -> list[dict[str, list[int]]]:
    return engine.tokenize(TEXTS)[0]


def drained(pool: LayerPool) -> list[PoolAnswer]:
    answers: list[PoolAnswer] = []
    while len(pool):
        answers += pool.step()[0]
    assert pool.step() == ([], 0)
    return answers


@settings(max_examples=8)
@given(seed=st.integers(0, 10_000), most_tokens=st.integers(1, 80), patience=st.integers(0, 20))
def test_any_arrival_gives_the_engines_answers(
    engine: Engine, seed: int, most_tokens: int, patience: int
) -> None:
    rng = random.Random(seed)
    pool, rows = engine.pool(most_tokens=most_tokens, patience=patience), rows_of(engine)
    asked: dict[Hashable, tuple[int, str | None, float]] = {}
    answers: list[PoolAnswer] = []
    audited: set[Hashable] = set()
    for number in range(25):
        row = rng.randrange(len(rows))
        criterion = rng.choice(["policy", "confidence", None])
        threshold = rng.choice(scores_at_policy) if criterion == "policy" else rng.choice([0.5, 0.6, 0.99])
        rule = ExitRule(criterion, threshold)
        to_the_end = rng.random() < 0.3
        pool.add([PoolRow(number, rows[row], threshold, to_the_end)], engine.exit_scores(rule))
        asked[number] = row, criterion, threshold
        audited.update([number] if to_the_end else [])
        for _ in range(rng.randrange(4)):
            answers += pool.step()[0]
    answers += drained(pool)
    firsts = [answer for answer in answers if not answer.went_on]
    assert sorted(answer.key for answer in firsts) == list(range(25))  # each once
    for answer in answers:
        row, criterion, threshold = asked[answer.key]
        rule = ExitRule(criterion, 1.0 if answer.went_on else threshold)
        if (engine, rule) not in ORACLE:
            ORACLE[engine, rule] = engine.run(rows, batch_size=6, rule=rule)
        alone = ORACLE[engine, rule]
        assert answer.exit_layer == alone.exit_layers[row]
        assert int(answer.logits.argmax()) == alone.labels[row]
    assert {answer.key for answer in answers if answer.went_on} == audited


ORACLE: dict[tuple[Engine, ExitRule], Answers] = {}
scores_at_policy = [0.2, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65]


def test_exits_differ_in_what_is_tested(engine: Engine) -> None:
    layers = {p.exit_layer for t in scores_at_policy for p in engine.predict(TEXTS, threshold=t)}
    assert len(layers) >= 3


def test_who_exits_first_is_answered_first_and_newcomers_catch_up(engine: Engine) -> None:
    rows, scores = rows_of(engine), engine.exit_scores(ExitRule("policy", 0.5))
    pool = engine.pool()
    pool.add([PoolRow("easy", rows[0], 0.0), PoolRow("hard", rows[1], 1.0)], scores)
    answers, passed = pool.step()
    assert ([answer.key for answer in answers], passed) == (["easy"], 2)
    pool.add([PoolRow("new", rows[2], 1.0)], scores)
    assert pool.step() == ([], 1)  # it passes the first layer while the other one waits ...
    if engine.backend.can_merge(*(engine.backend.start([rows[row]]) for row in (1, 2))):
        assert pool.step()[1] == 2  # ... and both pass the second
    assert {answer.key for answer in drained(pool)} == {"hard", "new"}


def test_the_fullest_layer_goes_first(engine: Engine) -> None:
    rows, scores = rows_of(engine), engine.exit_scores(ExitRule("policy", 0.5))
    pool = engine.pool()
    pool.add([PoolRow(number, rows[1], 1.0) for number in range(2)], scores)
    assert pool.step()[1] == 2
    pool.add([PoolRow("new", rows[1], 1.0)], scores)
    assert pool.step()[1] == 2  # the two go on, and one that comes waits ...
    pool.add([PoolRow("newer", rows[1], 1.0), PoolRow("newest", rows[1], 1.0)], scores)
    assert pool.step()[1] == 3  # ... until as many have come
    assert len(drained(pool)) == 5


def test_answered_rows_make_no_layer_full(engine: Engine) -> None:
    rows, scores = rows_of(engine), engine.exit_scores(ExitRule("policy", 0.5))
    pool = engine.pool()
    pool.add([PoolRow(number, rows[1], 0.0, to_the_end=True) for number in range(3)], scores)
    assert len(pool.step()[0]) == 3
    pool.add([PoolRow("new", rows[1], 0.0)], scores)
    assert [answer.key for answer in pool.step()[0]] == ["new"]


def test_nobody_waits_for_ever(engine: Engine) -> None:
    rows, scores = rows_of(engine), engine.exit_scores(ExitRule("policy", 0.5))
    pool = engine.pool(patience=6)
    pool.add([PoolRow("hard", rows[1], 1.0)], scores)
    pool.step()
    seen: list[Hashable] = []
    for number in range(20):  # one easy row after another would always be shallower
        pool.add([PoolRow(number, rows[0], 0.0)], scores)
        seen += [answer.key for answer in pool.step()[0]]
    assert "hard" in seen


def test_dropped_rows_are_not_computed(engine: Engine) -> None:
    rows, scores = rows_of(engine), engine.exit_scores(ExitRule("policy", 0.5))
    pool = engine.pool()
    pool.add([PoolRow(number, rows[number], 1.0) for number in range(3)], scores)
    pool.drop([0])
    assert pool.step()[1] == 2
    pool.drop([1, "unknown"])
    assert pool.step()[1] == 1
    pool.drop([2])
    assert pool.step() == ([], 0)
    assert len(pool) == 0


def test_tokens_between_layers_are_bounded(engine: Engine) -> None:
    rows, scores = rows_of(engine), engine.exit_scores(ExitRule("policy", 0.5))
    pool = engine.pool(most_tokens=8, patience=0)
    pool.add([PoolRow(number, rows[number % len(rows)], 1.0) for number in range(60)], scores)
    most = 0
    while len(pool):
        pool.step()
        most = max(most, pool._tokens_inside)
    assert most <= 8 * 8 + max(len(row["input_ids"]) for row in rows)
    assert pool._tokens_inside == 0


def test_a_model_without_exits(tmp_path: Path) -> None:
    plain = tiny_full_depth_model(tmp_path / "plain", tiny_backbone(tmp_path / "backbone"))
    engine = Engine.from_pretrained(plain, device="cpu")
    rows, rule = rows_of(engine), engine.rule()
    pool = engine.pool(most_tokens=20)
    pool.add([PoolRow(number, row, 0.0, True) for number, row in enumerate(rows)], engine.exit_scores(rule))
    answers = drained(pool)
    firsts = {answer.key: int(answer.logits.argmax()) for answer in answers if not answer.went_on}
    assert [firsts[number] for number in range(len(rows))] == engine.run(rows, batch_size=4, rule=rule).labels
    assert len(answers) == 2 * len(rows)
