"""What an evaluation of generation finds: points of the trade-off, examples, and all of it together.

Exit layers count from 1: they are layers executed. Layer speed-up is layers over mean exit layer, counted and not
timed; tokens per second are timed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

PLAIN, LAST_LAYER = "plain model", "last layer, no exits"
"""What reports and pictures call `reference` and `full_depth`."""


@dataclass(frozen=True)
class GenerationPoint:
    """What one threshold gives on the references themselves, each token predicted from the true ones before it.

    Args:
        threshold: a token leaves at the first layer whose exit score exceeds it.
        token_accuracy: share of the references' tokens that are predicted, in [0, 1].
        perplexity: of the references' tokens under the distributions at the exit layers, at least 1.
        mean_exit_layer: mean number of layers executed for a token.
        layer_speedup: layers over mean exit layer.
    """

    threshold: float
    token_accuracy: float
    perplexity: float
    mean_exit_layer: float
    layer_speedup: float


@dataclass(frozen=True)
class GeneratedPoint:
    """What one way to generate gives, on the text that it wrote.

    Args:
        mode: how tokens that left early get the states of the layers above, as later tokens attend to them.
        criterion: the exit rule.
        threshold: a token leaves at the first layer whose exit score exceeds it.
        metrics: name to value, in [0, 1]: what `text_metrics` gives; other figures beside them are kept.
        mean_exit_layer: mean number of layers executed for a token: in mode `lossless` all of them.
        layer_speedup: layers over mean exit layer.
        tokens_per_second: generated tokens over wall-clock seconds.
        num_tokens: generated tokens.
        draft_share: of mode `lossless`, the share of the tokens that exits drafted; else None.
        draft_acceptance: of mode `lossless`, the share of the verified drafts that stayed; None where there were none.
    """

    mode: str
    criterion: str
    threshold: float
    metrics: dict[str, float]
    mean_exit_layer: float
    layer_speedup: float
    tokens_per_second: float
    num_tokens: int
    draft_share: float | None = None
    draft_acceptance: float | None = None


@dataclass(frozen=True)
class GenerationRival:
    """Another exit rule on the same model.

    Args:
        threshold: the one that training chose for it, or None where it is not known.
        curve: all thresholds, on the references.
        generated: thresholds whose text was generated, if any.
    """

    threshold: float | None
    curve: list[GenerationPoint]
    generated: list[GeneratedPoint]


@dataclass(frozen=True)
class GenerationExample:
    """One prompt, what should follow and what was generated.

    Args:
        prompt: what the model was given.
        reference: what should follow.
        text: what the model wrote.
        pieces: (tokens,) the text token by token; together they are the text.
        exit_layers: (tokens,) the layer at which each token left, from 1.
    """

    prompt: str
    reference: str
    text: str
    pieces: list[str]
    exit_layers: list[int]


@dataclass(frozen=True)
class GenerationEvaluation:
    """The figures of one model on one set of prompts, at one mode, criterion and threshold.

    Args:
        num_hidden_layers: layers of the model.
        num_examples: prompts.
        mode: how tokens that left early get the states of the layers above.
        criterion: the exit rule.
        threshold: a token leaves at the first layer whose exit score exceeds it.
        batch_size: prompts generated together.
        max_new_tokens: longest text that was asked for, in tokens.
        metrics: name to value, in [0, 1], of the generated text: what `text_metrics` gives.
        num_tokens: generated tokens.
        mean_exit_layer: mean number of layers executed for a generated token: in mode `lossless` all of them.
        layer_speedup: layers over mean exit layer (counted, not timed).
        layers_saved: 1 - mean exit layer / layers.
        tokens_per_second: generated tokens over wall-clock seconds.
        exit_histogram: (layers,) generated tokens that leave at each layer.
        exit_by_position: (longest text,) mean exit layer of the first generated token, the second, and so on.
        curve: the trade-off over thresholds, on the references.
        full_depth: the same model with every token at the last layer; None where it was not run.
        generated: further thresholds and modes of the same criterion whose text was generated.
        other_criteria: other exit rules on the same model, by name.
        reference: another model on the same prompts, if one was given.
        reference_name: what that is: `plain model`, or an early-exit model and its exit rule.
        draft_share, draft_acceptance: of mode `lossless`, see `GeneratedPoint`.
        draft_histogram: of mode `lossless`, (layers,) generated tokens that were drafted after each layer; at the last
            one those that were not.
        examples: a few prompts with their text, token by token.
        environment: hardware, versions, seed.
        num_truncated: prompts that were longer than the model takes, and were cut.
    """

    num_hidden_layers: int
    num_examples: int
    mode: str
    criterion: str
    threshold: float
    batch_size: int
    max_new_tokens: int
    metrics: dict[str, float]
    num_tokens: int
    mean_exit_layer: float
    layer_speedup: float
    layers_saved: float
    tokens_per_second: float
    exit_histogram: list[int]
    exit_by_position: list[float]
    curve: list[GenerationPoint]
    full_depth: GeneratedPoint | None = None
    generated: list[GeneratedPoint] = field(default_factory=list[GeneratedPoint])
    other_criteria: dict[str, GenerationRival] = field(default_factory=dict[str, GenerationRival])
    reference: GeneratedPoint | None = None
    reference_name: str | None = None
    draft_share: float | None = None
    draft_acceptance: float | None = None
    draft_histogram: list[int] | None = None
    examples: list[GenerationExample] = field(default_factory=list[GenerationExample])
    environment: dict[str, Any] = field(default_factory=dict[str, Any])
    num_truncated: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain values, ready for JSON."""
        return asdict(self)

    def summary(self) -> dict[str, Any]:
        """The figures without curves and examples, for a training record."""
        long = ("curve", "generated", "other_criteria", "examples")
        return {name: value for name, value in self.to_dict().items() if name not in long}
