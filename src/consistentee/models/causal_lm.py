"""`EarlyExitForCausalLM`: a causal language model whose tokens exit at the layer that is good enough.

`forward` is the full model's, Hugging Face's own. `generate` is Hugging Face's too, with real exits while decoding.
`exit_pass` runs given texts with exits, all tokens at once: a token that has exited keeps its state through the deeper
layers, so that later tokens attend to exactly the keys and values that decoding would have copied (or, where these are
recomputed, goes on through them).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from typing_extensions import Self

from consistentee.backbones import decoders
from consistentee.backbones.precision import cast_parameters
from consistentee.errors import require_range
from consistentee.functional.tables import GENERATION
from consistentee.heads.exit_heads import ConfidenceClassifier, ExitHeads
from consistentee.inference.decoder import exit_rules
from consistentee.inference.decoder.exit_weights import ExitWeights
from consistentee.models.backbone_model import BackboneModel, WithExits
from consistentee.models.configuration import EarlyExitCausalLMConfig, opening_and_fields
from consistentee.models.generate import GenerationOptions, generate_tokens
from consistentee.models.generation_checks import check_cache, check_first_exit_layer, check_idle_options

Decide = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer index, states before the layer, after it, and behind the exit's norm) -> which tokens exit, bool."""


class PublishedGenerationConfig(GenerationConfig):
    """A backbone's `generation_config`, which is saved whatever it sets, with a warning.

    Transformers saves none that was changed, or made anew, and sets what has no effect, such as a temperature without
    `do_sample`. Many are published so, and would stop a training when its model is to be written.
    """

    @classmethod
    def of(cls, config: GenerationConfig) -> Self:
        """The same values."""
        return cls.from_dict(config.to_dict())  # pyright: ignore[reportReturnType]

    def validate(self, strict: bool = False, user_set_attributes: set[str] | None = None) -> None:
        """As Hugging Face's, but never strict."""
        super().validate(user_set_attributes=user_set_attributes)


class EarlyExitForCausalLM(BackboneModel, WithExits, GenerationMixin):
    """A causal language model with an exit, and a policy that decides about it, after every layer.

    Example:
        >>> model = EarlyExitForCausalLM.from_pretrained("alpaca-exits")  # doctest: +SKIP
        >>> model.generate(**tokenizer("Once", return_tensors="pt"), max_new_tokens=9)  # doctest: +SKIP

    Source: ConsistentEE (AAAI 2024, arXiv:2312.11882), generation.
    """

    task = GENERATION
    config_class = EarlyExitCausalLMConfig
    config: EarlyExitCausalLMConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    _supports_attention_backend = True

    def __init__(self, config: EarlyExitCausalLMConfig, backbone: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.backbone = backbone if backbone is not None else decoders.build_decoder(config.backbone_config)
        decoders.keep_soft_cap(self.backbone)
        self.exit_heads = ExitHeads(self.backbone, config.exit_head, config.exit_head_rank)
        self.policy = self.new_policy()
        self.confidence_classifier = ConfidenceClassifier(self.num_layers, config.hidden_size)
        self.checkpoint_layers = False
        """Whether training computes layers again in the backward pass instead of keeping what is inside them."""
        self._weights: ExitWeights | None = None
        self._weights_signature: tuple[Any, ...] = ()
        self.post_init()

    @classmethod
    def from_backbone(cls, name_or_path: str | Path | PreTrainedModel, **config_values: Any) -> Self:
        """A pretrained causal language model with fresh exits and policies, in evaluation mode.

        Args:
            name_or_path: hub name or local folder of a supported type, or the model itself.
            **config_values: further fields of `EarlyExitCausalLMConfig`, and options of opening a model by its name,
                such as `revision` or `dtype`.

        Raises:
            ValueError: the type is not supported, or a keyword is unknown.
            OSError: there is no such model.
        """
        opening, config_values = opening_and_fields(cls.config_class, config_values)
        if isinstance(name_or_path, PreTrainedModel):
            if opening:
                raise ValueError(
                    f"{next(iter(opening))} must not be given beside a model, which is open already."
                )
            backbone = name_or_path
            decoders.decoder_architecture(backbone.config)
        else:
            backbone = decoders.load_decoder(name_or_path, **opening)
        inherited: dict[str, Any] = {
            "attn_implementation": backbone.config._attn_implementation,
            "tie_word_embeddings": bool(getattr(backbone.config, "tie_word_embeddings", False)),
        }
        config = EarlyExitCausalLMConfig(decoder_config=backbone.config, **inherited, **config_values)
        model = cls(config, backbone=backbone).eval()
        if "dtype" in opening:
            cast_parameters(model, backbone.dtype)
        if backbone.generation_config is not None:
            model.generation_config = PublishedGenerationConfig.of(backbone.generation_config)
            if model.generation_config.use_cache is False:  # left by a training; exits need what is kept
                model.generation_config.use_cache = None
        return model

    # --- Parts --------------------------------------------------------------------------------

    def exit_norm(self, layer_index: int, hidden_states: Tensor) -> Tensor:
        """States behind the norm of a layer's exit: what policy and head read; (..., hidden) -> (..., hidden)."""
        return self.exit_heads.normed(self.backbone, layer_index, hidden_states)

    def exit_logits(self, layer_index: int, normed: Tensor) -> Tensor:
        """Logits of an exit after a layer, 0-based: (..., hidden) behind its norm -> (..., vocabulary)."""
        return self.exit_heads.logits(self.backbone, layer_index, normed)

    def get_output_embeddings(self) -> nn.Module:
        """The backbone's LM head."""
        return decoders.lm_head(self.backbone)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Give the backbone another LM head; the exits' own heads stay."""
        self.backbone.set_output_embeddings(new_embeddings)

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding:
        """Give embeddings, LM head and the exits' own heads as many entries as a tokenizer has; as in Hugging Face."""
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        if not self.exit_heads.head_is_shared:
            heads = self.exit_heads.heads
            for index, head in enumerate(cast("list[nn.Linear]", heads)):
                heads[index] = self.backbone._get_resized_lm_head(  # as Hugging Face resizes the model's own
                    head, len(embeddings.weight), mean_resizing=mean_resizing
                )
        return embeddings

    # --- The full model -----------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        objective: Callable[[EarlyExitForCausalLM, Tensor, Tensor | None, Tensor], Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The full model's logits, as Hugging Face's own class gives them.

        Args:
            input_ids: (batch, tokens), int64.
            attention_mask: (batch, tokens), 1 for real tokens.
            position_ids, cache, inputs_embeds, use_cache, logits_to_keep: as in Hugging Face, where the cache is
                called `past_key_values` before transformers 5.24; both names do with any version.
            labels: (batch, tokens), -100 where nothing is to be learnt; gives a loss.
            objective: a training loss (`generation.objectives`) that is called in place of the full model, as
                `objective(model, input_ids, attention_mask, labels)`: wrappers for several processes need losses to be
                computed inside `forward`.
            **kwargs: handed to the backbone.

        Returns:
            `CausalLMOutputWithPast`, or what the objective returns.
        """
        if objective is not None:
            return objective(self, cast(Tensor, input_ids), attention_mask, cast(Tensor, labels))
        if cache is not None:
            kwargs[decoders.CACHE] = cache
        return self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    # --- With exits ---------------------------------------------------------------------------

    def exit_pass(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        may_exit: Tensor,
        decide: Decide,
        *,
        skipped_states: str = "copy",
    ) -> tuple[Tensor, Tensor]:
        """Run given texts with exits, all tokens at once.

        Args:
            input_ids: (batch, tokens), int64.
            attention_mask: (batch, tokens), or None.
            may_exit: (batch, tokens) bool: tokens that the exits are for. Prompts stay to the last layer.
            decide: which tokens exit after a layer; asked for all tokens, those that have exited among them.
            skipped_states: what a token that has exited leaves at the layers above: its state at the exit (`copy`), or
                what the full model would have there (`recompute`).

        Returns:
            States behind the exit's norm, (batch, tokens, hidden), and exit layers, (batch, tokens), 1-based.
        """
        state = decoders.decoder_state(self.backbone, input_ids, attention_mask)
        exit_layer = torch.full_like(input_ids, self.num_layers)
        inside = torch.ones_like(may_exit)
        result: Tensor | None = None
        for index in range(self.num_layers):
            before = state.hidden_states
            after = decoders.run_decoder_layer(
                self.backbone, index, state, checkpointed=self.checkpoint_layers
            )
            state.hidden_states = after
            if skipped_states == "copy":
                state.hidden_states = torch.where(inside[..., None], after, before)
            normed = self.exit_norm(index, state.hidden_states)
            if index == self.num_layers - 1:
                exits = inside
            else:
                exits = inside & may_exit & decide(index, before, state.hidden_states, normed)
            chosen = torch.where(exits[..., None], normed, torch.zeros_like(normed))
            result = chosen if result is None else result + chosen
            exit_layer = torch.where(exits, index + 1, exit_layer)
            inside = inside & ~exits
        return cast(Tensor, result), exit_layer

    def exit_rule(
        self,
        criterion: str | None = None,
        threshold: float | None = None,
        min_exit_layer: int | None = None,
    ) -> exit_rules.TokenExitRule:
        """When tokens exit, ready for decoding.

        Args:
            criterion: in place of the saved one.
            threshold: in place of the saved one, or of the one that training chose for this criterion.
            min_exit_layer: in place of the saved one; `static` does without.

        Raises:
            ValueError: an unknown criterion, a threshold that does not fit, or none to be found.
        """
        rule, limit = self.criterion_and_threshold(criterion, threshold)
        first = self.config.min_exit_layer if min_exit_layer is None else min_exit_layer
        check_first_exit_layer(first, self.num_layers)
        return exit_rules.exit_rule(
            rule,
            limit,
            min_exit_layer=first,
            policy=self.policy,
            confidence_classifier=self.confidence_classifier,
            exit_logits=self.exit_logits,
            dtype=self.backbone.dtype,
        )

    def generation_options(self, **given: Any) -> GenerationOptions:
        """How `generate` goes about: its own arguments by name, the saved values for those that are None or missing.

        Raises:
            ValueError: a value that makes no sense, or that has no effect beside the others.
        """
        names = (
            "mode",
            "criterion",
            "skipped_states",
            "full_depth_first_token",
            "min_exit_layer",
            "draft_tokens",
            "draft_threshold",
        )
        values = {name: getattr(self.config, name) for name in names}
        values |= {"threshold": None, "adaptive_drafts": True, "fixed_exit_layers": None, "generator": None}
        options = GenerationOptions(
            **values | {name: value for name, value in given.items() if value is not None}
        )
        check_idle_options(options.mode, options.criterion, given)
        if given.get("min_exit_layer") is not None:
            check_first_exit_layer(options.min_exit_layer, self.num_layers)
        if given.get("draft_threshold") is not None:
            require_range("draft_threshold", given["draft_threshold"], 0, 1)
        return options

    def exit_weights(self) -> ExitWeights:
        """The weights laid out for decoding; made anew where they have changed, in whatever way."""
        if self._weights is None or self._weights_signature != self._weights.signature():
            with torch.autocast(self.device.type, enabled=False):
                self._weights = ExitWeights(self)
            self._weights_signature = self._weights.signature()
        return self._weights

    @torch.no_grad()
    def generate(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        mode: str | None = None,
        criterion: str | None = None,
        threshold: float | None = None,
        skipped_states: str | None = None,
        full_depth_first_token: bool | None = None,
        min_exit_layer: int | None = None,
        draft_tokens: int | None = None,
        draft_threshold: float | None = None,
        adaptive_drafts: bool | None = None,
        fixed_exit_layers: list[list[int]] | None = None,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate, as `transformers` does, each token exiting at its own layer.

        Greedy and sampled decoding, logits processors, stopping criteria, streamers and left-padded batches are
        Hugging Face's. With `return_dict_in_generate=True` the output has `exit_layers`, (batch, new tokens): the layer
        at which each token exited, 1-based, 0 for padding behind the end of a text. A streamer that has a method
        `put_exit_layers` gets them before each `put`. `torch.autocast` changes nothing: weights' dtypes count.

        Args:
            inputs: (batch, tokens) prompts; or `input_ids` by name.
            generation_config: as in Hugging Face.
            mode: `early-exit`, `full` (all layers) or `lossless` (exits draft, the full model verifies: greedy text is
                the full model's), in place of the saved one.
            criterion: exit rule, in place of the saved one.
            threshold: in place of the saved one.
            skipped_states: `copy` or `recompute`, see `EarlyExitCausalLMConfig`.
            full_depth_first_token, min_exit_layer: see `EarlyExitCausalLMConfig`.
            draft_tokens: of `lossless`: drafts before a verification, at most.
            draft_threshold: of `lossless` with the policy: its threshold while drafting.
            adaptive_drafts: of `lossless`: pause drafting where it does not pay on the clock; None does.
            fixed_exit_layers: exits given in advance, for measuring speed: for every new token the layer of each row.
            generator: that tokens are drawn from, on the model's device; None takes torch's own.
            **kwargs: as in Hugging Face.

        Raises:
            ValueError: beams, assistants and other ways to search that exits cannot serve; caches that save memory, of
                the call or of the model's own `generation_config`; sampling in `lossless` mode; options that make no
                sense, or have no effect in the mode.
        """
        options = self.generation_options(
            mode=mode,
            criterion=criterion,
            threshold=threshold,
            skipped_states=skipped_states,
            full_depth_first_token=full_depth_first_token,
            min_exit_layer=min_exit_layer,
            draft_tokens=draft_tokens,
            draft_threshold=draft_threshold,
            adaptive_drafts=adaptive_drafts,
            fixed_exit_layers=fixed_exit_layers,
            generator=generator,
        )
        for name in ("custom_generate", "assistant_model", "assistant_early_exit"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f'{name} does not go with exits. Leave it out; mode="lossless" drafts with the model\'s own exits.'
                )
        check_cache(kwargs, generation_config, self.generation_config)
        return super().generate(  # pyright: ignore[reportAttributeAccessIssue]
            inputs, generation_config, custom_generate=partial(generate_tokens, options=options), **kwargs
        )

    def _extract_generation_mode_kwargs(
        self, custom_generate: Any, kwargs: dict[str, Any], *others: Any, **named: Any
    ) -> dict[str, Any]:
        """What goes to the decoding loop; Hugging Face would not hand tokenizer and streamer on to one of our own."""
        tokenizer = kwargs.get("tokenizer")
        streamer = named.get("streamer", others[-1] if others else None)
        found = super()._extract_generation_mode_kwargs(custom_generate, kwargs, *others, **named)
        ours = {"tokenizer": tokenizer, "streamer": streamer}
        return {**found, **{name: value for name, value in ours.items() if value is not None}}

    def __getstate__(self) -> dict[str, Any]:
        """Without the weights laid out for decoding, which are made again when needed."""
        return {**self.__dict__, "_weights": None, "_weights_signature": ()}


AutoConfig.register("consistentee_causal_lm", EarlyExitCausalLMConfig, exist_ok=True)
AutoModelForCausalLM.register(EarlyExitCausalLMConfig, EarlyExitForCausalLM, exist_ok=True)
# By this list `Trainer` knows whose labels are shifted (label smoothing), and pipelines which models they can run.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[EarlyExitCausalLMConfig.model_type] = EarlyExitForCausalLM.__name__
