"""What fits: how many tokens a model has positions for, whether a tokenizer belongs to it, and how deep it must be.

All of it is known before the first step, and otherwise comes up as an index error in the middle of one.
"""

from __future__ import annotations

import logging
import os
from typing import Any, cast

from torch import nn
from transformers import PreTrainedConfig

from consistentee.errors import SettingError, UsageError

_log = logging.getLogger(__name__)

LONGER_TRAINING = "Train with a higher --max-length to keep more of them."

FROM_ZERO = ("bert", "distilbert", "albert", "electra", "gpt2")
"""Types with a table of positions that begins with the first token."""

BEHIND_PADDING = ("roberta", "xlm-roberta", "camembert", "mpnet")
"""Types whose first token stands behind the padding's entry: two of 514 positions are never a token's."""

ROTARY = ("modernbert",)
"""Encoders without such a table, which were made for a number of tokens all the same."""

MPNET_PADDING = 1  # whatever its configuration says


def check_depth(num_layers: int) -> None:
    """See that a model has layers to exit below its last.

    Raises:
        SettingError: it has one layer only.
    """
    if num_layers < 2:
        raise SettingError(
            f"Layers of a model with exits must be at least 2, got {num_layers}. Take a deeper one, or train it "
            "without exits."
        )


def longest_input(config: PreTrainedConfig) -> int | None:
    """The most tokens that a backbone has positions for; None where positions are relative or rotary.

    Args:
        config: of a supported encoder or causal language model.

    Example:
        >>> from transformers import BertConfig, RobertaConfig
        >>> longest_input(BertConfig()), longest_input(RobertaConfig(max_position_embeddings=514))
        (512, 512)
    """
    values: Any = config
    kind = config.model_type
    if kind in BEHIND_PADDING:
        padding = MPNET_PADDING if kind == "mpnet" else int(values.pad_token_id or 0)
        return int(values.max_position_embeddings) - padding - 1
    if kind in FROM_ZERO or (kind == "deberta-v2" and getattr(values, "position_biased_input", True)):
        return int(values.max_position_embeddings)
    return None


def training_length(max_length: int, *, default: int, backbone: PreTrainedConfig, name: object) -> int:
    """The tokens that a training cuts its rows to.

    Args:
        max_length: that was asked for.
        default: what it is where nobody asks.
        backbone: the backbone's own configuration.
        name: the backbone's, for the message.

    Returns:
        `max_length`; where that has its default value and the backbone fewer positions, as many as those.

    Raises:
        UsageError: there are fewer positions than were asked for; the message names the largest length that fits.
    """
    longest = longest_input(backbone)
    if longest is None or max_length <= longest:
        return max_length
    if max_length == default:
        return longest
    raise UsageError(
        f'max_length must be at most {longest}, the positions of backbone "{name}", got {max_length}.'
    )


def check_tokenizer(tokenizer: Any, embeddings: nn.Module, name: object, *, pads: bool = True) -> None:
    """Refuse a tokenizer that does not go with a model.

    Args:
        tokenizer: a Hugging Face tokenizer.
        embeddings: the model's token embeddings.
        name: of the model, for the message.
        pads: whether a padding token is needed.

    Raises:
        ValueError: it has tokens that the embeddings do not have, or no padding token.
    """
    rows = int(cast(Any, embeddings).weight.shape[0])
    entries = 1 + max(tokenizer.get_vocab().values(), default=-1)
    if entries > rows:
        raise ValueError(
            f'The tokenizer of "{name}" must have at most {rows} entries, as many as the model has embeddings, got '
            f"{entries}. Save both again after model.resize_token_embeddings({entries}), or take the model's own "
            "tokenizer."
        )
    if pads and tokenizer.pad_token_id is None:
        raise ValueError(
            f'The tokenizer of "{name}" must have a padding token, got none. Set pad_token in its '
            "tokenizer_config.json."
        )


def say_cuts(cut: int, total: int, what: str, remedy: str) -> None:
    """Log what `cut_message` says, if any text was cut; with no handler it goes to standard error.

    Of several processes the first says it.
    """
    if cut and os.environ.get("RANK", "0") == "0":
        _log.warning(cut_message(cut, total, what, remedy))


def cut_message(cut: int, total: int, what: str, remedy: str) -> str:
    """What is said of texts that were cut.

    Args:
        cut: how many were.
        total: of how many.
        what: the texts and their limit, such as `texts were longer than 128 tokens`.
        remedy: what to do about it, a full sentence.

    Example:
        >>> cut_message(3, 200, "texts were longer than 128 tokens", "Raise --max-length.")
        '3 of 200 texts were longer than 128 tokens and were cut. Raise --max-length.'
    """
    return f"{cut:,} of {total:,} {what} and were cut. {remedy}"
