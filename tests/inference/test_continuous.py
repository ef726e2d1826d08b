"""Rows that come and go have the tokens and exit layers of `generate` for their prompt alone, in every setting."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList

from consistentee.models.causal_lm import EarlyExitForCausalLM
from consistentee.models.continuous import ContinuousTokens
from tiny_decoders import (
    EVERY_TYPE,
    LAYERS,
    generate,
    layer_calls,
    new_tokens_of,
    prompt,
    tiny_exit_model,
)

CRITERIA = {
    "policy": 0.5,
    "softmax_margin": 0.3,
    "state_similarity": 0.75,
    "confidence_classifier": 0.5,
    "static": 2,
}
LENGTHS = (6, 2, 9, 1, 4)
LIMITS = (9, 14, 3, 8, 1)
JOINS = {0: [0, 1], 2: [2], 3: [3, 4]}
"""By step: the prompts that join before it."""

pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def exit_model(model_type: str, exit_head: str = "shared") -> EarlyExitForCausalLM:
    return tiny_exit_model(model_type, exit_head)


def tokens_of(model: EarlyExitForCausalLM, **options: Any) -> ContinuousTokens:
    how = model.generation_options(**{"mode": "early-exit", **options})
    return ContinuousTokens(model, how, processors=LogitsProcessorList(), do_sample=False)


class Writing:
    """Rows as they are written, by the number of their prompt."""

    def __init__(self, tokens: ContinuousTokens) -> None:
        self.tokens = tokens
        self.running: list[int] = []
        self.texts: dict[int, list[tuple[int, int]]] = {}
        self._limits: dict[int, int] = {}

    def join(self, prompts: Mapping[int, Sequence[int]], limits: Mapping[int, int]) -> None:
        found = self.tokens.join(list(prompts.values()))
        self.running += list(prompts)
        self._limits.update(limits)
        self._take(dict(zip(prompts, found, strict=True)))

    def step(self) -> None:
        self._take(dict(zip(self.running, self.tokens.step(), strict=True)))

    def _take(self, found: Mapping[int, tuple[int, int]]) -> None:
        for number, token in found.items():
            self.texts.setdefault(number, []).append(token)
        for place in reversed(range(len(self.running))):
            number = self.running[place]
            if len(self.texts[number]) == self._limits[number]:
                self.tokens.remove(place)
                last = self.running.pop()
                if place < len(self.running):
                    self.running[place] = last


def assert_as_alone(
    model: EarlyExitForCausalLM,
    lengths: Sequence[int] = LENGTHS,
    limits: Sequence[int] = LIMITS,
    joins: Mapping[int, Sequence[int]] = JOINS,
    **options: Any,
) -> set[int]:
    """Write with rows that join and end, and each prompt alone; returns the exit layers."""
    prompts = [prompt(length, seed) for seed, length in enumerate(lengths)]
    writing = Writing(tokens_of(model, **options))
    step = 0
    while writing.running or step <= max(joins):
        new = joins.get(step, ())
        if new:
            writing.join({n: prompts[n] for n in new}, {n: limits[n] for n in new})
        if writing.running:
            writing.step()
        step += 1
    for number, own in enumerate(prompts):
        alone = generate(model, [own], limits[number], **{"mode": "early-exit", **options})
        wanted = list(zip(new_tokens_of(alone, [own])[0], alone.exit_layers[0].tolist(), strict=True))
        assert writing.texts[number] == wanted, number
    return {layer for text in writing.texts.values() for _, layer in text}


@pytest.mark.parametrize("skipped_states", ["copy", "recompute"])
@pytest.mark.parametrize("full_depth_first_token", [True, False])
@EVERY_TYPE
def test_rows_that_join_are_as_alone(
    model_type: str, full_depth_first_token: bool, skipped_states: str
) -> None:
    layers = assert_as_alone(
        exit_model(model_type),
        full_depth_first_token=full_depth_first_token,
        skipped_states=skipped_states,
    )
    assert len(layers) >= 3  # exits all over the place


@EVERY_TYPE
def test_full_depth(model_type: str) -> None:
    assert assert_as_alone(exit_model(model_type), mode="full") == {LAYERS}


@pytest.mark.parametrize("skipped_states", ["copy", "recompute"])
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("model_type", ["mistral", "gpt2"])
def test_every_criterion(model_type: str, criterion: str, skipped_states: str) -> None:
    layers = assert_as_alone(
        exit_model(model_type),
        criterion=criterion,
        threshold=CRITERIA[criterion],
        skipped_states=skipped_states,
        full_depth_first_token=False,
    )
    assert min(layers) < LAYERS


@pytest.mark.parametrize("skipped_states", ["copy", "recompute"])
@pytest.mark.parametrize("exit_head", ["low_rank", "separate"])
def test_every_head(exit_head: str, skipped_states: str) -> None:
    assert_as_alone(exit_model("llama", exit_head), skipped_states=skipped_states)


@pytest.mark.parametrize("skipped_states", ["copy", "recompute"])
def test_angles_that_change_with_the_length(skipped_states: str) -> None:
    rope = {"rope_type": "dynamic", "factor": 8.0, "rope_theta": 10_000.0}
    model = tiny_exit_model("llama", rope_parameters=rope, max_position_embeddings=12)
    plain = exit_model("llama")
    lengths, limits = (11, 3, 14, 5), (12, 20, 8, 20)
    options = {"skipped_states": skipped_states, "full_depth_first_token": False}
    assert_as_alone(model, lengths, limits, {0: [0, 1], 4: [2, 3]}, **options)
    texts = [new_tokens_of(generate(one, [prompt(14, 2)], 8), [prompt(14, 2)]) for one in (model, plain)]
    assert texts[0] != texts[1]  # the texts reach where the angles change


@settings(max_examples=10)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 9)), min_size=2, max_size=7),
    st.sampled_from(["copy", "recompute"]),
    st.sampled_from(["llama", "gemma3_text"]),
)
def test_whoever_joins_when_it_may(
    rows: list[tuple[int, int, int]], skipped_states: str, model_type: str
) -> None:
    joins: dict[int, list[int]] = {}
    for number, (_, _, step) in enumerate(rows):
        joins.setdefault(step, []).append(number)
    lengths, limits = [length for length, _, _ in rows], [limit for _, limit, _ in rows]
    assert_as_alone(exit_model(model_type), lengths, limits, joins, skipped_states=skipped_states)


@pytest.mark.parametrize("skipped_states", ["copy", "recompute"])
def test_the_cache_stays_as_large_as_its_rows_need(skipped_states: str) -> None:
    """200 rows through a batch of at most four; each takes 8 slots in the end."""
    tokens = tokens_of(exit_model("llama"), skipped_states=skipped_states)
    writing, cache = Writing(tokens), tokens._decoding.cache
    for number in range(200):
        if len(writing.running) == 4:
            writing.step()
        writing.join({number: prompt(5, number)}, {number: 4})
        writing.step()
        assert len(writing.running) <= 4
        assert cache.rows <= 4
        assert cache.capacity <= 12  # 8, and half of it where it grew
    while writing.running:
        writing.step()
    assert [len(text) for text in writing.texts.values()] == [4] * 200
    assert len(tokens) == 0


def test_rows_that_have_ended_cost_nothing() -> None:
    model = exit_model("llama")
    writing = Writing(tokens_of(model))
    with layer_calls() as calls:
        writing.join({0: prompt(5), 1: prompt(3, 1)}, {0: 9, 1: 4})
        for _ in range(8):
            writing.step()
    # the first tokens came with the prompts, with padding; every other one ran as many layers as its exit says
    decoded = sum(tokens for _, tokens in calls) - LAYERS * 2 * 5
    assert decoded == sum(layer for text in writing.texts.values() for _, layer in text[1:])


def test_a_prompt_that_fails_leaves_the_others_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    model, own = exit_model("llama"), prompt(6)
    writing = Writing(tokens_of(model))
    writing.join({0: own}, {0: 6})
    writing.step()
    with pytest.raises(IndexError):
        writing.tokens.join([[5, 10**6]])  # no such token
    with pytest.raises(ValueError, match="at least one token"):
        writing.tokens.join([own, []])
    assert len(writing.tokens) == 1
    for _ in range(4):
        writing.step()
    alone = generate(model, [own], 6, mode="early-exit")
    assert [token for token, _ in writing.texts[0]] == new_tokens_of(alone, [own])[0]


@pytest.mark.parametrize("skipped_states", ["copy", "recompute"])
def test_a_first_token_that_fails_leaves_the_others_as_they_are(
    skipped_states: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory may run out behind the prompt's pass: newcomers are among the rows by then."""
    model, own = exit_model("llama"), [prompt(6), prompt(3)]
    writing = Writing(tokens_of(model, skipped_states=skipped_states))
    writing.join(dict(enumerate(own)), {0: 6, 1: 8})

    def fail(*outputs: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(writing.tokens, "_tokens", fail)
        with pytest.raises(torch.OutOfMemoryError):
            writing.tokens.join([prompt(4), prompt(9)])
    assert len(writing.tokens) == 2
    writing.join({2: prompt(5)}, {2: 4})
    for _ in range(7):
        writing.step()
    for number, (row, limit) in enumerate(zip([*own, prompt(5)], (6, 8, 4), strict=True)):
        alone = generate(model, [row], limit, mode="early-exit", skipped_states=skipped_states)
        assert [token for token, _ in writing.texts[number]] == new_tokens_of(alone, [row])[0]


@pytest.mark.parametrize("skipped_states", ["copy", "recompute"])
def test_states_that_are_no_numbers_leave_nothing_behind(skipped_states: str) -> None:
    """Where a row ends, another one begins: what it does not fill itself is masked, and 0 x NaN would be NaN."""
    model, prompts = tiny_exit_model("llama"), [prompt(9), prompt(2), prompt(3)]
    broken = next(token for token in range(3, 97) if not any(token in row for row in prompts))
    alone = [
        generate(model, [row], 4, mode="early-exit", skipped_states=skipped_states).sequences[0, len(row) :]
        for row in prompts
    ]
    assert not any(broken in row.tolist() for row in alone)
    embeddings: Any = model.get_input_embeddings()
    with torch.no_grad():
        embeddings.weight[broken] = float("nan")
    for lengths, removed in (((9, 7), (1, 0)), ((7, 2), (0, 0)), ((7, 7), (1, 0))):
        writing = Writing(tokens_of(model, skipped_states=skipped_states))
        writing.tokens.join([[broken] * length if length == 7 else prompt(length) for length in lengths])
        for row in removed:
            writing.tokens.remove(row)
        writing.join(dict(enumerate(prompts)), dict.fromkeys(range(3), 4))
        for _ in range(3):
            writing.step()
        for number, row in enumerate(alone):
            assert [token for token, _ in writing.texts[number]] == row.tolist()


@pytest.mark.parametrize("options", [{}, {"mode": "full"}, {"skipped_states": "recompute"}], ids=str)
def test_autocast_changes_nothing(options: dict[str, Any]) -> None:
    found: list[Any] = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            writing = Writing(tokens_of(exit_model("llama"), **options))
            writing.join({0: prompt(6), 1: prompt(3)}, {0: 9, 1: 5})
            writing.step()
            writing.join({2: prompt(4)}, {2: 6})
            for _ in range(7):
                writing.step()
        found.append(writing.texts)
    assert found[0] == found[1]


def test_lossless_rows_do_not_join() -> None:
    with pytest.raises(ValueError, match='got mode "lossless"'):
        tokens_of(exit_model("llama"), mode="lossless")


def test_steps_keep_no_graph() -> None:
    tokens = tokens_of(exit_model("llama"))
    tokens.join([prompt(4)])
    tokens.step()
    storage: torch.Tensor = tokens._decoding.cache.storage
    assert storage.is_inference()
