"""Predicting with a saved model: texts in, label, score and exit layer out, in the order of the input."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from consistentee.batches import collate, encode_texts
from consistentee.model import EarlyExitForSequenceClassification, FullDepthForSequenceClassification
from consistentee.saved import SavedModel, open_model

BATCHES_PER_WINDOW = 64
"""Batches that are sorted by length together: more saves padding, fewer answer earlier."""

Text = str | tuple[str, ...]


@dataclass(frozen=True)
class Prediction:
    """What the model says about one input.

    Args:
        label: name of the class.
        score: its probability at the exit layer, in [0, 1].
        exit_layer: layers executed, from 1.
    """

    label: str
    score: float
    exit_layer: int


class Predictor:
    """A saved model, ready to predict.

    Args:
        saved: a model that `open_model` opened: one with exits, or a plain one, which always runs all its layers.

    Example:
        >>> predictor = Predictor.from_pretrained("runs/sst2")  # doctest: +SKIP
        >>> predictor.predict(["A fine film.", "Dull."])  # doctest: +SKIP
        [Prediction(label='positive', score=0.98, exit_layer=2), Prediction(label='negative', score=0.97, exit_layer=3)]
    """

    def __init__(self, saved: SavedModel) -> None:
        ours = (EarlyExitForSequenceClassification, FullDepthForSequenceClassification)
        if not isinstance(saved.model, ours):
            raise ValueError(
                f'Model "{saved.name}" was not saved by this library (it is a {type(saved.model).__name__}). '
                "Give a folder that `consistentee train` or `consistentee finetune` saved."
            )
        self.saved = saved

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, device: str | torch.device | None = None) -> Predictor:
        """Open a model folder (or a name on the hub).

        Args:
            name_or_path: what `consistentee train` saved.
            device: where to compute; None takes a GPU if there is one.

        Raises:
            OSError: there is no such model.
            ValueError: it is not a model of this library.
        """
        return cls(open_model(name_or_path, device))

    def predict(
        self,
        texts: Iterable[Text],
        *,
        batch_size: int = 32,
        threshold: float | None = None,
        criterion: str | None = None,
    ) -> list[Prediction]:
        """Predictions for texts or pairs of texts, in their order.

        Args:
            texts: strings, or tuples of one text or two.
            batch_size: inputs that start together; a batch shrinks as they leave.
            threshold: an input leaves at the first layer whose exit score exceeds it; None takes the saved one.
            criterion: `policy`, `confidence`, `entropy` or `patience`; None takes the saved one.

        Raises:
            ValueError: a text is empty (the message says which), or the threshold does not fit the criterion.
        """
        return list(self.stream(texts, batch_size=batch_size, threshold=threshold, criterion=criterion))

    def stream(
        self,
        texts: Iterable[Text],
        *,
        batch_size: int = 32,
        threshold: float | None = None,
        criterion: str | None = None,
    ) -> Iterator[Prediction]:
        """As `predict`, but lazily: of an endless input only a window is held at a time."""
        windows = self.windows(texts, batch_size=batch_size, threshold=threshold, criterion=criterion)
        return (prediction for _, predictions in windows for prediction in predictions)

    def windows(
        self,
        texts: Iterable[Text],
        *,
        batch_size: int = 32,
        threshold: float | None = None,
        criterion: str | None = None,
    ) -> Iterator[tuple[list[tuple[str, ...]], list[Prediction]]]:
        """As `stream`, window by window, the texts beside their predictions.

        The first window is one batch, so that answers begin early; each next one is twice as large, up to
        `BATCHES_PER_WINDOW` batches. Inside a window rows of similar length run together.

        Yields:
            The texts of a window and their predictions, both in the order of the input.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        options = self._options(threshold, criterion)
        return self._windows(_checked(texts), batch_size, options)

    def _options(self, threshold: float | None, criterion: str | None) -> dict[str, Any]:
        """Arguments of the model's forward."""
        if isinstance(self.saved.model, EarlyExitForSequenceClassification):
            rule, limit = self.saved.exit_rule(criterion, threshold)
            return {"criterion": rule, "threshold": limit}
        if threshold is not None or criterion is not None:
            raise ValueError(
                f'Model "{self.saved.name}" has no exits: threshold and criterion must not be given.'
            )
        return {}

    def _windows(
        self, texts: Iterator[tuple[str, ...]], batch_size: int, options: dict[str, Any]
    ) -> Iterator[tuple[list[tuple[str, ...]], list[Prediction]]]:
        batches = 1
        while window := list(itertools.islice(texts, batches * batch_size)):
            yield window, self._predict_window(window, batch_size, options)
            batches = min(2 * batches, BATCHES_PER_WINDOW)

    @torch.inference_mode()
    def _predict_window(
        self, window: Sequence[tuple[str, ...]], batch_size: int, options: dict[str, Any]
    ) -> list[Prediction]:
        model, names = self.saved.model, self.saved.label_names
        rows = encode_texts(window, self.saved.tokenizer, self.saved.max_length)
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]["input_ids"]))
        predictions: dict[int, Prediction] = {}
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            batch = collate([rows[row] for row in part], self.saved.tokenizer).items()
            output = model(**{name: tensor.to(model.device) for name, tensor in batch}, **options)
            top = output.logits.float().softmax(-1).max(-1)
            depth = model.config.num_hidden_layers
            exit_layers = output.exit_layer.tolist() if options else [depth] * len(part)
            found = zip(part, top.values.tolist(), top.indices.tolist(), exit_layers, strict=True)
            for row, score, label, exit_layer in found:
                predictions[row] = Prediction(names[label], score, exit_layer)
        return [predictions[row] for row in range(len(rows))]


def _checked(texts: Iterable[Text]) -> Iterator[tuple[str, ...]]:
    """Tuples of texts, each known to be there."""
    if isinstance(texts, str):
        raise ValueError("texts must be a list of texts, got one text. Put it into a list.")
    for position, row in enumerate(texts, start=1):
        parts = tuple(row) if isinstance(row, (tuple, list)) else (row,)
        if len(parts) not in (1, 2) or not all(isinstance(part, str) for part in parts):
            raise ValueError(f"Text {position} must be a string or a pair of strings, got {row!r:.60}.")
        if not all(part.strip() for part in parts):
            raise ValueError(f"Text {position} is empty. Leave it out, or give at least one word.")
        yield parts
