"""Which of Hugging Face's logits processors and stopping criteria look at nothing but a row's text and scores.

Drafts are verified several positions at once, and rows of a batch at different times. A processor that only reads the
text so far and the scores gives there what it gives one token after the other. Others count their calls, keep a cache
of their own (`guidance_scale`) or are the user's: with them every token is generated in turn, through all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

PROCESSORS = (
    "EncoderNoRepeatNGramLogitsProcessor",
    "EncoderRepetitionPenaltyLogitsProcessor",
    "ExponentialDecayLengthPenalty",
    "ForcedBOSTokenLogitsProcessor",
    "ForcedEOSTokenLogitsProcessor",
    "InfNanRemoveLogitsProcessor",
    "LogitNormalization",
    "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor",
    "NoBadWordsLogitsProcessor",
    "NoRepeatNGramLogitsProcessor",
    "RepetitionPenaltyLogitsProcessor",
    "SequenceBiasLogitsProcessor",
    "SuppressTokensAtBeginLogitsProcessor",
    "SuppressTokensLogitsProcessor",
    "WatermarkLogitsProcessor",
)
"""Pure functions of text and scores, row by row."""
STOPPING_CRITERIA = ("EosTokenCriteria", "MaxLengthCriteria", "MaxTimeCriteria", "StopStringCriteria")


class TextCriteria(StoppingCriteria):
    """A stopping criterion of ours that reads a row's text and nothing else."""


def stateful(processors: Sequence[Any], criteria: Sequence[Any], rows: int) -> list[str]:
    """Names of those that may depend on more than a row's text and scores.

    Args:
        processors: of the logits.
        criteria: that end texts. With one row they are asked about every token in turn in any case.
        rows: of the batch.
    """
    known = [getattr(transformers, name, None) for name in (*PROCESSORS, *STOPPING_CRITERIA)]
    asked = [*processors, *(criteria if rows > 1 else ())]
    others = [one for one in asked if type(one) not in known and not isinstance(one, TextCriteria)]
    return list(dict.fromkeys(str(getattr(one, "__name__", type(one).__name__)) for one in others))


class RecordedEnds(StoppingCriteriaList):
    """Stopping criteria that keep, of every token in `running`, which rows it was for: (rows,) bool each."""

    def __init__(self, criteria: StoppingCriteriaList) -> None:
        super().__init__(criteria)
        self.running: list[Tensor] = []
        self._ended: Any = False

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Which rows have ended, (rows,) bool."""
        found: Any = super().__call__(input_ids, scores, **kwargs)
        self.running.append(torch.ones_like(found) & ~torch.as_tensor(self._ended, device=found.device))
        self._ended = self._ended | found
        return found
