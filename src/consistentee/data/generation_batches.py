"""Prompts and responses on their way into a causal language model: tokens, labels, batches.

A training row is the prompt's tokens, then the response's, then the end of text; only the last two are learned.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from consistentee.data.batches import TOKENIZED_AT_ONCE
from consistentee.data.generation import InstructionDataset
from consistentee.data.literal import ControlTokens, literal_ids
from consistentee.data.templates import PromptTemplate, Turn
from consistentee.errors import DataError, SettingError, require_characters

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token that is not learned."""

SHORTEST_RESPONSE = 0.25  # of max_length: a response is not cut below this; the instruction is, after it

Tokens = Sequence[int] | NDArray[np.int32]
"""Token ids of one row."""

Asked = tuple[str, str, tuple[Turn, ...]]
"""An instruction, its input and the turns before them."""


class TokenizedPrompts(Dataset[dict[str, Any]]):
    """Tokenized prompts with their responses, held as one flat array of token ids.

    Args:
        prompts: Token ids of every prompt.
        responses: Token ids of every response, equally many rows; a prompt or a response may be empty, not both.
        num_truncated: How many of the rows were cut.

    An item is a dict of `input_ids` (list of int, prompt and response), `labels` (list of int, the same with IGNORED in
    place of the prompt) and `index` (int, the row's own position in this dataset).
    """

    def __init__(
        self, prompts: Sequence[Tokens], responses: Sequence[Tokens], *, num_truncated: int = 0
    ) -> None:
        if len(prompts) != len(responses):
            raise ValueError(
                f"prompts and responses must be equally many, got {len(prompts)} and {len(responses)}."
            )
        self.num_truncated = num_truncated
        self.prompt_lengths = np.array([len(row) for row in prompts], dtype=np.int64)  # (rows,) tokens
        self.lengths = self.prompt_lengths + np.array([len(row) for row in responses], dtype=np.int64)
        self._ends = np.cumsum(self.lengths)
        parts = itertools.chain.from_iterable(zip(prompts, responses, strict=True))
        arrays = [np.asarray(part, dtype=np.int32) for part in parts]
        # (tokens of all rows,)
        self._flat = np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int32)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in [0, {len(self)}), got {index}.")
        end, prompt = int(self._ends[index]), int(self.prompt_lengths[index])
        input_ids: list[int] = self._flat[end - int(self.lengths[index]) : end].tolist()
        return {
            "input_ids": input_ids,
            "labels": [IGNORED] * prompt + input_ids[prompt:],
            "index": int(index),
        }


def with_more_tokens(
    rows: TokenizedPrompts, source: TokenizedPrompts, tokens: int, seed: int
) -> TokenizedPrompts:
    """Rows, and behind them as many of another data set as so many response tokens leave room for.

    Args:
        rows: all are kept.
        source: rows are drawn from it evenly, each once at most.
        tokens: of responses, at most.
        seed: of the draw.
    """
    missing = tokens - int((rows.lengths - rows.prompt_lengths).sum())
    order = np.random.default_rng(seed).permutation(len(source))
    ends = np.cumsum((source.lengths - source.prompt_lengths)[order])
    drawn = order[: int(np.searchsorted(ends, missing, side="right"))]
    items = [rows[row]["input_ids"] for row in range(len(rows))] + [
        source[row]["input_ids"] for row in drawn.tolist()
    ]
    prompts = [*rows.prompt_lengths.tolist(), *source.prompt_lengths[drawn].tolist()]
    return TokenizedPrompts(
        [ids[:end] for ids, end in zip(items, prompts, strict=True)],
        [ids[end:] for ids, end in zip(items, prompts, strict=True)],
    )


def encode_rows(
    dataset: InstructionDataset,
    tokenizer: PreTrainedTokenizerBase,
    template: PromptTemplate,
    *,
    max_length: int,
    max_prompt_length: int | None = None,
) -> TokenizedPrompts:
    """Tokenize prompts and responses to train on.

    Of a row that is too long the oldest turns of its conversation go first; then the input is cut, from its end, so
    that the template's own text stays whole; then the response, but not below SHORTEST_RESPONSE of `max_length`; then
    the instruction. A response that is cut has no end of text after it.

    Args:
        dataset: Instructions with responses.
        tokenizer: A Hugging Face tokenizer with an end-of-text token.
        template: How prompts are written.
        max_length: The most tokens of a row.
        max_prompt_length: The most tokens of a prompt; None leaves that to `max_length`.

    Returns:
        The tokenized rows, in the same order.

    Raises:
        DataError: Half a character in a row.
        ValueError: No end-of-text token, or lengths with no room for the template's own text.
    """
    for name, length, least in (
        ("max_length", max_length, 2),
        ("max_prompt_length", max_prompt_length, 1),
    ):
        if length is not None and length < least:
            raise ValueError(f"{name} must be at least {least}, got {length}.")
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise ValueError("The tokenizer must have an end-of-text token, got none. Set tokenizer.eos_token.")
    for position, (prompt, reference) in enumerate(
        zip(dataset.prompts(), dataset.references, strict=True), start=1
    ):
        instruction, context, history = prompt
        for text in (instruction, context, reference, *(turn for _, turn in history)):
            require_characters(text, row=position, unit="row")
    encoder = _PromptEncoder(tokenizer, template)
    longest_prompt = max_length if max_prompt_length is None else min(max_prompt_length, max_length)
    shortest_response = max(1, int(SHORTEST_RESPONSE * max_length))
    prompts: list[NDArray[np.int32]] = []  # arrays at once: lists of a large data set would take gigabytes
    responses: list[NDArray[np.int32]] = []
    num_truncated = 0
    for start in range(0, len(dataset), TOKENIZED_AT_ONCE):
        part = dataset.select(range(start, min(start + TOKENIZED_AT_ONCE, len(dataset))))
        asked = part.prompts()
        for (instruction, context, history), prompt, bare in zip(
            asked, encoder.prompts(asked), encoder.tokens_of(part.references), strict=True
        ):
            response = [*bare, end]
            whole = len(prompt) + len(response)
            room = min(longest_prompt, max_length - len(response))
            history, prompt = encoder.cut_history(instruction, context, history, prompt, room)
            context, prompt = encoder.cut_input(instruction, context, history, prompt, room)
            if len(prompt) > room:
                left = max_length - min(len(prompt), longest_prompt)
                response = response[: max(left, shortest_response)]
                room = min(longest_prompt, max_length - len(response))
                prompt = encoder.cut_instruction(instruction, context, history, prompt, room)
            prompts.append(np.array(prompt, dtype=np.int32))
            responses.append(np.array(response, dtype=np.int32))
            num_truncated += len(prompt) + len(response) < whole
    return TokenizedPrompts(prompts, responses, num_truncated=num_truncated)


def encode_prompts_with_cuts(
    prompts: InstructionDataset | Iterable[tuple[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    template: PromptTemplate,
    *,
    max_prompt_length: int,
) -> tuple[list[list[int]], list[bool]]:
    """Token ids of prompts to respond to, the same as in `encode_rows`, and which of them were cut.

    Args:
        prompts: A data set, or pairs of an instruction and an input ("" for none).
        tokenizer: A Hugging Face tokenizer.
        template: How prompts are written.
        max_prompt_length: The most tokens of a prompt: of a longer one the oldest turns of a conversation go, then the
            input is cut from its end, then the instruction.

    Returns:
        One list of token ids a prompt, not padded; and for each whether it was longer than `max_prompt_length`.

    Raises:
        DataError: A prompt of which no token is left, or with half a character.
        ValueError: A `max_prompt_length` with no room for the template's own text.
    """
    if isinstance(prompts, InstructionDataset):
        asked = prompts.prompts()
    else:
        asked = [(instruction, context, ()) for instruction, context in prompts]
    for position, (instruction, context, history) in enumerate(asked, start=1):
        for part in (instruction, context, *(text for _, text in history)):
            require_characters(part, row=position, unit="prompt")
    encoder = _PromptEncoder(tokenizer, template)
    encoded: list[list[int]] = []
    cut: list[bool] = []
    for (instruction, context, history), prompt in zip(asked, encoder.prompts(asked), strict=True):
        cut.append(len(prompt) > max_prompt_length)
        history, prompt = encoder.cut_history(instruction, context, history, prompt, max_prompt_length)
        context, prompt = encoder.cut_input(instruction, context, history, prompt, max_prompt_length)
        encoded.append(encoder.cut_instruction(instruction, context, history, prompt, max_prompt_length))
    if [] in encoded:
        row = encoded.index([]) + 1
        raise DataError("The prompt has no token.", row=row, unit="prompt", remedy="Write one, or remove it.")
    return encoded, cut


def encode_prompts(
    prompts: InstructionDataset | Iterable[tuple[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    template: PromptTemplate,
    *,
    max_prompt_length: int,
) -> list[list[int]]:
    """Token ids of prompts to respond to, one list a prompt; arguments and errors as in `encode_prompts_with_cuts`."""
    return encode_prompts_with_cuts(prompts, tokenizer, template, max_prompt_length=max_prompt_length)[0]


class _PromptEncoder:
    """A tokenizer and a template together: prompts that keep to a limit."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: PromptTemplate) -> None:
        self.tokenizer = tokenizer
        self.template = template
        bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
        special: list[int] = tokenizer("a")["input_ids"]
        starts = (start for start in range(len(special)) if special[start : start + len(bare)] == bare)
        # Tokens that begin a text; those with which some tokenizers end one would end it before the response.
        self.beginning = special[: next(starts, 0)]
        self._controls: dict[tuple[bool, bool, tuple[str, ...]], ControlTokens] = {}

    def tokens_of(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts that users wrote, with no special ones around them."""
        if self.template.parse_special_tokens:
            return self._parsed(texts)
        return literal_ids(self.tokenizer, texts)

    def prompts(self, asked: Iterable[Asked]) -> list[list[int]]:
        """Token ids of the prompts of instructions with their inputs and histories."""
        asked = [*asked]
        texts = [self.template.render(*prompt) for prompt in asked]
        beginnings = [[] if text and self.template.holds_special_tokens else self.beginning for text in texts]
        encoded = self._parsed(texts)
        if not self.template.parse_special_tokens:
            for row, prompt in enumerate(asked):
                own = self._own_controls(*prompt)
                if own.among(encoded[row]) != own.sequence:  # one is spelled in what the user wrote
                    encoded[row] = own.encode(self.template.parts(*prompt))
        return [[*first, *rest] for first, rest in zip(beginnings, encoded, strict=True)]

    def _parsed(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer([*texts], add_special_tokens=False, verbose=False)["input_ids"] if texts else []

    def _own_controls(self, instruction: str, context: str, history: Sequence[Turn]) -> ControlTokens:
        """The control tokens that the template itself writes around such a prompt."""
        roles = tuple(role for role, _ in history)
        shape = (bool(instruction), bool(context), roles)
        if shape not in self._controls:
            before = [(role, "a") for role in roles]
            text = self.template.render("a" if instruction else "", "a" if context else "", before)
            self._controls[shape] = ControlTokens(self.tokenizer, text)
        return self._controls[shape]

    def cut_history(
        self, instruction: str, context: str, history: tuple[Turn, ...], prompt: list[int], limit: int
    ) -> tuple[tuple[Turn, ...], list[int]]:
        """As many of the last turns as fit, behind a system's, and the prompt, which may still be too long."""
        system = history[: sum(role == "system" for role, _ in history)]
        turns = history[len(system) :]
        while turns and len(prompt) > limit:
            turns = turns[2:]
            (prompt,) = self.prompts([(instruction, context, (*system, *turns))])
        return (*system, *turns), prompt

    def cut_input(
        self, instruction: str, context: str, history: tuple[Turn, ...], prompt: list[int], limit: int
    ) -> tuple[str, list[int]]:
        """As much of the input as fits, and the prompt, which may still be too long where nothing fits."""
        count = len(self.tokens_of([context])[0]) if context and len(prompt) > limit else 0
        while context and len(prompt) > limit:
            count -= len(prompt) - limit
            context = self._first(context, count)
            (prompt,) = self.prompts([(instruction, context, history)])
        return context, prompt

    def cut_instruction(
        self, instruction: str, context: str, history: tuple[Turn, ...], prompt: list[int], limit: int
    ) -> list[int]:
        """The prompt with as much of the instruction as fits."""
        count = len(self.tokens_of([instruction])[0]) if len(prompt) > limit else 0
        fixed = len(prompt) - count
        while len(prompt) > limit:
            count -= len(prompt) - limit
            instruction = self._first(instruction, count)
            if not instruction:
                raise SettingError(
                    f"The prompt's length must be above the {fixed} tokens of the prompt template, got {limit}. "
                    "Raise max_length or max_prompt_length, or take a shorter template."
                )
            (prompt,) = self.prompts([(instruction, context, history)])
        return prompt

    def _first(self, text: str, count: int) -> str:
        """The first `count` tokens of a text."""
        if count <= 0:
            return ""
        if not self.tokenizer.is_fast:
            return str(self.tokenizer.decode(self.tokens_of([text])[0][:count])).rstrip()
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return text[: encoded["offset_mapping"][:count][-1][1]].rstrip()


def collate_rows(items: Sequence[Mapping[str, Any]], *, pad_token_id: int) -> dict[str, Tensor]:
    """A batch of tensors from items of different length, padded on the right to the longest.

    Args:
        items: Items of a `TokenizedPrompts`; at least one.
        pad_token_id: Token of the padding; no attention is paid to it.

    Returns:
        `input_ids`, `attention_mask` (1 = real token) and `labels` (IGNORED on prompt and padding), each (rows, tokens)
        int64, and `index`, (rows,) int64.
    """
    width = max(len(item["input_ids"]) for item in items)

    def padded(rows: Iterable[Sequence[int]], padding: int) -> Tensor:  # (rows, tokens)
        return torch.tensor([[*row, *[padding] * (width - len(row))] for row in rows], dtype=torch.int64)

    return {
        "input_ids": padded((item["input_ids"] for item in items), pad_token_id),
        "attention_mask": padded(([1] * len(item["input_ids"]) for item in items), 0),
        "labels": padded((item["labels"] for item in items), IGNORED),
        "index": torch.tensor([item["index"] for item in items], dtype=torch.int64),
    }


def pad_left(rows: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Rows of different length, padded on the left so that all end, and go on, at the same place.

    Args:
        rows: Token ids of every row; at least one row.
        pad_token_id: Token of the padding; no attention is paid to it.

    Returns:
        `input_ids` and `attention_mask` (1 = real token), both (rows, tokens) int64.

    Example:
        >>> pad_left([[5], [6, 7]], 0)[0].tolist()
        [[0, 5], [6, 7]]
    """
    width = max(len(row) for row in rows)
    input_ids = [[*[pad_token_id] * (width - len(row)), *row] for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(input_ids, dtype=torch.int64), torch.tensor(mask, dtype=torch.int64)
