"""Texts, prompts and responses as token ids that keep to a limit, each row with whether it was cut.

A training row of a language model is the prompt's tokens, then the response's, then the end of text; only the last two
are learned. Special tokens that a text spells are text, see `literal`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from consistentee.data.batches import TokenizedDataset, TokenizedPrompts
from consistentee.data.literal import ControlTokens, as_text, literal_ids
from consistentee.data.rows import InstructionDataset, TextDataset
from consistentee.data.templates import PromptTemplate, Turn
from consistentee.errors import DataError, SettingError, require_characters

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZED_AT_ONCE = 1024  # rows
SHORTEST_RESPONSE = 0.25  # of max_length: a response is not cut below this; the instruction is, after it

Asked = tuple[str, str, tuple[Turn, ...]]
"""An instruction, its input and the turns before them."""


def _require_characters(rows: Iterable[Iterable[str]], unit: str) -> None:
    for position, texts in enumerate(rows, start=1):
        for text in texts:
            require_characters(text, row=position, unit=unit)


def _texts_of(asked: Asked) -> list[str]:
    return [*asked[:2], *(text for _, text in asked[2])]


def encode_texts(
    texts: Sequence[tuple[str, ...]], tokenizer: PreTrainedTokenizerBase, max_length: int = 128
) -> tuple[list[dict[str, list[int]]], list[bool]]:
    """Token ids of texts or pairs, not padded, and which of them were cut.

    Args:
        texts: Tuples of one text, or all of two.
        tokenizer: A Hugging Face tokenizer; whether special tokens that a text spells are text, is its own setting
            (`literal.take_literally`).
        max_length: The most tokens of a row, special ones included; what is longer is cut (of a pair, the longer text).

    Returns:
        One dict a row, `input_ids` and, where the tokenizer gives them, `token_type_ids`: what `collate` takes; and for
        each row whether it was longer than `max_length`.

    Raises:
        DataError: A text of which no token is left, half a character, or pairs for a tokenizer that cannot keep them
            apart.
        ValueError: A `max_length` that leaves no room for text, or strings in place of tuples.
    """
    if not texts:
        return [], []
    if any(isinstance(row, str) for row in texts):
        raise ValueError('texts must be tuples of one text or two, got a string. Give ("a text",) for it.')
    pair = len(texts[0]) == 2
    if any(len(row) != len(texts[0]) for row in texts):
        raise ValueError("texts must be all single texts or all pairs, got both.")
    special = tokenizer.num_special_tokens_to_add(pair=pair)
    if max_length <= special:
        raise SettingError(
            f"max_length must be above the tokenizer's {special} special tokens, got {max_length}."
        )
    if pair and special <= tokenizer.num_special_tokens_to_add(pair=False):
        raise DataError(
            "The tokenizer puts no separator between the two texts of a pair.",
            remedy="Take a backbone whose tokenizer takes pairs, or one text column.",
        )
    _require_characters(texts, "text")
    encoded = tokenizer(
        as_text([row[0] for row in texts], tokenizer),
        as_text([row[1] for row in texts], tokenizer) if pair else None,
        truncation=True,
        max_length=max_length,
        padding=False,
        return_attention_mask=False,
    )
    keys = [key for key in ("input_ids", "token_type_ids") if key in encoded]
    rows = [{key: list(encoded[key][row]) for key in keys} for row in range(len(texts))]
    cut = [_is_cut(encoded, row, texts[row], tokenizer, max_length) for row in range(len(texts))]
    for texts_of_row, row in zip(texts, rows, strict=True):
        if not row["input_ids"]:
            raise DataError(
                f"The tokenizer leaves nothing of the text {texts_of_row[0][:40]!r}.",
                remedy="Remove the row.",
            )
    return rows, cut


def _is_cut(
    encoded: Any, row: int, texts: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> bool:
    """Whether a tokenizer left something of a text out; fast ones tell, others are asked again."""
    if len(encoded["input_ids"][row]) < max_length:
        return False
    if encoded.encodings is not None:
        return bool(encoded.encodings[row].overflowing)
    text, second = texts[0], texts[1] if len(texts) == 2 else None
    return len(tokenizer(text, second, verbose=False)["input_ids"]) > max_length


def tokenize(
    dataset: TextDataset, tokenizer: PreTrainedTokenizerBase, max_length: int = 128
) -> TokenizedDataset:
    """Tokenize every row of a labelled data set.

    Args:
        dataset: Texts or pairs with labels.
        tokenizer: A Hugging Face tokenizer.
        max_length: The most tokens of a row, special ones included.

    Returns:
        The tokenized rows, in the same order.

    Raises:
        DataError: As in `encode_texts`.
    """
    rows: list[
        dict[str, NDArray[np.int32]]
    ] = []  # arrays at once: lists of a large data set would take gigabytes
    num_truncated = 0
    _require_characters(dataset.texts, "row")
    for start in range(0, len(dataset), TOKENIZED_AT_ONCE):
        encoded, cut = encode_texts(dataset.texts[start : start + TOKENIZED_AT_ONCE], tokenizer, max_length)
        rows += [{key: np.array(tokens, dtype=np.int32) for key, tokens in row.items()} for row in encoded]
        num_truncated += sum(cut)
    return TokenizedDataset(rows, dataset.labels, dataset.label_names, num_truncated=num_truncated)


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
    _require_characters(map(_texts_of, dataset.prompts()), "row")
    _require_characters(zip(dataset.references, strict=True), "row")
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


def encode_prompts(
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
    _require_characters(map(_texts_of, asked), "prompt")
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
        if not turns or len(prompt) <= limit:
            return history, prompt

        def without(pairs: int) -> list[int]:
            (prompt,) = self.prompts([(instruction, context, (*system, *turns[2 * pairs :]))])
            return prompt

        some = range(1, (len(turns) + 1) // 2)  # fewer than all
        pairs = 1 + bisect_left(some, True, key=lambda pairs: len(without(pairs)) <= limit)
        return (*system, *turns[2 * pairs :]), without(pairs)

    def cut_input(
        self, instruction: str, context: str, history: tuple[Turn, ...], prompt: list[int], limit: int
    ) -> tuple[str, list[int]]:
        """As much of the input as fits, and the prompt, which may still be too long where nothing fits."""
        if not context or len(prompt) <= limit:
            return context, prompt
        reader = self._reader(context, (instruction, context, history))
        count = len(_ids(reader, context))
        while context and len(prompt) > limit:
            count -= len(prompt) - limit
            context = _first(reader, context, count)
            (prompt,) = self.prompts([(instruction, context, history)])
        return context, prompt

    def cut_instruction(
        self, instruction: str, context: str, history: tuple[Turn, ...], prompt: list[int], limit: int
    ) -> list[int]:
        """The prompt with as much of the instruction as fits."""
        if len(prompt) <= limit:
            return prompt
        reader = self._reader(instruction, (instruction, context, history))
        count = len(_ids(reader, instruction))
        fixed = len(prompt) - count
        while len(prompt) > limit:
            count -= len(prompt) - limit
            instruction = _first(reader, instruction, count)
            if not instruction:
                raise SettingError(
                    f"The prompt's length must be above the {fixed} tokens of the prompt template, got {limit}. "
                    "Raise max_length or max_prompt_length, or take a shorter template."
                )
            (prompt,) = self.prompts([(instruction, context, history)])
        return prompt

    def _reader(self, text: str, asked: Asked) -> PreTrainedTokenizerBase:
        """The tokenizer that gives a text the tokens that it has in a prompt."""
        if self.template.parse_special_tokens:
            return self.tokenizer
        return self._own_controls(*asked).reader(text)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    (text,) = as_text([text], tokenizer)
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _first(tokenizer: PreTrainedTokenizerBase, text: str, count: int) -> str:
    """The first `count` tokens of a text."""
    if count <= 0:
        return ""
    if not tokenizer.is_fast:
        return str(tokenizer.decode(_ids(tokenizer, text)[:count])).rstrip()
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return text[: encoded["offset_mapping"][:count][-1][1]].rstrip()
