"""Texts that are written together while others join: continuous batching, told token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from consistentee.inference.decoder.draws import NO_TOKEN, no_numbers
from consistentee.models.continuous import ContinuousTokens, RowToken
from consistentee.models.loaded import LoadedGenerator
from consistentee.pipelines.decoding_options import DecodingOptions, seeded_draws, warpers
from consistentee.pipelines.row_streams import RowStream, text_ends
from consistentee.pipelines.streaming import OnToken


@dataclass(frozen=True)
class JoiningPrompt:
    """A prompt, and who hears of its text.

    Args:
        token_ids: (tokens,), at least one.
        limit: the most tokens of the text.
        on_token: is told each token's piece of the text and its exit layer, as in `TextGenerator.stream`.
        on_end: is told why the text has ended: `stop`, `end` or `length`.
        on_error: is told what went wrong with this text alone; the others go on.
        is_gone: whether nobody waits for the text any more, so that it ends without a word.
        goes_on: whether the text goes on with the prompt; else it is one of its own, as behind a template.
    """

    token_ids: Sequence[int]
    limit: int
    on_token: OnToken
    on_end: Callable[[str], object]
    on_error: Callable[[Exception], object]
    is_gone: Callable[[], bool] = lambda: False
    goes_on: bool = False


@dataclass(frozen=True)
class _Row:
    prompt: JoiningPrompt
    stream: RowStream


def can_join(saved: LoadedGenerator, options: DecodingOptions) -> bool:
    """Whether prompts with these options (those that `TextGenerator.check` gave) can join a batch that is written.

    Drafts are verified row by row (`lossless`), and plain models of other types than exits know have a loop of
    their own.
    """
    return options.mode != "lossless" and saved.continuous_model is not None


class ContinuousTexts:
    """Texts that are written together, each as it would be by itself; others may join before any step.

    Args:
        saved: the model.
        tokenizer: of the texts.
        options: how to write all of them, from `TextGenerator.check`. Draws begin anew where it has a seed: then a
            text is reproducible where none is beside it.

    Raises:
        ValueError: options of texts that none can join, see `can_join`.
    """

    def __init__(self, saved: LoadedGenerator, tokenizer: Any, options: DecodingOptions) -> None:
        model = saved.continuous_model
        if model is None or not can_join(saved, options):
            raise ValueError(
                f'Model "{saved.name}" in mode "{options.mode}" writes no texts that others join. Take stream_rows.'
            )
        names = ("mode", "criterion", "threshold", "skipped_states")
        draws = seeded_draws(options, model.device)
        how = model.generation_options(generator=draws, **{name: getattr(options, name) for name in names})
        self._tokens = ContinuousTokens(model, how, processors=warpers(options), do_sample=options.do_sample)
        self._text_ends = text_ends(saved.model, tokenizer, options.stop)
        self._tokenizer, self._num_layers = tokenizer, saved.num_hidden_layers
        self._context_length = saved.context_length
        self._rows: list[_Row] = []

    def __len__(self) -> int:
        return len(self._rows)

    def join(self, prompts: Sequence[JoiningPrompt]) -> None:
        """Take prompts in, and tell their first tokens; the other texts wait for as long as that takes.

        Raises:
            ValueError: a prompt that does not fit into the context beside its text.
            Exception: whatever computing raises. In both cases none has joined, and the other texts are as they were.
        """
        for prompt in prompts:
            if prompt.limit < 1 or len(prompt.token_ids) + prompt.limit > self._context_length:
                raise ValueError(
                    f"limit must be at least 1 and fit into {self._context_length} tokens beside the prompt, got "
                    f"{prompt.limit} beside {len(prompt.token_ids)}."
                )
        newcomers = [_Row(prompt, self._stream(prompt)) for prompt in prompts]
        first = self._tokens.join([prompt.token_ids for prompt in prompts])
        begun = len(self._rows)
        self._rows += newcomers
        self._put(begun, first)

    def step(self) -> None:
        """Tell the next token of every text, or its end; texts that nobody waits for make room before."""
        for number in reversed(range(len(self._rows))):
            if self._rows[number].prompt.is_gone():
                self._remove(number)
        if self._rows:
            self._put(0, self._tokens.step())

    def cut(self) -> None:
        """End all texts where they are."""
        for row in self._rows:
            row.stream.cut()
        while self._rows:
            self._remove(len(self._rows) - 1)

    def _stream(self, prompt: JoiningPrompt) -> RowStream:
        return RowStream(
            self._tokenizer,
            self._num_layers,
            prompt.limit,
            self._text_ends,
            prompt.on_token,
            prompt.on_end,
            prompt.token_ids if prompt.goes_on else (),
        )

    def _put(self, begun: int, tokens: Sequence[RowToken]) -> None:
        """The newest tokens of the rows from `begun` on."""
        for number in reversed(
            range(begun, len(self._rows))
        ):  # the last row takes the place of one that ends
            row, (token, layer) = self._rows[number], tokens[number - begun]
            try:
                if token == NO_TOKEN:
                    raise no_numbers(layer)
                goes_on = row.stream.put(token, layer)
            except Exception as error:
                row.prompt.on_error(error)
                goes_on = False
            if not goes_on:
                self._remove(number)

    def _remove(self, number: int) -> None:
        self._tokens.remove(number)
        last = self._rows.pop()
        if number < len(self._rows):
            self._rows[number] = last
