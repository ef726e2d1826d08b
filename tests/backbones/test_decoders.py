"""The table of causal language models: layer by layer equal to Hugging Face's own forward pass."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, BertConfig
from transformers.utils import logging as transformers_logging

from consistentee.backbones.decoders import (
    DECODERS,
    SUPPORTED_DECODER_TYPES,
    build_decoder,
    decoder_architecture,
    decoder_base,
    decoder_layers,
    decoder_state,
    final_norm,
    layer_types,
    lm_head,
    load_decoder,
    positions_of,
    run_decoder_layer,
    sliding_window,
    soften_logits,
)
from tiny_decoders import (
    EVERY_TYPE,
    LAYERS,
    MIXED_LAYERS,
    MIXED_WINDOWS,
    left_padded_batch,
    prompt,
    tiny_decoder,
)

pytestmark = pytest.mark.usefixtures("one_thread")


# --- The table ------------------------------------------------------------------------------------


def test_the_table_holds_eight_types() -> None:
    assert SUPPORTED_DECODER_TYPES == (
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gpt2",
        "gpt_neox",
        "gemma2",
        "gemma3_text",
    )
    assert all(row.model_type == name for name, row in DECODERS.items())


@EVERY_TYPE
def test_paths_lead_to_parts(model_type: str) -> None:
    model = tiny_decoder(model_type)
    row = decoder_architecture(model.config)
    assert row is decoder_architecture(model_type) is DECODERS[model_type]
    assert model.config.num_hidden_layers == len(decoder_layers(model)) == LAYERS
    assert lm_head(model) is model.get_output_embeddings()
    assert decoder_base(model).get_submodule(row.embeddings) is model.get_input_embeddings()
    assert final_norm(model) not in list(decoder_layers(model).modules())
    for layer in decoder_layers(model):
        for name, path in vars(row.parts).items():
            if path and name not in ("fused", "attention_cap"):
                assert isinstance(layer.get_submodule(path), nn.Module), name


@pytest.mark.parametrize(
    "name, hint",
    [
        ("lama", 'Did you mean "llama"?'),
        ("gemma3", 'Did you mean "gemma3_text"?'),
        ("GPT-2", 'Did you mean "gpt2"?'),
        ("gpt-neox", 'Did you mean "gpt_neox"?'),
        ("bert", "supported. Supported model types: llama, mistral,"),
    ],
)
def test_other_types_are_refused_with_a_hint(name: str, hint: str) -> None:
    with pytest.raises(
        ValueError, match=rf'^Causal language model type "{name}" is not supported.'
    ) as raised:
        decoder_architecture(name)
    assert hint in str(raised.value)
    assert str(raised.value).endswith(", gpt_neox, gemma2, gemma3_text.")


def test_other_types_are_not_built() -> None:
    with pytest.raises(ValueError, match=r'^Causal language model type "bert" is not supported.'):
        build_decoder(BertConfig())


@pytest.mark.parametrize(
    "model_type, name", [("gpt2", "add_cross_attention"), ("gemma3_text", "use_bidirectional_attention")]
)
def test_configs_that_are_not_causal_are_refused(model_type: str, name: str) -> None:
    config = AutoConfig.for_model(model_type)
    decoder_architecture(config)
    setattr(config, name, True)
    with pytest.raises(ValueError, match=rf"^{name} must be false for a causal language model, got true.$"):
        decoder_architecture(config)


# --- Layer by layer -------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["none", "left", "right"])
@EVERY_TYPE
@torch.no_grad()
def test_states_equal_huggingface(model_type: str, side: str) -> None:
    model = tiny_decoder(model_type)
    input_ids, mask = left_padded_batch([prompt(length) for length in (9, 4, 1, 9)])
    if side == "right":
        input_ids, mask = input_ids.flip(1), mask.flip(1)
    given: dict[str, Tensor] = {}
    if side == "none":
        input_ids = input_ids[[0, 3]]
        mask = torch.ones_like(input_ids)
    else:
        given["attention_mask"] = mask
        given["position_ids"] = positions_of(mask)
    expected = model(input_ids, output_hidden_states=True, **given)
    state = decoder_state(model, input_ids, mask if given else None)
    real = mask.bool()
    torch.testing.assert_close(state.hidden_states[real], expected.hidden_states[0][real])
    for index in range(LAYERS):
        before = state.hidden_states
        state.hidden_states = run_decoder_layer(model, index, state)
        theirs = expected.hidden_states[index + 1]
        ours = state.hidden_states if index < LAYERS - 1 else final_norm(model)(state.hidden_states)
        torch.testing.assert_close(ours[real], theirs[real], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(before, state.hidden_states, atol=1e-2)
    logits = soften_logits(model, lm_head(model)(final_norm(model)(state.hidden_states)))
    torch.testing.assert_close(logits[real], expected.logits[real], rtol=1e-5, atol=1e-5)


@EVERY_TYPE
@torch.no_grad()
def test_layers_slide_where_huggingfaces_do(model_type: str) -> None:
    model = tiny_decoder(model_type, **MIXED_WINDOWS)
    input_ids = torch.tensor([prompt(9)])
    expected = model(input_ids, output_hidden_states=True, use_cache=False).hidden_states
    state = decoder_state(model, input_ids)
    for index in range(LAYERS):
        state.hidden_states = run_decoder_layer(model, index, state)
        ours = state.hidden_states if index < LAYERS - 1 else final_norm(model)(state.hidden_states)
        torch.testing.assert_close(ours, expected[index + 1], rtol=1e-5, atol=1e-5)


@EVERY_TYPE
def test_checkpointed_layers_give_the_same_gradients(model_type: str) -> None:
    model = tiny_decoder(model_type)
    input_ids, mask = left_padded_batch([prompt(6), prompt(3)])
    gradients: list[list[Tensor]] = []
    for checkpointed in (False, True):
        state = decoder_state(model, input_ids, mask)
        for index in range(LAYERS):
            state.hidden_states = run_decoder_layer(model, index, state, checkpointed=checkpointed)
        weights = list(decoder_layers(model).parameters())
        gradients.append(list(torch.autograd.grad(state.hidden_states.square().mean(), weights)))
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)
        assert plain.abs().max() > 0


def test_dropout_of_embeddings_is_on_in_training_only() -> None:
    model = tiny_decoder("gpt2", embd_pdrop=0.5)
    input_ids = torch.tensor([prompt(6)])
    first, second = (decoder_state(model, input_ids).hidden_states for _ in range(2))
    assert torch.equal(first, second)
    model.train()
    first, second = (decoder_state(model, input_ids).hidden_states for _ in range(2))
    assert not torch.equal(first, second)
    assert (first == 0).float().mean() > 0.2


def test_positions_count_real_tokens() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    assert positions_of(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2], [0, 1, 2, 3, 4]]
    assert positions_of(mask.bool()).dtype == torch.int64


@pytest.mark.parametrize(
    "model_type, values, kinds, window",
    [
        ("llama", {}, "ffff", None),
        ("mistral", {"sliding_window": 7}, "ssss", 7),
        ("mistral", {"sliding_window": None}, "ffff", None),
        # Hugging Face's models of these types do not read `layer_types`:
        ("mistral", {"sliding_window": 7, "layer_types": MIXED_LAYERS}, "ssss", 7),
        ("mistral", {"sliding_window": None, "layer_types": MIXED_LAYERS}, "ffff", None),
        ("llama", {"sliding_window": 7, "layer_types": MIXED_LAYERS}, "ffff", None),
        ("gpt2", {"sliding_window": 7, "layer_types": MIXED_LAYERS}, "ffff", None),
        ("gpt_neox", {"sliding_window": 7, "layer_types": MIXED_LAYERS}, "ffff", None),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}, "ffss", 5),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 5, "layer_types": MIXED_LAYERS}, "fsfs", 5),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 5, "max_window_layers": 2}, "ffff", None),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3}, "fffs", 5),
        ("gpt2", {}, "ffff", None),
        ("gpt_neox", {}, "ffff", None),
        ("gemma2", {"sliding_window": 3}, "sfsf", 3),
        (
            "gemma3_text",
            {"sliding_window": 3, "layer_types": ["full_attention"] + ["sliding_attention"] * 3},
            "fsss",
            3,
        ),
    ],
)
def test_layer_types_and_windows(
    model_type: str, values: dict[str, Any], kinds: str, window: int | None
) -> None:
    config = AutoConfig.for_model(model_type, num_hidden_layers=LAYERS, **values)
    names = {"f": "full_attention", "s": "sliding_attention"}
    assert layer_types(config) == [names[kind] for kind in kinds]
    assert sliding_window(config) == window


def test_soft_cap_of_logits() -> None:
    model = tiny_decoder("gemma2", final_logit_softcapping=2.0)
    logits = torch.tensor([0.0, 2.0, 100.0])
    torch.testing.assert_close(soften_logits(model, logits), torch.tensor([0.0, 1.5231884, 2.0]))
    assert soften_logits(tiny_decoder("llama"), logits) is logits


# --- Loading --------------------------------------------------------------------------------------


def test_folders_are_loaded(tmp_path: Path) -> None:
    transformers_logging.disable_progress_bar()
    model = tiny_decoder("qwen3")
    model.save_pretrained(tmp_path)
    loaded = load_decoder(tmp_path)
    assert loaded.dtype == torch.float32
    input_ids = torch.tensor([prompt(5)])
    with torch.no_grad():
        assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)


def test_random_models_differ_between_layers() -> None:  # or the comparisons above could not tell them apart
    for earlier, later in pairwise(decoder_layers(tiny_decoder("llama"))):
        for first, second in zip(earlier.parameters(), later.parameters(), strict=True):
            assert not torch.equal(first, second)
