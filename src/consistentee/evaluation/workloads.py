"""What a benchmark runs: an engine with a trained model on real texts, or a shape with random weights and rows."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from consistentee.backbones.limits import LONGER_TRAINING, say_cuts
from consistentee.data.batches import encode_with_cuts
from consistentee.evaluation.precision import Choice, recommend
from consistentee.evaluation.speed import exit_distribution_shares, random_rows, shape_model
from consistentee.inference.encoder.backend import TokenRow
from consistentee.models.loaded import usable_device
from consistentee.pipelines.classifier import Engine

READ_AT_MOST = 100_000
"""Texts of a file among which the sample is drawn."""


@dataclass(frozen=True)
class Workload:
    """What is measured.

    Args:
        engine: with its model.
        rows: tokenized inputs in the order of arrival.
        choice: how dtype and backend were chosen, where that was asked for.
    """

    engine: Engine
    rows: Sequence[TokenRow]
    choice: Choice | None = None

    def shares(self, distribution: str | None) -> list[float] | None:
        """The share of rows that are to leave at each layer; None: as the model's own rule has it.

        Raises:
            ValueError: the distribution makes no sense for this model.
        """
        if distribution is None:
            return None
        return exit_distribution_shares(distribution, self.engine.backend.num_layers)


def shape_workload(
    config_name: str,
    *,
    rows: int,
    sequence_length: int,
    num_labels: int = 2,
    classifier_hidden_size: int | None = None,
    device: str | None = None,
    dtype: str = "float32",
    backend: str = "torch",
    seed: int = 0,
) -> Workload:
    """Random weights of a named shape and random rows of one length.

    Raises:
        ValueError: an unknown shape, a length that the model's positions do not hold, or a precision that is chosen on
            labels, which random weights do not have.
    """
    if "auto" in (dtype, backend):
        raise ValueError(
            '"auto" needs a trained model, whose labels it keeps. Give a dtype and a backend with config-name.'
        )
    saved = shape_model(
        config_name,
        num_labels=num_labels,
        classifier_hidden_size=classifier_hidden_size,
        seed=seed,
        device=None if device is None else usable_device(device),
    )
    encoder: Any = saved.model.config.backbone_config
    most = encoder.max_position_embeddings - 2  # mpnet counts from 2
    if not 1 <= sequence_length <= most:
        raise ValueError(f"sequence-length must be in [1, {most}] for {config_name}, got {sequence_length}.")
    engine = Engine(saved, dtype=dtype, backend=backend)
    return Workload(engine, random_rows(rows, sequence_length, encoder.vocab_size, seed))


def model_workload(
    name_or_path: str,
    texts: Iterable[tuple[str, ...]],
    *,
    rows: int,
    device: str | None = None,
    dtype: str = "float32",
    backend: str = "torch",
    criterion: str | None = None,
    threshold: float | None = None,
    seed: int = 0,
) -> Workload:
    """A saved model and a random sample of texts, in the order in which they arrive.

    `auto` in dtype or backend compares what there is on the sample, under the exit rule, and takes what is recommended.

    Raises:
        ValueError: there are no texts, too few for `auto`, or the rule does not fit.
    """
    named = [None if value == "auto" else value for value in (dtype, backend)]
    engine = Engine.from_pretrained(
        name_or_path, device=device, dtype=named[0] or "float32", backend=named[1] or "torch"
    )
    read = list(itertools.islice(texts, READ_AT_MOST))
    if not read:
        raise ValueError("There must be at least one text to measure with, got none.")
    kept = sorted(random.Random(seed).sample(range(len(read)), min(rows, len(read))))
    sample = [read[position] for position in kept]
    engine.saved.check_texts(len(sample[0]), "each text")
    encoded, cut = encode_with_cuts(sample, engine.saved.tokenizer, engine.saved.max_length)
    longer = f"texts were longer than the model's {engine.saved.max_length} tokens"
    say_cuts(sum(cut), len(cut), longer, LONGER_TRAINING)
    if None not in named:
        return Workload(engine, encoded)
    rule = engine.rule(criterion, threshold)
    choice = recommend(engine.saved, encoded, dtype=dtype, backend=backend, rule=rule)
    return Workload(Engine(engine.saved, dtype=choice.dtype, backend=choice.backend), encoded, choice)
