"""Where lossless text could part from the full model's: position tables, angles by length, processors with a memory."""

from __future__ import annotations

import copy
import logging
import pickle
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from test_lossless import calm_last_layers
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList, WatermarkingConfig

from consistentee.backbones import decoders
from consistentee.inference.decoder.functional_decoder import FunctionalDecoder
from consistentee.models.causal_lm import EarlyExitForCausalLM
from consistentee.models.generate import MOST_CLOCKS
from tiny_decoders import LAYERS, generate, prompt, tiny_decoder, tiny_exit_model

BATCHES = ((5,), (9,), (3, 7, 5), (7, 1, 7, 4))
DRAFTING = {"adaptive_drafts": False, "draft_tokens": 5}

pytestmark = pytest.mark.usefixtures("one_thread")


def prompts_of(lengths: Sequence[int]) -> list[list[int]]:
    return [prompt(length, seed) for seed, length in enumerate(lengths)]


# --- Learned positions ----------------------------------------------------------------------------

POSITIONS = 20


@pytest.fixture(scope="module")
def gpt2() -> EarlyExitForCausalLM:
    return tiny_exit_model("gpt2", max_position_embeddings=POSITIONS, exit_values={"threshold": 0.3})


@pytest.mark.parametrize(
    "options", [{"mode": "full"}, {"mode": "lossless", **DRAFTING}], ids=["full", "lossless"]
)
@pytest.mark.parametrize("lengths", BATCHES, ids=str)
def test_texts_fill_the_position_table_as_huggingfaces_do(
    gpt2: EarlyExitForCausalLM, lengths: tuple[int, ...], options: dict[str, Any]
) -> None:
    prompts = prompts_of(lengths)
    for new_tokens in (
        POSITIONS - max(lengths),
        POSITIONS - max(lengths) + 1,
    ):  # the last token needs no position
        expected = generate(gpt2.backbone, prompts, new_tokens)
        output = generate(gpt2, prompts, new_tokens, **options)
        assert output.sequences.tolist() == expected.sequences.tolist()
        assert options["mode"] == "full" or output.drafted > 0


@pytest.mark.parametrize("mode", ["early-exit", "full", "lossless"])
@pytest.mark.parametrize("lengths", BATCHES, ids=str)
def test_texts_beyond_the_position_table(
    gpt2: EarlyExitForCausalLM, lengths: tuple[int, ...], mode: str
) -> None:
    prompts, new_tokens = prompts_of(lengths), POSITIONS - max(lengths) + 1
    options = {"mode": mode, **(DRAFTING if mode == "lossless" else {})}
    whole = generate(gpt2, prompts, new_tokens, **options)
    with pytest.raises(
        ValueError, match=r"must fit into the 20 positions that the model knows, got .* fewer max_new_tok"
    ):
        generate(gpt2, prompts, new_tokens + 1, **options)
    ends = sorted({row[-1] for row in whole.sequences.tolist()})  # each of them ends its text just in time
    ended = generate(gpt2, prompts, 40, eos_token_id=ends, **options)
    assert int((ended.exit_layers > 0).sum(1).max()) <= new_tokens


@pytest.mark.parametrize("mode", ["early-exit", "full", "lossless"])
def test_prompts_longer_than_the_position_table(gpt2: EarlyExitForCausalLM, mode: str) -> None:
    with pytest.raises(
        ValueError, match=r"must fit into the 20 positions that the model knows, got 21 tokens"
    ):
        generate(gpt2, prompts_of((3, POSITIONS + 1)), 2, mode=mode)


def test_no_token_is_drafted_that_cannot_be_verified() -> None:
    """What lies beyond the last token that was asked for is not computed."""
    model = calm_last_layers(tiny_exit_model("llama"), 0.0, first=LAYERS - 1)
    static = {"criterion": "static", "threshold": LAYERS - 1, "adaptive_drafts": False, "draft_tokens": 5}
    for new_tokens in range(1, 9):
        output = generate(model, prompts_of((4, 6)), new_tokens, mode="lossless", **static)
        assert output.drafted == output.accepted
        drafted = (output.exit_layers == LAYERS - 1).sum()
        assert int(drafted) == output.accepted
        assert int(output.exit_layers[:, -1].min()) == LAYERS


# --- Angles that change with the length -----------------------------------------------------------

LONG = [1.0, 3.0, 5.0, 9.0]
ROPES = {
    "dynamic": {"rope_type": "dynamic", "factor": 8.0, "rope_theta": 10_000.0},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": LONG,
        "factor": 4.0,
        "original_max_position_embeddings": 12,
    },
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0},
}


def rope_values(rope: str) -> dict[str, Any]:
    return {"rope_parameters": ROPES[rope], "max_position_embeddings": 48 if rope == "longrope" else 12}


@pytest.mark.parametrize(
    "model_type, lengths",
    [
        ("llama", (5,)),
        ("llama", (14,)),
        ("llama", (11, 3, 8, 11)),
        ("llama", (15, 2)),
        ("qwen2", (11, 3, 8, 11)),
    ],
    ids=str,
)
@pytest.mark.parametrize("rope", list(ROPES))
def test_angles_are_those_of_one_token_after_the_other(
    rope: str, lengths: tuple[int, ...], model_type: str
) -> None:
    values = rope_values(rope)
    prompts = prompts_of(lengths)
    # A model of its own: its angles remember how long the texts before were.
    expected = generate(tiny_decoder(model_type, **values), prompts, 24)
    model = calm_last_layers(tiny_exit_model(model_type, **values), 1.0)
    for options in (
        {"mode": "full"},
        {"mode": "full"},
        {"mode": "lossless", **DRAFTING, "threshold": 0.3},
        {"mode": "early-exit", "threshold": 1.0},
        {"mode": "early-exit", "threshold": 1.0, "full_depth_first_token": False},
        {
            "mode": "early-exit",
            "threshold": 1.0,
            "full_depth_first_token": False,
            "skipped_states": "recompute",
        },
    ):
        output = generate(model, prompts, 24, **options)
        assert output.sequences.tolist() == expected.sequences.tolist(), options
        assert options["mode"] != "lossless" or output.drafted > 0
    if rope != "linear":
        plain = generate(tiny_decoder(model_type), prompts, 24)
        assert (
            plain.sequences.tolist() != expected.sequences.tolist()
        )  # the texts reach where the angles change


def test_rows_that_end_leave_the_angles_as_they_are() -> None:
    """The longest row ends first; Hugging Face counts on for it."""
    prompts = prompts_of((13, 4, 6))
    model = tiny_exit_model("llama", **rope_values("dynamic"))
    ends = generate(model, prompts, 24, mode="full").sequences[0, 13 + 3].item()
    expected = generate(tiny_decoder("llama", **rope_values("dynamic")), prompts, 24, eos_token_id=ends)
    for options in ({"mode": "full"}, {"mode": "lossless", **DRAFTING, "threshold": 0.3}):
        output = generate(model, prompts, 24, eos_token_id=ends, **options)
        assert output.sequences.tolist() == expected.sequences.tolist()


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_threads_do_not_share_what_angles_remember(rope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = FunctionalDecoder(tiny_decoder("llama", **rope_values(rope)))
    lengths = {"short": 15, "long": 40}

    def angles(name: str) -> list[Tensor]:
        found = decoder.rotary(torch.arange(lengths[name]), lengths[name])["full_attention"]
        assert found is not None
        return list(found)

    expected = {name: angles(name) for name in lengths}
    tables = decoders.rotary_tables
    begun, other_is_done = threading.Event(), threading.Event()
    used: dict[str, set[int]] = {name: set() for name in lengths}

    def slow_tables(model: Any, like: Tensor, positions: Tensor, rotary: Any) -> Any:
        name = threading.current_thread().name
        used[name].add(id(rotary))
        found = tables(model, like, positions, rotary)
        if name == "short" and not begun.is_set():  # between its two calls
            begun.set()
            assert other_is_done.wait(60)
        return found

    monkeypatch.setattr(decoders, "rotary_tables", slow_tables)
    found: dict[str, list[Tensor]] = {}
    threads = [
        threading.Thread(name=name, target=lambda name=name: found.update({name: angles(name)}))
        for name in lengths
    ]
    threads[0].start()
    assert begun.wait(60)
    threads[1].start()
    threads[1].join()
    other_is_done.set()
    threads[0].join()
    for name in lengths:
        for ours, theirs in zip(found[name], expected[name], strict=True):
            assert torch.equal(ours, theirs)
    assert used["short"].isdisjoint(used["long"])


def test_copies_have_angles_of_their_own() -> None:
    decoder = FunctionalDecoder(tiny_decoder("llama", **rope_values("dynamic")))
    decoder.rotary(torch.arange(40), 40)
    rotary: Any = decoder._length_rotary
    for twin in (copy.deepcopy(rotary), pickle.loads(pickle.dumps(rotary))):  # noqa: S301
        assert twin.module is not rotary.module
        assert twin.module.max_seq_len_cached == 12  # as new


# --- Processors and criteria ----------------------------------------------------------------------


class Counting:
    """A processor that changes its mind with every call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        scores = scores.clone()
        scores[:, 3 + 7 * self.calls % 90] += 4
        return scores


class StopsAt(StoppingCriteria):
    """Ends a row of the batch after so many calls, each row after its own."""

    def __init__(self, calls: Sequence[int]) -> None:
        self.calls, self.count = torch.tensor(calls), 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        self.count += 1
        return self.calls[: len(input_ids)] <= self.count


PURE: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.5},
    "ngrams": {"no_repeat_ngram_size": 2},
    "encoder": {"encoder_repetition_penalty": 1.4, "encoder_no_repeat_ngram_size": 2},
    "lengths": {"min_length": 18, "min_new_tokens": 9, "eos_token_id": list(range(3, 60))},
    "words": {"bad_words_ids": [[5], [6, 7]], "sequence_bias": [[[9], 3.0], [[9, 11], -4.0]]},
    "forced": {"forced_eos_token_id": 7, "forced_bos_token_id": 8},
    "suppressed": {"suppress_tokens": list(range(3, 50)), "begin_suppress_tokens": list(range(50, 60))},
    "decay": {"exponential_decay_length_penalty": (4, 1.3), "eos_token_id": 9},
    "clean": {"remove_invalid_values": True, "renormalize_logits": True},
    "lefthash": {"watermarking_config": WatermarkingConfig(bias=4.0)},
    "selfhash": {"watermarking_config": WatermarkingConfig(bias=4.0, seeding_scheme="selfhash")},
}


@pytest.fixture(scope="module")
def drafting() -> EarlyExitForCausalLM:
    return calm_last_layers(tiny_exit_model("llama"), 0.35)


@pytest.mark.parametrize("name", list(PURE))
@pytest.mark.parametrize("lengths", [(6,), (1,), (6, 2, 9)], ids=str)
def test_processors_of_the_text_alone_keep_their_drafts(
    drafting: EarlyExitForCausalLM, lengths: tuple[int, ...], name: str
) -> None:
    prompts, options = prompts_of(lengths), PURE[name]
    expected = generate(drafting.backbone, prompts, 20, **options)
    output = generate(drafting, prompts, 20, mode="lossless", **DRAFTING, **options)
    assert output.sequences.tolist() == expected.sequences.tolist()
    assert output.drafted > 0


def stateful_options(name: str, rows: int) -> dict[str, Any]:
    if name == "guidance":
        negative = torch.arange(3 * rows).view(rows, 3) + 4
        return {
            "guidance_scale": 1.7,
            "negative_prompt_ids": negative,
            "negative_prompt_attention_mask": torch.ones_like(negative),
        }
    if name == "counting":
        return {"logits_processor": LogitsProcessorList([Counting()])}
    if name == "prefix":
        calls: list[int] = []

        def allowed(row: int, tokens: Tensor) -> list[int]:
            calls.append(row)
            return list(range(3 + len(calls) % 40, 96, 1 + row))

        return {"prefix_allowed_tokens_fn": allowed}
    # With an end of text, which no text reaches here, Hugging Face pads rows that have ended.
    return {"stopping_criteria": StoppingCriteriaList([StopsAt([9, 5, 12])]), "eos_token_id": 1000}


@pytest.mark.parametrize("name", ["guidance", "counting", "prefix", "criteria"])
@pytest.mark.parametrize("lengths", [(6,), (6, 2, 9)], ids=str)
def test_those_that_remember_are_served_without_drafts(
    drafting: EarlyExitForCausalLM, lengths: tuple[int, ...], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    rows, prompts = len(lengths), prompts_of(lengths)
    expected = generate(drafting.backbone, prompts, 16, **stateful_options(name, rows))
    plain = generate(drafting.backbone, prompts, 16)
    assert expected.sequences.tolist() != plain.sequences.tolist()
    named = {
        "guidance": "UnbatchedClassifierFreeGuidanceLogitsProcessor",
        "counting": "Counting",
        "prefix": "PrefixConstrainedLogitsProcessor",
        "criteria": "StopsAt",
    }[name]
    drafts = name == "criteria" and rows == 1  # is asked about each token in turn
    for options in ({"mode": "full"}, {"mode": "lossless", **DRAFTING}):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            output = generate(drafting, prompts, 16, **options, **stateful_options(name, rows))
        assert output.sequences.tolist() == expected.sequences.tolist()
        told = [record.getMessage() for record in caplog.records if record.name.startswith("consistentee")]
        if options["mode"] == "full" or drafts:
            assert not told
            continue
        assert told == [
            f'mode "lossless" generates without drafts, through all layers: {named} may depend on more than the '
            "text so far."
        ]
        assert output.drafted == output.accepted == 0
        assert output.exit_layers[output.exit_layers > 0].unique().tolist() == [LAYERS]


def test_thresholds_without_end_do_not_fill_the_memory() -> None:
    """A server's clients may send any; what was learnt of the last ones' speed is kept."""
    model: Any = tiny_exit_model("llama")
    options = {"mode": "lossless", "criterion": "softmax_margin"}
    for number in range(MOST_CLOCKS + 5):
        generate(model, prompts_of((3,)), 2, threshold=number / 1000, **options)
    clocks = model.exit_weights().draft_clocks
    assert len(clocks) == MOST_CLOCKS
    last = list(clocks.values())[-1]
    generate(model, prompts_of((3,)), 2, threshold=(MOST_CLOCKS + 4) / 1000, **options)
    assert list(clocks.values())[-1] is last
