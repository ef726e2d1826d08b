"""Prompts: how an instruction and its input become the text after which the response begins.

A model answers well in the format that it was trained in, so a saved model remembers its template (`to_dict`).
"""

from __future__ import annotations

import difflib
import os
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from consistentee.data.encodings import file_lines
from consistentee.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_NAMES = ("auto", "chat", "alpaca", "plain")
"""The templates that are no files; "auto" is "chat" where the tokenizer has a chat template, else "alpaca"."""

Turn = tuple[str, str]
"""A turn of a conversation: its role, "system", "user" or "assistant", and its text."""

_SLOT = re.compile(
    "\ue000([0-9]+)\ue001"
)  # stands for a turn's text: private characters, which templates leave alone
_PLACEHOLDERS = ("instruction", "input")
_BETWEEN_VARIANTS = re.compile(r"^---[ \t]*$\n?", re.MULTILINE)


@dataclass(frozen=True)
class PromptTemplate:
    """A way to write prompts.

    Args:
        name: One of TEMPLATE_NAMES but "auto", or the name of the template file.
        with_input: Text with `{instruction}` and, as a rule, `{input}`; "" for the tokenizer's chat template.
        without_input: The text where there is no input; None takes `with_input`.
        tokenizer: The tokenizer whose chat template is used; None for a template of text.
        parse_special_tokens: Whether special tokens that users spell in a prompt or a response are special tokens, as
            those of the template always are; otherwise they are text.
    """

    name: str
    with_input: str = ""
    without_input: str | None = None
    tokenizer: PreTrainedTokenizerBase | None = field(default=None, compare=False, repr=False)
    parse_special_tokens: bool = False

    def __post_init__(self) -> None:
        if (self.with_input == "") == (self.tokenizer is None):
            raise ValueError(f'with_input or tokenizer must be given for template "{self.name}", not both.')
        for text in (self.with_input, self.without_input):
            if text:
                _check_text(text, self.name)

    @property
    def holds_special_tokens(self) -> bool:
        """Whether the rendered text already has the tokenizer's special tokens: then none are to be added."""
        return self.tokenizer is not None

    def render(self, instruction: str, input: str = "", history: Sequence[Turn] = ()) -> str:
        """The prompt, up to where the response begins.

        A template of text writes earlier turns of a conversation one behind the other, each question as it writes the
        last one, its answer directly after it and then a blank line; a system's text comes first, as a paragraph.

        Args:
            instruction: What is asked for.
            input: What it is about, or "". A template with no place for it has it after the instruction.
            history: The turns before, a system's first, if there is one, then a user's and an assistant's in turn.

        Returns:
            The text. It is "" where instruction, input and history are empty: nothing is asked, the response is all of
            the text.

        Raises:
            DataError: The chat template refuses the conversation.
        """
        if self.tokenizer is None:
            return "".join(text for text, _ in self.parts(instruction, input, history))
        asked = _asked(instruction, input)
        return self._chat([*history, ("user", asked)]) if asked or history else ""

    def parts(
        self, instruction: str, input: str = "", history: Sequence[Turn] = ()
    ) -> list[tuple[str, bool]]:
        """The prompt in pieces, each with whether it is the text of a turn (and not the template's own).

        The pieces together are what `render` gives, unless a chat template looks into the texts or changes more of them
        than the space around.
        """
        if not instruction and not input and not history:
            return []
        if self.tokenizer is not None:
            return self._chat_parts([*history, ("user", _asked(instruction, input))])
        pieces: list[tuple[str, bool]] = []
        for role, text in history:
            if role == "user":
                pieces += self._question(text, "")
            else:
                pieces += [(text, True), ("\n\n", False)]
        return pieces + self._question(instruction, input)

    def _question(self, instruction: str, input: str) -> list[tuple[str, bool]]:
        text = self.with_input if input or self.without_input is None else self.without_input
        values = {"instruction": instruction, "input": input}
        if "input" not in _placeholders(text):
            values["instruction"] = _asked(instruction, input)
        pieces: list[tuple[str, bool]] = []
        for own, name, _, _ in string.Formatter().parse(text):
            pieces += [(own, False)] if own else []
            pieces += [(values[name], True)] if name is not None else []
        return pieces

    def _chat(self, turns: Sequence[Turn]) -> str:
        from jinja2 import TemplateError  # what chat templates are made with, and raise

        messages = [{"role": role, "content": text} for role, text in turns]
        try:
            tokenizer: Any = self.tokenizer
            return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        except TemplateError as error:
            raise DataError(
                f"The tokenizer's chat template does not take {' and '.join(dict.fromkeys(role for role, _ in turns))} "
                f"turns like those before {turns[-1][1][:40]!r}: {' '.join(str(error).split()).rstrip('.')}.",
                remedy="Change the conversation, or take another prompt template.",
            ) from None

    def _chat_parts(self, turns: Sequence[Turn]) -> list[tuple[str, bool]]:
        slots = [(role, f"\ue000{number}\ue001") for number, (role, _) in enumerate(turns)]
        own_and_numbers = _SLOT.split(self._chat(slots))
        texts, rendered = [text for _, text in turns], self._chat(turns)
        kept = {int(number) for number in own_and_numbers[1::2]}
        for number, text in enumerate(texts):
            if number not in kept and text.strip() in rendered:
                raise DataError(
                    f"The tokenizer's chat template rewrites the text {text[:40]!r}, so that special tokens spelled in "
                    "it cannot be kept as text.",
                    remedy="Take them out, or take another prompt template.",
                )

        own, numbers = own_and_numbers[::2], [int(number) for number in own_and_numbers[1::2]]
        pieces, place = [(own[0], False)], len(own[0])
        for number, behind in zip(numbers, own[1:], strict=True):
            text = texts[number]
            forms = (
                text,
                text.strip(),
                text.rstrip(),
                text.lstrip(),
            )  # some templates strip some roles' turns
            form = next((form for form in forms if rendered.startswith(form + behind, place)), text.strip())
            pieces += [(form, True), (behind, False)]
            place += len(form) + len(behind)
        return [(text, is_turn) for text, is_turn in pieces if text]

    def to_dict(self) -> dict[str, Any]:
        """The template as JSON values; a chat template stays with its tokenizer, which saves it."""
        parsed = {"parse_special_tokens": True} if self.parse_special_tokens else {}
        if self.tokenizer is not None:
            return {"kind": "chat", **parsed}
        return {
            **parsed,
            "kind": "text",
            "name": self.name,
            "with_input": self.with_input,
            "without_input": self.without_input,
        }

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None = None
    ) -> PromptTemplate:
        """The template that `to_dict` wrote.

        Args:
            values: What it wrote.
            tokenizer: The model's tokenizer, which a chat template needs.

        Raises:
            ValueError: Values that are of no template, or no tokenizer with a chat template where one is needed.
        """
        match values:
            case {"kind": "chat"}:
                template = _chat(tokenizer)
            case {"kind": "text", "name": str(name), "with_input": str(text), "without_input": str() | None}:
                template = cls(name, text, values["without_input"])
            case _:
                raise ValueError(
                    f"A saved prompt template must be of kind chat, or of kind text with name, with_input and "
                    f"without_input, got {dict(values)!r}."
                )
        return replace(template, parse_special_tokens=bool(values.get("parse_special_tokens", False)))


def _asked(instruction: str, input: str) -> str:
    return "\n\n".join(part for part in (instruction, input) if part)


def _placeholders(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}


def _check_text(text: str, file: str | os.PathLike[str]) -> None:
    """Raise unless `str.format` will find in the text what it is given, and nothing else."""
    try:
        fields = [part[1:] for part in string.Formatter().parse(text) if part[1] is not None]
    except ValueError as error:
        reason = str(error).rstrip(".")
        remedy = "Write braces that are part of the text twice: {{ and }}."
        raise DataError(f"Its braces are not paired: {reason}.", file=file, remedy=remedy) from None
    for name, format_spec, conversion in fields:
        if name not in _PLACEHOLDERS or format_spec or conversion:
            written = (
                f"{name}{'!' + conversion if conversion else ''}{':' + format_spec if format_spec else ''}"
            )
            raise DataError(
                f"The placeholder {{{written}}} is not known.",
                file=file,
                remedy="Known: {instruction} and {input}. Write braces that are part of the text twice.",
            )
    if all(name != "instruction" for name, _, _ in fields):
        where = "" if text.strip() else " (there is no text)"
        raise DataError(
            f"The template has no {{instruction}}{where}.",
            file=file,
            remedy="Put it where the request belongs.",
        )


ALPACA = PromptTemplate(
    "alpaca",
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:",
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:",
)
"""The prompt of Stanford Alpaca, in its two variants."""

PLAIN = PromptTemplate("plain", "{instruction}")
"""The text as it is: the instruction and, after a blank line, the input; for texts that are to be continued."""


def prompt_template(
    spec: str | os.PathLike[str] | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    parse_special_tokens: bool = False,
) -> PromptTemplate:
    """The prompt template of that name, or of a file.

    Args:
        spec: One of TEMPLATE_NAMES, None for "auto", or a text file with `{instruction}` and, as a rule, `{input}`. A
            line `---` in it separates two variants, the second for rows that have no input. Braces that are text are
            doubled; the file's last line end is no part of the prompt.
        tokenizer: The model's tokenizer.
        parse_special_tokens: Whether special tokens that users spell are special tokens.

    Returns:
        The template.

    Raises:
        DataError: There is no such name or file, or the file is no template.
        ValueError: "chat" for a tokenizer that has no chat template.
    """
    match spec:
        case None | "auto":
            template = _chat(tokenizer) if tokenizer.chat_template else ALPACA
        case "chat":
            template = _chat(tokenizer)
        case "alpaca":
            template = ALPACA
        case "plain":
            template = PLAIN
        case _:
            template = _from_file(Path(spec))
    return replace(template, parse_special_tokens=True) if parse_special_tokens else template


def _chat(tokenizer: PreTrainedTokenizerBase | None) -> PromptTemplate:
    if tokenizer is None or not tokenizer.chat_template:
        raise ValueError(
            'The tokenizer must have a chat template for prompt template "chat", got none. '
            'Take "alpaca", "plain" or a template file.'
        )
    return PromptTemplate("chat", tokenizer=tokenizer)


def _from_file(path: Path) -> PromptTemplate:
    if not path.is_file():
        close = difflib.get_close_matches(str(path).lower(), TEMPLATE_NAMES, n=1)
        hint = f'Did you mean "{close[0]}"? ' if close else ""
        raise DataError(
            "There is no prompt template or template file of this name.",
            file=path,
            remedy=f"{hint}Give one of {', '.join(TEMPLATE_NAMES)}, or the path of a text file.",
        )
    text = "".join(line for _, line in file_lines(path)).replace("\r\n", "\n")
    variants = [variant.removesuffix("\n") for variant in _BETWEEN_VARIANTS.split(text)]
    if len(variants) > 2:
        raise DataError(
            f"Variants separated by a line ---: {len(variants)}.",
            file=path,
            remedy="Give one, or one for rows with an input and one for rows without.",
        )
    for variant in variants:
        _check_text(variant, path)
    if len(variants) == 2 and "input" in _placeholders(variants[1]):
        raise DataError(
            "The second variant, for rows without an input, holds {input}.",
            file=path,
            remedy="Put the variant with {input} first.",
        )
    return PromptTemplate(path.name, variants[0], variants[1] if len(variants) == 2 else None)
