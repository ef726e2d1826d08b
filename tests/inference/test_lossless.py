"""Lossless drafting: the text of the full model, whatever is drafted, and nothing computed twice."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from consistentee.inference.decoder.exit_rules import PolicyRule
from consistentee.inference.decoder.lossless import (
    CHECK_EVERY,
    CHECKED,
    SHORTEST_PAUSE,
    SHORTEST_TRIAL,
    TRIAL,
    TRYING,
    DraftClock,
    DraftedRow,
)
from consistentee.models.causal_lm import EarlyExitForCausalLM
from tiny_decoders import (
    EVERY_TYPE,
    LAYERS,
    PAD,
    generate,
    layer_calls,
    new_tokens_of,
    prompt,
    tiny_exit_model,
)

NEW = 14
LENGTHS = (6, 2, 9, 1, 4)

pytestmark = pytest.mark.usefixtures("one_thread")


def prompts_of(lengths: Sequence[int]) -> list[list[int]]:
    return [prompt(length, seed) for seed, length in enumerate(lengths)]


@torch.no_grad()
def calm_last_layers(model: Any, factor: float, first: int = 1) -> EarlyExitForCausalLM:
    """Let layers add little to the state, and exits read it as the last layer does: drafts become right."""
    for layer in model.backbone.model.layers[first:]:
        layer.self_attn.o_proj.weight.mul_(factor)
        layer.mlp.down_proj.weight.mul_(factor)
    for norm in model.exit_heads.norms:
        norm.load_state_dict(model.backbone.model.norm.state_dict())
    return model


@functools.cache
def exit_model(model_type: str, exit_head: str = "shared") -> EarlyExitForCausalLM:
    return tiny_exit_model(model_type, exit_head)


@functools.cache
def drafting_model() -> EarlyExitForCausalLM:
    """Some of its drafts are right, and some are wrong."""
    return calm_last_layers(tiny_exit_model("llama"), 0.35)


def assert_lossless(
    model: EarlyExitForCausalLM,
    lengths: Sequence[int] = LENGTHS,
    new_tokens: int = NEW,
    *,
    lossless: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Compare with the full model's text, row by row and as a batch; returns the output."""
    prompts = prompts_of(lengths)
    expected = generate(model, prompts, new_tokens, mode="full", **options)
    options = {**options, "adaptive_drafts": False, **(lossless or {})}
    output = generate(model, prompts, new_tokens, mode="lossless", **options)
    assert output.sequences.tolist() == expected.sequences.tolist()
    assert output.exit_layers.shape == expected.exit_layers.shape
    assert torch.equal(output.exit_layers > 0, expected.exit_layers > 0)
    assert 0 <= output.accepted <= output.drafted
    return output


# --- The full model's text ------------------------------------------------------------------------


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("lengths", [(6,), (1,), LENGTHS], ids=str)
@EVERY_TYPE
def test_text_is_the_full_models(model_type: str, lengths: tuple[int, ...], adaptive: bool) -> None:
    output = assert_lossless(exit_model(model_type), lengths, lossless={"adaptive_drafts": adaptive})
    if not adaptive:
        assert output.drafted > output.accepted  # random exits are wrong most of the time
    expected = generate(exit_model(model_type).backbone, prompts_of(lengths), NEW)
    assert torch.equal(output.sequences, expected.sequences)


@pytest.mark.parametrize("draft_tokens", range(1, 7))
@pytest.mark.parametrize("lengths", [(6,), LENGTHS], ids=["one", "five"])
def test_any_number_of_drafts(lengths: tuple[int, ...], draft_tokens: int) -> None:
    output = assert_lossless(drafting_model(), lengths, 40, lossless={"draft_tokens": draft_tokens})
    assert 0 < output.accepted < output.drafted  # something is kept and something is thrown away


@pytest.mark.parametrize("exit_head", ["low_rank", "separate"])
def test_heads(exit_head: str) -> None:
    assert_lossless(exit_model("gemma2", exit_head))
    assert_lossless(exit_model("gpt2", exit_head))


@pytest.mark.parametrize(
    "criterion, threshold",
    [("softmax_margin", 0.2), ("state_similarity", 0.5), ("confidence_classifier", 0.5), ("static", 2)],
)
def test_criteria(criterion: str, threshold: float) -> None:
    output = assert_lossless(
        drafting_model(), new_tokens=30, lossless={"criterion": criterion, "threshold": threshold}
    )
    assert output.accepted > 0


@given(
    lengths=st.lists(st.integers(1, 8), min_size=1, max_size=4),
    threshold=st.floats(0, 1),
    draft_tokens=st.integers(1, 6),
    new_tokens=st.integers(1, 16),
)
def test_whatever_comes_the_text_is_the_same(
    lengths: list[int], threshold: float, draft_tokens: int, new_tokens: int
) -> None:
    for model in (drafting_model(), exit_model("gemma3_text")):
        assert_lossless(
            model, lengths, new_tokens, lossless={"threshold": threshold, "draft_tokens": draft_tokens}
        )


# --- Ends of texts --------------------------------------------------------------------------------


@pytest.mark.parametrize("new_tokens", range(1, 9))
def test_the_maximum_cuts_drafts(new_tokens: int) -> None:
    output = assert_lossless(drafting_model(), new_tokens=new_tokens, lossless={"draft_tokens": 5})
    assert output.exit_layers.shape == (len(LENGTHS), new_tokens)


@pytest.mark.parametrize("lengths", [(6,), LENGTHS], ids=["one", "five"])
def test_texts_end_amid_drafts(lengths: tuple[int, ...]) -> None:
    model = calm_last_layers(tiny_exit_model("llama"), 0.1)
    texts = new_tokens_of(generate(model, prompts_of(lengths), 30, mode="full"), prompts_of(lengths))
    amid = 0
    for end in sorted({token for row in texts for token in row})[:24:3]:
        output = assert_lossless(
            model, lengths, 30, eos_token_id=end, lossless={"draft_tokens": 6, "threshold": 0.2}
        )
        last = [row[row > 0][-1] for row in output.exit_layers]
        amid += sum(int(layer) < LAYERS for layer in last)  # the end itself was drafted
    assert amid > 0


class AfterPair(StoppingCriteria):
    """Ends a text whose last two tokens are both below a limit."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return (input_ids[:, -2:] < self.limit).all(-1)


def test_own_stopping_criteria() -> None:
    lengths = []
    for limit in (20, 40, 60):
        criteria = StoppingCriteriaList([AfterPair(limit)])
        output = assert_lossless(drafting_model(), new_tokens=30, stopping_criteria=criteria)
        lengths.append(output.exit_layers.shape[1])
    assert len(set(lengths)) > 1


# --- Logits processors ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
        {"no_repeat_ngram_size": 1, "bad_words_ids": [[5], [6, 7]]},
        {"min_new_tokens": 6, "eos_token_id": list(range(3, 60))},
        {"suppress_tokens": list(range(3, 50))},
    ],
    ids=lambda options: "+".join(options),
)
@pytest.mark.parametrize("lengths", [(6,), LENGTHS], ids=["one", "five"])
def test_processors(lengths: tuple[int, ...], options: dict[str, Any]) -> None:
    plain = generate(drafting_model(), prompts_of(lengths), 24, mode="full")
    output = assert_lossless(drafting_model(), lengths, 24, **options)
    assert not torch.equal(output.sequences, plain.sequences)
    assert output.drafted > 0


def test_processors_know_their_row() -> None:
    """`prefix_allowed_tokens_fn` is told the row: odd rows may use other tokens than even ones."""

    def allowed(row: int, tokens: Tensor) -> list[int]:
        return list(range(10, 50)) if row % 2 else list(range(50, 90))

    assert_lossless(drafting_model(), new_tokens=10, prefix_allowed_tokens_fn=allowed)


def test_own_processors_see_the_text_so_far() -> None:
    def add_by_length(input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, 3 + input_ids.shape[1] % 90] += 3
        return scores

    assert_lossless(drafting_model(), new_tokens=20, logits_processor=LogitsProcessorList([add_by_length]))


# --- What it costs --------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(6,), (5, 5, 5), LENGTHS], ids=str)
@pytest.mark.parametrize("draft_tokens", [1, 3, 5])
def test_right_drafts_cost_nothing_extra(draft_tokens: int, lengths: tuple[int, ...]) -> None:
    """The last layer does nothing, so that drafts behind the third are right: each token runs each layer once."""
    model = calm_last_layers(tiny_exit_model("llama"), 0.0, first=LAYERS - 1)
    new_tokens = 1 + 2 * (draft_tokens + 1)
    with layer_calls() as calls:
        output = assert_lossless(
            model,
            lengths,
            new_tokens,
            lossless={"criterion": "static", "threshold": LAYERS - 1, "draft_tokens": draft_tokens},
        )
    rows = len(lengths)
    assert output.drafted == output.accepted == 2 * draft_tokens * rows
    assert output.exit_layers.tolist() == [[LAYERS] + ([LAYERS - 1] * draft_tokens + [LAYERS]) * 2] * rows
    # first the full model's prompt and tokens, then ours
    full = LAYERS * new_tokens
    ours = calls[full + LAYERS :]
    by_layer = [sum(tokens for index, tokens in ours if index == layer) for layer in range(LAYERS)]
    assert by_layer == [rows * (new_tokens - 1)] * LAYERS
    assert sum(index == LAYERS - 1 for index, _ in ours) == 2  # the last layer's weights are read twice only


def test_wrong_drafts_cost_their_layers_and_no_more() -> None:
    model, prompts, new_tokens = drafting_model(), prompts_of((6,)), 40
    with layer_calls() as calls:
        output = generate(model, prompts, new_tokens, mode="lossless", adaptive_drafts=False, draft_tokens=3)
    run = sum(tokens for index, tokens in calls if index == 0) - len(prompts[0])
    rejected = output.drafted - output.accepted
    assert rejected > 0
    # at most the unverified drafts of the end, and what was drafted behind a wrong draft
    assert new_tokens - 1 - 3 <= run <= new_tokens - 1 + 3 * rejected + 3
    for layer in range(LAYERS):
        assert sum(tokens for index, tokens in calls if index == layer) - len(prompts[0]) <= run


def test_nothing_is_drafted_where_nobody_leaves() -> None:
    output = assert_lossless(drafting_model(), lossless={"threshold": 1.0})
    assert output.drafted == output.accepted == 0
    assert output.exit_layers.unique().tolist() == [LAYERS]


def test_draft_threshold_stands_in_for_the_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    model = drafting_model()
    assert assert_lossless(model, lossless={"draft_threshold": 1.0}).drafted == 0
    assert assert_lossless(model, lossless={"draft_threshold": 0.0}).drafted > 0
    monkeypatch.setattr(model.config, "draft_threshold", 1.0)
    own = assert_lossless(model, lossless={"threshold": 0.0})
    assert own.drafted > 0  # what is said in the call counts
    early = generate(model, prompts_of((5,)), 8)
    assert int(early.exit_layers.min()) < LAYERS  # and only drafts are held to it


def test_drafts_leave_from_the_first_exit_layer_on() -> None:
    layers = [
        assert_lossless(drafting_model(), lossless={"threshold": 0.0, "min_exit_layer": first}).exit_layers
        for first in (1, 3)
    ]
    assert [int(found[found > 0].min()) for found in layers] == [1, 3]


def test_draft_threshold_is_the_policys_alone() -> None:
    model = tiny_exit_model("llama", exit_values={"draft_threshold": 0.3, "thresholds": {"static": 2}})
    output = generate(model, prompts_of((5,)), 8, mode="lossless", criterion="static", adaptive_drafts=False)
    assert output.drafted > 0


def test_finished_rows_leave() -> None:
    model, lengths = drafting_model(), (5, 5, 5, 5)
    texts = new_tokens_of(generate(model, prompts_of(lengths), 30, mode="full"), prompts_of(lengths))
    end = texts[0][4]
    with layer_calls() as calls:
        output = generate(
            model, prompts_of(lengths), 30, mode="lossless", adaptive_drafts=False, eos_token_id=end
        )
    assert (output.exit_layers == 0).any()
    ended = int(((output.exit_layers > 0).sum(1) <= 1).sum())  # at the first token, which the prompt gives
    widths = [tokens for index, tokens in calls if index == 0][1:]
    assert widths[0] == 4 - ended
    assert min(widths) < widths[0]
    padding = output.sequences[:, 5:][output.exit_layers == 0]
    assert padding.unique().tolist() == [PAD]


@pytest.mark.parametrize("paused", [True, False])
def test_texts_of_rows_that_end_at_different_times(paused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a pause rows go on as in plain decoding, those left over among them, padded or not."""
    if paused:
        monkeypatch.setattr(DraftClock, "drafts", False)
    model = drafting_model()
    for lengths in ((5, 5, 5, 5), LENGTHS):
        texts = new_tokens_of(generate(model, prompts_of(lengths), 30, mode="full"), prompts_of(lengths))
        for end in (texts[0][4], texts[1][7], texts[2][2]):
            output = assert_lossless(
                model, lengths, 30, eos_token_id=end, lossless={"adaptive_drafts": paused}
            )
            assert (output.drafted == 0) == paused


# --- The clock ------------------------------------------------------------------------------------


def known_clock() -> DraftClock:
    return DraftClock(full_samples=deque([1.0]), paused_for=0)


def test_the_clock_begins_with_full_depth() -> None:
    clock = DraftClock()
    assert not clock.drafts
    clock.full_depth(1.0, tokens=1, rows=1)
    assert not clock.drafts
    assert clock.full_seconds == 1.0
    clock.full_depth(2.0, tokens=1, rows=1)
    assert clock.drafts
    assert clock.full_seconds == 1.5  # the median: one slow pass among many changes nothing
    for seconds in (1.0, 1.0, 50.0):
        clock.full_depth(seconds, tokens=1, rows=1)
    assert clock.full_seconds == 1.0


def test_rows_share_the_seconds_but_not_the_pause() -> None:
    clock = DraftClock()
    clock.full_depth(2.0, tokens=4, rows=4)
    assert clock.full_seconds == 0.5
    assert not clock.drafts  # four tokens, of four rows: one step


def test_a_pause_is_as_long_as_what_was_lost_demands() -> None:
    clock = known_clock()
    clock.cycle(5.8, tokens=6, rows=1)
    assert clock.drafts
    clock = known_clock()
    clock.cycle(18.0, tokens=6, rows=1)  # 12 tokens' time lost, of which a pause makes 2 %
    assert clock.paused_for == 600
    in_a_batch = known_clock()
    in_a_batch.cycle(72.0, tokens=24, rows=4)
    assert in_a_batch.paused_for == 600
    for _ in range(600):
        assert not clock.drafts
        clock.full_depth(1.0, tokens=1, rows=1)
    assert clock.drafts
    clock.cycle(6.01, tokens=6, rows=1)
    assert clock.paused_for == SHORTEST_PAUSE == 16
    assert TRYING == 0.02


@pytest.mark.parametrize(
    "rows, steps", [(1, TRIAL), (2, TRIAL // 2), (4, SHORTEST_TRIAL), (32, SHORTEST_TRIAL)]
)
def test_a_trial_is_long_enough_to_be_judged_and_short_in_a_batch(rows: int, steps: int) -> None:
    clock = known_clock()
    for _ in range(steps - 1):
        clock.cycle(9.0 * rows, tokens=rows, rows=rows)  # a token of each row
        assert clock.drafts
    clock.cycle(9.0 * rows, tokens=rows, rows=rows)
    assert not clock.drafts


def test_one_bad_cycle_among_good_ones_is_forgiven() -> None:
    clock = known_clock()
    for _ in range(5):
        clock.cycle(3.0, tokens=6, rows=1)
    clock.cycle(7.0, tokens=3, rows=1)
    assert clock.drafts
    for _ in range(5):
        clock.cycle(7.0, tokens=3, rows=1)
    assert not clock.drafts


def test_full_depth_is_timed_again_now_and_then() -> None:
    clock = known_clock()
    cycles = 0
    while clock.drafts:
        clock.cycle(7.0, tokens=8, rows=2)
        cycles += 1
    assert cycles * 4 == CHECK_EVERY
    for _ in range(CHECKED):
        assert not clock.drafts
        clock.full_depth(1.0, tokens=2, rows=2)
    assert clock.drafts


def test_a_cycle_without_tokens_does_not_pay() -> None:
    clock = known_clock()
    for _ in range(TRIAL):
        clock.cycle(0.1, tokens=0, rows=1)
    assert not clock.drafts
    unknown = DraftClock(paused_for=0)
    unknown.cycle(9.0, tokens=9, rows=1)
    assert unknown.drafts  # nothing to compare with


@pytest.mark.parametrize("pays", [True, False])
def test_drafting_stops_where_it_does_not_pay(pays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def clock() -> float:
        return now

    run = EarlyExitForCausalLM.exit_logits

    def slow(self: EarlyExitForCausalLM, layer_index: int, normed: Tensor) -> Tensor:
        nonlocal now
        now += 1.0 if layer_index == LAYERS - 1 else 0.5  # a full token or a verification; a draft
        return run(self, layer_index, normed)

    monkeypatch.setattr("consistentee.inference.decoder.lossless.time.perf_counter", clock)
    monkeypatch.setattr(EarlyExitForCausalLM, "exit_logits", slow)
    model: Any = calm_last_layers(tiny_exit_model("llama", "separate"), 0.0, first=LAYERS - 1)
    with torch.no_grad():
        for head in model.exit_heads.heads:
            head.weight.copy_(model.backbone.get_output_embeddings().weight)
            if not pays:
                head.weight.mul_(-1)  # every draft is wrong
    options = {"criterion": "static", "threshold": LAYERS - 1, "mode": "lossless", "draft_tokens": 3}
    output = generate(model, prompts_of((5,)), 40, adaptive_drafts=True, **options)
    assert output.sequences.tolist() == generate(model, prompts_of((5,)), 40, mode="full").sequences.tolist()
    always = generate(model, prompts_of((5,)), 40, adaptive_drafts=False, **options)
    assert always.drafted > 20
    assert (output.drafted > 20) == pays
    assert output.drafted > 0
    again = generate(model, prompts_of((5,)), 10, adaptive_drafts=True, **options)
    assert (again.drafted > 0) == pays  # the clock outlives a text


def test_rows_begin_empty() -> None:
    assert DraftedRow() == DraftedRow([], [], [], [])
    assert DraftedRow().tokens is not DraftedRow().tokens


def test_asking_in_vain_costs_little(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = 0

    def unsure(self: PolicyRule, layer_index: int, before: Tensor, *others: Any) -> list[bool]:
        nonlocal asked
        asked += 1
        return [False] * len(before)

    monkeypatch.setattr(PolicyRule, "exits", unsure)
    monkeypatch.setattr(
        "consistentee.inference.decoder.lossless.time.perf_counter", lambda: 1.0 + 0.001 * asked
    )
    model = tiny_exit_model("llama")
    options: dict[str, Any] = {"criterion": "policy", "threshold": 0.9, "mode": "lossless"}
    generate(model, prompts_of((5,)), 60, adaptive_drafts=False, **options)
    every_time, asked = asked, 0
    output = generate(model, prompts_of((5,)), 60, adaptive_drafts=True, **options)
    assert output.drafted == 0
    assert every_time == 58 * (LAYERS - 1)  # not about the last token, which nothing could verify
    assert asked == TRIAL * (LAYERS - 1)  # one trial; its loss is worth a longer pause than the text
