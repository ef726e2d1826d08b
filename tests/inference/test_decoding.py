"""Decoding with real exits is the naive loop of `tiny_decoders`: tokens and exit layers, in every setting."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from consistentee.inference.decoder.kv_cache import DecoderCache
from consistentee.models import generate as generate_module
from consistentee.models.causal_lm import EarlyExitForCausalLM
from tiny_decoders import (
    EVERY_TYPE,
    LAYERS,
    PAD,
    generate,
    layer_calls,
    left_padded_batch,
    naive_decide,
    naive_generate,
    new_tokens_of,
    prompt,
    tiny_exit_model,
)

NEW = 10
LENGTHS = (6, 2, 9)
CRITERIA = {
    "policy": 0.5,
    "softmax_margin": 0.3,
    "state_similarity": 0.75,
    "confidence_classifier": 0.5,
    "static": 2,
}

pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def exit_model(model_type: str, exit_head: str = "shared") -> EarlyExitForCausalLM:
    return tiny_exit_model(model_type, exit_head)


def prompts_of(lengths: Sequence[int]) -> list[list[int]]:
    return [prompt(length, seed) for seed, length in enumerate(lengths)]


def assert_equals_oracle(
    model: EarlyExitForCausalLM,
    lengths: Sequence[int],
    new_tokens: int = NEW,
    *,
    criterion: str = "policy",
    threshold: float = 0.5,
    full_depth_first_token: bool = True,
    skipped_states: str = "copy",
    min_exit_layer: int | None = None,
    eos_token_id: int | None = None,
) -> Any:
    """Generate in one batch and compare every row with the oracle's; returns the output."""
    prompts = prompts_of(lengths)
    options: dict[str, Any] = {} if eos_token_id is None else {"eos_token_id": eos_token_id}
    output = generate(
        model,
        prompts,
        new_tokens,
        mode="early-exit",
        criterion=criterion,
        threshold=threshold,
        full_depth_first_token=full_depth_first_token,
        skipped_states=skipped_states,
        min_exit_layer=min_exit_layer,
        **options,
    )
    decide = naive_decide(model, criterion, threshold, min_exit_layer or model.config.min_exit_layer)
    texts, layers = zip(
        *(
            naive_generate(
                model,
                row,
                new_tokens,
                decide,
                full_depth_first_token=full_depth_first_token,
                skipped=skipped_states,
                eos_token_id=eos_token_id,
            )
            for row in prompts
        ),
        strict=True,
    )
    longest = max(map(len, texts))
    assert output.exit_layers.dtype == torch.int64
    assert output.exit_layers.tolist() == [row + [0] * (longest - len(row)) for row in layers]
    assert new_tokens_of(output, prompts) == [row + [PAD] * (longest - len(row)) for row in texts]
    return output


# --- All types ------------------------------------------------------------------------------------


@pytest.mark.parametrize("skipped_states", ["copy", "recompute"])
@pytest.mark.parametrize("full_depth_first_token", [True, False])
@EVERY_TYPE
def test_exits_equal_the_oracle(model_type: str, full_depth_first_token: bool, skipped_states: str) -> None:
    options: dict[str, Any] = {
        "full_depth_first_token": full_depth_first_token,
        "skipped_states": skipped_states,
    }
    single = assert_equals_oracle(exit_model(model_type), LENGTHS[:1], **options)
    padded = assert_equals_oracle(exit_model(model_type), LENGTHS, **options)
    assert single.exit_layers.tolist() == padded.exit_layers[:1].tolist()
    assert len(padded.exit_layers.unique()) >= 3  # exits all over the place


@pytest.mark.parametrize("skipped_states", ["copy", "recompute"])
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("lengths", [LENGTHS[:1], LENGTHS])
def test_nobody_leaves_before_the_first_exit_layer(
    lengths: tuple[int, ...], criterion: str, skipped_states: str
) -> None:
    options: dict[str, Any] = {"criterion": criterion, "skipped_states": skipped_states}
    options["threshold"] = CRITERIA[criterion]
    everywhere = assert_equals_oracle(exit_model("llama"), lengths, **options)
    saved = assert_equals_oracle(
        tiny_exit_model("llama", exit_values={"min_exit_layer": 3}), lengths, **options
    )
    told = {} if criterion == "static" else {"min_exit_layer": 3}
    later = assert_equals_oracle(exit_model("llama"), lengths, **told, **options)
    assert torch.equal(later.exit_layers, saved.exit_layers)
    assert int(everywhere.exit_layers.min()) < 3
    assert int(later.exit_layers.min()) == (2 if criterion == "static" else 3)
    at_last = generate(exit_model("llama"), prompts_of(lengths), 4, min_exit_layer=LAYERS)
    assert set(at_last.exit_layers.flatten().tolist()) == {LAYERS}


def test_the_first_exit_layer_is_saved_with_the_model() -> None:
    model = tiny_exit_model("llama", exit_values={"threshold": 0.0, "min_exit_layer": 2})
    layers = generate(model, prompts_of(LENGTHS), 4).exit_layers[:, 1:]
    assert set(layers.flatten().tolist()) == {2}
    layers = generate(model, prompts_of(LENGTHS), 4, min_exit_layer=1).exit_layers[:, 1:]
    assert set(layers.flatten().tolist()) == {1}
    with pytest.raises(ValueError, match="min_exit_layer must be from 1 to 4, got 5"):
        generate(model, prompts_of(LENGTHS), 4, min_exit_layer=5)
    with pytest.raises(ValueError, match="min_exit_layer must be at least 1, got 0"):
        tiny_exit_model("llama", exit_values={"min_exit_layer": 0})


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_copied_and_exact_states_differ(
    model_type: str,
) -> None:  # or the tests above could not tell them apart
    model = exit_model(model_type)
    texts = [
        generate(model, prompts_of(LENGTHS), 16, skipped_states=kind).sequences
        for kind in ("copy", "recompute")
    ]
    assert not torch.equal(*texts)


@pytest.mark.parametrize("skipped_states", ["copy", "recompute"])
@pytest.mark.parametrize("lengths", [(1,), (1, 1), (1, 4)])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2"])
def test_prompts_of_one_token(model_type: str, lengths: tuple[int, ...], skipped_states: str) -> None:
    for first in (True, False):
        assert_equals_oracle(
            exit_model(model_type), lengths, full_depth_first_token=first, skipped_states=skipped_states
        )


@EVERY_TYPE
def test_everybody_leaves_at_the_first_layer(model_type: str) -> None:
    with layer_calls() as calls:
        output = assert_equals_oracle(
            exit_model(model_type), LENGTHS, threshold=0.0, full_depth_first_token=False
        )
    assert output.exit_layers.unique().tolist() == [1]
    decoding = [index for index, tokens in calls if tokens == len(LENGTHS)]
    assert decoding == [0] * NEW  # no deeper layer ran
    later = generate(exit_model(model_type), prompts_of(LENGTHS), NEW, threshold=0.0)
    assert later.exit_layers.tolist() == [[LAYERS] + [1] * (NEW - 1)] * 3


@EVERY_TYPE
def test_everybody_stays_to_the_last_layer(model_type: str) -> None:
    model = exit_model(model_type)
    full = generate(model, prompts_of(LENGTHS), NEW, mode="full")
    for skipped_states in ("copy", "recompute"):
        output = assert_equals_oracle(model, LENGTHS, threshold=1.0, skipped_states=skipped_states)
        assert output.exit_layers.unique().tolist() == [LAYERS]
        assert torch.equal(output.sequences, full.sequences)
    assert torch.equal(full.exit_layers, output.exit_layers)


# --- Heads and criteria ---------------------------------------------------------------------------


@pytest.mark.parametrize("skipped_states", ["copy", "recompute"])
@pytest.mark.parametrize("exit_head", ["shared", "low_rank", "separate"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2"])
def test_every_head(model_type: str, exit_head: str, skipped_states: str) -> None:
    output = assert_equals_oracle(exit_model(model_type, exit_head), LENGTHS, skipped_states=skipped_states)
    assert len(output.exit_layers.unique()) >= 3


def test_heads_differ() -> None:
    texts = {
        str(generate(exit_model("llama", kind), prompts_of(LENGTHS), NEW).sequences.tolist())
        for kind in ("shared", "low_rank", "separate")
    }
    assert len(texts) == 3


@pytest.mark.parametrize("skipped_states", ["copy", "recompute"])
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("model_type", ["mistral", "gemma3_text"])
def test_every_criterion(model_type: str, criterion: str, skipped_states: str) -> None:
    output = assert_equals_oracle(
        exit_model(model_type, "low_rank"),
        LENGTHS,
        criterion=criterion,
        threshold=CRITERIA[criterion],
        skipped_states=skipped_states,
        full_depth_first_token=False,
    )
    layers = output.exit_layers.unique().tolist()
    assert layers == [2] if criterion == "static" else len(layers) >= 2


@pytest.mark.parametrize("layers", [1, 3, 4, 9])
def test_static_depth(layers: int) -> None:
    output = assert_equals_oracle(
        exit_model("qwen3"), LENGTHS, criterion="static", threshold=layers, full_depth_first_token=False
    )
    assert output.exit_layers.unique().tolist() == [min(layers, LAYERS)]


# --- Rows that end --------------------------------------------------------------------------------


class CacheSpy:
    """Counts compactions and growth of caches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kept: list[int] = []
        self.grown: list[int] = []
        keep, use = DecoderCache.keep, DecoderCache._use

        def spied_keep(cache: DecoderCache, rows: torch.Tensor) -> None:
            self.kept.append(len(rows))
            keep(cache, rows)

        def spied_use(cache: DecoderCache, storage: torch.Tensor) -> None:
            self.grown.append(storage.shape[4])
            use(cache, storage)

        monkeypatch.setattr(DecoderCache, "keep", spied_keep)
        monkeypatch.setattr(DecoderCache, "_use", spied_use)


def an_end(model: EarlyExitForCausalLM, lengths: Sequence[int], new_tokens: int, **options: Any) -> int:
    """A token at which rows end at as many different times as can be had."""
    texts = new_tokens_of(
        generate(model, prompts_of(lengths), new_tokens, mode="early-exit", **options), prompts_of(lengths)
    )

    def variety(token: int) -> int:
        return len({row.index(token) if token in row else new_tokens for row in texts})

    best = max({token for row in texts for token in row}, key=variety)
    assert variety(best) >= 3
    return best


@pytest.mark.parametrize("skipped_states", ["copy", "recompute"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("lengths", [(6, 2, 9, 4, 7, 3, 5, 8), (5,) * 8], ids=["padded", "even"])
def test_finished_rows_leave_the_batch(
    model_type: str, lengths: tuple[int, ...], skipped_states: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, new_tokens = exit_model(model_type), 24
    end = an_end(model, lengths, new_tokens, skipped_states=skipped_states)
    spy = CacheSpy(monkeypatch)
    output = assert_equals_oracle(model, lengths, new_tokens, skipped_states=skipped_states, eos_token_id=end)
    if skipped_states == "copy":
        assert spy.kept
        assert all(rows <= 6 for rows in spy.kept)  # at 3/4 of eight rows, and again below
    real = (output.exit_layers > 0).sum(1)
    assert len(real.unique()) >= 3


def test_compaction_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, lengths = exit_model("qwen2"), (6, 2, 9, 4, 7, 3, 5, 8)
    end = an_end(model, lengths, 24)
    outputs = []
    for share in (0.0, 0.75, 1.0):  # never, as usual, each time
        monkeypatch.setattr("consistentee.inference.decoder.decoding.COMPACT_BELOW", share)
        with pytest.MonkeyPatch.context() as patch:
            spy = CacheSpy(patch)
            outputs.append(generate(model, prompts_of(lengths), 24, eos_token_id=end))
        assert bool(spy.kept) == (share > 0)
    for other in outputs[1:]:
        assert torch.equal(outputs[0].sequences, other.sequences)
        assert torch.equal(outputs[0].exit_layers, other.exit_layers)


def test_finished_rows_cost_nothing() -> None:
    model, lengths = exit_model("llama"), (5,) * 8
    end = an_end(model, lengths, 24)
    with layer_calls() as calls:
        output = generate(model, prompts_of(lengths), 24, eos_token_id=end)
    # the first token came with the prompt; every other token ran as many layers as its exit layer says
    decoded = sum(tokens for _, tokens in calls) - LAYERS * 8 * 5
    assert decoded == int(output.exit_layers[:, 1:].sum())


# --- The cache ------------------------------------------------------------------------------------


@pytest.mark.parametrize("skipped_states", ["copy", "recompute"])
@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_the_cache_grows(model_type: str, skipped_states: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate_module, "CAPACITY_AHEAD", 1)
    spy = CacheSpy(monkeypatch)
    assert_equals_oracle(exit_model(model_type), LENGTHS, 16, skipped_states=skipped_states)
    assert spy.grown == [10, 15, 22, 33]


def test_cache_storage() -> None:
    cache = DecoderCache(
        num_layers=2,
        rows=3,
        num_key_value_heads=1,
        head_size=2,
        capacity=4,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    assert cache.capacity == 4
    cache.keys[1][2, 0, 3] = torch.tensor([1.0, 2.0])
    cache.values[0][0, 0, 0] = torch.tensor([3.0, 4.0])
    cache.reserve(4)
    assert cache.capacity == 4
    cache.reserve(5)
    assert cache.capacity == 6
    assert cache.keys[1][2, 0, 3].tolist() == [1, 2]
    assert cache.storage.sum() == 10
    cache.reserve(20)
    assert cache.capacity == 20
    cache.keep(torch.tensor([2, 0]))
    assert cache.keys[1][0, 0, 3].tolist() == [1, 2]
    assert cache.values[0][1, 0, 0].tolist() == [3, 4]
    assert cache.storage.shape == (2, 2, 2, 1, 20, 2)


# --- Types of numbers -----------------------------------------------------------------------------


@EVERY_TYPE
def test_bfloat16(model_type: str) -> None:
    model = tiny_exit_model(model_type, "low_rank").to(torch.bfloat16)
    ways: tuple[dict[str, Any], ...] = (
        {"skipped_states": "copy"},
        {"skipped_states": "recompute"},
        {"mode": "lossless"},
        {"mode": "full"},
    )
    for way in ways:
        output = generate(model, prompts_of(LENGTHS), NEW, **way)
        assert output.sequences.shape == (3, max(LENGTHS) + NEW)
        assert int(output.sequences.max()) < 97
    output = generate(model, prompts_of((6,)), 4, mode="full", output_logits=True)
    theirs = generate(model.backbone, prompts_of((6,)), 4, output_logits=True)
    assert output.logits[0].dtype == torch.float32
    torch.testing.assert_close(output.logits[0], theirs.logits[0], rtol=0.1, atol=0.3)


# --- Exits given in advance -----------------------------------------------------------------------


@pytest.mark.parametrize("skipped_states", ["copy", "recompute"])
@pytest.mark.parametrize("first", [True, False])
def test_forced_exits(first: bool, skipped_states: str) -> None:
    forced = [[1 + (3 * position + 2 * row) % LAYERS for row in range(3)] for position in range(NEW)]
    model = exit_model("llama")
    output = generate(
        model,
        prompts_of(LENGTHS),
        NEW,
        fixed_exit_layers=forced,
        full_depth_first_token=first,
        skipped_states=skipped_states,
    )
    expected = torch.tensor(forced).T
    if first:
        expected[:, 0] = LAYERS
    assert torch.equal(output.exit_layers, expected)
    for row, text in enumerate(prompts_of(LENGTHS)):
        # what is still due: the oracle asks about a token after every layer but the last, until it leaves
        left: list[int] = [forced[place][row] for place in range(first, NEW)]

        def decide(index: int, *states: Any, left: list[int] = left) -> torch.Tensor:
            goes = index + 1 == left[0]
            if goes or index == LAYERS - 2:
                left.pop(0)
            return torch.tensor(goes)

        tokens, _ = naive_generate(
            model, text, NEW, decide, full_depth_first_token=first, skipped=skipped_states
        )
        assert new_tokens_of(output, prompts_of(LENGTHS))[row] == tokens


# --- All tokens at once ---------------------------------------------------------------------------


@EVERY_TYPE
@torch.no_grad()
def test_teacher_forced_pass_agrees_with_decoding(model_type: str) -> None:
    model, prompts = exit_model(model_type, "low_rank"), prompts_of(LENGTHS)
    output = generate(model, prompts, NEW, full_depth_first_token=False)
    _, mask = left_padded_batch(prompts)
    length = mask.shape[1]
    mask = torch.cat([mask, mask.new_ones(3, NEW)], dim=1)
    may_leave = torch.zeros_like(mask, dtype=torch.bool)
    may_leave[:, length - 1 :] = True
    normed, exit_layer = model.exit_pass(
        output.sequences, mask, may_leave, naive_decide(model, "policy", 0.5)
    )
    predicts = slice(length - 1, -1)
    assert torch.equal(exit_layer[:, predicts], output.exit_layers)
    assert (exit_layer[:, : length - 1] == LAYERS).all()
    tokens = output.sequences[:, length:]
    for row in range(3):
        for place in range(NEW):
            at = length - 1 + place
            logits = model.exit_logits(int(exit_layer[row, at]) - 1, normed[row, at])
            assert int(logits.argmax()) == tokens[row, place]


# --- Any lengths, thresholds and batches ----------------------------------------------------------


@given(
    lengths=st.lists(st.integers(1, 8), min_size=1, max_size=4),
    threshold=st.floats(0.05, 0.95),
    model_type=st.sampled_from(["llama", "mistral", "gpt_neox", "gemma3_text"]),
    first=st.booleans(),
    skipped_states=st.sampled_from(["copy", "recompute"]),
    new_tokens=st.integers(1, 7),
)
def test_whatever_comes_the_oracle_agrees(
    lengths: list[int], threshold: float, model_type: str, first: bool, skipped_states: str, new_tokens: int
) -> None:
    assert_equals_oracle(
        exit_model(model_type),
        lengths,
        new_tokens,
        threshold=threshold,
        full_depth_first_token=first,
        skipped_states=skipped_states,
    )
