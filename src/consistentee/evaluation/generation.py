"""What exits give in generation: texts against references, what exits cost on the references, all criteria."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from consistentee.backbones.limits import LONGER_TRAINING, say_cuts
from consistentee.data.rows import InstructionDataset, require_rows
from consistentee.data.templates import PLAIN as PLAIN_TEMPLATE
from consistentee.data.templates import PromptTemplate
from consistentee.data.tokenization import encode_prompts
from consistentee.evaluation.results import (
    BASELINE,
    GeneratedPoint,
    GenerationEvaluation,
    GenerationExample,
    OtherGenerationCriterion,
    depth_metrics,
)
from consistentee.evaluation.teacher_forcing import (
    ReferencePasses,
    TeacherForcedTokens,
    reference_rows,
    teacher_forced_baseline,
    teacher_forced_exits,
)
from consistentee.evaluation.text_metrics import check_text_metrics, text_metrics
from consistentee.functional.criteria import EXIT_CRITERIA, digits
from consistentee.inference.timing import environment
from consistentee.models.loaded import LoadedGenerator
from consistentee.pipelines.decoding_options import DecodingOptions
from consistentee.pipelines.generator import GeneratedText, TextGenerator
from consistentee.progress import track

CURVE_THRESHOLDS = 8
"""Thresholds of a curve on the references: each costs a pass over them."""

EXAMPLES = 5
"""Texts that an evaluation keeps token by token."""


def evaluate_generation(
    saved: LoadedGenerator,
    rows: InstructionDataset,
    *,
    criteria: Sequence[str] = (),
    threshold: float | None = None,
    mode: str | None = None,
    skipped_states: str | None = None,
    reference: LoadedGenerator | None = None,
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    text_speedups: Sequence[float] = (),
    curve_thresholds: int = CURVE_THRESHOLDS,
    bertscore_model: str | None = None,
    progress: bool = False,
    seed: int = 0,
) -> GenerationEvaluation:
    """Evaluate a saved generator on prompts with references.

    Texts are generated greedily. Perplexity and token accuracy are of the references' tokens, each predicted from the
    true ones before it at the layer where it exits, with skipped states copied or recomputed as in decoding. The curves
    are exact: as copied states change with the exits, every threshold has a pass of its own. Their thresholds are
    equally spaced in depth by the exit scores of one full-depth pass; the chosen threshold and, of another criterion,
    the one at which its tokens exit at the depth of the first criterion, are among them.

    Args:
        saved: the model, from `load_model`.
        rows: prompts and references. Of texts without prompts the second half is generated from the first.
        criteria: exit criteria; the first is reported, the others are compared with it. None given: the saved one. One
            without a saved threshold has its text generated at the depth of the first criterion.
        threshold: of the first criterion; None takes the saved one.
        mode: `early-exit`, `full` or `lossless`; None takes the saved one.
        skipped_states: `copy` or `recompute`; None takes the saved one.
        reference: a model to compare with on the same prompts, with or without exits, as it was saved.
        batch_size: rows per step and texts that are generated together.
        max_new_tokens: longest text; None takes what suits the model's task.
        text_speedups: layer speed-ups, above 1, at which text of every criterion is generated besides: at the
            threshold where the references' tokens exit after that share of the layers, as near as it gets.
        curve_thresholds: thresholds of each curve on the references, beside the chosen ones; at least 1.
        bertscore_model: encoder for BERTScore; None leaves it out.
        progress: whether to show how far it is.
        seed: of the tokens whose scores choose the curves' thresholds.

    Returns:
        What was found.

    Raises:
        MissingExtraError: the packages of the text metrics are not installed.
        TypeError: other rows than these.
        ValueError: the model has no exits, there is no row, or options that do not fit.
    """
    require_rows("rows", rows, InstructionDataset)
    if curve_thresholds < 1:
        raise ValueError(f"curve_thresholds must be at least 1, got {curve_thresholds}.")
    for value in text_speedups:
        if not 1 < value <= saved.num_hidden_layers:
            raise ValueError(
                f"text_speedups must be above 1 and at most {saved.num_hidden_layers} (layers), got {value}."
            )
    if not len(rows):
        raise ValueError("rows must hold at least one prompt, got none.")
    config = saved.early_exit_model.config
    mode, skipped_states = mode or config.mode, skipped_states or config.skipped_states
    criterion, limit = saved.exit_rule_of_mode(mode, criteria[0] if criteria else None, threshold)
    other_names = [name for name in dict.fromkeys(criteria[1:]) if name != criterion]
    for name in other_names:
        if saved.known_threshold(name) is not None:
            saved.exit_rule(name)  # whether it fits
    depth = saved.num_hidden_layers
    texts = _Texts(saved, rows, max_new_tokens, batch_size, bertscore_model, progress)
    generate = partial(texts.generate, mode=mode, skipped_states=skipped_states)
    own, written = generate(criterion, limit)
    full, _ = texts.generate(criterion, EXIT_CRITERIA[criterion].thresholds.highest(depth), "full", None)

    references = reference_rows(saved, rows)
    whole = f"prompts with their references were longer than {saved.max_length} tokens"
    say_cuts(references.num_truncated, len(references), whole, LONGER_TRAINING)
    passes = ReferencePasses(
        saved,
        references,
        skipped_states=skipped_states if mode == "early-exit" else "copy",
        batch_size=batch_size,
        progress=progress,
        seed=seed,
    )
    depths = [depth / speedup for speedup in text_speedups]
    dialled = _without([passes.threshold_for_depth(criterion, aim) for aim in depths], limit)
    curve = passes.curve(criterion, [limit, *dialled], curve_thresholds)
    at_limit = passes.tokens(criterion, limit)

    def with_references(point: GeneratedPoint) -> GeneratedPoint:
        exits = mode == "early-exit"
        return _with_references(
            point, passes.tokens(point.criterion, point.threshold) if exits else passes.full_depth
        )

    own = with_references(own)
    others: dict[str, OtherGenerationCriterion] = {}
    for name in other_names:
        known = saved.known_threshold(name)
        matched = passes.threshold_for_depth(name, at_limit.mean_exit_layer)
        chosen = matched if known is None else known
        thresholds = [chosen, *_without([passes.threshold_for_depth(name, aim) for aim in depths], chosen)]
        points = passes.curve(name, sorted({matched, *thresholds}), curve_thresholds)
        generated = [with_references(generate(name, value)[0]) for value in thresholds]
        others[name] = OtherGenerationCriterion(known, points, generated)
    return GenerationEvaluation(
        num_hidden_layers=depth,
        num_examples=len(texts.references),
        mode=own.mode,
        criterion=criterion,
        threshold=limit,
        batch_size=batch_size,
        max_new_tokens=texts.max_new_tokens,
        metrics=own.metrics,
        num_tokens=own.num_tokens,
        **depth_metrics(own.mean_exit_layer, depth),
        tokens_per_second=own.tokens_per_second,
        exit_histogram=_histogram([text.exit_layers for text in written], depth),
        exit_by_position=_by_position(written),
        curve=curve,
        full_depth=_with_references(full, passes.full_depth),
        generated=[with_references(generate(criterion, value)[0]) for value in dialled],
        other_criteria=others,
        reference=None if reference is None else texts.reference(reference, rows),
        reference_name=None if reference is None else _reference_name(reference),
        draft_share=own.draft_share,
        draft_acceptance=own.draft_acceptance,
        draft_histogram=_histogram([text.draft_layers or [] for text in written], depth)
        if mode == "lossless"
        else None,
        examples=texts.examples(written),
        environment=environment(saved.model.device, seed) | {"dtype": _dtype_name(saved)},
        num_truncated=texts.num_truncated,
    )


def evaluate_plain_generation(
    saved: LoadedGenerator,
    rows: InstructionDataset,
    *,
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    bertscore_model: str | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """What a model without exits gives: `num_examples`, `num_truncated`, `metrics`, and tokens and their speed."""
    texts = _Texts(saved, rows, max_new_tokens, batch_size, bertscore_model, progress)
    point = texts.reference(saved, rows)
    return {
        "num_examples": len(texts.references),
        "metrics": point.metrics,
        "tokens_per_second": point.tokens_per_second,
        "num_tokens": point.num_tokens,
        "num_truncated": texts.num_truncated,
    }


def _reference_name(reference: LoadedGenerator) -> str:
    """What tables and pictures call a model that another one is compared with."""
    if not reference.has_exits:
        return BASELINE
    mode = reference.early_exit_model.config.mode
    criterion, threshold = reference.exit_rule_of_mode(mode)
    if mode == "full":
        return "early-exit model, all layers"
    return f"early-exit model, {criterion} > {digits(threshold)}" + (
        ", lossless" if mode == "lossless" else ""
    )


class _Texts:
    """Texts of one set of prompts, by whatever way to generate, and their metrics."""

    def __init__(
        self,
        saved: LoadedGenerator,
        rows: InstructionDataset,
        max_new_tokens: int | None,
        batch_size: int,
        bertscore_model: str | None,
        progress: bool,
    ) -> None:
        check_text_metrics(bertscore_model)
        self._saved, self._batch_size = saved, batch_size
        self._bertscore_model, self._progress = bertscore_model, progress
        self._rows, template = text_prompts(rows, saved.prompt_template())
        self.references = self._rows.references
        self._generator = TextGenerator(saved, template=template)
        options = DecodingOptions(max_new_tokens=max_new_tokens, max_prompt_length=saved.max_length)
        checked = self._generator.check(replace(options, mode="full"))
        self.max_new_tokens = checked.max_new_tokens or 1
        self._options = replace(
            options, max_new_tokens=self.max_new_tokens, max_prompt_length=checked.max_prompt_length
        )
        self._encoded, self.num_truncated = self._encode(saved, self._generator)

    def _encode(self, saved: LoadedGenerator, generator: TextGenerator) -> tuple[list[list[int]], int]:
        """Token ids of the prompts, and how many were cut, which is also said."""
        limit = self._options.max_prompt_length or saved.max_length
        encoded, cut = encode_prompts(
            self._rows, saved.tokenizer, generator.template, max_prompt_length=limit
        )
        prompts = f'prompts were longer than the {limit} tokens of model "{saved.name}"'
        say_cuts(sum(cut), len(cut), prompts, LONGER_TRAINING)
        return encoded, sum(cut)

    def generate(
        self, criterion: str, threshold: float, mode: str, skipped_states: str | None
    ) -> tuple[GeneratedPoint, list[GeneratedText]]:
        """The texts at one threshold, and what they give."""
        rule: dict[str, Any] = {} if mode == "full" else {"criterion": criterion, "threshold": threshold}
        states = skipped_states if mode == "early-exit" else None
        options = replace(self._options, mode=mode, skipped_states=states, **rule)
        title = mode if mode == "full" else f"{criterion} > {threshold:.3g}"
        written = list(self._bar(self._run(self._generator, self._encoded, options), title))
        shown = "recompute" if mode == "early-exit" and skipped_states == "recompute" else mode
        return self._point(written, self._saved, shown, criterion, threshold), written

    def reference(self, reference: LoadedGenerator, rows: InstructionDataset) -> GeneratedPoint:
        """What another model gives as it was saved, prompted as it was trained, or else like the first model."""
        own = self._saved.prompt_template()
        known = reference.saved_template is not None or own.tokenizer is not None
        given = reference.prompt_template() if known else own
        _, template = text_prompts(rows, given)
        generator = TextGenerator(reference, template=template)
        options = generator.check(self._options)
        mode, criterion, threshold = options.mode or "full", "none", 1.0
        if mode != "full":
            criterion, threshold = reference.exit_rule_of_mode(mode)
        encoded, _ = self._encode(reference, generator)
        written = list(self._bar(self._run(generator, encoded, options), "reference"))
        point = self._point(written, reference, mode, criterion, threshold)
        max_length = min(self._saved.max_length, reference.context_length)  # the same tokens as ours
        tokens = reference_rows(reference, rows, given, max_length)
        bar = "reference, its perplexity" if self._progress else None
        if mode == "early-exit":
            references = teacher_forced_exits(
                reference,
                tokens,
                criterion=criterion,
                threshold=threshold,
                skipped_states=reference.early_exit_model.config.skipped_states,
                batch_size=self._batch_size,
                description=bar,
            )
        else:
            references = teacher_forced_baseline(
                reference, tokens, batch_size=self._batch_size, description=bar
            )
        return _with_references(point, references)

    def examples(self, written: Sequence[GeneratedText]) -> list[GenerationExample]:
        """The first few texts."""
        asked = zip(self._rows.instructions, self._rows.inputs, self.references, written, strict=True)
        return [
            GenerationExample(
                prompt="\n\n".join(part for part in (instruction, context) if part),
                reference=expected,
                text=text.text,
                pieces=text.pieces,
                exit_layers=text.exit_layers,
            )
            for instruction, context, expected, text in list(asked)[:EXAMPLES]
        ]

    def _run(
        self, generator: TextGenerator, encoded: Sequence[Sequence[int]], options: DecodingOptions
    ) -> Iterator[GeneratedText]:
        return generator.generate_encoded(encoded, batch_size=self._batch_size, options=options)

    def _bar(self, texts: Iterator[GeneratedText], title: str) -> Iterator[GeneratedText]:
        return track(texts, title, total=len(self._encoded), unit="text", shown=self._progress)

    def _point(
        self,
        written: Sequence[GeneratedText],
        saved: LoadedGenerator,
        mode: str,
        criterion: str,
        threshold: float,
    ) -> GeneratedPoint:
        layers = [layer for text in written for layer in text.exit_layers]
        seconds = sum(text.seconds for text in written)
        mean = sum(layers) / len(layers)
        return GeneratedPoint(
            mode=mode,
            criterion=criterion,
            threshold=threshold,
            metrics=text_metrics(
                [text.text.strip() for text in written],
                self.references,
                bertscore_model=self._bertscore_model,
                device=saved.model.device,
            ),
            mean_exit_layer=mean,
            layer_speedup=saved.num_hidden_layers / mean,
            tokens_per_second=len(layers) / max(seconds, 1e-9),
            num_tokens=len(layers),
            **_drafts(written, saved.num_hidden_layers),
        )


def _drafts(written: Sequence[GeneratedText], depth: int) -> dict[str, float | None]:
    """`draft_share` and `draft_acceptance` of texts, both None but for those of mode `lossless`."""
    layers = [layer for text in written for layer in text.draft_layers or ()]
    drafted = sum(text.drafted or 0 for text in written)
    return {
        "draft_share": sum(layer < depth for layer in layers) / len(layers) if layers else None,
        "draft_acceptance": sum(text.accepted or 0 for text in written) / drafted if drafted else None,
    }


def _with_references(point: GeneratedPoint, tokens: TeacherForcedTokens) -> GeneratedPoint:
    """The point with perplexity and token accuracy of the references beside the metrics of its texts."""
    found = {"perplexity": tokens.perplexity, "token_accuracy": tokens.token_accuracy}
    return replace(point, metrics=point.metrics | found)


def _without(thresholds: Sequence[float], known: float) -> list[float]:
    """Each threshold once, without one that is known."""
    return [value for value in dict.fromkeys(thresholds) if value != known]


def _histogram(exit_layers: Sequence[Sequence[int]], num_hidden_layers: int) -> list[int]:
    """(layers,) tokens of all texts at each."""
    layers = torch.tensor([layer for text in exit_layers for layer in text])
    return torch.bincount(layers - 1, minlength=num_hidden_layers).tolist()


def _by_position(texts: Sequence[GeneratedText]) -> list[float]:
    """(longest text,) mean exit layer of the first token, the second, and so on."""
    longest = max(len(text.exit_layers) for text in texts)
    means: list[float] = []
    for position in range(longest):
        layers = [text.exit_layers[position] for text in texts if position < len(text.exit_layers)]
        means.append(sum(layers) / len(layers))
    return means


def _dtype_name(saved: LoadedGenerator) -> str:
    return str(saved.model.dtype).removeprefix("torch.")


def text_prompts(
    rows: InstructionDataset, template: PromptTemplate
) -> tuple[InstructionDataset, PromptTemplate]:
    """Rows to generate from: of a text that nothing is asked for, the first half of its words is the prompt.

    Args:
        rows: prompts and references.
        template: how prompts are written.

    Returns:
        The rows and their template. Texts without spaces are halved by characters where they are not ASCII, as those of
        scripts that need none, or where no text has two words; else single words are left out.
    """
    if any(
        instruction or context for instruction, context in zip(rows.instructions, rows.inputs, strict=True)
    ):
        return rows, template
    texts = rows.references
    halves = [found for text in texts if (found := _halves(text, by_characters=not text.isascii()))]
    halves = halves or [found for text in texts if (found := _halves(text, by_characters=True))]
    if not halves:
        raise ValueError("Texts must have at least two characters each to be continued, got none that has.")
    prompts, rest = ([*part] for part in zip(*halves, strict=True))
    plain = replace(PLAIN_TEMPLATE, parse_special_tokens=template.parse_special_tokens)
    return InstructionDataset(prompts, [""] * len(prompts), rest, rows.source), plain


def _halves(text: str, *, by_characters: bool) -> tuple[str, str] | None:
    """The first half of a text's words and the others, or else of its characters; None where one would be blank."""
    words, letters = text.split(" "), text.strip()
    ways = [(" ", words), ("", [*letters])] if by_characters else [(" ", words)]
    for gap, parts in ways:
        half = len(parts) // 2
        first, rest = gap.join(parts[:half]), gap.join(parts[half:])
        if first.strip() and rest.strip():
            return first, rest
    return None
