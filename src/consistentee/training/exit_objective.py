"""What most ways to train a classifier's exits have in common: one loss a row, of the losses of all its exits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from consistentee.functional.losses import layer_losses
from consistentee.training.steps import Figures, Objective

RowLosses = Callable[[Tensor, Any, Tensor], Tensor]
"""(every exit's cross-entropy on its own logits, (rows, layers); the model's `EarlyExitOutput`, all layers run; labels,
(rows,)) -> a row's loss, (rows,)."""


def exit_objective(row_losses: RowLosses) -> Objective:
    """An objective over all exits of rows, from what a row's loss is."""

    def objective(model: nn.Module, batch: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, Figures]:
        output = model(**batch)
        losses = layer_losses(output.classifier_logits, labels)
        right = output.classifier_logits[:, -1].argmax(-1) == labels
        return row_losses(losses, output, labels), {"accuracy": right.float()}

    return objective
