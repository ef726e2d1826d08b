"""Texts from prompts, many at a time or one as it is written: what the command line and the evaluation generate with.

The end-of-text token counts as a token: `exit_layers` has a layer for it, and its piece of the text is "".
"""

from __future__ import annotations

import copy
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

import torch
from transformers import StoppingCriteriaList

from consistentee.data.batches import pad_left
from consistentee.data.rows import InstructionDataset, prompt_pairs
from consistentee.data.templates import PLAIN, PromptTemplate, Turn
from consistentee.data.tokenization import encode_prompts
from consistentee.errors import DataError
from consistentee.inference.decoder.draws import drawing_from
from consistentee.inference.decoder.known_processors import TextCriteria
from consistentee.inference.threads import settle_after_fork
from consistentee.inference.timing import synchronised_seconds
from consistentee.models.generation_checks import check_idle_options
from consistentee.models.loaded import LoadedGenerator
from consistentee.pipelines.continuous import ContinuousTexts
from consistentee.pipelines.decoding_options import (
    DecodingOptions,
    generate_arguments,
    merged_options,
    seeded_draws,
)
from consistentee.pipelines.pieces import PieceDecoder, decode_pieces
from consistentee.pipelines.row_streams import OnRowEnd, OnRowToken, RowLimits, RowStreams, text_ends
from consistentee.pipelines.stops import StopTexts, cut_at_stop
from consistentee.pipelines.streaming import OnToken, PieceStreamer

WINDOW_BATCHES = 8
"""Prompts are sorted by length within so many batches; the first window is a single batch, the next ones double."""


@dataclass(frozen=True)
class GeneratedText:
    """One text that was generated.

    Args:
        prompt: the instruction it answers.
        input: what the instruction is about, or "".
        text: what was written, without the end-of-text token.
        token_ids: (tokens,) the end-of-text token among them, if the text came to its end.
        pieces: (tokens,) the text token by token; together they are the text.
        exit_layers: (tokens,) the layer at which each token exited, from 1; all layers of a model without exits, and in
            `lossless` mode, where all layers verify what exits draft.
        seconds: its share of the time that its batch took.
        finish_reason: `stop` (a stop string), `end` (the end-of-text token) or `length` (`max_new_tokens`).
        draft_layers: of `lossless` mode, (tokens,): the layer at which each token was drafted, or the last one where
            the verification gave it; else None.
        drafted, accepted: of `lossless` mode: drafts that were verified, and those that stayed; else None.
        truncated: whether the prompt was longer than there was room for, and was cut.
    """

    prompt: str
    input: str
    text: str
    token_ids: list[int]
    pieces: list[str]
    exit_layers: list[int]
    seconds: float
    finish_reason: str = "length"
    draft_layers: list[int] | None = None
    drafted: int | None = None
    accepted: int | None = None
    truncated: bool = False

    @property
    def mean_exit_layer(self) -> float:
        """Mean number of layers executed for a token, the end-of-text token included."""
        return sum(self.exit_layers) / len(self.exit_layers)


class TextGenerator:
    """Writes texts with a model.

    Args:
        saved: the model, from `load_model`.
        template: how prompts are written; None takes the saved template.

    Several threads may use one generator. It can be pickled, for other processes. After a fork it goes on with one
    thread (the others stay behind in the parent); on a GPU, which cannot, it refuses.

    Example:
        >>> generator = TextGenerator(load_model("alpaca-exits"))  # doctest: +SKIP
        >>> [text.mean_exit_layer for text in generator.generate_texts([("Add.", "1, 2")])]  # doctest: +SKIP
    """

    def __init__(self, saved: LoadedGenerator, *, template: PromptTemplate | None = None) -> None:
        self.saved = saved
        template = saved.prompt_template() if template is None else template
        # Others use the saved tokenizer with settings of their own, and it keeps some of them from call to call.
        self._tokenizer: Any = copy.deepcopy(saved.tokenizer)
        if template.tokenizer is saved.tokenizer:
            template = replace(template, tokenizer=self._tokenizer)
        self.template = template
        self._tokenizing = Lock()
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        """All but what belongs to this process."""
        return {
            name: value for name, value in self.__dict__.items() if name not in ("_tokenizing", "_process")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _tokenizing=Lock(), _process=os.getpid())

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
        check_idle_options(mode, options.criterion or saved.early_exit_model.config.criterion, values)
        if mode != "full":
            rule = saved.exit_rule_of_mode(mode, options.criterion, options.threshold)
            values["criterion"], values["threshold"] = rule
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
        of any length fits; the batch with the prompt that is due first goes first. With a `batch_size` of 1 every
        prompt is answered before the next is taken. With a seed the texts are the same every time, whatever else draws
        between them; torch's own generator stays as it was.

        Args:
            prompts: pairs of an instruction and an input ("" for none).
            batch_size: texts that are written together, at least 1.
            options: how to generate.
            **values: fields of `DecodingOptions`, in place of `options`.

        Yields:
            One text a prompt.

        Raises:
            DataError: a prompt of which no token is left, or that is no pair.
            ValueError: options that do not fit the model or each other; raised before anything is generated.
        """
        options = self.check(merged_options(options, values))
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        return self._windows(prompt_pairs(prompts), batch_size, options)

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
            on_token: called with each token's piece of the text and its exit layer; in `lossless` mode the layer at
                which it was drafted, as in `draft_layers`. What may begin a stop string is held back until it is
                certain.
            options: how to generate.
            **values: fields of `DecodingOptions`, in place of `options`.

        Raises:
            DataError, ValueError: as `generate_texts`.
        """
        options = self.check(merged_options(options, values))
        encoded, cut = self._encode([(instruction, input)], options, before=0)
        known = text_ends(self.saved.model, self._tokenizer, options.stop)
        decoder = PieceDecoder(self._tokenizer, known.ends)
        streamer = PieceStreamer(decoder, on_token, self.saved.num_hidden_layers, known.stops)
        draws = seeded_draws(options, self.saved.model.device)
        (text,) = self._batch([(instruction, input)], encoded, options, draws, streamer)
        return replace(text, truncated=cut[0])

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
        draws = seeded_draws(options, self.saved.model.device)
        for start in range(0, len(prompts), batch_size * WINDOW_BATCHES):
            part = prompts[start : start + batch_size * WINDOW_BATCHES]
            yield from self._window([("", "")] * len(part), part, batch_size, options, draws)

    def stream_rows(
        self,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        *,
        on_token: OnRowToken,
        on_end: OnRowEnd,
        is_gone: Callable[[int], bool] = lambda row: False,
        go_on: Sequence[bool] = (),
        options: DecodingOptions,
    ) -> None:
        """Write several texts together, telling of every token as soon as it is certain, and of every end.

        Args:
            prompts: (rows, tokens), not padded; one alone in `lossless` mode.
            limits: (rows,) the most tokens of each text, in place of `max_new_tokens`.
            on_token: is told the row, the token's piece of the text and its exit layer, as in `stream`.
            on_end: is told a row that has ended, and why.
            is_gone: whether nobody waits for a row any more, so that it ends.
            go_on: (rows,) whether each goes on with its prompt, as in `JoiningPrompt`; none does where it is empty.
            options: how to generate.

        Raises:
            ValueError: options that do not fit the model.
        """
        options = self.check(merged_options(options, {"max_new_tokens": max(limits)}))
        draws = seeded_draws(options, self.saved.model.device)
        ends = text_ends(self.saved.model, self._tokenizer, options.stop)
        before = [prompt if on else () for prompt, on in zip(prompts, go_on, strict=True)] if go_on else []
        layers = self.saved.num_hidden_layers
        streams = RowStreams(
            self._tokenizer, layers, limits, ends, on_token=on_token, on_end=on_end, before=before
        )
        bounds = RowLimits(max(map(len, prompts)), limits, is_gone)
        self._batch([("", "")] * len(prompts), prompts, options, draws, streams, [bounds], before)

    def continuous_texts(self, options: DecodingOptions) -> ContinuousTexts:
        """Texts that are written together in one way, and that others join between two tokens.

        Raises:
            ValueError: options that do not fit the model, or of texts that none can join: see `ContinuousTexts`.
        """
        self._go_on_after_fork()
        return ContinuousTexts(self.saved, self._tokenizer, self.check(options))

    def encode_conversation(self, turns: Sequence[Turn]) -> list[int]:
        """Token ids of a conversation, not cut; the last turn is a user's.

        Raises:
            DataError: the template does not take such a conversation.
        """
        *history, (_, instruction) = turns
        asked = InstructionDataset([instruction], [""], [" "], "a conversation", [tuple(history)])
        return self._uncut(asked, self.template)

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a text to go on with, as it is, not cut; special tokens as the template takes them."""
        plain = replace(PLAIN, parse_special_tokens=self.template.parse_special_tokens)
        return self._uncut([(text, "")], plain)

    def _uncut(
        self, asked: InstructionDataset | Sequence[tuple[str, str]], template: PromptTemplate
    ) -> list[int]:
        self._go_on_after_fork()
        with self._tokenizing:
            return encode_prompts(asked, self._tokenizer, template, max_prompt_length=sys.maxsize)[0][0]

    def encode(self, prompts: Sequence[tuple[str, str]]) -> list[list[int]]:
        """Token ids of prompts, (instruction, input) each, as `generate_texts` makes them."""
        return self._encode(prompts, DecodingOptions(), 0)[0]

    def _windows(
        self, prompts: Iterator[tuple[str, str]], batch_size: int, options: DecodingOptions
    ) -> Iterator[GeneratedText]:
        batches, done = 1, 0
        draws = seeded_draws(options, self.saved.model.device)
        while part := list(itertools.islice(prompts, batches * batch_size)):
            encoded, cut = self._encode(part, options, done)
            texts = self._window(part, encoded, batch_size, options, draws)
            yield from (replace(text, truncated=is_cut) for text, is_cut in zip(texts, cut, strict=True))
            done += len(part)
            if batch_size > 1:  # alone, every prompt is answered before the next is asked for
                batches = min(2 * batches, WINDOW_BATCHES)

    def _window(
        self,
        asked: Sequence[tuple[str, str]],
        encoded: Sequence[Sequence[int]],
        batch_size: int,
        options: DecodingOptions,
        draws: torch.Generator | None,
    ) -> Iterator[GeneratedText]:
        """Texts of one window, each as soon as it and all before it are written."""
        order = sorted(range(len(encoded)), key=lambda row: len(encoded[row]))
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        texts: dict[int, GeneratedText] = {}
        due = 0
        for rows in sorted(batches, key=min):
            written = self._batch(
                [asked[row] for row in rows], [encoded[row] for row in rows], options, draws
            )
            texts.update(zip(rows, written, strict=True))
            while due in texts:
                yield texts.pop(due)
                due += 1

    def _encode(
        self, asked: Sequence[tuple[str, str]], options: DecodingOptions, before: int
    ) -> tuple[list[list[int]], list[bool]]:
        """Token ids, and which prompts were cut."""
        limit = options.max_prompt_length or self.saved.context_length
        self._go_on_after_fork()
        try:
            with self._tokenizing:  # the tokenizer is set up anew for each call
                return encode_prompts(asked, self._tokenizer, self.template, max_prompt_length=limit)
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
        draws: torch.Generator | None,
        streamer: PieceStreamer | RowStreams | None = None,
        criteria: Sequence[TextCriteria] = (),
        before: Sequence[Sequence[int]] = (),
    ) -> list[GeneratedText]:
        self._go_on_after_fork()
        saved, model = self.saved, self.saved.model
        input_ids, mask = pad_left(encoded, self._tokenizer.pad_token_id)  # (rows, tokens)
        known = text_ends(model, self._tokenizer, options.stop)
        stops, ends = known.stops, {*known.ends, *known.stop_tokens}
        exits: dict[str, Any] = {}
        if saved.has_exits:
            names = ("mode", "criterion", "threshold", "skipped_states")
            exits = {"generator": draws, **{name: getattr(options, name) for name in names}}
        if stops:
            criteria = [*criteria, StopTexts(self._tokenizer, stops, input_ids.shape[1], ends, before)]
        if criteria:
            exits["stopping_criteria"] = StoppingCriteriaList(criteria)
        start = synchronised_seconds(model.device)
        with drawing_from(None if saved.has_exits else draws):  # plain models have Hugging Face's own loop
            output: Any = model.generate(  # pyright: ignore[reportCallIssue]
                input_ids=input_ids.to(model.device),
                attention_mask=mask.to(model.device),
                streamer=streamer,
                **generate_arguments(options, ends, self._tokenizer.pad_token_id),
                **exits,
            )
        seconds = (synchronised_seconds(model.device) - start) / len(encoded)
        new: list[list[int]] = output.sequences[:, input_ids.shape[1] :].tolist()
        layers: list[list[int]] = [[]] * len(new)
        if saved.has_exits:
            layers = output.exit_layers.tolist()
        lossless = options.mode == "lossless"
        texts: list[GeneratedText] = []
        for number, ((instruction, context), row, row_layers) in enumerate(
            zip(asked, new, layers, strict=True)
        ):
            exited = [layer for layer in row_layers if layer]  # 0 marks padding behind the end
            token_ids = row[: len(exited) if exited else _length(row, ends)]
            pieces = decode_pieces(self._tokenizer, token_ids, ends, before[number] if before else ())
            stopped = cut_at_stop(pieces, stops)
            if stopped is not None:
                pieces, token_ids = stopped, token_ids[: len(stopped)]
            reason = "end" if token_ids[-1] in ends else "length"
            if stopped is not None or token_ids[-1] in known.stop_tokens:
                reason = "stop"
            all_layers = [saved.num_hidden_layers] * len(token_ids)
            texts.append(
                GeneratedText(
                    instruction,
                    context,
                    "".join(pieces),
                    token_ids,
                    pieces,
                    exited if exited and not lossless else all_layers,
                    seconds,
                    finish_reason=reason,
                    draft_layers=exited if lossless else None,
                    drafted=output.drafted_by_row[number] if lossless else None,
                    accepted=output.accepted_by_row[number] if lossless else None,
                )
            )
        return texts

    def _go_on_after_fork(self) -> None:
        """In a forked process: leave what other threads held."""
        if os.getpid() == self._process:
            return
        settle_after_fork(self.saved.model.device)
        self._tokenizing = Lock()
        self._process = os.getpid()


def _length(tokens: Sequence[int], ends: set[int]) -> int:
    """Tokens up to the first that ends the text, which counts."""
    return next((place + 1 for place, token in enumerate(tokens) if token in ends), len(tokens))
