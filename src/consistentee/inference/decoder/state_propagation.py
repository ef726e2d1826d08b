"""Keys and values of the layers that a token skipped, from the state with which it exited.

Later tokens that go deeper attend to every earlier token at every layer, also where that token never went. Its state at
the exit stands for its state at all deeper layers (hidden-state copying), so its keys and values there are linear maps
of one vector: all skipped layers and all rows are computed by one batched product and written at once.

Source: ConsistentEE (arXiv:2312.11882), generation; CALM (arXiv:2207.07061), section on missing states.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from consistentee.backbones import decoders
from consistentee.inference.decoder.functional_decoder import Rotary, rotate
from consistentee.inference.decoder.kv_cache import DecoderCache
from consistentee.inference.decoder.weights import Map, norm_epsilon, plain_weights, rms_weight


class StatePropagation:
    """Key and value projections of all layers, stacked.

    Args:
        model: a Hugging Face causal language model of a type in `DECODERS`. Its key and value projections are copied
            (6 % of the weights of a SmolLM2 layer).
    """

    def __init__(self, model: PreTrainedModel) -> None:
        row, config = decoders.decoder_architecture(model.config), model.config
        layers: list[Any] = list(decoders.decoder_layers(model))
        norms: list[Any] = [layer.get_submodule(row.parts.input_norm) for layer in layers]
        attention: Any = layers[0].get_submodule(row.parts.attention)
        values: Any = config
        self.num_layers = len(layers)
        self.head_size = int(getattr(attention, "head_dim", None) or attention.head_size)
        heads = int(values.num_attention_heads)
        self.num_key_value_heads = int(getattr(values, "num_key_value_heads", None) or heads)
        self._centred = row.norm == "layer"
        self._eps = norm_epsilon(norms[0])
        # (layers, 1, hidden)
        self._norm_weight = torch.stack(
            [norm.weight.detach() if self._centred else rms_weight(norm, row.norm) for norm in norms]
        )[:, None]
        self._norm_bias = (
            torch.stack([norm.bias.detach() for norm in norms])[:, None] if self._centred else None
        )
        parts = [_key_value_weights(layer, row.parts, heads, self.head_size) for layer in layers]
        pairs = [part for part in parts if isinstance(part, tuple)]
        self._maps: list[Map] | None = None
        self._weight = self._bias = None
        if len(pairs) < len(parts):  # adapters: layer by layer
            self._maps = [_as_map(part) for part in parts]
        else:
            self._weight = torch.stack([weight for weight, _ in pairs])  # (layers, hidden, 2 * heads * size)
            biases = [bias for _, bias in pairs if bias is not None]
            self._bias = torch.stack(biases)[:, None] if biases else None
        self._key_norm: Tensor | None = None
        if row.parts.key_norm:
            key_norms: list[Any] = [layer.get_submodule(row.parts.key_norm) for layer in layers]
            weights = [rms_weight(norm, row.norm) for norm in key_norms]
            self._key_norm = torch.stack(weights)[:, None, None]  # (layers, 1, 1, size)
            self._key_eps = norm_epsilon(key_norms[0])
        self._layer_types = decoders.layer_types(config)

    def compute(self, states: Tensor, first_layer: int, rotary: dict[str, Rotary | None]) -> Tensor:
        """Keys and values of all layers from one on.

        Args:
            states: (tokens, hidden), hidden states at the exits.
            first_layer: 0-based index of the first layer to compute for.
            rotary: angles of the tokens, by attention type.

        Returns:
            (layers from there on, tokens, 2, key/value heads, head size).
        """
        shape = (states.shape[-1],)
        if self._centred:
            normed = functional.layer_norm(states, shape, None, None, self._eps)
        else:
            normed = functional.rms_norm(states, shape, None, self._eps)
        inputs = normed * self._norm_weight[first_layer:]  # (layers, tokens, hidden)
        if self._norm_bias is not None:
            inputs = inputs + self._norm_bias[first_layer:]
        if self._maps is not None or self._weight is None:
            maps = (self._maps or [])[first_layer:]
            both = torch.stack([run(states) for run, states in zip(maps, inputs, strict=True)])
        elif self._bias is None:
            both = torch.bmm(inputs, self._weight[first_layer:])
        else:
            both = torch.baddbmm(self._bias[first_layer:], inputs, self._weight[first_layer:])
        both = both.view(*both.shape[:2], 2, self.num_key_value_heads, self.head_size)
        keys = both[:, :, 0]
        if self._key_norm is not None:
            keys = functional.rms_norm(keys, (self.head_size,), None, self._key_eps)
            keys = keys * self._key_norm[first_layer:]
        both[:, :, 0] = self._rotated(keys, first_layer, rotary)
        return both

    def write(
        self,
        cache: DecoderCache,
        states: Tensor,
        exit_layer: Tensor,
        *,
        rows: Tensor,
        slots: Tensor,
        rotary: dict[str, Rotary | None],
    ) -> None:
        """Compute and write the keys and values that tokens skipped.

        Args:
            cache: where they go.
            states: (tokens, hidden), at the exits.
            exit_layer: (tokens,) int64, 1-based.
            rows, slots: (tokens,) int64, where each token stands in the cache.
            rotary: angles of these tokens, by attention type.
        """
        first = int(exit_layer.min())
        if first >= self.num_layers:
            return
        both = self.compute(states, first, rotary)
        if len(states) == 1:
            cache.storage[first:, :, int(rows[0]), :, int(slots[0])] = both[:, 0]
            return
        layers = torch.arange(first, self.num_layers, device=states.device)
        layer_index, token = (layers[:, None] >= exit_layer).nonzero(as_tuple=True)
        cache.storage[layer_index + first, :, rows[token], :, slots[token]] = both[layer_index, token]

    def _rotated(self, keys: Tensor, first_layer: int, rotary: dict[str, Rotary | None]) -> Tensor:
        """Keys (layers, tokens, heads, size) turned by their positions, each layer as its attention type has it."""
        kinds = self._layer_types[first_layer:]
        tables = {kind: rotary[kind] for kind in dict.fromkeys(kinds)}
        first = next(iter(tables.values()))
        if first is None:
            return keys
        if len(tables) == 1 or all(table is first for table in tables.values()):
            return rotate(keys, first)
        turned = {kind: rotate(keys, table) for kind, table in tables.items() if table is not None}
        return torch.stack([turned[kind][index] for index, kind in enumerate(kinds)])


def _key_value_weights(
    layer: Any, parts: decoders.LayerParts, heads: int, size: int
) -> tuple[Tensor, Tensor | None] | Map:
    """Key and value weights of a layer, (hidden, 2 * heads * size), and their bias; a function if it has adapters."""
    paths = (parts.query,) if parts.fused else (parts.key, parts.value)
    modules = [layer.get_submodule(path) for path in paths]
    plain = [found for found in map(plain_weights, modules) if found is not None]
    if len(plain) < len(modules):
        if not parts.fused:
            return lambda states: torch.cat([module(states) for module in modules], dim=-1)
        picked = _key_value_outputs(parts.fused, heads, size)
        return lambda states: modules[0](states)[..., picked]
    weight = torch.cat([found for found, _ in plain])
    bias = None if plain[0][1] is None else torch.cat([own for _, own in plain if own is not None])
    if parts.fused:
        picked = _key_value_outputs(parts.fused, heads, size).to(weight.device)
        weight, bias = weight[picked], None if bias is None else bias[picked]
    return weight.t().contiguous(), bias


def _key_value_outputs(layout: str, heads: int, size: int) -> Tensor:
    """Which outputs of a fused projection are keys, and behind them values, head by head."""
    outputs = torch.arange(3 * heads * size)
    if layout == "blocks":
        return outputs[heads * size :]
    return outputs.view(heads, 3, size)[:, 1:].transpose(0, 1).reshape(-1)


def _as_map(part: tuple[Tensor, Tensor | None] | Map) -> Map:
    if not isinstance(part, tuple):
        return part
    weight, bias = part
    return lambda states: functional.linear(states, weight.t(), bias)
