"""Every supported backbone against Hugging Face's own forward pass, layer by layer, on padded batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    GPT2Config,
    PreTrainedConfig,
    PreTrainedModel,
)

from consistentee.backbones import encoders as backbones
from consistentee.backbones.encoders import (
    ARCHITECTURES,
    SUPPORTED_MODEL_TYPES,
    EncoderState,
    architecture_of,
    build_backbone,
    embed,
    embedding_projection,
    encoder_layers,
    load_backbone,
    num_layers,
    run_layer,
)
from tiny import all_hidden_states

LAYERS = 4
LENGTHS = (12, 7, 3, 9, 12)
PAD = 1  # roberta, its kin and mpnet count positions from the padding id, so all types share theirs

COMMON: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "pad_token_id": PAD,
    "initializer_range": 0.3,
}
PARTICULAR: dict[str, dict[str, Any]] = {
    "roberta": {"type_vocab_size": 2},
    "camembert": {"type_vocab_size": 1},
    "xlm-roberta": {"type_vocab_size": 1},
    "distilbert": {"dim": 32, "n_layers": LAYERS, "n_heads": 4, "hidden_dim": 48},
    "albert": {"embedding_size": 16, "num_hidden_groups": 2},
    "electra": {"embedding_size": 16},
    "deberta-v2": {
        "type_vocab_size": 2,
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "position_buckets": 4,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "conv_kernel_size": 3,
    },
    # a window of 4 tokens: long padding leaves queries with nothing to attend to
    "modernbert": {
        "local_attention": 4,
        "global_attn_every_n_layers": 3,
        "bos_token_id": 2,
        "cls_token_id": 2,
        "eos_token_id": 3,
        "sep_token_id": 3,
    },
}
HAVE_TOKEN_TYPES = ("bert", "roberta", "albert", "electra", "deberta-v2")
HAVE_SDPA = tuple(t for t in SUPPORTED_MODEL_TYPES if t not in ("mpnet", "deberta-v2"))
EVERY_TYPE = pytest.mark.parametrize("model_type", SUPPORTED_MODEL_TYPES)
TYPES_AND_ATTENTION = pytest.mark.parametrize(
    "model_type, attention",
    [(t, "eager") for t in SUPPORTED_MODEL_TYPES] + [(t, "sdpa") for t in HAVE_SDPA],
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Keep tiny models on one thread: handing work to others costs more than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_config(model_type: str, **options: Any) -> PreTrainedConfig:
    values = {**COMMON, **PARTICULAR.get(model_type, {}), **options}
    if model_type == "distilbert":
        values = {k: v for k, v in values.items() if k not in ("hidden_size", "num_attention_heads")}
        values.pop("num_hidden_layers")
    return AutoConfig.for_model(model_type, **values)


def tiny_backbone(model_type: str, attention: str = "eager", **options: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = tiny_config(model_type, **options)
    config._attn_implementation = attention
    return build_backbone(config).eval()


def padded_batch(lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(4, 100, (len(lengths), max(lengths)), generator=generator)
    attention_mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return input_ids.masked_fill(attention_mask == 0, PAD), attention_mask


def huggingface_states(backbone: PreTrainedModel, input_ids: Tensor, **inputs: Tensor) -> tuple[Tensor, ...]:
    output = backbone(input_ids=input_ids, output_hidden_states=True, **inputs)
    torch.testing.assert_close(output.hidden_states[-1], output.last_hidden_state, rtol=0, atol=0)
    return output.hidden_states[1:]


def assert_states_equal(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    assert len(actual) == len(expected) == LAYERS
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.isfinite(ours).all()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# --- Layer by layer -------------------------------------------------------------------------------


@TYPES_AND_ATTENTION
@torch.no_grad()
def test_states_equal_huggingface(model_type: str, attention: str) -> None:
    backbone = tiny_backbone(model_type, attention)
    input_ids, attention_mask = padded_batch()
    expected = huggingface_states(backbone, input_ids, attention_mask=attention_mask)
    assert_states_equal(all_hidden_states(backbone, input_ids, attention_mask), expected)
    assert_states_equal(all_hidden_states(backbone, input_ids, attention_mask.bool()), expected)
    for earlier, later in pairwise(expected):  # the comparison can tell layers apart
        assert not torch.allclose(earlier, later, atol=1e-2)


@TYPES_AND_ATTENTION
@torch.no_grad()
def test_left_padding_equals_huggingface(model_type: str, attention: str) -> None:
    backbone = tiny_backbone(model_type, attention)
    input_ids, attention_mask = (tensor.flip(1) for tensor in padded_batch())
    expected = huggingface_states(backbone, input_ids, attention_mask=attention_mask)
    assert_states_equal(all_hidden_states(backbone, input_ids, attention_mask), expected)


@EVERY_TYPE
def test_dropout_equals_huggingface(model_type: str) -> None:
    backbone = tiny_backbone(model_type).train()
    input_ids, attention_mask = padded_batch()
    torch.manual_seed(3)
    expected = huggingface_states(backbone, input_ids, attention_mask=attention_mask)
    torch.manual_seed(3)
    assert_states_equal(all_hidden_states(backbone, input_ids, attention_mask), expected)


@TYPES_AND_ATTENTION
@torch.no_grad()
def test_bfloat16_autocast_equals_huggingface(model_type: str, attention: str) -> None:
    backbone = tiny_backbone(model_type, attention)
    input_ids, attention_mask = padded_batch()
    rows = torch.tensor([1, 3])
    with torch.autocast("cpu", torch.bfloat16):
        expected = huggingface_states(backbone, input_ids, attention_mask=attention_mask)
        state = embed(backbone, input_ids, attention_mask)
        for layer_index in range(LAYERS):
            if layer_index == 2:
                state = state.select(rows)
            state = run_layer(backbone, layer_index, state)
            theirs = expected[layer_index] if layer_index < 2 else expected[layer_index][rows]
            assert state.hidden_states.dtype == theirs.dtype
            torch.testing.assert_close(state.hidden_states.float(), theirs.float(), rtol=2e-2, atol=2e-2)


@EVERY_TYPE
@torch.no_grad()
def test_bfloat16_weights(model_type: str) -> None:
    backbone = tiny_backbone(model_type).to(torch.bfloat16)
    input_ids, attention_mask = padded_batch()
    expected = huggingface_states(backbone, input_ids, attention_mask=attention_mask)
    assert_states_equal(all_hidden_states(backbone, input_ids, attention_mask), expected)


@torch.no_grad()
@pytest.mark.parametrize(
    "model_type, options",
    [
        ("albert", {"num_hidden_groups": 1}),
        ("albert", {"num_hidden_groups": 3}),
        ("electra", {"embedding_size": 32}),
        ("mpnet", {"relative_attention_num_buckets": 64}),
        ("deberta-v2", {"embedding_size": 16}),
        ("deberta-v2", {"relative_attention": False, "pos_att_type": [], "position_biased_input": True}),
        ("deberta-v2", {"conv_kernel_size": 0, "share_att_key": False, "norm_rel_ebd": "none"}),
        ("modernbert", {"global_attn_every_n_layers": 2}),
    ],
)
def test_variants_of_a_type(model_type: str, options: dict[str, Any]) -> None:
    backbone = tiny_backbone(model_type, **options)
    input_ids, attention_mask = padded_batch()
    expected = huggingface_states(backbone, input_ids, attention_mask=attention_mask)
    assert_states_equal(all_hidden_states(backbone, input_ids, attention_mask), expected)


@torch.no_grad()
def test_albert_layer_is_its_whole_inner_group() -> None:
    backbone = tiny_backbone("albert", inner_group_num=2)
    input_ids, attention_mask = padded_batch()
    expected = huggingface_states(backbone, input_ids, attention_mask=attention_mask)
    assert_states_equal(all_hidden_states(backbone, input_ids, attention_mask), expected[1::2])


# --- Rows leave -----------------------------------------------------------------------------------


@TYPES_AND_ATTENTION
@pytest.mark.parametrize("lengths", [LENGTHS, (12, 12, 12, 12, 12)], ids=["padded", "full"])
@torch.no_grad()
def test_states_of_remaining_rows_do_not_change(
    model_type: str, attention: str, lengths: tuple[int, ...]
) -> None:
    backbone = tiny_backbone(model_type, attention)
    input_ids, attention_mask = padded_batch(lengths)
    expected = all_hidden_states(backbone, input_ids, attention_mask)
    state = embed(backbone, input_ids, attention_mask)
    rows = torch.arange(len(lengths))
    for layer_index, kept in enumerate([[0, 1, 2, 3, 4], [0, 2, 3, 4], [3, 1], [1]]):
        state, rows = state.select(torch.tensor(kept)), rows[kept]
        state = run_layer(backbone, layer_index, state)
        torch.testing.assert_close(state.hidden_states, expected[layer_index][rows], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state.attention_mask, attention_mask[rows])
    assert rows.tolist() == [2]


@TYPES_AND_ATTENTION
def test_everything_per_row_has_the_batch_dimension(model_type: str, attention: str) -> None:
    state = embed(tiny_backbone(model_type, attention), *padded_batch())
    assert state.per_row
    for tensor in state.per_row.values():
        assert tensor is not None
        assert tensor.shape[0] == len(LENGTHS)
    assert all(
        tensor is not None and tensor.shape[0] == 2
        for tensor in state.select(torch.tensor([0, 4])).per_row.values()
    )


@EVERY_TYPE
@torch.no_grad()
def test_no_row_may_remain(model_type: str) -> None:
    backbone = tiny_backbone(model_type)
    state = embed(backbone, *padded_batch()).select(torch.tensor([], dtype=torch.int64))
    for layer_index in range(LAYERS):
        state = run_layer(backbone, layer_index, state)
    assert state.hidden_states.shape == (0, max(LENGTHS), 32)


@torch.no_grad()
def test_run_layer_and_select_leave_the_state_as_it_was() -> None:
    backbone = tiny_backbone("bert")
    state = embed(backbone, *padded_batch())
    before = replace(state, hidden_states=state.hidden_states.clone())
    run_layer(backbone, 0, state)
    state.select(torch.tensor([0]))
    torch.testing.assert_close(state.hidden_states, before.hidden_states)
    assert state.per_row["layer_mask"] is before.per_row["layer_mask"]


def test_select_wants_indices() -> None:
    state = EncoderState(torch.zeros(3, 2, 4), torch.ones(3, 2, dtype=torch.int64))
    with pytest.raises(
        ValueError, match=r"rows must be a vector of int64 indices, got shape \(3,\) and torch.bool"
    ):
        state.select(torch.tensor([True, False, True]))


# --- Inputs ---------------------------------------------------------------------------------------


@TYPES_AND_ATTENTION
@torch.no_grad()
def test_no_mask_means_all_tokens_are_real(model_type: str, attention: str) -> None:
    backbone = tiny_backbone(model_type, attention)
    input_ids, attention_mask = padded_batch((12, 12, 12))
    without = all_hidden_states(backbone, input_ids)
    assert_states_equal(without, all_hidden_states(backbone, input_ids, attention_mask))
    assert_states_equal(without, huggingface_states(backbone, input_ids))


@EVERY_TYPE
@torch.no_grad()
def test_token_types_count_where_the_type_has_them(model_type: str) -> None:
    backbone = tiny_backbone(model_type)
    input_ids, attention_mask = padded_batch()
    token_type_ids = (torch.arange(max(LENGTHS)) > 4).long().expand(len(LENGTHS), -1) * attention_mask
    with_types = all_hidden_states(backbone, input_ids, attention_mask, token_type_ids)
    without = all_hidden_states(backbone, input_ids, attention_mask)
    if model_type in HAVE_TOKEN_TYPES:
        expected = huggingface_states(
            backbone, input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        )
        assert_states_equal(with_types, expected)
        assert not torch.allclose(with_types[0], without[0], atol=1e-2)
    else:
        assert_states_equal(with_types, without)


@pytest.mark.parametrize("model_type, types", [("roberta", 1), ("deberta-v2", 0), ("deberta-v2", 1)])
@torch.no_grad()
def test_token_types_are_ignored_by_a_backbone_trained_with_one(model_type: str, types: int) -> None:
    backbone = tiny_backbone(model_type, type_vocab_size=types)
    input_ids, attention_mask = padded_batch()
    with_types = all_hidden_states(backbone, input_ids, attention_mask, torch.ones_like(input_ids))
    assert_states_equal(with_types, all_hidden_states(backbone, input_ids, attention_mask))


def test_shapes_are_checked() -> None:
    backbone = tiny_backbone("bert")
    input_ids, attention_mask = padded_batch()
    with pytest.raises(ValueError, match=r"input_ids must have the shape \(batch, tokens\), got \(12,\)"):
        embed(backbone, input_ids[0])
    with pytest.raises(
        ValueError, match=r"attention_mask must have the shape of input_ids, \(5, 12\), got \(5, 11\)"
    ):
        embed(backbone, input_ids, attention_mask[:, 1:])
    with pytest.raises(ValueError, match=r"token_type_ids must have the shape of input_ids"):
        embed(backbone, input_ids, attention_mask, input_ids[:1])
    with pytest.raises(ValueError, match=r"layer_index must be in \[0, 3\], got -1"):
        run_layer(backbone, -1, embed(backbone, input_ids))


def test_attention_without_tensor_masks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone("bert")
    monkeypatch.setattr(backbones, "create_bidirectional_mask", lambda *_args: object())
    with pytest.raises(ValueError, match="attn_implementation must give masks as tensors, got object"):
        embed(backbone, *padded_batch())


# --- Gradients ------------------------------------------------------------------------------------


@EVERY_TYPE
def test_gradients_reach_the_first_layer(model_type: str) -> None:
    backbone = tiny_backbone(model_type)
    state = embed(backbone, *padded_batch())
    for layer_index in range(LAYERS):
        state = run_layer(backbone, layer_index, state.select(torch.arange(4 - layer_index)))
    (state.hidden_states * torch.randn_like(state.hidden_states)).sum().backward()
    for module in (encoder_layers(backbone)[0], backbone.get_input_embeddings()):
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        assert gradients
        assert any(g.abs().max() > 1e-6 for g in gradients)
    unreached = [name for name, p in backbone.named_parameters() if p.grad is None]
    assert unreached == []


# --- The table ------------------------------------------------------------------------------------


def test_table_lists_the_supported_types() -> None:
    assert set(SUPPORTED_MODEL_TYPES) == {
        "bert",
        "roberta",
        "xlm-roberta",
        "camembert",
        "distilbert",
        "albert",
        "electra",
        "mpnet",
        "deberta-v2",
        "modernbert",
    }
    assert all(architecture_of(name) is row for name, row in ARCHITECTURES.items())


@EVERY_TYPE
def test_built_backbone_fits_its_row(model_type: str) -> None:
    backbone = tiny_backbone(model_type)
    assert architecture_of(backbone.config).model_type == model_type
    assert num_layers(backbone) == LAYERS
    assert len(encoder_layers(backbone)) == (2 if model_type == "albert" else LAYERS)
    assert getattr(backbone, "pooler", None) is None


@pytest.mark.parametrize(
    "model_type, options, shape",
    [
        ("bert", {}, None),
        ("albert", {}, (16, 32)),
        ("electra", {}, (16, 32)),
        ("electra", {"embedding_size": 32}, None),
        ("deberta-v2", {"embedding_size": 16}, (16, 32)),
        ("deberta-v2", {}, None),
    ],
)
def test_embedding_projection(
    model_type: str, options: dict[str, Any], shape: tuple[int, int] | None
) -> None:
    projection = embedding_projection(tiny_backbone(model_type, **options))
    if shape is None:
        assert projection is None
    else:
        assert isinstance(projection, torch.nn.Linear)
        assert (projection.in_features, projection.out_features) == shape


@pytest.mark.parametrize(
    "wrong, meant", [("bert_base", "bert"), ("deberta", "deberta-v2"), ("XLM-roberta", "xlm-roberta")]
)
def test_unsupported_type_names_the_nearest_and_all_supported(wrong: str, meant: str) -> None:
    with pytest.raises(
        ValueError, match=f'Backbone type "{wrong}" is not supported. Did you mean "{meant}"'
    ) as error:
        architecture_of(wrong)
    assert all(model_type in str(error.value) for model_type in SUPPORTED_MODEL_TYPES)


def test_unsupported_config_and_decoder() -> None:
    with pytest.raises(
        ValueError, match=r'Backbone type "gpt2" is not supported. Supported model types: bert, '
    ):
        build_backbone(GPT2Config())
    with pytest.raises(ValueError, match="must be an encoder, got a config with is_decoder=True"):
        build_backbone(tiny_config("bert", is_decoder=True))


# --- Loading --------------------------------------------------------------------------------------


@EVERY_TYPE
@torch.no_grad()
def test_load_backbone_equals_the_saved_one(model_type: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    saved = AutoModel.from_config(tiny_config(model_type)).eval()
    saved.save_pretrained(tmp_path)
    loaded = load_backbone(tmp_path).eval()
    assert type(loaded) is type(saved)
    assert getattr(loaded, "pooler", None) is None
    input_ids, attention_mask = padded_batch()
    expected = huggingface_states(saved, input_ids, attention_mask=attention_mask)
    assert_states_equal(all_hidden_states(loaded, input_ids, attention_mask), expected)


@EVERY_TYPE
def test_load_backbone_from_a_classifier(model_type: str, tmp_path: Path) -> None:
    classifier = AutoModelForSequenceClassification.from_config(tiny_config(model_type)).eval()
    classifier.save_pretrained(tmp_path)
    loaded = load_backbone(str(tmp_path))
    encoder = classifier.base_model.state_dict()
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, encoder[name], rtol=0, atol=0)
