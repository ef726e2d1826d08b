"""A model's own answers as what another one learns: its logits, computed once for each row, in place of labels.

Memory holds classes x 4 bytes a row. Rows are run in full precision, whatever the training's is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from accelerate.utils import AutocastKwargs
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from consistentee.data.batches import collate
from consistentee.data.spooled import SpooledRows
from consistentee.models.loaded import LoadedClassifier
from consistentee.training.states import run_full_depth
from consistentee.training.steps import default_accelerator


def teacher_logits(
    original: LoadedClassifier, rows: SpooledRows, *, description: str | None = None
) -> Tensor:
    """A plain classifier's logits for every row, (rows, classes), float32, on the CPU.

    Args:
        original: the model; it is moved to the device that is trained on.
        rows: tokenized by its tokenizer.
        description: label of the progress bar; none without it.
    """
    accelerator = default_accelerator(kwargs_handlers=[AutocastKwargs(enabled=False)])
    original.model.to(accelerator.device)
    return run_full_depth(
        original.model,
        cast(Any, rows),
        collate=partial(collate, tokenizer=original.tokenizer),
        accelerator=accelerator,
        description=description,
    )


class TaughtRows:
    """Rows with a teacher's logits as labels.

    Args:
        rows: tokenized.
        logits: (rows, classes), float32.

    An item is one of `rows`, its `labels` (classes,) float32.
    """

    def __init__(self, rows: SpooledRows, logits: Tensor) -> None:
        self._rows, self.logits = rows, logits
        self.lengths, self.num_truncated = rows.lengths, rows.num_truncated

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self._rows[index], "labels": self.logits[index]}


def collate_taught(
    items: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Tensor]:
    """A padded batch of `TaughtRows`' items, as `batches.collate` makes it; `labels` (rows, classes) float32."""
    inputs = [{name: value for name, value in item.items() if name != "labels"} for item in items]
    return {**collate(inputs, tokenizer), "labels": torch.stack([item["labels"] for item in items])}
