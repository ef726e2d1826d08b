"""Texts from prompts, many at a time or one as it is written: what the command line and the evaluation generate with.

The end-of-text token counts as a token: `exit_layers` has a layer for it, and its piece of the text is "".
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor
from transformers import GenerationConfig

from consistentee.config import require_choice
from consistentee.errors import DataError
from consistentee.generation.config import GenerationMode, SkippedStates
from consistentee.generation.encoding import encode_prompts, pad_left
from consistentee.generation.saved import SavedGenerator
from consistentee.generation.templates import PromptTemplate
from consistentee.timing import synchronised_seconds

WINDOW_BATCHES = 8
"""Prompts are sorted by length within so many batches; the first window is a single batch, the next ones double."""

_BROKEN = "\ufffd"  # what a tokenizer makes of bytes that are no whole character


class PieceDecoder:
    """Token ids into pieces of text, one for each token; the pieces together are the text.

    A character of several tokens belongs to the last of them, and special tokens have the piece "".

    Args:
        tokenizer: a Hugging Face tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids)
        self._ids: list[int] = []
        self._start = 0  # decoding begins here, so that a space before a word is not lost
        self._read = 0  # the pieces so far are of the ids before here

    def put(self, token_id: int) -> str:
        """The text that this token completes; "" where it is part of a character that goes on."""
        if token_id in self._special:
            return ""
        self._ids.append(token_id)
        piece = self._rest()
        if not piece or piece.endswith(_BROKEN):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return piece

    def end(self) -> str:
        """What is left over: the beginning of a character that never came to its end."""
        piece = self._rest() if self._read < len(self._ids) else ""
        self._start, self._read = self._read, len(self._ids)
        return piece

    def _rest(self) -> str:
        before = self._decoded(self._ids[self._start : self._read])
        return self._decoded(self._ids[self._start :])[len(before) :]

    def _decoded(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)) if token_ids else ""


def decode_pieces(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """Pieces of a whole text, one for each token id, see `PieceDecoder`."""
    decoder = PieceDecoder(tokenizer)
    pieces = [decoder.put(token_id) for token_id in token_ids]
    if pieces:
        pieces[-1] += decoder.end()
    return pieces


@dataclass(frozen=True)
class GeneratedText:
    """One text that was generated.

    Args:
        prompt: the instruction it answers.
        input: what the instruction is about, or "".
        text: what was written, without the end-of-text token.
        token_ids: (tokens,) the end-of-text token among them, if the text came to its end.
        pieces: (tokens,) the text token by token; together they are the text.
        exit_layers: (tokens,) the layer at which each token left, from 1; all layers of a model without exits.
        seconds: its share of the time that its batch took.
    """

    prompt: str
    input: str
    text: str
    token_ids: list[int]
    pieces: list[str]
    exit_layers: list[int]
    seconds: float

    @property
    def mean_exit_layer(self) -> float:
        """Mean number of layers executed for a token, the end-of-text token included."""
        return sum(self.exit_layers) / len(self.exit_layers)


@dataclass(frozen=True)
class DecodingOptions:
    """How to generate.

    Args:
        mode: `early-exit`, `full` or `lossless`; None takes the saved one.
        criterion: exit rule; None takes the saved one.
        threshold: None takes the one saved for the criterion.
        skipped_states: `copy` or `recompute`; None takes the saved one.
        max_new_tokens: longest text; None takes what suits the model's task.
        max_prompt_length: longest prompt, in tokens; None takes what the model has room for beside the text.
        do_sample: whether to draw tokens; otherwise the likeliest is taken.
        temperature: above 0, divides the logits before drawing.
        top_p: in (0, 1], share of the probability from which tokens are drawn.
        seed: of the draws; None goes on with torch's generator as it is.
    """

    mode: str | None = None
    criterion: str | None = None
    threshold: float | None = None
    skipped_states: str | None = None
    max_new_tokens: int | None = None
    max_prompt_length: int | None = None
    do_sample: bool = False
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.mode is not None:
            require_choice("mode", self.mode, get_args(GenerationMode))
        if self.skipped_states is not None:
            require_choice("skipped_states", self.skipped_states, get_args(SkippedStates))
        for name in ("max_new_tokens", "max_prompt_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        for name in ("temperature", "top_p"):
            if getattr(self, name) is not None and not self.do_sample:
                raise ValueError(f"{name} goes with do_sample, got {getattr(self, name)} without it.")
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}.")
        if self.do_sample and self.mode == "lossless":
            raise ValueError('do_sample must be False in mode "lossless", got True: it verifies greedy text.')


OnToken = Callable[[str, int], object]
"""Is told every token as it is generated: its piece of the text, and the layer at which it left."""


@dataclass
class _Streamer:
    """Hears of tokens from `generate`, of one row; the first thing it is given is the prompt."""

    decoder: PieceDecoder
    on_token: OnToken
    num_layers: int
    _layers: list[int] = field(default_factory=list[int])
    _held: tuple[str, int] | None = None
    _prompt_is_over: bool = False

    def put_exit_layers(self, layers: Tensor) -> None:
        self._layers = layers.tolist()

    def put(self, tokens: Tensor) -> None:
        if not self._prompt_is_over:
            self._prompt_is_over = True
            return
        layers = self._layers or [self.num_layers] * tokens.numel()
        for token, layer in zip(tokens.flatten().tolist(), layers, strict=True):
            if self._held is not None:
                self.on_token(*self._held)
                self._held = None
            piece = self.decoder.put(token)
            if piece:
                self.on_token(piece, layer)
            else:  # may be the last one, which gets what is left over
                self._held = ("", layer)

    def end(self) -> None:
        if self._held is not None:
            self.on_token(self.decoder.end(), self._held[1])


class TextGenerator:
    """Writes texts with a model.

    Args:
        saved: the model, from `open_generator`.
        template: how prompts are written; None takes the saved template.

    Example:
        >>> generator = TextGenerator(open_generator("alpaca-exits"))  # doctest: +SKIP
        >>> [text.mean_exit_layer for text in generator.generate_texts([("Add.", "1, 2")])]  # doctest: +SKIP
    """

    def __init__(self, saved: SavedGenerator, *, template: PromptTemplate | None = None) -> None:
        self.saved = saved
        self.template = saved.prompt_template() if template is None else template

    def check(self, options: DecodingOptions) -> DecodingOptions:
        """The options, with what the saved model decides filled in.

        Raises:
            ValueError: they do not fit the model.
        """
        saved = self.saved
        new = options.max_new_tokens or min(saved.max_new_tokens, max(1, saved.context_length // 2))
        if new >= saved.context_length:
            raise ValueError(
                f"max_new_tokens must be below the {saved.context_length} tokens that the model has room for, "
                f"got {new}."
            )
        room = saved.context_length - new
        values = {
            **vars(options),
            "max_new_tokens": new,
            "max_prompt_length": min(options.max_prompt_length or room, room),
        }
        if not saved.has_exits:
            given = [
                name for name in ("criterion", "threshold", "skipped_states") if values[name] is not None
            ]
            if values["mode"] not in (None, "full"):
                given.append("mode")
            if given:
                raise ValueError(
                    f'{given[0]} goes with exits, which model "{saved.name}" does not have. Leave it out.'
                )
            return DecodingOptions(**{**values, "mode": "full"})
        mode = options.mode or saved.early_exit_model.config.mode
        if mode != "full" or options.criterion is not None or options.threshold is not None:
            values["criterion"], values["threshold"] = saved.exit_rule(options.criterion, options.threshold)
        return DecodingOptions(**{**values, "mode": mode})

    def generate_texts(
        self,
        prompts: Iterable[tuple[str, str]],
        *,
        batch_size: int = 8,
        options: DecodingOptions | None = None,
        **values: Any,
    ) -> Iterator[GeneratedText]:
        """Write a text for every prompt, in the order of the prompts.

        Prompts are taken a window at a time and sorted by length within it, so that little is padded and a stream
        of any length fits; the batch with the prompt that is due first goes first.

        Args:
            prompts: pairs of an instruction and an input ("" for none).
            batch_size: texts that are written together, at least 1.
            options: how to generate.
            **values: fields of `DecodingOptions`, in place of `options`.

        Yields:
            One text a prompt.

        Raises:
            DataError: a prompt of which no token is left.
            ValueError: options that do not fit the model or each other; raised before anything is generated.
        """
        options = self.check(_options(options, values))
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        _seed(options)
        return self._windows(iter(prompts), batch_size, options)

    def stream(
        self,
        instruction: str,
        input: str = "",
        *,
        on_token: OnToken,
        options: DecodingOptions | None = None,
        **values: Any,
    ) -> GeneratedText:
        """Write one text, telling of every token as soon as it is there.

        Args:
            instruction: what is asked for.
            input: what it is about, or "".
            on_token: called with each token's piece of the text and its exit layer.
            options: how to generate.
            **values: fields of `DecodingOptions`, in place of `options`.

        Raises:
            DataError, ValueError: as `generate_texts`.
        """
        options = self.check(_options(options, values))
        _seed(options)
        encoded = self._encode([(instruction, input)], options, before=0)
        streamer = _Streamer(PieceDecoder(self.saved.tokenizer), on_token, self.saved.num_hidden_layers)
        (text,) = self._batch([(instruction, input)], encoded, options, streamer)
        return text

    def generate_encoded(
        self, prompts: Sequence[Sequence[int]], *, batch_size: int = 8, options: DecodingOptions
    ) -> Iterator[GeneratedText]:
        """Write a text for every prompt, given as token ids; as `generate_texts`, whose texts know their prompts.

        Args:
            prompts: (prompts, tokens), not padded.
            batch_size: as in `generate_texts`.
            options: as in `generate_texts`.
        """
        options = self.check(options)
        _seed(options)
        for start in range(0, len(prompts), batch_size * WINDOW_BATCHES):
            part = prompts[start : start + batch_size * WINDOW_BATCHES]
            yield from self._window([("", "")] * len(part), part, batch_size, options)

    def encode(self, prompts: Sequence[tuple[str, str]]) -> list[list[int]]:
        """Token ids of prompts, (instruction, input) each, as `generate_texts` makes them."""
        return self._encode(prompts, DecodingOptions(), 0)

    def _windows(
        self, prompts: Iterator[tuple[str, str]], batch_size: int, options: DecodingOptions
    ) -> Iterator[GeneratedText]:
        batches, done = 1, 0
        while part := list(itertools.islice(prompts, batches * batch_size)):
            yield from self._window(part, self._encode(part, options, done), batch_size, options)
            done += len(part)
            batches = min(2 * batches, WINDOW_BATCHES)

    def _window(
        self,
        asked: Sequence[tuple[str, str]],
        encoded: Sequence[Sequence[int]],
        batch_size: int,
        options: DecodingOptions,
    ) -> Iterator[GeneratedText]:
        """Texts of one window, each as soon as it and all before it are written."""
        order = sorted(range(len(encoded)), key=lambda row: len(encoded[row]))
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        texts: dict[int, GeneratedText] = {}
        due = 0
        for rows in sorted(batches, key=min):
            written = self._batch([asked[row] for row in rows], [encoded[row] for row in rows], options)
            texts.update(zip(rows, written, strict=True))
            while due in texts:
                yield texts.pop(due)
                due += 1

    def _encode(
        self, asked: Sequence[tuple[str, str]], options: DecodingOptions, before: int
    ) -> list[list[int]]:
        limit = options.max_prompt_length or self.saved.context_length
        try:
            return encode_prompts(asked, self.saved.tokenizer, self.template, max_prompt_length=limit)
        except DataError as error:
            if error.row is None:
                raise
            row = before + error.row
            raise DataError(error.problem, row=row, unit="prompt", remedy=error.remedy) from error

    def _batch(
        self,
        asked: Sequence[tuple[str, str]],
        encoded: Sequence[Sequence[int]],
        options: DecodingOptions,
        streamer: _Streamer | None = None,
    ) -> list[GeneratedText]:
        saved, model = self.saved, self.saved.model
        input_ids, mask = pad_left(encoded, saved.tokenizer.pad_token_id)  # (rows, tokens)
        ends = _end_tokens(saved)
        config = GenerationConfig(
            max_new_tokens=options.max_new_tokens,
            do_sample=options.do_sample,
            temperature=options.temperature,
            top_p=options.top_p,
            eos_token_id=sorted(ends),
            pad_token_id=saved.tokenizer.pad_token_id,
            return_dict_in_generate=True,
        )
        exits: dict[str, Any] = {}
        if saved.has_exits:
            exits = {
                name: getattr(options, name) for name in ("mode", "criterion", "threshold", "skipped_states")
            }
        start = synchronised_seconds(model.device)
        output: Any = model.generate(  # pyright: ignore[reportCallIssue]
            input_ids=input_ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=config,
            streamer=streamer,
            **exits,
        )
        seconds = (synchronised_seconds(model.device) - start) / len(encoded)
        new: list[list[int]] = output.sequences[:, input_ids.shape[1] :].tolist()
        if saved.has_exits:
            layers: list[list[int]] = output.exit_layers.tolist()
        else:
            layers = [[saved.num_hidden_layers] * _length(row, ends) for row in new]
        texts: list[GeneratedText] = []
        for (instruction, context), row, row_layers in zip(asked, new, layers, strict=True):
            exit_layers = [layer for layer in row_layers if layer]  # 0 marks padding behind the end
            token_ids = row[: len(exit_layers)]
            pieces = decode_pieces(saved.tokenizer, token_ids)
            texts.append(
                GeneratedText(instruction, context, "".join(pieces), token_ids, pieces, exit_layers, seconds)
            )
        return texts


def _options(options: DecodingOptions | None, values: dict[str, Any]) -> DecodingOptions:
    if not values:
        return options or DecodingOptions()
    return DecodingOptions(**{**vars(options or DecodingOptions()), **values})


def _seed(options: DecodingOptions) -> None:
    if options.do_sample and options.seed is not None:
        torch.manual_seed(options.seed)


def _end_tokens(saved: SavedGenerator) -> set[int]:
    """Tokens that end a text: the model's, and the tokenizer's, after which training ends its responses."""
    known = getattr(saved.model.generation_config, "eos_token_id", None)
    ends = set(known) if isinstance(known, (list, tuple)) else {known}
    return {int(token) for token in (*ends, saved.tokenizer.eos_token_id) if token is not None}


def _length(tokens: Sequence[int], ends: set[int]) -> int:
    """Tokens up to the first that ends the text, which counts."""
    return next((place + 1 for place, token in enumerate(tokens) if token in ends), len(tokens))
