"""`generate`, `pipeline` and saving behave as Hugging Face's own do; what exits cannot serve is refused."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    PreTrainedTokenizerFast,
    TextStreamer,
    pipeline,
)
from transformers.utils import logging as transformers_logging

from consistentee.backbones.decoders import CACHE, CACHES
from consistentee.models.causal_lm import EarlyExitForCausalLM
from consistentee.models.configuration import EarlyExitCausalLMConfig
from consistentee.models.generate import EarlyExitGenerateOutput
from tiny_decoders import (
    EVERY_TYPE,
    LAYERS,
    PAD,
    VOCABULARY,
    generate,
    left_padded_batch,
    new_tokens_of,
    prompt,
    single_thread,
    tiny_decoder,
    tiny_exit_model,
)
from tiny_tokenizers import byte_tokenizer

NEW = 8
HEADS = pytest.mark.parametrize("exit_head", ["shared", "low_rank", "separate"])


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    transformers_logging.disable_progress_bar()
    with single_thread():
        yield


@functools.cache
def exit_model(model_type: str = "llama", exit_head: str = "shared") -> EarlyExitForCausalLM:
    return tiny_exit_model(model_type, exit_head)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words w3 to w96, and the special ones."""
    words = ["<pad>", "<s>", "</s>", *(f"w{number}" for number in range(3, VOCABULARY))]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<s>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


PROMPTS = [prompt(6), prompt(3, 1)]


# --- What comes back ------------------------------------------------------------------------------


def test_plain_call_returns_token_ids() -> None:
    input_ids, mask = left_padded_batch(PROMPTS)
    sequences = exit_model().generate(
        input_ids=input_ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=PAD
    )
    assert isinstance(sequences, Tensor)
    assert sequences.shape == (2, 6 + NEW)
    assert not sequences.is_inference()  # or it could not be trained on
    assert torch.equal(sequences[:, :6], input_ids)
    by_position = exit_model().generate(input_ids[:1], max_new_tokens=NEW, do_sample=False, pad_token_id=PAD)
    assert torch.equal(by_position, sequences[:1])


@pytest.mark.parametrize("mode", ["early-exit", "full", "lossless"])
def test_output_object(mode: str) -> None:
    output = generate(exit_model(), PROMPTS, NEW, mode=mode)
    assert isinstance(output, EarlyExitGenerateOutput)
    assert output.exit_layers.shape == (2, NEW)
    assert output.exit_layers.dtype == torch.int64
    assert output.scores is None
    assert output.logits is None
    assert (output.drafted is None) == (output.accepted is None) == (mode != "lossless")


@pytest.mark.parametrize("mode", ["early-exit", "full", "lossless"])
def test_what_comes_back_may_be_changed_and_trained_with(mode: str) -> None:
    kept = {} if mode == "lossless" else {"output_scores": True, "output_logits": True}
    output = generate(exit_model(), PROMPTS, NEW, mode=mode, **kept)
    kept_parts = [part for name in kept for part in output[name.removeprefix("output_")]]
    for value in (output.sequences, output.exit_layers, *kept_parts):
        assert not value.is_inference()
    costs = torch.zeros(LAYERS + 1, requires_grad=True)
    costs[output.exit_layers].sum().backward()
    output.exit_layers.sub_(1)


def test_output_object_without_a_cache() -> None:
    whole = generate(exit_model(), PROMPTS, NEW, mode="full", use_cache=False)
    assert isinstance(whole, EarlyExitGenerateOutput)
    assert whole.exit_layers.tolist() == [[LAYERS] * NEW] * 2
    ends = {"eos_token_id": new_tokens_of(whole, PROMPTS)[0][2], "output_scores": True}
    wanted = generate(exit_model(), PROMPTS, NEW, mode="full", **ends)
    ended = generate(exit_model(), PROMPTS, NEW, mode="full", use_cache=False, **ends)
    assert 0 in ended.exit_layers
    assert torch.equal(ended.sequences, wanted.sequences)
    assert torch.equal(ended.exit_layers, wanted.exit_layers)
    assert ended.exit_layers.dtype == torch.int64
    assert len(ended.scores) == len(wanted.scores)


@pytest.mark.parametrize("mode", ["early-exit", "full"])
def test_scores_and_logits(mode: str) -> None:
    options: dict[str, Any] = {"repetition_penalty": 1.7, "output_scores": True, "output_logits": True}
    output = generate(exit_model(), PROMPTS, NEW, mode=mode, **options)
    plain = generate(exit_model(), PROMPTS, NEW, mode=mode, repetition_penalty=1.7)
    assert torch.equal(output.sequences, plain.sequences)
    assert torch.equal(output.exit_layers, plain.exit_layers)
    assert len(output.scores) == len(output.logits) == NEW
    tokens = torch.tensor(new_tokens_of(output, PROMPTS))
    assert torch.equal(torch.stack(output.scores, dim=1).argmax(-1), tokens)
    assert not torch.equal(output.scores[0], output.logits[0])
    if mode == "full":
        theirs = generate(exit_model().backbone, PROMPTS, NEW, **options)
        for name in ("scores", "logits"):  # sums are in another order, which each processor chooses
            found, wanted = torch.stack(output[name]), torch.stack(theirs[name])
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@EVERY_TYPE
def test_autocast_changes_nothing(model_type: str) -> None:
    for options in (
        {"mode": "full"},
        {"mode": "early-exit"},
        {"mode": "early-exit", "skipped_states": "recompute"},
        {"mode": "lossless", "adaptive_drafts": False},
    ):
        wanted = generate(exit_model(model_type), PROMPTS, NEW, **options)
        fresh = tiny_exit_model(model_type)  # its weights are not yet laid out for decoding
        with torch.autocast("cpu", torch.bfloat16):
            found = generate(fresh, PROMPTS, NEW, **options)
            assert torch.is_autocast_enabled("cpu")
        assert torch.equal(found.sequences, wanted.sequences)
        assert torch.equal(found.exit_layers, wanted.exit_layers)


# --- Sampling -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.7, "top_k": 9, "top_p": 0.9}, {"min_p": 0.02, "repetition_penalty": 1.3}],
)
@pytest.mark.parametrize("rows", [1, 2])
def test_samples_are_huggingfaces(rows: int, options: dict[str, Any]) -> None:
    prompts = PROMPTS[:rows]
    texts = []
    for model, mode in ((exit_model(), {"mode": "full"}), (exit_model().backbone, {})):
        torch.manual_seed(7)
        texts.append(generate(model, prompts, NEW, do_sample=True, **options, **mode).sequences)
    assert torch.equal(*texts)
    greedy = generate(exit_model(), prompts, NEW, mode="full", **options)
    assert not torch.equal(texts[0], greedy.sequences)


@pytest.mark.parametrize("skipped_states", ["copy", "recompute"])
def test_samples_with_exits(skipped_states: str) -> None:
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outputs.append(generate(exit_model(), PROMPTS, NEW, do_sample=True, skipped_states=skipped_states))
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    assert not torch.equal(outputs[0].sequences, outputs[2].sequences)
    assert len(outputs[0].exit_layers.unique()) > 1


@pytest.mark.parametrize(
    "options", [{}, {"skipped_states": "recompute"}, {"mode": "full"}, {"mode": "full", "use_cache": False}]
)
def test_samples_from_a_generator(options: dict[str, Any]) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    wanted = generate(exit_model(), PROMPTS, NEW, do_sample=True, **options)
    torch.set_rng_state(before)
    own = torch.Generator().manual_seed(3)
    for same in (True, False):  # it goes on from one call to the next
        found = generate(exit_model(), PROMPTS, NEW, do_sample=True, generator=own, **options)
        assert torch.equal(found.sequences, wanted.sequences) == same
    assert torch.equal(torch.get_rng_state(), before)


def test_several_samples_per_prompt() -> None:
    output = generate(exit_model(), PROMPTS, NEW, do_sample=True, num_return_sequences=3)
    assert output.sequences.shape == (6, 6 + NEW)
    assert output.exit_layers.shape == (6, NEW)
    starts = output.sequences[:, :6].tolist()
    assert starts[0] == starts[1] == starts[2] != starts[3] == starts[5]
    assert len({tuple(row) for row in output.sequences.tolist()}) > 2


# --- Streamers, configs, stop strings --------------------------------------------------------------


class Recorder:
    """A streamer that keeps everything, in order."""

    def __init__(self) -> None:
        self.events: list[tuple[str, list[int]]] = []

    def put(self, value: Tensor) -> None:
        self.events.append(("tokens", value.flatten().tolist()))

    def put_exit_layers(self, layers: Tensor) -> None:
        self.events.append(("layers", layers.flatten().tolist()))

    def end(self) -> None:
        self.events.append(("end", []))


@pytest.mark.parametrize("mode", ["early-exit", "full", "lossless"])
def test_streamers_get_tokens_and_their_layers(mode: str) -> None:
    streamer = Recorder()
    output = generate(exit_model(), PROMPTS[:1], NEW, mode=mode, streamer=streamer)
    names = [name for name, _ in streamer.events]
    assert names == ["tokens", *["layers", "tokens"] * NEW, "end"]
    assert streamer.events[0][1] == PROMPTS[0]
    tokens = [value for name, values in streamer.events[1:] if name == "tokens" for value in values]
    layers = [value for name, values in streamer.events if name == "layers" for value in values]
    assert [tokens] == new_tokens_of(output, PROMPTS[:1])
    assert [layers] == output.exit_layers.tolist()


@pytest.mark.parametrize("mode", ["early-exit", "lossless"])
def test_text_streamers_write_text(mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tiny_tokenizer()
    output = generate(
        exit_model(), PROMPTS[:1], NEW, mode=mode, streamer=TextStreamer(tokenizer, skip_prompt=True)
    )
    written = capsys.readouterr().out
    assert written.split() == tokenizer.decode(output.sequences[0, 6:]).split()


@pytest.mark.parametrize("mode", ["early-exit", "full", "lossless"])
def test_generation_config_objects(mode: str) -> None:
    input_ids, mask = left_padded_batch(PROMPTS)
    given = GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=PAD, no_repeat_ngram_size=1)
    output = exit_model().generate(input_ids, given, attention_mask=mask, mode=mode)
    expected = generate(exit_model(), PROMPTS, 5, mode=mode, no_repeat_ngram_size=1)
    assert torch.equal(output, expected.sequences)
    by_name = exit_model().generate(
        input_ids=input_ids, attention_mask=mask, generation_config=given, mode=mode, max_new_tokens=3
    )
    assert torch.equal(by_name, output[:, :9])


@pytest.mark.parametrize(
    "options",
    [{"mode": "early-exit"}, {"mode": "full"}, {"mode": "full", "use_cache": False}, {"mode": "lossless"}],
)
def test_stop_strings(options: dict[str, Any]) -> None:
    tokenizer = byte_tokenizer()
    model = tiny_exit_model("llama", vocab_size=len(tokenizer))
    whole = generate(model, PROMPTS[:1], NEW, **options)
    pieces = [tokenizer.decode([token]) for token in whole.sequences[0, 6:].tolist()]
    stop = next(
        place for place, piece in enumerate(pieces) if place >= 2 and len(piece) == 1 and piece.isascii()
    )
    stopped = generate(model, PROMPTS[:1], NEW, stop_strings=[pieces[stop]], tokenizer=tokenizer, **options)
    assert stopped.sequences.shape[1] == 6 + pieces.index(pieces[stop]) + 1


def test_saved_defaults_are_used() -> None:
    model = tiny_exit_model("llama", exit_values={"mode": "lossless", "skipped_states": "recompute"})
    assert generate(model, PROMPTS, NEW).drafted is not None
    for options in ({"mode": "early-exit"}, {"mode": "full"}):
        assert generate(model, PROMPTS, NEW, **options).drafted is None
    exact = generate(model, PROMPTS, 20, mode="early-exit")
    assert torch.equal(
        exact.sequences, generate(model, PROMPTS, 20, mode="early-exit", skipped_states="recompute").sequences
    )
    for values in ({"threshold": 0.0}, {"criterion": "static", "threshold": 1.0}):
        early = tiny_exit_model("llama", exit_values={**values, "full_depth_first_token": False})
        assert generate(early, PROMPTS, NEW).exit_layers.unique().tolist() == [1]


def test_as_an_assistant_of_another_model() -> None:
    large: Any = tiny_decoder("llama", seed=9)
    input_ids, mask = left_padded_batch(PROMPTS[:1])
    for padding in (0, 2):  # a mask of ones alone is left out by some versions of transformers
        input_ids, mask = (functional.pad(one, (padding, 0)) for one in (input_ids, mask))
        options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False}
        expected = large.generate(input_ids, **options)
        assert torch.equal(large.generate(input_ids, assistant_model=exit_model(), **options), expected)


# --- Refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_beams": 2}, "num_beams must be 1 with exits, got 2: "),
        ({"mode": "lossless", "do_sample": True}, 'do_sample must be False in mode "lossless", got True: '),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens does not go with exits, got 3. "),
        ({"assistant_model": "itself"}, "assistant_model does not go with exits. Leave it out; "),
        ({"assistant_early_exit": 2}, "assistant_early_exit does not go with exits. "),
        ({"force_words_ids": [[5]]}, "force_words_ids does not go with exits, got [[5]]. "),
        ({"constraints": ["own"]}, "constraints does not go with exits, got ['own']. "),
        ({"use_mtp": True}, "use_mtp does not go with exits, got True. "),
        (
            {"cache_implementation": "paged"},
            "cache_implementation must be dynamic or static with exits, got paged: ",
        ),
        (
            {"cache_implementation": "quantized"},
            "cache_implementation must be dynamic or static with exits, ",
        ),
        (
            {"generation_config": GenerationConfig(cache_implementation="offloaded")},
            "cache_implementation must be dynamic or static with exits, got offloaded: ",
        ),
        ({"custom_generate": "own/loop"}, "custom_generate does not go with exits. "),
        ({"output_attentions": True}, "output_attentions must be False with exits, got True: "),
        ({"output_hidden_states": True}, "output_hidden_states must be False with exits, got True: "),
        ({"use_cache": False}, "use_cache must be true for exits, got False. "),
        ({"use_cache": False, "mode": "lossless"}, "use_cache must be true for exits, got False. "),
        ({"mode": "fast"}, 'mode must be one of early-exit, full, lossless, got "fast".'),
        ({"skipped_states": "drop"}, 'skipped_states must be one of copy, recompute, got "drop".'),
        ({"criterion": "entropy"}, "criterion must be one of policy, "),
        ({"criterion": "static"}, 'criterion "static" has no saved threshold. '),
        ({"threshold": 1.5}, "threshold must be in [0, 1] for policy, got 1.5."),
        ({"draft_tokens": 0}, "draft_tokens must be at least 1, got 0."),
        ({"fixed_exit_layers": []}, "fixed_exit_layers must hold at least one position "),
        (
            {"fixed_exit_layers": [[1]], "mode": "full"},
            "fixed_exit_layers must hold at least one position ",
        ),
        ({"fixed_exit_layers": [[1], [1, 2]]}, "fixed_exit_layers must hold for every new token 1 layers, "),
        ({"fixed_exit_layers": [[LAYERS + 1]]}, "fixed_exit_layers must hold for every new token 1 layers, "),
        (
            {"mode": "full", "threshold": 0.3},
            'threshold has no effect in mode "full", got 0.3. Leave it out, ',
        ),
        ({"mode": "full", "criterion": "policy"}, 'criterion has no effect in mode "full", got policy. '),
        ({"mode": "lossless", "skipped_states": "copy"}, 'skipped_states has no effect in mode "lossless", '),
        ({"draft_tokens": 3}, 'draft_tokens has no effect in mode "early-exit", got 3. '),
        ({"mode": "full", "min_exit_layer": 99}, 'min_exit_layer has no effect in mode "full", got 99. '),
        (
            {"mode": "full", "full_depth_first_token": False},
            'full_depth_first_token has no effect in mode "full", got False. ',
        ),
        (
            {"mode": "lossless", "full_depth_first_token": True},
            'full_depth_first_token has no effect in mode "lossless", got True. ',
        ),
        (
            {"mode": "full", "adaptive_drafts": False},
            'adaptive_drafts has no effect in mode "full", got False. ',
        ),
        ({"adaptive_drafts": True}, 'adaptive_drafts has no effect in mode "early-exit", got True. '),
        (
            {"criterion": "static", "threshold": 2, "min_exit_layer": 3},
            'min_exit_layer has no effect with criterion "static", got 3: its threshold is the layer. Leave it out, ',
        ),
        (
            {"mode": "lossless", "criterion": "static", "threshold": 2, "min_exit_layer": 3},
            'min_exit_layer has no effect with criterion "static", got 3: ',
        ),
        (
            {"fixed_exit_layers": [[1]], "min_exit_layer": 3},
            "min_exit_layer has no effect beside fixed_exit_layers, got 3. Leave out one of them.",
        ),
        (
            {"mode": "lossless", "criterion": "softmax_margin", "draft_threshold": 0.5},
            'draft_threshold has no effect with criterion "softmax_margin", got 0.5: it is the policy\'s. Give ',
        ),
        (
            {"mode": "lossless", "threshold": 0.5, "draft_threshold": 7.0},
            "draft_threshold has no effect beside threshold, got 7.0 and 0.5. Leave out one of them.",
        ),
        (
            {"mode": "lossless", "draft_threshold": 7.0},
            "draft_threshold must be in [0, 1], got 7.0.",
        ),
        ({"min_exit_layer": LAYERS + 1}, f"min_exit_layer must be from 1 to {LAYERS}, got {LAYERS + 1}."),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_exits_cannot_serve_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        generate(exit_model(), PROMPTS[:1], 4, **options)
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize("values", [{"draft_threshold": 7.0}, {"min_exit_layer": 0}])
def test_ranges_hold_where_nothing_is_drafted(values: dict[str, Any]) -> None:
    """Before the text: with a processor that may remember what it saw, `lossless` asks no exit."""
    options: dict[str, Any] = {
        "mode": "lossless",
        "prefix_allowed_tokens_fn": lambda *_: list(range(VOCABULARY)),
    }
    with pytest.raises(ValueError, match=f"^{next(iter(values))} must be "):
        generate(exit_model(), PROMPTS[:1], 4, **values, **options)


@pytest.mark.parametrize("mode", ["early-exit", "full", "lossless"])
@pytest.mark.parametrize("criterion", ["policy", "static"])
def test_saved_options_without_effect_are_not_refused(mode: str, criterion: str) -> None:
    values: dict[str, Any] = {
        "skipped_states": "recompute",
        "full_depth_first_token": False,
        "min_exit_layer": 3,
        "draft_tokens": 2,
        "draft_threshold": 0.5,
        "thresholds": {"static": 2},
    }
    model = tiny_exit_model("llama", exit_values=values)
    told = {} if mode == "full" else {"criterion": criterion}
    assert generate(model, PROMPTS, 4, mode=mode, **told).exit_layers.shape == (2, 4)
    if told:  # the threshold of the call counts, and the saved one of drafts does not
        told["threshold"] = 1.0
        assert generate(model, PROMPTS, 4, mode=mode, **told).exit_layers.shape == (2, 4)


@pytest.mark.parametrize("saved", ["quantized", "offloaded", "offloaded_static", "paged"])
def test_caches_of_the_models_own_settings_are_refused(saved: str) -> None:
    model = tiny_exit_model("llama")
    wanted = generate(model, PROMPTS, 4).sequences
    model.generation_config.cache_implementation = saved
    message = (
        f"^cache_implementation must be dynamic or static with exits, got {saved}: .* give .*=None where"
    )
    for options in ({}, {"generation_config": GenerationConfig()}):
        with pytest.raises(ValueError, match=message):
            generate(model, PROMPTS, 4, **options)
    assert torch.equal(generate(model, PROMPTS, 4, cache_implementation=None).sequences, wanted)
    assert torch.equal(generate(model, PROMPTS, 4, cache_implementation="static").sequences, wanted)
    own = GenerationConfig(cache_implementation="dynamic")
    input_ids, mask = left_padded_batch(PROMPTS)
    found = model.generate(input_ids, own, attention_mask=mask, max_new_tokens=4, pad_token_id=PAD)
    assert torch.equal(found, wanted)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
@pytest.mark.parametrize("mode", ["early-exit", "full", "lossless"])
def test_inputs_that_exits_cannot_serve_are_refused(mode: str) -> None:
    model = exit_model()
    input_ids, mask = left_padded_batch(PROMPTS)
    options: dict[str, Any] = {"max_new_tokens": 4, "mode": mode, "pad_token_id": PAD, "do_sample": False}
    with pytest.raises(
        ValueError, match=r"^attention_mask must have its padding on the left, got zeros behind ones."
    ):
        model.generate(input_ids=input_ids.flip(1), attention_mask=mask.flip(1), **options)
    with pytest.raises(
        ValueError, match=r"^attention_mask must have the shape of input_ids, \(2, 6\), got \(2, 5\)"
    ):
        model.generate(input_ids=input_ids, attention_mask=mask[:, 1:], **options)
    with pytest.raises(ValueError, match=r"^inputs_embeds does not go with exits. Give input_ids.$"):
        model.generate(inputs_embeds=model.get_input_embeddings()(input_ids), attention_mask=mask, **options)
    counted = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 1, 2]])
    kept = {"input_ids": input_ids, "attention_mask": mask}
    expected = model.generate(**kept, **options)
    assert torch.equal(model.generate(**kept, position_ids=counted, **options), expected)
    with pytest.raises(
        ValueError, match=r"^position_ids must count the tokens of each row from 0 with exits, "
    ):
        model.generate(**kept, position_ids=counted + 3, **options)
    cache = DynamicCache(config=model.backbone.config)
    with torch.no_grad():
        model.backbone(input_ids[:1, :3], **{CACHE: cache})
    for name in CACHES:
        with pytest.raises(ValueError, match=f"^({name}|{CACHE}) must be empty with exits: "):
            model.generate(input_ids=input_ids[:1], **{name: cache}, **options)
        empty = DynamicCache(config=model.backbone.config)
        assert model.generate(input_ids=input_ids[:1], **{name: empty}, **options).shape == (1, 10)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"exit_head": "own"}, 'exit_head must be one of shared, low_rank, separate, got "own".'),
        ({"criterion": "entropy"}, "criterion must be one of "),
        ({"mode": "fast"}, "mode must be one of "),
        ({"skipped_states": "drop"}, "skipped_states must be one of "),
        ({"policy_dropout": 1.0}, "policy_dropout must be in [0, 1), got 1.0"),
        ({"threshold": -0.5}, "threshold must be in [0, 1] for policy, got -0.5."),
        ({"criterion": "static", "threshold": 0.5}, "threshold must be at least 1 for static "),
        ({"exit_head_rank": 0}, "exit_head_rank must be at least 1, got 0."),
        ({"policy_hidden_size": 0}, "policy_hidden_size must be at least 1, got 0."),
        ({"draft_tokens": 0}, "draft_tokens must be at least 1, got 0."),
    ],
    ids=lambda value: str(value)[:30],
)
def test_configs_that_make_no_sense_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        EarlyExitCausalLMConfig(decoder_config=tiny_decoder("llama").config, **values)
    assert str(raised.value).startswith(message)


# --- Saved and loaded -----------------------------------------------------------------------------


@HEADS
@EVERY_TYPE
def test_saved_models_come_back(model_type: str, exit_head: str, tmp_path: Path) -> None:
    values = {"threshold": 0.4, "thresholds": {"static": 2.0}, "task": "alpaca", "draft_tokens": 3}
    model = tiny_exit_model(model_type, exit_head, exit_values=values)
    before = generate(model, PROMPTS, NEW)
    model.save_pretrained(tmp_path)
    for loaded in (
        EarlyExitForCausalLM.from_pretrained(tmp_path),
        AutoModelForCausalLM.from_pretrained(tmp_path),
    ):
        assert isinstance(loaded, EarlyExitForCausalLM)
        assert not loaded.training
        assert type(loaded.backbone) is type(model.backbone)
        weights = loaded.state_dict()
        assert weights.keys() == model.state_dict().keys()
        for name, weight in model.state_dict().items():
            assert torch.equal(weights[name], weight), name
        for name in (*values, "exit_head", "exit_head_rank", "mode", "criterion", "policy_hidden_size"):
            assert getattr(loaded.config, name) == getattr(model.config, name), name
        decoder = {**model.config.backbone_config.to_dict(), "dtype": "float32"}  # noted when saved
        assert loaded.config.backbone_config.to_dict() == decoder
        after = generate(loaded, PROMPTS, NEW)
        assert torch.equal(after.sequences, before.sequences)
        assert torch.equal(after.exit_layers, before.exit_layers)
        lossless = generate(loaded, PROMPTS, NEW, mode="lossless")
        assert torch.equal(lossless.sequences, generate(model.backbone, PROMPTS, NEW).sequences)


@pytest.mark.parametrize(
    "model_type, tied",
    [("llama", True), ("llama", False), ("gpt2", True), ("gpt_neox", False), ("gemma2", True)],
)
@HEADS
def test_tied_weights_are_saved_once(model_type: str, tied: bool, exit_head: str, tmp_path: Path) -> None:
    model = tiny_exit_model(model_type, exit_head, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    shapes = []
    for file in tmp_path.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            shapes += [tuple(opened.get_slice(name).get_shape()) for name in opened.keys()]  # noqa: SIM118
    own = LAYERS - 1 if exit_head == "separate" else 0
    assert shapes.count((VOCABULARY, 32)) == (1 if tied else 2) + own
    loaded = EarlyExitForCausalLM.from_pretrained(tmp_path)
    head: Any = loaded.get_output_embeddings()
    same = loaded.get_input_embeddings().weight is head.weight
    assert same == tied
    if exit_head == "separate":  # heads of their own are nobody else's
        heads = [head, *loaded.exit_heads.heads]
        assert len({own_head.weight.data_ptr() for own_head in heads}) == LAYERS


def test_half_precision_is_kept(tmp_path: Path) -> None:
    model = tiny_exit_model("llama", "low_rank").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = EarlyExitForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {weight.dtype for weight in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(generate(loaded, PROMPTS, 4).sequences, generate(model, PROMPTS, 4).sequences)
    wide = EarlyExitForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert {weight.dtype for weight in wide.parameters()} == {torch.float32}


def test_a_backbone_that_was_trained_without_a_cache(tmp_path: Path) -> None:
    """Checkpoints keep `use_cache: false` of a training with gradient checkpointing."""
    backbone = tiny_decoder("llama", use_cache=False)
    backbone.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    model = EarlyExitForCausalLM.from_backbone(tmp_path)
    assert model.backbone.generation_config.use_cache is False
    model.save_pretrained(tmp_path / "exits")
    for one in (model, EarlyExitForCausalLM.from_pretrained(tmp_path / "exits")):
        assert new_tokens_of(generate(one, PROMPTS, NEW), PROMPTS)
        with pytest.raises(ValueError, match="use_cache must be true for exits, got False"):
            generate(one, PROMPTS, NEW, use_cache=False)


def test_backbones_from_folders(tmp_path: Path) -> None:
    backbone = tiny_decoder("qwen2")
    backbone.generation_config.repetition_penalty = 1.25
    backbone.save_pretrained(tmp_path)
    model = EarlyExitForCausalLM.from_backbone(tmp_path, criterion="static", threshold=2).eval()
    assert model.generation_config.repetition_penalty == 1.25
    assert (model.num_layers, model.config.vocab_size, model.config.hidden_size) == (LAYERS, VOCABULARY, 32)
    full = generate(model, PROMPTS, NEW, mode="full").sequences
    assert torch.equal(full, generate(backbone, PROMPTS, NEW).sequences)
    with torch.no_grad():
        for norm, weights in zip(model.exit_heads.norms, [backbone.model.norm.weight] * 3, strict=True):
            assert torch.equal(norm.weight, weights)  # exits begin as the last layer's


def test_unsupported_backbones_are_refused(tmp_path: Path) -> None:
    AutoConfig.for_model("bert").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r'Causal language model type "bert" is not supported.'):
        EarlyExitForCausalLM.from_backbone(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere"):
        EarlyExitForCausalLM.from_backbone(tmp_path / "nowhere")


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_pipelines_run_saved_folders(model_type: str, tmp_path: Path) -> None:
    model, tokenizer = tiny_exit_model(model_type), tiny_tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    generator = pipeline("text-generation", model=str(tmp_path))
    texts = ["w5 w9 w40 w8", "w77"]
    outputs = generator(texts, max_new_tokens=NEW, do_sample=False, return_full_text=False, batch_size=2)
    ids = [tokenizer(text)["input_ids"] for text in texts]
    expected = generate(model, ids, NEW)
    assert len(expected.exit_layers.unique()) > 1
    for (output,), row in zip(outputs, new_tokens_of(expected, ids), strict=True):
        assert output["generated_text"].split() == tokenizer.decode(row, skip_special_tokens=True).split()


@pytest.mark.parametrize("exit_head", ["shared", "low_rank", "separate"])
def test_what_a_folder_lacks_is_initialised(exit_head: str, tmp_path: Path) -> None:
    model = tiny_exit_model("llama", exit_head)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    kept = {name: weight for name, weight in saved.items() if name.startswith("backbone.")}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    opened = EarlyExitForCausalLM.from_pretrained(tmp_path)
    for name, weight in opened.state_dict().items():
        if name in kept:
            assert weight.equal(kept[name]), name
        else:
            assert weight.isfinite().all(), name
            assert weight.abs().max() < 5, name
    norms = [weight for name, weight in opened.exit_heads.named_parameters() if name.startswith("norms.")]
    assert all(bool((weight == 1).all()) for weight in norms)
