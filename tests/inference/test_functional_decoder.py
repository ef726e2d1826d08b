"""Layers as plain functions, exits off: token for token what Hugging Face's own `generate` gives."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache

from consistentee.backbones.decoders import CACHE, CACHES
from consistentee.inference.decoder import functional_decoder
from consistentee.inference.decoder.functional_decoder import (
    FunctionalDecoder,
    rotate,
    signed_rotary,
)
from consistentee.inference.decoder.weights import weight_signature
from consistentee.models.causal_lm import EarlyExitForCausalLM
from tiny_decoders import (
    EVERY_TYPE,
    MIXED_WINDOWS,
    generate,
    left_padded_batch,
    naive_decide,
    naive_generate,
    new_tokens_of,
    prompt,
    tiny_decoder,
    tiny_exit_model,
)

NEW = 12
BATCHES = {
    "one row": (7,),
    "one token": (1,),
    "four rows": (4, 4, 4, 4),
    "padded": (8, 3, 1, 5),
    "prompts of one token": (1, 1),
    "longer than every window": (14, 9),
}

pytestmark = pytest.mark.usefixtures("one_thread")


def prompts_of(lengths: tuple[int, ...]) -> list[list[int]]:
    return [prompt(length, seed) for seed, length in enumerate(lengths)]


def assert_equals_huggingface(model: EarlyExitForCausalLM, lengths: tuple[int, ...], **options: Any) -> None:
    prompts = prompts_of(lengths)
    theirs = generate(model.backbone, prompts, NEW, output_logits=True, **options)
    ours = generate(model, prompts, NEW, mode="full", output_logits=True, **options)
    assert len(ours.logits) == len(theirs.logits) == NEW
    alike = torch.ones(len(prompts), dtype=torch.bool)
    for own, expected in zip(ours.logits, theirs.logits, strict=True):
        torch.testing.assert_close(own[alike], expected[alike], rtol=1e-4, atol=1e-4)
        first, second = expected.topk(2, dim=1).values.unbind(1)
        alike &= first - second > 2e-5  # rounding breaks a tie this way or that, and behind it texts part
    assert alike.any()
    assert torch.equal(ours.sequences[alike], theirs.sequences[alike])


# --- Against Hugging Face -------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
@EVERY_TYPE
def test_full_depth_equals_huggingface(model_type: str, lengths: tuple[int, ...]) -> None:
    assert_equals_huggingface(tiny_exit_model(model_type), lengths)


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen3", "gpt2"])
def test_masks_of_prompts_are_not_copied(
    model_type: str, grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One for all heads, whether the device's kernels take it with grouped heads or keys are repeated."""
    held: list[tuple[int, bool]] = []
    attend = functional.scaled_dot_product_attention

    def recorded(query: Tensor, *others: Any, attn_mask: Tensor | None = None, **how: Any) -> Tensor:
        if attn_mask is not None and query.shape[2] >= 19:
            held.append((attn_mask.untyped_storage().nbytes(), how.get("enable_gqa", False)))
        return attend(query, *others, attn_mask=attn_mask, **how)

    monkeypatch.setattr(functional_decoder, "_masks_grouped_heads", lambda device: grouped)
    model, prompts = tiny_exit_model(model_type), prompts_of((19, 17))
    wanted = generate(model.backbone, prompts, NEW)
    monkeypatch.setattr(functional, "scaled_dot_product_attention", recorded)
    assert torch.equal(generate(model, prompts, NEW, mode="full").sequences, wanted.sequences)
    assert held == [(2 * 19 * 19 * 4, grouped)] * len(held)
    assert len(held) == 4


@EVERY_TYPE
def test_without_a_cache(model_type: str) -> None:
    model = tiny_exit_model(model_type)
    prompts = prompts_of((6, 2))
    expected = generate(model.backbone, prompts, NEW)
    ours = generate(model, prompts, NEW, mode="full", use_cache=False)
    assert torch.equal(ours.sequences, expected.sequences)


@pytest.mark.parametrize(
    "model_type, values",
    [
        ("llama", {"num_key_value_heads": 4}),
        ("llama", {"num_key_value_heads": 1}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"head_dim": 6}),
        ("llama", {"hidden_act": "gelu"}),
        ("llama", {"attn_implementation": "eager"}),
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 2}),
        ("qwen2", {"use_sliding_window": False}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
        ("qwen3", {"attention_bias": True}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("gpt2", {"scale_attn_weights": False}),
        ("gpt2", {"tie_word_embeddings": False}),
        ("gpt2", {"activation_function": "relu"}),
        ("gpt_neox", {"rotary_pct": 1.0}),
        ("gpt_neox", {"rotary_pct": 0.25}),
        ("gpt_neox", {"use_parallel_residual": False}),
        ("gpt_neox", {"attention_bias": False}),
        ("gpt_neox", {"tie_word_embeddings": True}),
        ("gemma2", {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 1.0}),
        ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
        ("gemma2", {"query_pre_attn_scalar": 3}),
        ("gemma3_text", {"query_pre_attn_scalar": 3, "final_logit_softcapping": 2.0}),
        ("gemma3_text", {"tie_word_embeddings": False}),
        ("gemma3_text", {"attn_logit_softcapping": 0.5}),  # which Hugging Face's layer leaves aside
    ],
    ids=str,
)
def test_variants_equal_huggingface(model_type: str, values: dict[str, Any]) -> None:
    assert_equals_huggingface(tiny_exit_model(model_type, **values), (8, 3, 1))


def test_soft_caps_of_attention_are_kept(tmp_path: Path) -> None:
    backbone = tiny_decoder("gemma2")
    backbone.config._attn_implementation = "sdpa"  # as transformers before 5.21 takes it
    model = EarlyExitForCausalLM.from_backbone(backbone)
    assert model.backbone.config._attn_implementation == "eager"
    model.save_pretrained(tmp_path)
    loaded = EarlyExitForCausalLM.from_pretrained(tmp_path)
    assert loaded.backbone.config._attn_implementation == "eager"
    without = tiny_decoder("gemma2", attn_logit_softcapping=None)
    without.config._attn_implementation = "sdpa"
    assert EarlyExitForCausalLM.from_backbone(without).backbone.config._attn_implementation == "sdpa"


def test_a_window_of_the_token_itself() -> None:
    """The cache of transformers 5.23 keeps everything then, so the oracle is the one without a cache."""
    model = tiny_exit_model("mistral", sliding_window=1)
    expected = generate(model.backbone, prompts_of((8, 3)), NEW, use_cache=False)
    assert torch.equal(generate(model, prompts_of((8, 3)), NEW, mode="full").sequences, expected.sequences)


@EVERY_TYPE
def test_layers_slide_where_huggingfaces_do(model_type: str) -> None:
    """The cache of transformers follows `layer_types` of any config, the models of some types do not read them."""
    model = tiny_exit_model(model_type, **MIXED_WINDOWS)
    prompts = prompts_of((8, 3))
    expected = generate(model.backbone, prompts, NEW, use_cache=False, output_logits=True)
    for options in ({"mode": "full", "output_logits": True}, {"mode": "lossless", "threshold": 0.4}):
        found = generate(model, prompts, NEW, **options)
        assert torch.equal(found.sequences, expected.sequences)
        if options["mode"] == "full":
            torch.testing.assert_close(
                torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-4
            )


def test_windows_and_caps_matter() -> None:  # or equality above would show nothing
    prompts = prompts_of((14, 9))

    def text(model_type: str, **values: Any) -> Tensor:
        return generate(tiny_exit_model(model_type, **values), prompts, NEW, mode="full").sequences

    assert not torch.equal(text("mistral", sliding_window=2), text("mistral", sliding_window=None))
    assert not torch.equal(
        text("gemma2", attn_logit_softcapping=0.5), text("gemma2", attn_logit_softcapping=None)
    )
    inverse = text("gpt2", scale_attn_by_inverse_layer_idx=True)
    assert not torch.equal(inverse, text("gpt2", scale_attn_by_inverse_layer_idx=False))


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
@EVERY_TYPE
@torch.no_grad()
def test_forward_is_the_backbones(model_type: str) -> None:
    model = tiny_exit_model(model_type)
    input_ids, mask = left_padded_batch(prompts_of((6, 3)))
    ours = model(input_ids, attention_mask=mask, labels=input_ids)
    theirs = model.backbone(input_ids, attention_mask=mask, labels=input_ids)
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.loss, theirs.loss)
    for name in CACHES:  # either does with any version
        kept = DynamicCache(config=model.backbone.config)
        cached = model(input_ids, attention_mask=mask, use_cache=True, **{name: kept})
        assert cached[CACHE] is kept
        assert kept.get_seq_length() == 6


# --- Weights that change --------------------------------------------------------------------------


def scale_in_place(model: EarlyExitForCausalLM) -> None:
    with torch.no_grad():
        for weight in model.backbone.parameters():
            weight.mul_(1.3)


def step_of_an_optimiser(model: EarlyExitForCausalLM) -> None:
    optimiser = torch.optim.AdamW(model.backbone.parameters(), lr=0.05)
    input_ids = torch.tensor([prompt(6)])
    model(input_ids, labels=input_ids).loss.backward()
    optimiser.step()


def load_other_weights(model: EarlyExitForCausalLM) -> None:
    model.backbone.load_state_dict(tiny_decoder(model.backbone.config.model_type, seed=5).state_dict())


def replace_parameters(model: EarlyExitForCausalLM) -> None:
    for module in model.backbone.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight.ndim == 2 and not isinstance(module, nn.Embedding):
                setattr(module, name, nn.Parameter(weight.detach() * 1.5))


def replace_backbone(model: EarlyExitForCausalLM) -> None:
    model.backbone = tiny_decoder(model.backbone.config.model_type, seed=6)


@pytest.mark.parametrize(
    "change",
    [scale_in_place, step_of_an_optimiser, load_other_weights, replace_parameters, replace_backbone],
)
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2"])
def test_changed_weights_are_seen(model_type: str, change: Callable[[EarlyExitForCausalLM], None]) -> None:
    model = tiny_exit_model(model_type)
    prompts = prompts_of((5, 3))
    before = generate(model, prompts, NEW, mode="full").sequences
    weights = model.exit_weights()
    assert model.exit_weights() is weights  # laid out once
    generate(model, prompts, NEW)
    change(model)
    assert model.exit_weights() is not weights
    after = generate(model, prompts, NEW, mode="full").sequences
    assert not torch.equal(before, after)
    assert torch.equal(after, generate(model.backbone, prompts, NEW).sequences)


@EVERY_TYPE
def test_generate_sees_weights_that_were_written_through_data(model_type: str) -> None:
    """Torch does not count such changes; adapters are merged, and averages of weights taken, in this way."""
    model, other = tiny_exit_model(model_type, seed=3), tiny_exit_model(model_type, seed=8)
    prompt = torch.tensor([[5, 6, 7]])
    options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "threshold": 0.5}
    before, expected = (one.generate(prompt, **options) for one in (model, other))
    assert before.sequences.tolist() != expected.sequences.tolist()
    for weight, value in zip(model.parameters(), other.parameters(), strict=True):
        weight.data.copy_(value)
    after = model.generate(prompt, **options)
    assert after.sequences.tolist() == expected.sequences.tolist()
    assert after.exit_layers.tolist() == expected.exit_layers.tolist()


def test_one_number_written_through_data_is_seen() -> None:
    model: Any = tiny_exit_model("gpt2", seed=3)
    weights = model.exit_weights()
    for copied in (
        model.policy.state_weight,
        model.exit_heads.norms[1].weight,
        model.backbone.lm_head.weight,
        model.backbone.transformer.h[2].attn.c_attn.bias,
        model.backbone.transformer.h[2].ln_1.bias,
    ):
        copied.data.view(-1)[-1] += 1e-6
        assert model.exit_weights() is not weights
        weights = model.exit_weights()
        copied.data.copy_(copied.data.flip(0))  # the same numbers elsewhere
        assert model.exit_weights() is not weights
        weights = model.exit_weights()
        assert model.exit_weights() is weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_signature_reads_weights_of_any_size(dtype: torch.dtype) -> None:
    assert weight_signature(nn.Module(), [torch.zeros(0, 3, dtype=dtype)])[-2:] == (0, 0)
    for shape in ((), (1,), (5,), (3, 4), (3, 5), (2, 3, 2)):
        for view in (
            torch.zeros(shape, dtype=dtype),
            torch.zeros(1 + math.prod(shape), dtype=dtype)[1:].view(shape),
        ):
            module = nn.Module()
            before = weight_signature(module, [view])
            assert weight_signature(module, [view]) == before
            view.view(-1)[-1] = 1
            assert weight_signature(module, [view]) != before


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.roll(2, 1),
        lambda weight: weight.roll(1, 0),
        lambda weight: weight.flip(0),
        lambda weight: weight.view(4, 4, 2).transpose(0, 1).reshape(4, 8),
    ],
)
def test_a_signature_tells_where_a_weight_stands(change: Callable[[Tensor], Tensor]) -> None:
    """Also where it was written through `.data`, which torch does not count."""
    weight = torch.randn(4, 8)
    before = weight_signature(nn.Module(), [weight])
    weight.data.copy_(change(weight.data).clone())
    assert weight_signature(nn.Module(), [weight]) != before


def test_columns_that_change_places_are_seen() -> None:
    model: Any = tiny_exit_model("llama")
    before = generate(model, prompts_of((9, 9)), NEW, mode="full").sequences
    weight = model.backbone.model.layers[0].self_attn.q_proj.weight
    weight.data.copy_(weight.data.roll(2, 1))
    after = generate(model, prompts_of((9, 9)), NEW, mode="full").sequences
    assert torch.equal(after, generate(copy.deepcopy(model), prompts_of((9, 9)), NEW, mode="full").sequences)
    assert not torch.equal(before, after)


@pytest.mark.parametrize(
    "how",
    [
        {"mode": "full"},
        {"mode": "early-exit"},
        {"mode": "lossless"},
        {"mode": "full", "do_sample": True},
        {"mode": "full", "repetition_penalty": 1.1},
        {"mode": "lossless", "repetition_penalty": 1.1},
    ],
    ids=str,
)
def test_logits_that_are_no_numbers_give_no_text(how: dict[str, Any]) -> None:
    model: Any = tiny_exit_model("llama")
    with torch.no_grad():
        model.backbone.model.layers[0].mlp.down_proj.weight.fill_(torch.inf)
    with pytest.raises(
        FloatingPointError, match=r"logits must be numbers to take a token from, got NaN at layer \d"
    ):
        generate(model, prompts_of((5,)), NEW, **how)


def test_one_key_projection_in_place_is_seen_by_skipped_layers() -> None:
    model: Any = tiny_exit_model("llama")
    generate(model, [prompt(5)], NEW)
    with torch.no_grad():
        model.backbone.model.layers[-1].self_attn.k_proj.weight.mul_(-3)
        model.exit_heads.norms[0].weight.mul_(-1)
    tokens, layers = naive_generate(
        model, prompt(5), NEW, naive_decide(model, "policy", 0.5), full_depth_first_token=True
    )
    output = generate(model, [prompt(5)], NEW)
    assert new_tokens_of(output, [prompt(5)]) == [tokens]
    assert output.exit_layers.tolist() == [layers]


def test_changed_policies_and_heads_are_seen() -> None:
    model = tiny_exit_model("llama", "low_rank")
    before = generate(model, [prompt(5)], NEW)
    with torch.no_grad():
        model.policy.exit_bias.fill_(-50)
    assert generate(model, [prompt(5)], NEW).exit_layers.unique().tolist() == [4]
    with torch.no_grad():
        model.policy.exit_bias.fill_(50)
    early = generate(model, [prompt(5)], NEW)
    assert early.exit_layers.tolist() == [[4] + [1] * (NEW - 1)]
    with torch.no_grad():
        model.exit_heads.up.mul_(-5)
    assert not torch.equal(generate(model, [prompt(5)], NEW).sequences, early.sequences)
    assert not torch.equal(before.sequences, early.sequences)


@pytest.mark.parametrize("criterion", ["policy", "confidence_classifier"])
def test_changed_readers_are_seen(criterion: str) -> None:
    """The weights of policy and classifier are laid out together with the projections of layers."""
    model = tiny_exit_model("llama")
    prompts = prompts_of((5, 3))
    layers = generate(model, prompts, NEW, criterion=criterion, threshold=0.5).exit_layers
    with torch.no_grad():
        model.policy.state_weight.mul_(-1)
        model.confidence_classifier.weight.mul_(-1)
    changed = generate(model, prompts, NEW, criterion=criterion, threshold=0.5).exit_layers
    expected = generate(copy.deepcopy(model), prompts, NEW, criterion=criterion, threshold=0.5).exit_layers
    assert torch.equal(changed, expected)
    assert not torch.equal(changed, layers)
    model.policy = model.new_policy()  # as after another training
    fresh = generate(model, prompts, NEW, criterion=criterion, threshold=0.5).exit_layers
    expected = generate(copy.deepcopy(model), prompts, NEW, criterion=criterion, threshold=0.5).exit_layers
    assert torch.equal(fresh, expected)


def test_copies_of_a_model_are_independent() -> None:
    model = tiny_exit_model("llama")
    before = generate(model, [prompt(5)], NEW).sequences
    twin = copy.deepcopy(model)
    assert torch.equal(generate(twin, [prompt(5)], NEW).sequences, before)
    scale_in_place(twin)
    with torch.no_grad():
        twin.backbone.model.layers[0].mlp.down_proj.weight.mul_(-1)
    assert not torch.equal(generate(twin, [prompt(5)], NEW).sequences, before)
    assert torch.equal(generate(model, [prompt(5)], NEW).sequences, before)


def test_signatures_tell_changes() -> None:
    model = nn.Linear(3, 2)
    before = weight_signature(model)
    assert weight_signature(model) == before
    with torch.no_grad():
        model.bias.add_(1)
    changed = weight_signature(model)
    assert changed != before
    model.weight = nn.Parameter(model.weight.detach().clone())
    replaced = weight_signature(model)
    assert replaced != changed
    assert weight_signature(model.to(torch.bfloat16)) != replaced
    with torch.inference_mode():
        made = nn.Linear(3, 2)
    assert weight_signature(made) == weight_signature(made)


# --- Modules that are not plain linear maps -------------------------------------------------------


class Doubled(nn.Linear):
    """Gives twice what its weights say."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_subclasses_of_linear_run_as_they_are() -> None:
    model = tiny_exit_model("llama")
    before = generate(model, prompts_of((5, 2)), NEW, mode="full").sequences
    layer = model.backbone.model.layers[1]
    for parent, name in ((layer.self_attn, "k_proj"), (layer.self_attn, "o_proj"), (layer.mlp, "down_proj")):
        plain = getattr(parent, name)
        own = Doubled(plain.in_features, plain.out_features, bias=False)
        own.load_state_dict(plain.state_dict())
        setattr(parent, name, own)
    assert_equals_huggingface(model, (5, 2))
    assert not torch.equal(generate(model, prompts_of((5, 2)), NEW, mode="full").sequences, before)


# peft asks transformers by an old name
PEFT = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def with_adapters(model: EarlyExitForCausalLM, *targets: str) -> peft.PeftModel:
    config = peft.LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False, lora_alpha=8)
    torch.manual_seed(3)
    return peft.get_peft_model(model, config).eval()


@PEFT
@pytest.mark.parametrize(
    "model_type, targets",
    [
        ("llama", ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")),
        ("qwen2", ("k_proj", "v_proj")),
        ("gemma3_text", ("q_proj", "k_proj", "v_proj", "gate_proj")),
        ("gpt_neox", ("query_key_value", "dense_h_to_4h")),
    ],
)
def test_adapters_at_full_depth(model_type: str, targets: tuple[str, ...]) -> None:
    model = tiny_exit_model(model_type)
    before = generate(model, prompts_of((5, 2)), NEW, mode="full").sequences
    adapted = with_adapters(model, *targets)
    assert_equals_huggingface(model, (5, 2))
    assert not torch.equal(generate(model, prompts_of((5, 2)), NEW, mode="full").sequences, before)
    with adapted.disable_adapter():
        assert torch.equal(generate(model, prompts_of((5, 2)), NEW, mode="full").sequences, before)
    adapted.merge_and_unload()
    assert_equals_huggingface(model, (5, 2))


@PEFT
@pytest.mark.parametrize(
    "model_type, targets",
    [
        ("llama", ("q_proj", "o_proj")),
        ("llama", ("k_proj", "v_proj")),
        ("gpt_neox", ("query_key_value",)),
    ],
)
def test_adapters_with_exits(model_type: str, targets: tuple[str, ...]) -> None:
    model = tiny_exit_model(model_type)
    with_adapters(model, *targets)
    decide = naive_decide(model, "policy", 0.5)
    for seed in range(3):
        text = prompt(5, seed)
        tokens, layers = naive_generate(model, text, NEW, decide, full_depth_first_token=True)
        output = generate(model, [text], NEW)
        assert output.exit_layers.tolist() == [layers]
        assert new_tokens_of(output, [text]) == [tokens]


# --- Parts ----------------------------------------------------------------------------------------


def test_rotation_by_hand() -> None:
    # one head of four entries at 90 degrees, then two more that do not turn: (a, b, c, d) -> (-c, -d, a, b)
    cos, sin = torch.zeros(1, 1, 4), torch.ones(1, 1, 4)
    states = torch.arange(1.0, 7).view(1, 1, 6)
    assert rotate(states, signed_rotary(cos, sin)).flatten().tolist() == [-3, -4, 1, 2, 5, 6]
    assert rotate(states[..., :4], signed_rotary(cos, sin)).flatten().tolist() == [-3, -4, 1, 2]


@EVERY_TYPE
def test_weights_are_read_in_place_but_for_fused_projections(model_type: str) -> None:
    model = tiny_decoder(model_type)
    packed = FunctionalDecoder(model)
    assert (packed.dtype, packed.device) == (torch.float32, torch.device("cpu"))
    assert [layer.index for layer in packed.layers] == [0, 1, 2, 3]
    tokens, positions = torch.tensor([5, 9]), torch.tensor([0, 1])
    with torch.no_grad():
        expected = model(tokens[None], output_hidden_states=True).hidden_states[0][0]
        torch.testing.assert_close(packed.embed(tokens, positions), expected)
