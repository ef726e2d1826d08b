"""Decoder layers as plain functions on a model's own weights, for generation.

Hugging Face's modules spend more time between kernels than in them when a step has few tokens. Here a layer is about
seventeen calls of torch, whatever the model type; `decoders.LayerParts` says where each keeps its weights. Only the
query, key and value projections are copied: into one, with the factors of the norm before them. The norm itself is then
the same for everything that reads a state, and an exit's policy (`FunctionalDecoder.fused`) comes with that product.

What a layer attends to is the caller's: it takes a step whose `attend` writes the new keys and values and gives the
attention's output.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from consistentee.backbones import decoders
from consistentee.backbones.decoders import LayerParts
from consistentee.inference.decoder.weights import (
    Map,
    adding_function,
    affine_norm,
    linear_function,
    norm_epsilon,
    norm_function,
    plain_weights,
    unit_norm,
    weight_signature,
)

Affine = tuple[Tensor, Tensor]
"""Weight (outputs, inputs) and bias (outputs,)."""
Rotary = tuple[Tensor, Tensor]
"""Cosines and signed sines, each (tokens or 1, 1, rotated size): see `signed_rotary`."""


class Step(Protocol):
    """What attention asks of the caller: where tokens stand and what they may see."""

    def rotary(self, layer_type: str) -> Rotary | None:
        """Angles of the tokens of this step; None for learned positions."""
        ...

    def attend(self, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Write keys and values (tokens, key/value heads, head size), attend: (tokens, heads * head size)."""
        ...


class Layer:
    """One layer.

    Args:
        module: Hugging Face's.
        parts: where its parts lie.
        norm: kind of its norms, as in the table.
        config: of the model.
        index: 0-based.
        layer_type: full or sliding attention.
    """

    def __init__(
        self, module: nn.Module, parts: LayerParts, norm: str, config: Any, index: int, layer_type: str
    ) -> None:
        def part(path: str) -> Any:
            return module.get_submodule(path) if path else None

        attention: Any = part(parts.attention)
        self.index = index
        self.layer_type = layer_type
        self.num_heads = int(config.num_attention_heads)
        self.num_key_value_heads = int(getattr(config, "num_key_value_heads", None) or self.num_heads)
        self.head_size = int(getattr(attention, "head_dim", None) or attention.head_size)
        self.scaling = float(attention.scaling)
        self.softcap: float | None = getattr(attention, parts.attention_cap) if parts.attention_cap else None
        self.qkv_width = (self.num_heads + 2 * self.num_key_value_heads) * self.head_size
        self._qkv_modules = [part(path) for path in (parts.query, parts.key, parts.value) if path]
        self._input_norm = part(parts.input_norm)
        self._norm_kind = norm
        self.qkv = self.projection(None)
        self._heads_layout = parts.fused == "heads"
        self._query_norm = norm_function(part(parts.query_norm), norm) if parts.query_norm else None
        self._key_norm = norm_function(part(parts.key_norm), norm) if parts.key_norm else None
        self._output = part(parts.attention_output)
        self._add_output = adding_function(self._output)
        self._output_norm = _optional_norm(part(parts.attention_output_norm), norm)
        self._mlp_norm = norm_function(part(parts.mlp_norm), norm)
        self._gate = linear_function(part(parts.gate)) if parts.gate else None
        self._up = linear_function(part(parts.up))
        self._add_down = adding_function(part(parts.down))
        self._activation = _activation(part(parts.activation))
        self._mlp_output_norm = _optional_norm(part(parts.mlp_output_norm), norm)
        self._parallel = bool(getattr(module, "use_parallel_residual", False))

    def projection(self, feature_map: Affine | None) -> Map:
        """Queries, keys and values from states behind `unit_norm`, and what else reads these states.

        Args:
            feature_map: an affine map of states behind `unit_norm`; its outputs come last.

        Returns:
            (tokens, hidden) -> (tokens, queries, keys and values, exit features).
        """
        factor, shift = affine_norm(self._input_norm, self._norm_kind)
        parts = [plain_weights(module) for module in self._qkv_modules]
        if any(part is None for part in parts):  # an adapter: run as it is
            modules = self._qkv_modules

            def run(unit: Tensor) -> Tensor:
                normed = unit * factor if shift is None else torch.addcmul(shift, unit, factor)
                outputs = [module(normed) for module in modules]
                if feature_map is not None:
                    outputs.append(functional.linear(unit, *feature_map))
                return torch.cat(outputs, dim=-1)

            return run
        plain = [part for part in parts if part is not None]
        weight = torch.cat([weight for weight, _ in plain])
        bias = None
        if shift is not None or any(own is not None for _, own in plain):
            bias = torch.cat([weight.new_zeros(len(part)) if own is None else own for part, own in plain])
            bias = bias if shift is None else bias + (weight.float() @ shift.float()).to(weight.dtype)
        weight = (weight.float() * factor.float()).to(weight.dtype)
        if feature_map is None:
            return lambda unit: functional.linear(unit, weight, bias)
        width, more = self.qkv_width, feature_map[1].to(weight.dtype)
        both = torch.cat([weight, feature_map[0].to(weight.dtype)])
        if bias is not None:
            biases = torch.cat([bias, more])
            return lambda unit: functional.linear(unit, both, biases)

        def run_unbiased(unit: Tensor) -> Tensor:  # a product with a bias takes a slower way for few rows
            outputs = functional.linear(unit, both)
            outputs.narrow(1, width, len(more)).add_(more)
            return outputs

        return run_unbiased

    def __call__(self, hidden: Tensor, unit: Tensor, step: Step) -> Tensor:
        """Hidden states after this layer: (tokens, hidden), and the same behind `unit_norm` -> (tokens, hidden)."""
        return self.finish(hidden, self.qkv(unit), step)

    def finish(self, hidden: Tensor, qkv: Tensor, step: Step) -> Tensor:
        """Hidden states after this layer, from those before it and their queries, keys and values."""
        query, key, value = self._split(qkv, step.rotary(self.layer_type))
        attended = step.attend(self, query, key, value)
        after = _residual(hidden, attended, self._add_output, self._output_norm)
        mlp_input = self._mlp_norm(hidden if self._parallel else after)
        inner = self._activation(self._up(mlp_input) if self._gate is None else self._gate(mlp_input))
        if self._gate is not None:
            inner = inner * self._up(mlp_input)
        return _residual(after, inner, self._add_down, self._mlp_output_norm)

    def _split(self, qkv: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries (tokens, heads, size), rotated keys and values (tokens, key/value heads, size)."""
        tokens, heads, pairs, size = len(qkv), self.num_heads, self.num_key_value_heads, self.head_size
        if self._heads_layout:
            query, key, value = qkv.view(tokens, heads, 3 * size).chunk(3, dim=-1)
        else:
            by_head = qkv.view(tokens, heads + 2 * pairs, size)
            value = by_head[:, heads + pairs :]
            if self._query_norm is None and rotary is not None:  # one rotation for both
                both = rotate(by_head[:, : heads + pairs], rotary)
                return both[:, :heads], both[:, heads:], value
            query, key = by_head[:, :heads], by_head[:, heads : heads + pairs]
        if self._query_norm is not None and self._key_norm is not None:
            query, key = self._query_norm(query), self._key_norm(key)
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        return query, key, value

    def causal_attention(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention of whole rows without padding, each token to itself and what is before it.

        Args:
            query: (rows, tokens, heads, size).
            keys, values: (rows, key/value heads, tokens, size).

        Returns:
            (rows * tokens, heads * size).
        """
        rows, tokens, heads, size = query.shape
        attended = functional.scaled_dot_product_attention(
            query.transpose(1, 2), keys, values, is_causal=True, scale=self.scaling, enable_gqa=True
        )
        return attended.transpose(1, 2).reshape(rows * tokens, heads * size)

    def attention(self, query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """Attention of equally many tokens per row.

        Args:
            query: (rows, tokens, heads, size).
            keys, values: (rows, key/value heads, slots, size).
            bias: (rows, tokens, slots), added to the scores; None where every token sees every slot.

        Returns:
            (rows * tokens, heads * size).
        """
        rows, tokens, heads, size = query.shape
        pairs = self.num_key_value_heads
        group = heads // pairs
        if (
            tokens > size and self.softcap is None
        ):  # a prompt: its mask is larger than keys, and is not copied
            grouped = bias is None or _masks_grouped_heads(query.device)
            if not grouped:
                keys, values = (part.repeat_interleave(group, dim=1) for part in (keys, values))
            mask = None if bias is None else bias[:, None]
            attended = functional.scaled_dot_product_attention(
                query.transpose(1, 2), keys, values, attn_mask=mask, scale=self.scaling, enable_gqa=grouped
            )
            return attended.transpose(1, 2).reshape(rows * tokens, heads * size)
        if tokens == 1:  # the heads of a group stand where tokens would: no key is repeated
            grouped = query.view(rows, pairs, group, size)
        else:
            grouped = query.view(rows, tokens, pairs, group, size).permute(0, 2, 3, 1, 4)
            grouped = grouped.reshape(rows, pairs, group * tokens, size)
        mask = None
        if bias is not None:
            slots = keys.shape[2]
            mask = bias[:, None, None].expand(rows, 1, group, tokens, slots)
            mask = mask.reshape(rows, 1, group * tokens, slots)
        if self.softcap is None:
            attended = functional.scaled_dot_product_attention(
                grouped, keys, values, attn_mask=mask, scale=self.scaling
            )
        else:
            scores = torch.matmul(grouped, keys.transpose(2, 3)) * self.scaling
            scores = torch.tanh(scores / self.softcap) * self.softcap
            scores = scores if mask is None else scores + mask
            weights = scores.softmax(-1, dtype=torch.float32).to(grouped.dtype)
            attended = torch.matmul(weights, values)
        if tokens == 1:
            return attended.reshape(rows, heads * size)
        attended = attended.view(rows, pairs, group, tokens, size).permute(0, 3, 1, 2, 4)
        return attended.reshape(rows * tokens, heads * size)


class FunctionalDecoder:
    """All layers of a model, and what stands before and behind them.

    Args:
        model: a Hugging Face causal language model of a type in `DECODERS`, in evaluation mode. Its weights are read
            in place; make a new `FunctionalDecoder` where `signature` tells that they have changed.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        row = decoders.decoder_architecture(model.config)
        kinds = decoders.layer_types(model.config)
        self.model = model
        self.layers = [
            Layer(module, row.parts, row.norm, model.config, index, kinds[index])
            for index, module in enumerate(decoders.decoder_layers(model))
        ]
        self.norm_kind = row.norm
        hidden = int(cast(Any, model.config).hidden_size)
        input_norm = decoders.decoder_layers(model)[0].get_submodule(row.parts.input_norm)
        self.unit_norm = unit_norm(hidden, row.norm, norm_epsilon(input_norm))
        """What every norm of a state begins with: (tokens, hidden), scaled to unit variance."""
        self.layer_types = kinds
        self.sliding_window = decoders.sliding_window(model.config)
        self.signature = weight_signature(model)
        self._length_rotary: _LengthRotary | None = None
        if decoders.rotary_depends_on_length(model):
            self._length_rotary = _LengthRotary(copy.deepcopy(decoders.decoder_base(model).rotary_emb))
        weight = decoders.decoder_base(model).get_submodule(row.embeddings).weight
        self.dtype, self.device = weight.dtype, weight.device
        self._plain_embedding = (
            weight
            if type(decoders.decoder_base(model).get_submodule(row.embeddings)) is (nn.Embedding)
            and not row.positions
            else None
        )

    @property
    def rotary_depends_on_length(self) -> bool:
        """Whether the angles of a token depend on how long its text is."""
        return self._length_rotary is not None

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """(tokens,) ids and positions -> (tokens, hidden)."""
        if self._plain_embedding is not None:
            return self._plain_embedding[tokens]
        return decoders.decoder_inputs(self.model, tokens[None], positions[None])[0]

    def fused(self, feature_maps: Sequence[Affine | None]) -> list[Map]:
        """Every layer's projection with something else that reads the state before it.

        Args:
            feature_maps: for each layer an affine map of states behind `unit_norm`, or None.
        """
        return [
            layer.qkv if more is None else layer.projection(more)
            for layer, more in zip(self.layers, feature_maps, strict=True)
        ]

    def rotary(self, positions: Tensor, lengths: int | Sequence[int]) -> dict[str, Rotary | None]:
        """Angles of (tokens,) positions for each attention type.

        Args:
            positions: of the tokens.
            lengths: tokens of the batch's longest row when these come, for all or for each; read by scalings that
                change with it alone, which turn a token as they do when it is generated by itself.
        """
        if self._length_rotary is None:
            return self._angles(positions, None)
        if isinstance(lengths, int):
            return self._angles(positions, lengths)
        distinct = list(dict.fromkeys(lengths))
        if len(distinct) == 1:
            return self._angles(positions, distinct[0])
        members = [[token for token, own in enumerate(lengths) if own == length] for length in distinct]
        parts = [
            self._angles(positions[torch.tensor(own, device=positions.device)], length)
            for own, length in zip(members, distinct, strict=True)
        ]
        back = torch.tensor([token for own in members for token in own], device=positions.device).argsort()
        tables: dict[str, Rotary | None] = {}
        for kind in parts[0]:
            known = [table for table in (part[kind] for part in parts) if table is not None]
            tables[kind] = (
                torch.cat([cos for cos, _ in known])[back],
                torch.cat([sin for _, sin in known])[back],
            )
        return tables

    def _angles(self, positions: Tensor, length: int | None) -> dict[str, Rotary | None]:
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        if self._length_rotary is None or length is None:
            tables = decoders.rotary_tables(self.model, like, positions[None])
        else:
            rotary = self._length_rotary.module
            # The first call lets it forget longer texts; the second is told the length by one more position.
            decoders.rotary_tables(self.model, like, torch.zeros_like(positions[None]), rotary)
            longest = torch.cat([positions, positions.new_tensor([length - 1])])
            tables = {
                kind: None if table is None else (table[0][:, :-1], table[1][:, :-1])
                for kind, table in decoders.rotary_tables(self.model, like, longest[None], rotary).items()
            }
        return {kind: None if table is None else signed_rotary(*table) for kind, table in tables.items()}


class _LengthRotary(threading.local):
    """A module of angles that remembers how long texts were: each thread's own copy.

    Args:
        fresh: what is copied; it is not run itself.
    """

    def __init__(self, fresh: nn.Module) -> None:  # called anew in every thread
        self.fresh = fresh
        self.module = copy.deepcopy(fresh)

    def __reduce__(self) -> Any:
        return type(self), (self.fresh,)


def signed_rotary(cos: Tensor, sin: Tensor) -> Rotary:
    """Tables of Hugging Face, (1, tokens, size) each, in the form that `rotate` reads."""
    half = sin.shape[-1] // 2
    signed = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
    return cos[0].unsqueeze(1), signed[0].unsqueeze(1)


def rotate(states: Tensor, rotary: Rotary) -> Tensor:
    """Rotate queries or keys by their positions: (tokens, heads, size), of which the first entries rotate."""
    cos, sin = rotary
    width = cos.shape[-1]
    turned = states if width == states.shape[-1] else states[..., :width]
    turned = torch.addcmul(turned * cos, turned.roll(width // 2, -1), sin)
    return turned if width == states.shape[-1] else torch.cat([turned, states[..., width:]], dim=-1)


def _residual(
    residual: Tensor, states: Tensor, add: Callable[[Tensor | None, Tensor], Tensor], norm: Map | None
) -> Tensor:
    return add(residual, states) if norm is None else residual + norm(add(None, states))


def _masks_grouped_heads(device: torch.device) -> bool:
    """Whether attention with a mask and fewer key/value heads than heads has a kernel that keeps no scores."""
    return device.type == "cpu"


def _optional_norm(module: nn.Module | None, kind: str) -> Map | None:
    return None if module is None else norm_function(module, kind)


def _activation(module: Any) -> Map:
    return (
        functional.silu
        if isinstance(module, nn.SiLU) or type(module).__name__ == "SiLUActivation"
        else module
    )
