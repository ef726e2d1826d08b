"""A model's weights laid out for decoding with exits: layers, exit norms, exit rules, heads."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from consistentee.backbones import decoders
from consistentee.heads.exit_heads import ExitHeads
from consistentee.inference.decoder.draws import NO_TOKEN
from consistentee.inference.decoder.exit_rules import TokenExitRule
from consistentee.inference.decoder.functional_decoder import Affine, FunctionalDecoder
from consistentee.inference.decoder.kv_cache import DecoderCache
from consistentee.inference.decoder.screened_argmax import ScreenedArgmax
from consistentee.inference.decoder.state_propagation import StatePropagation
from consistentee.inference.decoder.weights import Map, active_module, affine_norm, weight_signature
from consistentee.inference.other_weights import apply_masks, weights_elsewhere


class ExitWeights:
    """A model's weights, laid out for decoding.

    Args:
        model: an `EarlyExitForCausalLM`.

    Raises:
        ValueError: weights are not in memory, or on several devices.
    """

    def __init__(self, model: Any) -> None:
        _require_one_device(model)
        apply_masks(model)
        self.model = model
        self.decoder = FunctionalDecoder(model.backbone)
        self.heads: ExitHeads = model.exit_heads
        kind = self.decoder.norm_kind
        norms = [*self.heads.norms, decoders.final_norm(model.backbone)]
        self._norms = [affine_norm(norm, kind) for norm in norms]
        self._projections: dict[str, list[Map]] = {}
        self._state_propagation: StatePropagation | None = None
        self._screened_argmax: ScreenedArgmax | None = None
        self.draft_clocks: dict[Hashable, Any] = {}
        """What lossless decoding learnt about its speed, by how it was asked to draft; gone when the weights change."""

    def signature(self) -> tuple[Any, ...]:
        """Tells whether these are still the model's weights, see `weight_signature`; errors as of the class."""
        _require_one_device(self.model)
        return weight_signature(self.model, _copied_weights(self.model))

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return len(self._norms)

    def normed(self, layer_index: int, unit: Tensor) -> Tensor:
        """States behind the norm of a layer's exit, from those behind `unit_norm`: (tokens, hidden)."""
        factor, shift = self._norms[layer_index]
        return unit * factor if shift is None else torch.addcmul(shift, unit, factor)

    def projections(self, rule: TokenExitRule) -> list[Map]:
        """Every layer's projection, with what the rule reads of the state before it."""
        if rule.name not in self._projections:
            feature_maps = [self._unit_feature_map(rule, index) for index in range(self.num_layers - 1)]
            self._projections[rule.name] = self.decoder.fused([None, *feature_maps])
        return self._projections[rule.name]

    def _unit_feature_map(self, rule: TokenExitRule, layer_index: int) -> Affine | None:
        """A rule's map of normed states as a map of states behind `unit_norm`."""
        feature_map = rule.feature_map(layer_index)
        if feature_map is None:
            return None
        (weight, bias), (factor, shift) = feature_map, self._norms[layer_index]
        bias = bias if shift is None else bias + (weight.float() @ shift.float()).to(bias.dtype)
        return (weight.float() * factor.float()).to(weight.dtype), bias

    @property
    def state_propagation(self) -> StatePropagation:
        """Stacked key and value projections, made when first needed."""
        if self._state_propagation is None:
            self._state_propagation = StatePropagation(self.model.backbone)
        return self._state_propagation

    def new_cache(self, rows: int, capacity: int) -> DecoderCache:
        """An empty cache."""
        layer = self.decoder.layers[0]
        return DecoderCache(
            num_layers=len(self.decoder.layers),
            rows=rows,
            num_key_value_heads=layer.num_key_value_heads,
            head_size=layer.head_size,
            capacity=capacity,
            dtype=self.decoder.dtype,
            device=self.decoder.device,
        )

    def greedy(self, normed: Tensor, exit_layers: Sequence[int]) -> Tensor:
        """The most probable token of each exit, (tokens,); `NO_TOKEN` of no numbers. Arguments as in `logits`."""
        return self._greedy(normed, exit_layers).masked_fill(~normed.isfinite().all(-1), NO_TOKEN)

    def _greedy(self, normed: Tensor, exit_layers: Sequence[int]) -> Tensor:
        backbone = self.model.backbone
        head = active_module(decoders.lm_head(backbone))
        if not self.heads.head_is_shared or type(head) is not nn.Linear:  # an adapter, or int8
            return self.logits(normed, exit_layers).argmax(-1)
        if self._screened_argmax is None:
            self._screened_argmax = ScreenedArgmax(
                head, lambda logits: decoders.soften_logits(backbone, logits)
            )
        if self.heads.kind == "low_rank":
            normed = self._each_layer(normed, exit_layers, self.heads.adapted)
        return self._screened_argmax(normed)

    def logits(self, normed: Tensor, exit_layers: Sequence[int]) -> Tensor:
        """Logits of exits at any layers: (tokens, hidden) normed states and their 1-based layers -> (tokens, words).

        A `shared` head reads all tokens at once, `separate` ones are read layer by layer.
        """
        if self.heads.kind == "shared":
            return self.model.exit_logits(self.num_layers - 1, normed)
        if self.heads.kind == "low_rank":
            normed = self._each_layer(normed, exit_layers, self.heads.adapted)
            return self.model.exit_logits(self.num_layers - 1, normed)
        return self._each_layer(normed, exit_layers, self.model.exit_logits)

    @staticmethod
    def _each_layer(normed: Tensor, exit_layers: Sequence[int], run: Any) -> Tensor:
        distinct = set(exit_layers)
        if len(distinct) == 1:
            return run(distinct.pop() - 1, normed)
        layers = torch.tensor(exit_layers, device=normed.device)
        members = [(layers == layer).nonzero().squeeze(1) for layer in sorted(distinct)]
        parts = [run(layer - 1, normed[own]) for layer, own in zip(sorted(distinct), members, strict=True)]
        return torch.cat(parts)[torch.cat(members).argsort()]


def _require_one_device(model: Any) -> None:
    elsewhere = weights_elsewhere(model)
    devices = sorted({str(weight.device) for weight in model.parameters()})
    if elsewhere or len(devices) > 1:
        got = f'{len(elsewhere)} elsewhere, such as "{elsewhere[0]}"' if elsewhere else ", ".join(devices)
        raise ValueError(
            f"weights must be in memory on one device to generate with exits, got {got}. Open the model without a "
            'device_map that splits it, or generate with mode="full" and use_cache=False.'
        )


def _copied_weights(model: Any) -> list[Tensor]:
    """Weights that are kept a second time, in another form: all but those of large maps that are read in place."""
    parts = decoders.decoder_architecture(model.backbone.config).parts
    paths = [path for path in (parts.attention_output, parts.gate, parts.up, parts.down) if path]
    in_place: list[nn.Module] = [
        layer.get_submodule(path) for layer in decoders.decoder_layers(model.backbone) for path in paths
    ]
    in_place.append(model.backbone.get_input_embeddings())
    if not model.exit_heads.head_is_shared:
        in_place += [model.exit_heads.heads, decoders.lm_head(model.backbone)]
    left_out = {id(weight) for module in in_place for weight in module.parameters()}
    if model.exit_heads.head_is_shared:  # also where it is the embeddings
        left_out -= {id(weight) for weight in decoders.lm_head(model.backbone).parameters()}
    return [weight for weight in model.parameters() if id(weight) not in left_out]
