"""What users write is text: a special token that is spelled in it (`[SEP]`, `</s>`, `<|im_end|>`) is no special token.

Tokenizers look for special tokens before they look at words. `split_special_tokens` of transformers keeps them from it,
but some then find the same token as a word of their vocabulary (SentencePiece unigram models have `</s>` there): such a
spelling gets a space after its first character, behind all other normalisation.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from tokenizers import AddedToken, normalizers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_COPIES: WeakKeyDictionary[Any, dict[frozenset[str], Any]] = WeakKeyDictionary()

_NO_WORD = "\U00013000 \U0001342f"  # two hieroglyphs, which no vocabulary of words has


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The special tokens by their spelling.

    The token of unknown words is among them only where ordinary text never gives it, as in byte-level vocabularies.
    """
    named = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    added = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    unknown = tokenizer.unk_token_id
    ordinary = unknown in tokenizer(_NO_WORD, add_special_tokens=False)["input_ids"]
    return {token: index for token, index in (named | added).items() if not (ordinary and index == unknown)}


def read_special_tokens(tokenizer: PreTrainedTokenizerBase, parse: bool) -> None:
    """Choose what special tokens that a text spells are to a tokenizer, which is changed and saves itself so.

    Args:
        tokenizer: A Hugging Face tokenizer.
        parse: Whether they are special tokens; otherwise they are text.
    """
    if parse:
        tokenizer.split_special_tokens = tokenizer.init_kwargs["split_special_tokens"] = False
    else:
        take_literally(tokenizer)


def take_literally(tokenizer: PreTrainedTokenizerBase, others: Iterable[str] = ()) -> None:
    """Make a tokenizer read special tokens in texts as text, and save itself so.

    What it puts around texts stays. Texts that spell no special token give the same tokens as before.

    Args:
        tokenizer: A Hugging Face tokenizer; it is changed.
        others: Further added tokens that are to be read as text, such as those that a chat template marks roles with.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    others = [*others]
    if others and backend is not None:
        backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in others])
    tokenizer.split_special_tokens = True
    tokenizer.init_kwargs["split_special_tokens"] = True  # these are what is saved
    if backend is not None:
        found = words_of_vocabulary(tokenizer, others)
        replaced = [normalizers.Replace(token, spaced) for token, spaced in found.items()]
        if replaced:
            before = [] if backend.normalizer is None else [backend.normalizer]
            backend.normalizer = normalizers.Sequence([*before, *replaced])


def literal_copy(tokenizer: PreTrainedTokenizerBase, others: Iterable[str] = ()) -> PreTrainedTokenizerBase:
    """A copy of a tokenizer to which `take_literally` was done; made once for each tokenizer and set of others."""
    copies = _COPIES.setdefault(tokenizer, {})
    key = frozenset(others)
    if key not in copies:
        literal = copy.deepcopy(tokenizer)
        take_literally(literal, key)
        copies[key] = literal
    return copies[key]


def words_of_vocabulary(tokenizer: PreTrainedTokenizerBase, others: Iterable[str] = ()) -> dict[str, str]:
    """Special tokens that a tokenizer finds in texts although it does not look for them, by how to write them apart."""
    known = special_tokens(tokenizer)
    known |= _added(tokenizer, others)
    spaced: dict[str, str] = {}
    for token, index in known.items():
        for text in (token, f"a{token}b", f"a {token} b"):
            ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            if index in ids and len(token) > 1:
                spaced[token] = f"{token[0]} {token[1:]}"
    return spaced


def _added(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[str]) -> dict[str, int]:
    wanted = {*tokens}
    found = tokenizer.added_tokens_decoder.items() if wanted else ()
    return {token.content: index for index, token in found if token.content in wanted}


def as_text(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts as a tokenizer that takes them literally must be given them: others than fast ones do not normalise."""
    if tokenizer.is_fast or not tokenizer.split_special_tokens:
        return [*texts]
    spaced = words_of_vocabulary(tokenizer)
    for token, apart in spaced.items():
        texts = [text.replace(token, apart) for text in texts]
    return [*texts]


def literal_ids(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], others: Iterable[str] = ()
) -> list[list[int]]:
    """Token ids of texts in which special tokens are text, with none around them; the tokenizer stays as it is.

    Args:
        tokenizer: A Hugging Face tokenizer that looks for special tokens.
        texts: What users wrote.
        others: Further added tokens to read as text.
    """
    if not texts:
        return []
    encoded: list[list[int]] = tokenizer([*texts], add_special_tokens=False, verbose=False)["input_ids"]
    controls = {*special_tokens(tokenizer).values(), *_added(tokenizer, others).values()}
    for row, ids in enumerate(encoded):
        if not controls.isdisjoint(ids):
            literal = literal_copy(tokenizer, others)
            (text,) = as_text([texts[row]], literal)
            encoded[row] = literal(text, add_special_tokens=False, verbose=False)["input_ids"]
    return encoded


class ControlTokens:
    """The control tokens of a text that somebody else's texts are put into: special tokens, and others it marks with.

    Args:
        tokenizer: A Hugging Face tokenizer that looks for special tokens.
        text: The text, with nothing in it that spells one.

    Attributes:
        sequence: Token ids of its control tokens, in their order.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
        self._tokenizer = tokenizer
        ids = set(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        added = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
        self._others = {token: index for token, index in added.items() if index in ids}
        self._ids = special_tokens(tokenizer) | self._others
        self._values = frozenset(self._ids.values())
        self.sequence = self.among(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def among(self, ids: Iterable[int]) -> list[int]:
        """Those of the token ids that are control tokens."""
        return [index for index in ids if index in self._values]

    def encode(self, pieces: Iterable[tuple[str, bool]]) -> list[int]:
        """Token ids of a text in which control tokens are found in its own pieces only.

        Args:
            pieces: The text in pieces, each with whether it is somebody else's.
        """
        longest_first = sorted(self._ids, key=len, reverse=True)
        control = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        ids: list[int] = []
        stretch = ""
        for text, is_foreign in pieces:
            for piece in [text] if is_foreign else control.split(text):
                if is_foreign or piece not in self._ids:
                    stretch += piece
                    continue
                ids += [*self._literal(stretch), self._ids[piece]]
                stretch = ""
        return ids + self._literal(stretch)

    def reader(self, text: str) -> PreTrainedTokenizerBase:
        """The tokenizer that gives somebody else's text the tokens that it has in `encode`."""
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        spells = not self._values.isdisjoint(ids)
        return literal_copy(self._tokenizer, self._others) if spells else self._tokenizer

    def _literal(self, text: str) -> list[int]:
        return literal_ids(self._tokenizer, [text], self._others)[0] if text else []
