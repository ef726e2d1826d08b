"""What an evaluation finds, of classification and of generation: metrics, points of the trade-off, all of it together.

Exit layers count from 1: they are layers executed. Layer speed-up is layers over mean exit layer, counted and not
timed; tokens per second are timed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, cast

if TYPE_CHECKING:
    from consistentee.functional.curves import CurvePoint
    from consistentee.functional.recall import ClassRecall

BASELINE, LAST_LAYER = "plain model", "last layer, no exits"
"""What tables and pictures call a reference without exits, and the model itself with every exit at the last layer."""

MODE_NOTES = {
    "lossless": " Lossless: all layers verified every token; drafted: the share of the tokens that came from exits, "
    "kept: the share of the verified drafts that stayed.",
    "recompute": " Recompute: layers are counted up to a token's exit; those above it run later, beside a token that "
    "goes deeper, and are not counted.",
}
"""What tables say of ways to generate."""


@dataclass(frozen=True)
class Clock:
    """An evaluation's points on the clock of one machine, milliseconds of an input among others of its batch.

    Args:
        batch_size: inputs that start together.
        start_ms, layer_ms, exit_ms: before the first layer and after the last; of a layer; of an exit by the reported
            criterion, as much as which those by others are taken to cost.
        full_depth_ms: of an input of the model without early exits.
        milliseconds: at the reported threshold.
        others: at the other criteria's own thresholds, where these are known.
        curves: of every criterion's curve, a number a point.
    """

    batch_size: int
    start_ms: float
    layer_ms: float
    exit_ms: float
    full_depth_ms: float
    milliseconds: float
    others: dict[str, float]
    curves: dict[str, list[float]]


@dataclass(frozen=True, kw_only=True)
class ExitEvaluation:
    """What both kinds of evaluation hold, at one criterion and threshold.

    Args:
        num_hidden_layers: layers of the model.
        num_examples: rows or prompts.
        criterion: the exit criterion.
        threshold: an input or token exits at the first layer whose exit score exceeds it.
        metrics: name to value: of the predicted classes, or of the generated text.
        mean_exit_layer: mean number of layers executed for an input or generated token.
        layer_speedup: layers over mean exit layer (counted, not timed).
        layers_saved: 1 - mean exit layer / layers.
        exit_histogram: (layers,) inputs or generated tokens that exit at each layer.
        curve: the trade-off over thresholds: of the rows, or of the references' tokens.
        other_criteria: other exit criteria on the same model, by name.
        environment: hardware and versions, and what else the values depend on.
        num_truncated: rows or prompts that were longer than the model takes, and were cut.
    """

    LONG: ClassVar[tuple[str, ...]] = ("curve", "other_criteria", "generated", "examples", "clock")
    """What a training record leaves out."""

    num_hidden_layers: int
    num_examples: int
    criterion: str
    threshold: float
    metrics: dict[str, float]
    mean_exit_layer: float
    layer_speedup: float
    layers_saved: float
    exit_histogram: list[int]
    curve: list[Any]
    other_criteria: Mapping[str, Any] = field(default_factory=dict[str, Any])
    environment: dict[str, Any] = field(default_factory=dict[str, Any])
    num_truncated: int = 0

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values, ready for JSON; `clock` only where there is one."""
        return {name: value for name, value in asdict(self).items() if name != "clock" or value is not None}

    def summary(self) -> dict[str, Any]:
        """All of it but curves, further texts and examples, for a training record."""
        return {name: value for name, value in self.to_dict().items() if name not in self.LONG}


@dataclass(frozen=True)
class OtherCriterion:
    """Another exit criterion on the same classifiers.

    Args:
        threshold: the one that training chose for it, or None where it is not known.
        point: what that threshold gives; None without one.
        curve: all thresholds.
    """

    threshold: float | None
    point: CurvePoint | None
    curve: list[CurvePoint]


@dataclass(frozen=True)
class Reference:
    """Another model on the same rows, compared pair by pair.

    Args:
        accuracy: its share of right predictions.
        metrics: its metrics.
        accuracy_difference: ours minus its accuracy.
        standard_error: of that difference, from the paired rows.
        name: what it is: `plain model`, or an early-exit model and its exit criterion.
        num_hidden_layers: its layers; None where that is not known.
        mean_exit_layer: mean number of its layers executed.
    """

    accuracy: float
    metrics: dict[str, float]
    accuracy_difference: float
    standard_error: float
    name: str = BASELINE
    num_hidden_layers: int | None = None
    mean_exit_layer: float | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluation(ExitEvaluation):
    """A classifier on one set of rows; see `ExitEvaluation` for what is not named here.

    Args:
        accuracy: share of right predictions at the exit layers.
        exit_accuracy: share of right predictions among the rows that exit at each layer; None where none does.
        per_layer_accuracy: accuracy if every row exited at that layer; None where the layer has no exit.
        classifier_accuracy: accuracy of each internal classifier alone, without the ensemble over the layers before;
            None where the layer has no exit.
        class_recall: recall of every class at the exits and at full depth.
        reference: another model on the same rows, if one was given.
        clock: the points in milliseconds, where that was asked for.
    """

    curve: list[CurvePoint]
    other_criteria: Mapping[str, OtherCriterion] = field(default_factory=dict[str, OtherCriterion])
    accuracy: float
    exit_accuracy: list[float | None]
    per_layer_accuracy: list[float | None]
    classifier_accuracy: list[float | None]
    class_recall: list[ClassRecall]
    reference: Reference | None = None
    clock: Clock | None = None

    @property
    def full_depth_accuracy(self) -> float:
        """Accuracy of the last layer, which always has an exit."""
        return cast(float, self.per_layer_accuracy[-1])


@dataclass(frozen=True)
class AgreementPoint:
    """What one threshold gives without labels.

    Args:
        threshold: an input exits at the first layer whose exit score exceeds it.
        agreement: share of the inputs that get the model's class, in [0, 1].
        mean_exit_layer: mean number of layers executed.
        layer_speedup: layers over mean exit layer.
    """

    threshold: float
    agreement: float
    mean_exit_layer: float
    layer_speedup: float


@dataclass(frozen=True)
class OtherAgreement:
    """Another exit criterion on the same classifiers, without labels; see `OtherCriterion`."""

    threshold: float | None
    point: AgreementPoint | None
    curve: list[AgreementPoint]


@dataclass(frozen=True, kw_only=True)
class AgreementEvaluation(ExitEvaluation):
    """A classifier on texts without labels, against a model's answers; see `ExitEvaluation` for the other fields.

    Args:
        agreement: share of the inputs that get the model's class at their exit.
        agreement_standard_error: of that share.
        exit_agreement: the same among the inputs that exit at each layer; None where none does.
        per_layer_agreement: agreement if every input exited at that layer; 1 at the last where that is the model, None
            where the layer has no exit.
        agreement_with: name of the model that it is about; None for the exits' own last layer.
        clock: the points in milliseconds, where that was asked for.
    """

    curve: list[AgreementPoint]
    other_criteria: Mapping[str, OtherAgreement] = field(default_factory=dict[str, OtherAgreement])
    agreement: float
    agreement_standard_error: float
    exit_agreement: list[float | None]
    per_layer_agreement: list[float | None]
    agreement_with: str | None = None
    clock: Clock | None = None

    @property
    def full_depth_agreement(self) -> float:
        """Agreement of the last layer, which always has an exit."""
        return cast(float, self.per_layer_agreement[-1])


@dataclass(frozen=True)
class GenerationPoint:
    """What one threshold gives on the references themselves, each token predicted from the true ones before it.

    Args:
        threshold: a token exits at the first layer whose exit score exceeds it.
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
        mode: how tokens that exited early get the states of the layers above, as later tokens attend to them.
        criterion: the exit criterion.
        threshold: a token exits at the first layer whose exit score exceeds it.
        metrics: name to value, in [0, 1]: what `text_metrics` gives; other metrics beside them are kept.
        mean_exit_layer: mean number of layers executed for a token: in mode `lossless` all of them, in `recompute`
            those up to its exit, though those above run later beside tokens that go deeper.
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
class OtherGenerationCriterion:
    """Another exit criterion on the same model.

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
        exit_layers: (tokens,) the layer at which each token exited, from 1.
    """

    prompt: str
    reference: str
    text: str
    pieces: list[str]
    exit_layers: list[int]


@dataclass(frozen=True, kw_only=True)
class GenerationEvaluation(ExitEvaluation):
    """A text generator on one set of prompts, in one mode; see `ExitEvaluation` for what is not named here.

    Args:
        mode: how tokens that exited early get the states of the layers above; in mode `lossless` all layers ran.
        batch_size: prompts generated together.
        max_new_tokens: longest text that was asked for, in tokens.
        num_tokens: generated tokens.
        tokens_per_second: generated tokens over wall-clock seconds.
        exit_by_position: (longest text,) mean exit layer of the first generated token, the second, and so on.
        full_depth: the same model with every token at the last layer; None where it was not run.
        generated: further thresholds and modes of the same criterion whose text was generated.
        reference: another model on the same prompts, if one was given.
        reference_name: what that is: `plain model`, or an early-exit model and its exit criterion.
        draft_share, draft_acceptance: of mode `lossless`, see `GeneratedPoint`.
        draft_histogram: of mode `lossless`, (layers,) generated tokens that were drafted after each layer; at the last
            one those that were not.
        examples: a few prompts with their text, token by token.
    """

    curve: list[GenerationPoint]
    other_criteria: Mapping[str, OtherGenerationCriterion] = field(
        default_factory=dict[str, OtherGenerationCriterion]
    )
    mode: str
    batch_size: int
    max_new_tokens: int
    num_tokens: int
    tokens_per_second: float
    exit_by_position: list[float]
    full_depth: GeneratedPoint | None = None
    generated: list[GeneratedPoint] = field(default_factory=list[GeneratedPoint])
    reference: GeneratedPoint | None = None
    reference_name: str | None = None
    draft_share: float | None = None
    draft_acceptance: float | None = None
    draft_histogram: list[int] | None = None
    examples: list[GenerationExample] = field(default_factory=list[GenerationExample])

    def own_point(self) -> GeneratedPoint:
        """The reported mode, criterion and threshold as a point beside the others."""
        return GeneratedPoint(**{name: getattr(self, name) for name in GeneratedPoint.__dataclass_fields__})


def depth_metrics(mean_exit_layer: float, num_hidden_layers: int) -> dict[str, Any]:
    """`mean_exit_layer`, `layer_speedup` and `layers_saved`."""
    return {
        "mean_exit_layer": mean_exit_layer,
        "layer_speedup": num_hidden_layers / mean_exit_layer,
        "layers_saved": 1 - mean_exit_layer / num_hidden_layers,
    }
