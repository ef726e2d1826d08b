"""Tiny causal language models for tests, and the oracle of token-level early exit: one row, token and layer at a time.

The oracle keeps, for every layer, the list of the states that all positions had (or are taken to have had) in front of
it, and calls Hugging Face's own layer on the whole list to get the newest state. No cache, no batch, no padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from consistentee.backbones.decoders import SUPPORTED_DECODER_TYPES, build_decoder, final_norm
from consistentee.inference.decoder.functional_decoder import Layer
from consistentee.models.causal_lm import EarlyExitForCausalLM

LAYERS = 4
VOCABULARY = 97
PAD = 0
EVERY_TYPE = pytest.mark.parametrize("model_type", SUPPORTED_DECODER_TYPES)

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,  # texts end at their maximum; tests of an end choose a token that occurs
    "initializer_range": 0.3,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
}
PARTICULAR: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 6},
    "qwen2": {
        "num_key_value_heads": 2,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 2,
    },
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "gpt_neox": {"rotary_pct": 0.5},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 16},
    "gemma3_text": {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "sliding_window": 5,
        "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    },
}
MIXED_LAYERS = ["full_attention", "sliding_attention"] * 2
"""`layer_types` that no type has by itself; some types' models do not read them."""
MIXED_WINDOWS: dict[str, Any] = {"layer_types": MIXED_LAYERS, "sliding_window": 3, "use_sliding_window": True}


@contextmanager
def single_thread() -> Iterator[None]:
    """Keep tiny models on one thread: handing work to others costs more than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_decoder(model_type: str, *, seed: int = 0, **config_values: Any) -> PreTrainedModel:
    """A random causal language model in evaluation mode; biases and norms are random too.

    Args:
        model_type: one of the supported types.
        seed: same seed, same weights; torch's generator is left as it was.
        **config_values: further fields of the Hugging Face config.
    """
    values = {**COMMON, **PARTICULAR.get(model_type, {}), **config_values}
    if model_type != "gpt2":
        values = {name: value for name, value in values.items() if not name.endswith("_pdrop")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_decoder(AutoConfig.for_model(model_type, **values)).eval()
        randomise_vectors(model)
        sign_norm(final_norm(model), model_type)
    return model


def tiny_exit_model(
    model_type: str,
    exit_head: str = "shared",
    seed: int = 0,
    exit_values: dict[str, Any] | None = None,
    **config_values: Any,
) -> EarlyExitForCausalLM:
    """A random early-exit model whose policy and other classifiers let tokens leave at all layers.

    Args:
        model_type, seed, **config_values: as in `tiny_decoder`.
        exit_head: `shared`, `low_rank` or `separate`.
        exit_values: further fields of `EarlyExitCausalLMConfig`.
    """
    backbone = tiny_decoder(model_type, seed=seed, **config_values)
    values: dict[str, Any] = {"exit_head": exit_head, "exit_head_rank": 3, **(exit_values or {})}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed + 1)
        model = EarlyExitForCausalLM.from_backbone(backbone, **values).eval()
        torch.manual_seed(seed + 1)
        for norm in model.exit_heads.norms:
            sign_norm(norm, model_type)
        for name, weight in model.exit_heads.named_parameters():
            if name == "up" or name.startswith("heads."):
                weight.normal_(std=0.3)
        model.policy.state_weight.normal_(std=0.5)
        model.policy.state_bias.normal_(std=0.5)
        model.policy.state_output.normal_(std=1.0)
        model.confidence_classifier.weight.normal_(std=0.2)
        # biases with which three tokens of ten leave at every layer
        ids = torch.randint(3, VOCABULARY, (8, 12))
        never = torch.zeros_like(ids, dtype=torch.bool)

        def look(index: int, before: Tensor, after: Tensor, normed: Tensor) -> Tensor:
            flat = normed.flatten(0, 1)
            policy = (
                model.policy(flat[:, None], None, first_layer_index=index) - model.policy.exit_bias[index]
            )
            model.policy.exit_bias[index] = -policy.quantile(0.7)
            model.confidence_classifier.bias[index] = -(
                flat @ model.confidence_classifier.weight[index]
            ).quantile(0.7)
            return never

        model.exit_pass(ids, None, never, look)
    return model


@torch.no_grad()
def randomise_vectors(module: nn.Module) -> None:
    """Give norms and biases random values: at their usual ones and zeros they would hide mistakes."""
    for weight in module.parameters():
        if weight.ndim == 1:
            weight.add_(torch.randn_like(weight), alpha=0.2)


@torch.no_grad()
def sign_norm(norm: nn.Module, model_type: str) -> None:
    """Give the factors of a norm before a head any sign: with tied embeddings, texts would repeat one token."""
    weight: Any = norm.weight
    weight.normal_()
    if model_type.startswith("gemma"):  # stored minus one
        weight.sub_(1)


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random token ids without padding."""
    generator = torch.Generator().manual_seed(100 * seed + length)
    return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()


def left_padded_batch(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Prompts of any lengths to `input_ids` and `attention_mask`, each (rows, longest) int64."""
    longest = max(map(len, prompts))
    input_ids = torch.tensor([[PAD] * (longest - len(row)) + list(row) for row in prompts])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts])
    return input_ids, mask


def generate(model: Any, prompts: Sequence[Sequence[int]], new_tokens: int, **options: Any) -> Any:
    """Greedy generation on left-padded prompts, with everything that it returns."""
    input_ids, mask = left_padded_batch(prompts)
    options = {"do_sample": False, "pad_token_id": PAD, "return_dict_in_generate": True, **options}
    return model.generate(input_ids=input_ids, attention_mask=mask, max_new_tokens=new_tokens, **options)


def new_tokens_of(output: Any, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """What was generated behind the prompts."""
    return output.sequences[:, max(map(len, prompts)) :].tolist()


@contextmanager
def layer_calls() -> Iterator[list[tuple[int, int]]]:
    """Count what packed layers do: a list that fills with (layer index, tokens) of every call."""
    calls: list[tuple[int, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        run = Layer.finish

        def counted(self: Layer, hidden: Tensor, *rest: Any) -> Any:
            calls.append((self.index, len(hidden)))
            return run(self, hidden, *rest)

        patch.setattr(Layer, "finish", counted)
        yield calls


# --- The oracle -----------------------------------------------------------------------------------

Decide = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer index, states before, states after, states behind the exit's norm), (..., hidden) each -> (...) bool."""


def naive_decide(
    model: EarlyExitForCausalLM, criterion: str, threshold: float, min_exit_layer: int = 1
) -> Decide:
    """Exit criteria once more, as their papers define them, by probabilities and not by logits."""

    def decide(index: int, before: Tensor, after: Tensor, normed: Tensor) -> Tensor:
        if index + 1 < min_exit_layer and criterion != "static":
            return torch.zeros(after.shape[:-1], dtype=torch.bool)
        if criterion == "policy":
            flat = normed.reshape(-1, 1, normed.shape[-1])
            scores = model.policy(flat, None, first_layer_index=index).sigmoid().view(normed.shape[:-1])
        elif criterion == "softmax_margin":
            top = naive_logits(model, index, normed).softmax(-1).sort(-1, descending=True).values
            scores = top[..., 0] - top[..., 1]
        elif criterion == "state_similarity":
            if index == 0:
                return torch.zeros(after.shape[:-1], dtype=torch.bool)
            scores = (before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1))
        elif criterion == "confidence_classifier":
            weight, bias = model.confidence_classifier.weight[index], model.confidence_classifier.bias[index]
            scores = ((normed * weight).sum(-1) + bias).sigmoid()
        else:
            return torch.full(after.shape[:-1], index + 1 >= threshold)
        return scores > threshold

    return decide


def naive_logits(model: EarlyExitForCausalLM, layer_index: int, normed: Tensor) -> Tensor:
    """Logits of an exit, (..., hidden) -> (..., vocabulary), from the heads' weights."""
    heads, backbone = model.exit_heads, model.backbone
    output: Any = backbone.get_output_embeddings()
    if layer_index < LAYERS - 1 and heads.kind == "low_rank":
        normed = normed + normed @ heads.down[layer_index].T @ heads.up[layer_index].T
    if layer_index < LAYERS - 1 and heads.kind == "separate":
        output = heads.heads[layer_index]
    logits = output(normed)
    cap = getattr(backbone.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def naive_norm(model: EarlyExitForCausalLM, layer_index: int, state: Tensor) -> Tensor:
    """A state behind the norm of its exit, by Hugging Face's norm module."""
    if layer_index < LAYERS - 1:
        return model.exit_heads.norms[layer_index](state)
    base: Any = getattr(model.backbone, model.backbone.base_model_prefix)
    names = [name for name in ("norm", "ln_f", "final_layer_norm") if hasattr(base, name)]
    return getattr(base, names[0])(state)


def naive_layer(backbone: PreTrainedModel, layer_index: int, states: Sequence[Tensor]) -> Tensor:
    """States of a row's positions behind a layer: Hugging Face's own layer on the whole row."""
    base: Any = getattr(backbone, backbone.base_model_prefix)
    config: Any = backbone.config
    layers = base.h if hasattr(base, "h") else base.layers
    count = len(states)
    hidden = torch.stack(list(states))[None]
    reads_kinds = config.model_type in ("qwen2", "qwen3", "gemma2", "gemma3_text")
    kind = config.layer_types[layer_index] if reads_kinds else "full_attention"
    slides = kind == "sliding_attention" or (config.model_type == "mistral" and config.sliding_window)
    distance = torch.arange(count)[:, None] - torch.arange(count)
    visible = distance >= 0
    if slides:
        visible &= distance < config.sliding_window
    mask = torch.zeros(count, count).masked_fill(~visible, torch.finfo(torch.float32).min)
    positions = torch.arange(count)[None]
    options: dict[str, Any] = {"attention_mask": mask[None, None], "use_cache": False}
    if hasattr(base, "rotary_emb"):
        by_kind = (kind,) if config.model_type == "gemma3_text" else ()
        options["position_embeddings"] = base.rotary_emb(hidden, positions, *by_kind)
    output = layers[layer_index](hidden, **options)
    return (output[0] if isinstance(output, tuple) else output)[0]


@torch.no_grad()
def naive_generate(
    model: EarlyExitForCausalLM,
    prompt_ids: Sequence[int],
    new_tokens: int,
    decide: Decide,
    *,
    full_depth_first_token: bool,
    skipped: str = "copy",
    eos_token_id: int | None = None,
) -> tuple[list[int], list[int]]:
    """Greedy text of one prompt with exits, as slowly and as plainly as can be.

    Args:
        model: an early-exit model, of which the weights are used and nothing else.
        prompt_ids: of one row, without padding.
        new_tokens: at most.
        decide: when a token leaves.
        full_depth_first_token: whether the last token of the prompt goes through all layers, as the others do.
        skipped: `copy`: a token that left stands, at all deeper layers, with its state at the exit; `recompute`: with
            what the full model would have there.
        eos_token_id: ends the text.

    Returns:
        New tokens and the layer at which each left, 1-based.
    """
    text, exit_layers = list(prompt_ids), []
    inputs: list[list[Tensor]] = [
        [] for _ in range(LAYERS + 1)
    ]  # by layer: the state of every position before it
    position, embedded = 0, torch.empty(0)
    while True:
        if position >= len(embedded):
            embedded = model.backbone(torch.tensor([text]), output_hidden_states=True).hidden_states[0][0]
        in_prompt = position < len(prompt_ids) - 1 or (
            position == len(prompt_ids) - 1 and full_depth_first_token
        )
        inputs[0].append(embedded[position])
        exit_layer, exit_state = LAYERS, None
        for index in range(LAYERS):
            if exit_state is None:
                before = inputs[index][position]
                after = naive_layer(model.backbone, index, inputs[index])[position]
                normed = naive_norm(model, index, after)
                inputs[index + 1].append(after)
                leaves = index == LAYERS - 1 or (not in_prompt and bool(decide(index, before, after, normed)))
                if leaves:
                    exit_layer, exit_state = index + 1, after
            elif skipped == "copy":
                inputs[index + 1].append(exit_state)
            else:
                inputs[index + 1].append(naive_layer(model.backbone, index, inputs[index])[position])
        position += 1
        if position < len(prompt_ids):
            continue
        assert exit_state is not None
        normed = naive_norm(model, exit_layer - 1, exit_state)
        text.append(int(naive_logits(model, exit_layer - 1, normed).argmax()))
        exit_layers.append(exit_layer)
        if text[-1] == eos_token_id or len(exit_layers) == new_tokens:
            return text[len(prompt_ids) :], exit_layers
