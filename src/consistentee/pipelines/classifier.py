"""Inference whose clock agrees with the layers it saves.

After a layer, rows that leave go out and the rest close up, so that every later layer costs what its survivors cost;
classifiers and policy look at each layer only as far as the exit rule needs them. Two modes:

- *latency* (a `batch_size`): one batch after another goes straight through, rows sorted by length among neighbours.
- *throughput* (no `batch_size`): a window of inputs moves through the model layer by layer, and the survivors of all
  its batches are pooled, so that the batches of deep layers are as full as those of the first. Batches are sized by
  tokens, not by rows. Memory is bounded by the window: at most `WINDOW_ROWS` inputs and their hidden states.

On ONNX Runtime on CPU one graph decides by itself who exits, in both; batches of throughput mode are not pooled there.

What comes out is what running all layers and choosing afterwards gives, in the order of the input.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, cast

import torch

from consistentee.data.rows import Text, require_texts
from consistentee.data.tokenization import encode_texts
from consistentee.errors import require_characters
from consistentee.functional.criteria import EXIT_CRITERIA
from consistentee.inference.encoder.backend import Answers, Backend, TokenRow
from consistentee.inference.encoder.incremental_scores import IncrementalExitScores
from consistentee.inference.encoder.layer_pool import LayerPool
from consistentee.inference.encoder.onnx_backend import OnnxBackend
from consistentee.inference.encoder.onnx_runner import OnnxExitRunner, has_graph, run_graph
from consistentee.inference.encoder.scheduler import ExitRule, run_rows
from consistentee.inference.memory import give_back_memory
from consistentee.inference.threads import settle_after_fork
from consistentee.models.loaded import LoadedClassifier, load_model
from consistentee.models.sequence_classification import EarlyExitForSequenceClassification
from consistentee.pipelines.layouts import (
    SeenWeights,
    make_backend,
    require_evaluation_mode,
    require_own_classifier,
)

BATCHES_PER_WINDOW = 64
"""Latency mode: batches that are sorted by length together; more saves padding, fewer answer earlier."""

WINDOW_ROWS = 1024
"""Throughput mode: inputs on their way at a time, at most."""

FIRST_WINDOW_ROWS = 64
"""Throughput mode: the first window is small, so that answers begin early; each next one is twice as large."""


@dataclass(frozen=True)
class Prediction:
    """What the model says about one input.

    Args:
        label: name of the class.
        score: its probability at the exit layer, in [0, 1].
        exit_layer: layers executed, from 1.
        truncated: whether the input was longer than the model's `max_length`, and was cut.
    """

    label: str
    score: float
    exit_layer: int
    truncated: bool = False

    def line(self, texts: tuple[str, ...]) -> str:
        """The line of JSON that `consistentee predict` writes for the texts of an input."""
        values = {
            "text": texts[0] if len(texts) == 1 else list(texts),
            "label": self.label,
            "score": round(self.score, 6),
            "exit_layer": self.exit_layer,
            "truncated": self.truncated,
        }
        return json.dumps(values, ensure_ascii=False) + "\n"


class Engine:
    """A saved model, ready to predict fast.

    Args:
        saved: a model that `load_model` opened: one with exits, or a plain one, which always runs all its layers.
        dtype: `float32`, `bfloat16`, `float16` or `int8` (dynamic quantisation, CPU). Other precisions than float32
            may exit at other layers and change a label; `consistentee benchmark MODEL --dtype auto` says which is
            the fastest that keeps them all on given texts.
        backend: `torch`, or `onnxruntime` (BERT and its kin in float32; extra `onnx`, on a GPU with onnxruntime-gpu).

    Attributes:
        backend: what runs the layers.

    Raises:
        ValueError: a model that is not of this library, has adapters or is in training mode, a dtype or backend that is
            not there.

    Weights are laid out for fast computing when an engine is made, and again at the first call after they have changed
    (a training that went on, `load_state_dict`, `set_policy`); a `pool` keeps those it was made of. What a fused
    optimiser writes while the model stays in evaluation mode is not seen.

    Several threads may use one engine at the same time. It can be pickled, for other processes. After a fork it goes on
    with one thread (the others stay behind in the parent); on a GPU and on ONNX Runtime, which cannot, it refuses.

    On a GPU the host must learn after each layer who exits: a few bytes a row. It asks about one batch while the
    device computes the next, without extra work; where a single batch is on its way it waits once a layer. In
    throughput mode many are; in latency mode batches of at least `scheduler.SPLIT_TOKENS` tokens go as two halves.

    Where the threshold is so high that nobody can exit, the policy is not computed, and classifiers only if the last
    layer's prediction has a share of theirs (`ensemble_decay`).

    Example:
        >>> engine = Engine.from_pretrained("runs/sst2")  # doctest: +SKIP
        >>> engine.predict(["A fine film."])  # doctest: +SKIP
        [Prediction(label='positive', score=0.98, exit_layer=2, truncated=False)]
    """

    def __init__(self, saved: LoadedClassifier, *, dtype: str = "float32", backend: str = "torch") -> None:
        require_own_classifier(saved)
        self.saved = saved
        self._model = saved.model
        self._making = Lock()
        self._lay_out(dtype, backend)
        # Others use the saved tokenizer with settings of their own, and it keeps some of them from call to call.
        self._tokenizer = copy.deepcopy(saved.tokenizer)
        self._tokenizing = Lock()
        self._process = os.getpid()

    def _lay_out(self, dtype: str, backend: str) -> None:
        """Make what computes of the model's weights as they are now."""
        weights = SeenWeights(self._model)
        self._exit_scores: dict[str | None, IncrementalExitScores] = {}
        self._runners: dict[tuple[str | None, bool], OnnxExitRunner | None] = {}
        self.backend: Backend[Any] = make_backend(cast(Any, self._model), dtype, backend)
        self._weights = weights

    def _follow_model(self) -> None:
        """Lay the weights out anew where they have changed since: half of what computes are copies.

        Raises:
            ValueError: the model has got adapters.
            SettingError: the model is in training mode.
        """
        require_evaluation_mode(self.saved)
        if self._weights.have_changed():
            with self._making:
                if self._weights.have_changed():
                    require_own_classifier(self.saved)
                    self._lay_out(self.backend.dtype, self.backend.name)

    def __getstate__(self) -> dict[str, Any]:
        """The model and how it runs; the rest is made anew where it is opened."""
        named = {"dtype": self.backend.dtype, "backend": self.backend.name}
        return {"saved": self.saved, "tokenizer": self._tokenizer, "named": named}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["saved"], **state["named"])
        self._tokenizer = state["tokenizer"]

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        device: str | torch.device | None = "auto",
        dtype: str = "float32",
        backend: str = "torch",
        original: str | Path | None = None,
    ) -> Engine:
        """Open a model folder (or a name on the hub).

        Args:
            name_or_path: what `consistentee train`, `finetune` or `retrofit` saved.
            device: where to compute; `auto` (or None) takes a GPU if there is one.
            dtype: see the class.
            backend: see the class.
            original: see `load_model`.

        Raises:
            OSError: there is no such model, or no original.
            ValueError: it is not a model of this library, or it does not run so; an original as of `load_model`.
        """
        place = None if device == "auto" else device
        saved = load_model(name_or_path, LoadedClassifier, device=place, original=original)
        return cls(saved, dtype=dtype, backend=backend)

    def predict(
        self,
        texts: Iterable[Text],
        *,
        batch_size: int | None = None,
        threshold: float | None = None,
        criterion: str | None = None,
        operating_point: str | None = None,
    ) -> list[Prediction]:
        """Predictions for texts or pairs of texts, in their order.

        Args:
            texts: strings, or tuples of one text or two.
            batch_size: inputs that start together (latency mode); None: throughput mode.
            threshold: an input exits at the first layer whose exit score exceeds it; None takes the saved one.
            criterion: one of `criteria.CRITERIA`; None takes the saved one.
            operating_point: in place of both, one that `consistentee calibrate` saved, by name.

        Raises:
            ValueError: a text is empty, or a pair where the model takes one text, or the other way round (the message
                says which), or the threshold does not fit the criterion.
        """
        return list(
            self.stream(
                texts,
                batch_size=batch_size,
                threshold=threshold,
                criterion=criterion,
                operating_point=operating_point,
            )
        )

    def stream(
        self,
        texts: Iterable[Text],
        *,
        batch_size: int | None = None,
        threshold: float | None = None,
        criterion: str | None = None,
        operating_point: str | None = None,
    ) -> Iterator[Prediction]:
        """As `predict`, but lazily: of an endless input only a window is held at a time."""
        windows = self.windows(
            texts,
            batch_size=batch_size,
            threshold=threshold,
            criterion=criterion,
            operating_point=operating_point,
        )
        return (prediction for _, predictions in windows for prediction in predictions)

    def windows(
        self,
        texts: Iterable[Text],
        *,
        batch_size: int | None = None,
        threshold: float | None = None,
        criterion: str | None = None,
        operating_point: str | None = None,
    ) -> Iterator[tuple[list[tuple[str, ...]], list[Prediction]]]:
        """As `stream`, window by window, the texts beside their predictions.

        The first window is small (one batch), so that answers begin early; each next one is twice as large, up to
        `WINDOW_ROWS` inputs, or `BATCHES_PER_WINDOW` batches. Inside a window rows of similar length run together. With
        a `batch_size` of 1 every window is one input, answered before the next is asked for.

        Yields:
            The texts of a window and their predictions, both in the order of the input.
        """
        _check_batch_size(batch_size)
        return self._windows(
            self.checked(texts), batch_size, self.rule(criterion, threshold, operating_point)
        )

    def predict_window(
        self, texts: Sequence[Text], *, batch_size: int | None, rule: ExitRule
    ) -> list[Prediction]:
        """Predictions for texts that are all one window; arguments and errors as of `predict` and `run`."""
        _check_batch_size(batch_size)
        window = list(self.checked(texts))
        return self._window(window, batch_size, rule) if window else []

    def _window(
        self, window: Sequence[tuple[str, ...]], batch_size: int | None, rule: ExitRule
    ) -> list[Prediction]:
        names = self.saved.label_names
        rows, cut = self._encode(window)
        answers = self.run(rows, batch_size=batch_size, rule=rule)
        found = zip(answers.labels, answers.scores, answers.exit_layers, cut, strict=True)
        return [Prediction(names[label], score, layer, is_cut) for label, score, layer, is_cut in found]

    def rule(
        self,
        criterion: str | None = None,
        threshold: float | None = None,
        operating_point: str | None = None,
    ) -> ExitRule:
        """The exit rule of a call: the given one, that of an operating point, or the saved one.

        Raises:
            ValueError: a threshold that does not fit, or either for a model without exits.
        """
        if isinstance(self.saved.model, EarlyExitForSequenceClassification):
            return ExitRule(*self.saved.exit_rule(criterion, threshold, operating_point))
        if any(value is not None for value in (threshold, criterion, operating_point)):
            raise ValueError(
                f'Model "{self.saved.name}" has no exits: threshold, criterion and operating point must not be given.'
            )
        return ExitRule.full_depth()

    def run(self, rows: Sequence[TokenRow], *, batch_size: int | None, rule: ExitRule) -> Answers:
        """Answers for tokenized rows.

        Args:
            rows: what `encode_texts` gives, none longer than the model's positions.
            batch_size: inputs that start together (latency mode); None: throughput mode, all rows one window.
            rule: when they exit.

        Raises:
            ValueError: fixed exit layers that are not one for each row, or not among the layers that have an exit.
        """
        self._go_on_after_fork()
        self._follow_model()
        self._check_fixed(rule)
        exit_scores = self._scores_under(rule)
        classes = self._model.config.num_classes
        runner = None if exit_scores is None or not rows else self._runner(rule)
        if runner is not None:
            return run_graph(runner, rows, batch_size, rule, self.backend.num_layers)
        return run_rows(
            self.backend, rows, batch_size=batch_size, rule=rule, exit_scores=exit_scores, num_classes=classes
        )

    def _check_fixed(self, rule: ExitRule) -> None:
        """Raise ValueError where rows are to exit at a layer that has no exit."""
        layers: list[int] | None = getattr(self._model.config, "exit_layers", None)
        if layers is None or rule.exit_layers is None or set(rule.exit_layers) <= set(layers):
            return
        wrong = next(layer for layer in rule.exit_layers if layer not in layers)
        raise ValueError(f"exit_layers must be among {layers}, which have an exit, got {wrong}.")

    def pool(self, **how: Any) -> LayerPool:
        """A pool for rows that arrive one by one; keywords as of `LayerPool`. For one thread at a time."""
        self._follow_model()
        return LayerPool(self.backend, self._model.config.num_classes, **how)

    def tokenize(self, texts: Iterable[Text]) -> tuple[list[dict[str, list[int]]], list[bool]]:
        """Token ids of texts as `predict` takes them, and which of them were cut; errors as of `predict`."""
        return self._encode(list(self.checked(texts)))

    def exit_scores(self, rule: ExitRule) -> IncrementalExitScores | None:
        """The scores of a rule's criterion, the same object for the same criterion; None: nobody exits by it."""
        return self._scores_under(rule)

    def _encode(self, texts: Sequence[tuple[str, ...]]) -> tuple[list[dict[str, list[int]]], list[bool]]:
        """Token ids, and which were cut; one thread at a time, as the tokenizer is set up anew for each call."""
        self._go_on_after_fork()
        with self._tokenizing:
            return encode_texts(texts, self._tokenizer, self.saved.max_length)

    def _go_on_after_fork(self) -> None:
        """In a forked process: leave what other threads held."""
        if os.getpid() == self._process:
            return
        settle_after_fork(self.backend.device, self.backend.name)
        self._tokenizing = Lock()
        self._process = os.getpid()

    def _scores_under(self, rule: ExitRule) -> IncrementalExitScores | None:
        """The scores of the rule's criterion, made once; None where the last classifier alone decides."""
        model, criterion = self._model, rule.criterion
        if criterion is None or not isinstance(model, EarlyExitForSequenceClassification):
            return None
        if rule.never_exits(model.num_layers):
            if not model.config.ensemble_decay or model.config.original_head is not None:
                return None
            criterion = None  # every classifier has a share in the last prediction; nothing is decided
        if criterion not in self._exit_scores:
            self._exit_scores[criterion] = IncrementalExitScores(
                criterion,
                model.policy,
                num_classes=model.config.num_classes,
                ensemble_decay=model.config.ensemble_decay,
                signals=None if criterion is None else model.exit_signals(EXIT_CRITERIA[criterion].reads),
                alone=None if model.config.original_head is None else model.num_layers - 1,
                has_exit=model.config.has_exit,
            )
        return self._exit_scores[criterion]

    def _runner(self, rule: ExitRule) -> OnnxExitRunner | None:
        """On ONNX Runtime on CPU: the model with its exits as one graph, made once for a criterion; None elsewhere."""
        if not isinstance(self.backend, OnnxBackend) or rule.never_exits(self.backend.num_layers):
            return None
        key = (rule.criterion, rule.exit_layers is not None)
        with self._making:
            if key not in self._runners:
                model = cast(Any, self._model)
                self._runners[key] = OnnxExitRunner(model, rule) if has_graph(model, rule) else None
            return self._runners[key]

    def checked(self, texts: Iterable[Text]) -> Iterator[tuple[str, ...]]:
        """Texts as tuples, each known to be there, and as many as the model takes; errors as of `predict`."""
        for position, parts in enumerate(_checked(texts), start=1):
            self.saved.check_texts(len(parts), f"text {position}")
            yield parts

    def _windows(
        self, texts: Iterator[tuple[str, ...]], batch_size: int | None, rule: ExitRule
    ) -> Iterator[tuple[list[tuple[str, ...]], list[Prediction]]]:
        for size in window_sizes(batch_size):
            window = list(itertools.islice(texts, size))
            if not window:
                return
            yield window, self._window(window, batch_size, rule)
            if size >= WINDOW_ROWS:
                give_back_memory()


def window_sizes(batch_size: int | None) -> Iterator[int]:
    """Inputs of one window after another, without an end; arguments as of `Engine.windows`."""
    size = FIRST_WINDOW_ROWS if batch_size is None else batch_size
    largest = WINDOW_ROWS if batch_size is None else BATCHES_PER_WINDOW * batch_size
    if batch_size == 1:  # no neighbours to gain from: an input is answered before the next is read
        largest = 1
    while True:
        yield size
        size = min(2 * size, largest)


def _check_batch_size(batch_size: int | None) -> None:
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")


Predictor = Engine
"""The name this class had before it was fast."""


def _checked(texts: Iterable[Text]) -> Iterator[tuple[str, ...]]:
    """Tuples of texts, each known to be there."""
    require_texts(texts)
    for position, row in enumerate(texts, start=1):
        parts = tuple(row) if isinstance(row, (tuple, list)) else (row,)
        if len(parts) not in (1, 2) or not all(isinstance(part, str) for part in parts):
            raise ValueError(f"Text {position} must be a string or a pair of strings, got {row!r:.60}.")
        if not all(part.strip() for part in parts):
            raise ValueError(f"Text {position} is empty. Leave it out, or give at least one word.")
        for part in parts:
            require_characters(part, row=position, unit="Text")
        yield parts
