"""Teacher forcing under exits: references run with an exit criterion, all their tokens at once.

Every token is predicted from the true ones before it. Tokens exit exactly as in decoding: prompts stay to the last
layer, and a token that exited keeps its state through the layers above, or goes on where skipped states are recomputed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from consistentee.data.batches import IGNORED, TokenizedPrompts, collate
from consistentee.data.rows import InstructionDataset
from consistentee.data.templates import PromptTemplate
from consistentee.data.tokenization import encode_rows
from consistentee.evaluation.results import GenerationPoint
from consistentee.functional.criteria import EXIT_CRITERIA
from consistentee.functional.curves import threshold_for_depth
from consistentee.functional.tables import value_of
from consistentee.models.causal_lm import Decide, EarlyExitForCausalLM
from consistentee.models.loaded import LoadedGenerator
from consistentee.progress import track

LOGIT_ROWS = 1024
"""Logits of at most so many tokens are held at once."""

SCORED_TOKENS = 2048
"""Exit scores of about so many tokens decide which thresholds are looked at."""

SHALLOWEST = 0.2  # of the layers: how far down a curve goes

LONGEST_LOSS = 100.0  # of a token on average, in nats: the perplexity stays a number


@dataclass(frozen=True)
class TeacherForcedTokens:
    """What a model makes of the tokens of responses.

    Args:
        losses: (tokens,) float32, negative log-likelihood of each token, in nats.
        right: (tokens,) bool, whether the likeliest token is the true one.
        exit_layers: (tokens,) int64, the layer at which each was predicted, from 1.
    """

    losses: Tensor
    right: Tensor
    exit_layers: Tensor

    @property
    def perplexity(self) -> float:
        """Exp of the mean loss."""
        return math.exp(min(float(self.losses.double().mean()), LONGEST_LOSS))

    @property
    def token_accuracy(self) -> float:
        """Share of right tokens."""
        return float(self.right.double().mean())

    @property
    def mean_exit_layer(self) -> float:
        """Mean number of layers executed for a token."""
        return float(self.exit_layers.double().mean())

    def point(self, threshold: float, num_hidden_layers: int) -> GenerationPoint:
        """This as a point of a curve."""
        return GenerationPoint(
            threshold=threshold,
            token_accuracy=self.token_accuracy,
            perplexity=self.perplexity,
            mean_exit_layer=self.mean_exit_layer,
            layer_speedup=num_hidden_layers / self.mean_exit_layer,
        )


def reference_rows(
    saved: LoadedGenerator,
    rows: InstructionDataset,
    template: PromptTemplate | None = None,
    max_length: int | None = None,
) -> TokenizedPrompts:
    """Prompts with their references as token ids, cut as in training.

    Args:
        saved: the model, whose tokenizer and lengths these are.
        rows: prompts and references.
        template: how prompts are written; None takes the saved template.
        max_length: the most tokens of a row; None takes the model's.
    """
    return encode_rows(
        rows,
        saved.tokenizer,
        saved.prompt_template() if template is None else template,
        max_length=max_length or saved.max_length,
    )


@torch.no_grad()
def teacher_forced_exits(
    saved: LoadedGenerator,
    rows: TokenizedPrompts,
    *,
    criterion: str | None,
    threshold: float = math.inf,
    skipped_states: str = "copy",
    batch_size: int = 8,
    description: str | None = None,
) -> TeacherForcedTokens:
    """Predict every token of the responses, each at the layer at which it exits.

    Args:
        saved: a model with exits.
        rows: prompts with responses.
        criterion: exit rule; None for all layers.
        threshold: a token exits at the first layer whose exit score exceeds it.
        skipped_states: `copy` or `recompute`, as in decoding.
        batch_size: rows per step; does not change the result.
        description: of a progress bar; None for none.

    Raises:
        ValueError: the model has no exits, or no response has a token that follows another.
    """
    model = saved.early_exit_model
    weights = model.exit_weights()
    if criterion is not None:
        thresholds = EXIT_CRITERIA[criterion].thresholds
        criterion = None if thresholds.lets_nobody_exit(threshold, model.num_layers) else criterion
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for input_ids, mask, labels, predicts in _batches(saved, rows, batch_size, description):
        may_leave = _may_leave(model, predicts)
        decide = _decider(model, criterion, threshold, may_leave)
        normed, exit_layer = model.exit_pass(
            input_ids, mask, may_leave, decide, skipped_states=skipped_states
        )
        targets = labels.roll(-1, 1)[predicts]  # (tokens,): position t predicts token t + 1
        states, layers = normed[predicts], exit_layer[predicts]
        for start in range(0, len(states), LOGIT_ROWS):
            here = slice(start, start + LOGIT_ROWS)
            logits = weights.logits(states[here], layers[here].tolist())
            parts.append((*_judged(logits, targets[here]), layers[here].cpu()))
    return _together(parts)


@torch.no_grad()
def teacher_forced_baseline(
    saved: LoadedGenerator, rows: TokenizedPrompts, *, batch_size: int = 8, description: str | None = None
) -> TeacherForcedTokens:
    """Predict every token of the responses with a model without exits; arguments as `teacher_forced_exits`."""
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    depth = saved.num_hidden_layers
    for input_ids, mask, labels, predicts in _batches(saved, rows, batch_size, description):
        shifted = labels.roll(-1, 1)
        columns = predicts.any(0).nonzero().squeeze(1)
        first, last = int(columns[0]), int(columns[-1]) + 1
        at_once = max(1, LOGIT_ROWS // (last - first))  # rows whose logits are held together
        for start in range(0, len(input_ids), at_once):
            here = slice(start, start + at_once)
            keep = torch.arange(first, last, device=input_ids.device)
            output = saved.model(
                input_ids=input_ids[here], attention_mask=mask[here], logits_to_keep=keep, use_cache=False
            )
            chosen = predicts[here, first:last]
            targets = shifted[here, first:last][chosen]
            layers = torch.full((len(targets),), depth)
            parts.append((*_judged(output.logits[chosen], targets), layers))
    return _together(parts)


@torch.no_grad()
def full_depth_scores(
    saved: LoadedGenerator,
    rows: TokenizedPrompts,
    criterion: str,
    *,
    batch_size: int = 8,
    seed: int = 0,
    description: str | None = None,
) -> Tensor:
    """Exit scores of about `SCORED_TOKENS` tokens of responses at every layer, none of which exits.

    Args:
        saved: a model with exits.
        rows: prompts with responses; as many as are needed are drawn.
        criterion: exit rule.
        batch_size: rows per step.
        seed: of the rows drawn.
        description: of a progress bar; None for none.

    Returns:
        (tokens, layers) float32; minus infinity where a token cannot exit, infinity at the last layer.
    """
    model = saved.early_exit_model
    order = np.random.default_rng(seed).permutation(len(rows))
    counts = np.cumsum((rows.lengths - rows.prompt_lengths)[order])
    few = order[: int(np.searchsorted(counts, SCORED_TOKENS)) + 1]
    scores: list[Tensor] = []
    for input_ids, mask, _, predicts in _batches(saved, rows, batch_size, description, few.tolist()):
        may_leave = _may_leave(model, predicts)
        here = torch.full((int(predicts.sum()), model.num_layers), -math.inf)
        here[:, -1] = math.inf
        model.exit_pass(input_ids, mask, may_leave, _recorder(model, criterion, predicts, may_leave, here))
        scores.append(here)
    return torch.cat(scores)


class ReferencePasses:
    """The references under exits, each criterion and threshold at most once.

    Args:
        saved: a model with exits.
        rows: prompts with references.
        skipped_states: `copy` or `recompute`.
        batch_size: rows per step.
        progress: whether to show how far each pass is.
        seed: of the rows whose scores are looked at.
    """

    def __init__(
        self,
        saved: LoadedGenerator,
        rows: TokenizedPrompts,
        *,
        skipped_states: str = "copy",
        batch_size: int = 8,
        progress: bool = False,
        seed: int = 0,
    ) -> None:
        self._saved, self._rows, self._batch_size = saved, rows, batch_size
        self._skipped_states = skipped_states
        self._progress, self._seed = progress, seed
        self._scores: dict[str, Tensor] = {}
        self._known: dict[tuple[str, float], TeacherForcedTokens] = {}

    @cached_property
    def full_depth(self) -> TeacherForcedTokens:
        """What every token gives at the last layer."""
        return self._pass(None, math.inf, "all layers")

    def tokens(self, criterion: str, threshold: float) -> TeacherForcedTokens:
        """What every token gives at a threshold."""
        if threshold >= EXIT_CRITERIA[criterion].thresholds.highest(self._saved.num_hidden_layers):
            return self.full_depth
        key = (criterion, threshold)
        if key not in self._known:
            self._known[key] = self._pass(criterion, threshold, f"{criterion} > {threshold:.3g}")
        return self._known[key]

    def threshold_for_depth(
        self, criterion: str, target_mean_exit_layer: float, *, refinements: int = 2
    ) -> float:
        """The threshold at which the references' tokens exit after a given number of layers on average.

        A first threshold comes from the scores of one full-depth pass; as states that are copied change later scores,
        the depth is then measured and the threshold corrected.

        Args:
            criterion: exit criterion.
            target_mean_exit_layer: from 1 to the number of layers.
            refinements: measurements, at most; none needs no more than the full-depth pass.

        Returns:
            Of the thresholds measured, the one nearest to the target. `static` knows whole layers only.

        Raises:
            ValueError: there is no such depth, or the model has no exits.
        """
        depth, target = float(self._saved.num_hidden_layers), target_mean_exit_layer
        if not 1 <= target <= depth:
            raise ValueError(f"target_mean_exit_layer must be from 1 to {depth:g}, got {target}.")
        away: dict[float, float] = {}  # by threshold: how far from the target it left the tokens
        aim, threshold = target, threshold_for_depth(self._scores_of(criterion), target, criterion)
        for _ in range(refinements):
            if threshold in away:
                break
            away[threshold] = target - self.tokens(criterion, threshold).mean_exit_layer
            if abs(away[threshold]) < 0.02 * target:
                break
            aim = min(max(aim + away[threshold], 1.0), depth)
            threshold = threshold_for_depth(self._scores_of(criterion), aim, criterion)
        return min(away, key=lambda value: abs(away[value]), default=threshold)

    def curve(self, criterion: str, chosen: Sequence[float], count: int) -> list[GenerationPoint]:
        """Points from full depth down, the chosen thresholds and `count` at equal steps of depth among them."""
        depth = self._saved.num_hidden_layers
        aims = torch.linspace(depth, max(1.0, SHALLOWEST * depth), count + 1)[1:].tolist()
        scores = self._scores_of(criterion)
        spread = {threshold_for_depth(scores, aim, criterion) for aim in aims}
        thresholds = {EXIT_CRITERIA[criterion].thresholds.highest(depth), *chosen, *spread}
        points = [self.tokens(criterion, value).point(value, depth) for value in thresholds]
        points.sort(key=lambda point: (-point.mean_exit_layer, -point.threshold))
        return points

    def _scores_of(self, criterion: str) -> Tensor:
        if criterion not in self._scores:
            self._scores[criterion] = full_depth_scores(
                self._saved,
                self._rows,
                criterion,
                batch_size=self._batch_size,
                seed=self._seed,
                description=self._title(f"scores of {criterion}"),
            )
        return self._scores[criterion]

    def _pass(self, criterion: str | None, threshold: float, title: str) -> TeacherForcedTokens:
        return teacher_forced_exits(
            self._saved,
            self._rows,
            criterion=criterion,
            threshold=threshold,
            skipped_states=self._skipped_states,
            batch_size=self._batch_size,
            description=self._title(title),
        )

    def _title(self, text: str) -> str | None:
        return f"references, {text}" if self._progress else None


def _decider(
    model: EarlyExitForCausalLM, criterion: str | None, threshold: float, may_leave: Tensor
) -> Decide:
    """Which tokens of a batch exit after a layer; scores are computed for those still inside only."""
    inside = may_leave

    def decide(layer_index: int, before: Tensor, after: Tensor, normed: Tensor) -> Tensor:
        nonlocal inside
        exits = torch.zeros_like(inside)
        if criterion is not None:
            scores = token_scores(
                model, criterion, layer_index, before[inside], after[inside], normed[inside]
            )
            exits = exits.masked_scatter(inside, scores > threshold)
            inside = inside & ~exits
        return exits

    return decide


def _recorder(
    model: EarlyExitForCausalLM, criterion: str, predicts: Tensor, may_leave: Tensor, scores: Tensor
) -> Decide:
    """No token exits; the scores of those that might are kept in `scores`, (tokens that predict, layers)."""
    asked = may_leave[predicts].cpu()

    def decide(layer_index: int, before: Tensor, after: Tensor, normed: Tensor) -> Tensor:
        states = (before[may_leave], after[may_leave], normed[may_leave])
        scores[asked, layer_index] = token_scores(model, criterion, layer_index, *states).cpu()
        return torch.zeros_like(may_leave)

    return decide


def token_scores(
    model: EarlyExitForCausalLM,
    criterion: str,
    layer_index: int,
    before: Tensor,
    after: Tensor,
    normed: Tensor,
) -> Tensor:
    """Exit scores of tokens at one layer, on the scale of the criterion's thresholds.

    Args:
        model: with exits.
        criterion: one of `criteria.GENERATION_CRITERIA`.
        layer_index: 0-based.
        before, after: (tokens, hidden), states around the layer.
        normed: (tokens, hidden), `after` behind the exit's norm.

    Returns:
        (tokens,) float32; minus infinity where the criterion lets nobody exit.
    """
    row = EXIT_CRITERIA[criterion]
    if layer_index + 1 < row.first_exit_layer(model.config.min_exit_layer):
        return torch.full((len(normed),), -math.inf, device=normed.device)
    known = {"before": before, "after": after}
    if "exit_probs" in row.reads:
        known["exit_probs"] = model.policy(normed[:, None], None, layer_index)[:, 0].sigmoid()
    if "agreement_probs" in row.reads:
        classifier = model.confidence_classifier
        logits = normed.to(classifier.weight.dtype) @ classifier.weight[layer_index]
        known["agreement_probs"] = (logits + classifier.bias[layer_index]).float().sigmoid()
    if "layers" in row.reads:
        known["layers"] = torch.full((len(normed),), layer_index + 1.0, device=normed.device)
    if "logits" in row.reads:
        parts = normed.split(LOGIT_ROWS)
        return torch.cat([row.function(model.exit_logits(layer_index, part)) for part in parts])
    return value_of(row, criterion, known)


def _batches(
    saved: LoadedGenerator,
    rows: TokenizedPrompts,
    batch_size: int,
    description: str | None,
    chosen: Sequence[int] | None = None,
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Input ids, attention mask, labels and "predicts a token of the response", each (rows, tokens), on the device."""
    device = saved.model.device
    kept = np.arange(len(rows)) if chosen is None else np.asarray(chosen)
    order = kept[
        np.argsort(-rows.lengths[kept], kind="stable")
    ].tolist()  # the longest first: memory shows at once
    starts = range(0, len(order), batch_size)
    for start in track(starts, description or "", shown=description is not None):
        items = [rows[row] for row in order[start : start + batch_size]]
        batch = collate(items, saved.tokenizer)
        labels = batch["labels"]
        predicts = labels.roll(-1, 1) != IGNORED
        predicts[:, -1] = False
        if not bool(predicts.any()):
            continue
        yield (
            batch["input_ids"].to(device),
            batch["attention_mask"].to(device),
            labels.to(device),
            predicts.to(device),
        )


def _may_leave(model: EarlyExitForCausalLM, predicts: Tensor) -> Tensor:
    """All that predict, but for the first of each row (the prompt's last token) where that goes through all layers."""
    return predicts & (predicts.cumsum(1) > 1) if model.config.full_depth_first_token else predicts


def _judged(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and hits of (tokens, vocabulary) logits."""
    losses = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    return losses.cpu(), (logits.argmax(-1) == targets).cpu()


def _together(parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> TeacherForcedTokens:
    if not parts:
        raise ValueError(
            "references must hold at least one token that follows another, got none. Give longer ones."
        )
    losses, right, layers = (torch.cat(column) for column in zip(*parts, strict=True))
    return TeacherForcedTokens(losses, right, layers)
