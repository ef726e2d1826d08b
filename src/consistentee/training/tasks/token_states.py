"""One full-depth pass over texts with all exits computed for response tokens: what policy and rivals learn from.

Every response token is an instance: what each layer would have said in its place, and the state it would have said it
from. Tokens of long data sets are drawn, evenly at random, and only those go through the heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from consistentee.backbones import decoders
from consistentee.data.batches import TokenizedPrompts
from consistentee.functional.criteria import EXIT_CRITERIA, GENERATION_CRITERIA
from consistentee.models.causal_lm import EarlyExitForCausalLM
from consistentee.training.states import gather_into, row_shares, state_storage
from consistentee.training.steps import Collate, default_accelerator
from consistentee.training.tasks.token_objectives import response_counts

_OF_TOKENS = {name: EXIT_CRITERIA[name] for name in GENERATION_CRITERIA}
LOGIT_CRITERIA = {name: row for name, row in _OF_TOKENS.items() if row.reads == ("logits",)}
STATE_CRITERIA = {name: row for name, row in _OF_TOKENS.items() if row.reads == ("before", "after")}


@dataclass(frozen=True)
class TokenStates:
    """Every exit's outputs for response tokens, on the CPU, text by text in the data set's order.

    Attributes:
        labels: (tokens,), int64, the reference tokens.
        targets: (tokens,), int64, the tokens that make an exit right: the reference tokens, or the last layer's.
        rows: (tokens,), int64, the text each belongs to, ascending.
        losses: (tokens, layers), float32, cross-entropy of the reference token at each exit.
        right: (tokens, layers), bool, whether an exit gives the target.
        agrees: (tokens, layers), bool, whether an exit gives the last layer's token.
        regret: (tokens, layers), float32, how much likelier the last layer holds its own token than the exit's, in
            nats.
        scores: by criterion, (tokens, layers), float32: exit scores of those that read logits or states.
        pooled: (tokens, layers, hidden), float16, states behind the exits' norms; None on processes other than the main
            one, and where they were not kept. May be memory-mapped.
    """

    labels: Tensor
    targets: Tensor
    rows: Tensor
    losses: Tensor
    right: Tensor
    agrees: Tensor
    regret: Tensor
    scores: Mapping[str, Tensor]
    pooled: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def first_texts(self, texts: int) -> TokenStates:
        """The tokens of the first so many texts of the data set."""
        count = int(torch.searchsorted(self.rows, texts))
        values: dict[str, Any] = dict(vars(self))
        values["scores"] = {name: value[:count] for name, value in values["scores"].items()}
        for name, value in values.items():
            if isinstance(value, Tensor):
                values[name] = value[:count]
        return TokenStates(**values)

    @property
    def per_layer_accuracy(self) -> list[float]:
        """Share of tokens of which each exit gives the target."""
        return self.right.float().mean(0).tolist()


@torch.no_grad()
def run_token_states(
    model: EarlyExitForCausalLM,
    dataset: TokenizedPrompts,
    *,
    collate: Collate,
    max_tokens: int | None = None,
    seed: int = 0,
    target: str = "reference",
    logit_rows: int = 1024,
    batch_size: int = 16,
    accelerator: Accelerator | None = None,
    keep_pooled: bool = True,
    last_layer_only: bool = False,
    memory_limit_mb: float = math.inf,
    scratch_dir: Path | None = None,
    description: str | None = None,
) -> TokenStates:
    """Run every layer for every text, and every exit for response tokens.

    Args:
        model: the (unwrapped) model; left in the mode it was in.
        dataset: texts to run.
        collate: turns a list of items into a padded batch.
        max_tokens: tokens to keep, drawn by `seed`; None keeps all.
        seed: of that draw.
        target: what makes an exit right: the `reference` token, or the `last_layer`'s.
        logit_rows: rows of logits at once.
        batch_size: texts per process and step.
        accelerator: shares the texts among its processes; every process returns all tokens, and the states are kept by
            the main process only.
        keep_pooled: whether to keep the states.
        last_layer_only: leave out all exits but the last, as if the model had one layer.
        memory_limit_mb: states larger than this go to a memory-mapped file in `scratch_dir`.
        scratch_dir: where that file goes.
        description: label of the progress bar; none without it.

    Raises:
        ValueError: there is no response token, or the states exceed the limit and there is no `scratch_dir`.
    """
    accelerator = accelerator or default_accelerator()
    rows, positions = draw_tokens(dataset, max_tokens, seed)
    if len(rows) == 0:
        raise ValueError("dataset must hold response tokens, got none. Give texts with longer responses.")
    tokens, layers = len(rows), 1 if last_layer_only else model.num_layers
    results = {
        "losses": torch.empty(tokens, layers),
        "predictions": torch.empty(tokens, layers, dtype=torch.int64),
        "regret": torch.empty(tokens, layers),
        **{name: torch.empty(tokens, layers) for name in (*LOGIT_CRITERIA, *STATE_CRITERIA)},
        "labels": torch.empty(tokens, dtype=torch.int64),
    }
    if keep_pooled and accelerator.is_main_process:
        shape = (tokens, layers, model.config.hidden_size)
        results["pooled"] = state_storage(shape, memory_limit_mb, scratch_dir)
    first_of_row = np.searchsorted(
        rows, np.arange(len(dataset) + 1)
    )  # tokens of row r: first[r] to first[r + 1]
    was_training = model.training
    model.eval()
    try:
        for mine, padding in row_shares(dataset.lengths, batch_size, accelerator, description):
            here = mine + padding
            batch = collate([dataset[row] for row in here])
            chosen = [np.arange(first_of_row[row], first_of_row[row + 1]) for row in here]
            index = torch.from_numpy(np.concatenate(chosen))  # (tokens of the batch,)
            at_row = torch.from_numpy(np.repeat(np.arange(len(here)), [len(part) for part in chosen]))
            at_position = torch.from_numpy(positions)[index]
            with accelerator.autocast():
                output = _exits_of(
                    model,
                    {name: value.to(model.device) for name, value in batch.items()},
                    at_row.to(model.device),
                    at_position.to(model.device),
                    first_exit=model.num_layers - layers,
                    logit_rows=logit_rows,
                    keep_pooled=keep_pooled,
                )
            real = at_row < len(mine)
            index = torch.where(real, index, -1)
            if accelerator.num_processes > 1:
                counts = accelerator.gather(torch.tensor([len(index)], device=accelerator.device))
                longest = int(torch.as_tensor(counts).max())
                index = functional.pad(index, (0, longest - len(index)), value=-1)
                output = {
                    name: functional.pad(value, (0, 0) * (value.ndim - 1) + (0, longest - len(value)))
                    for name, value in output.items()
                }
            gather_into(results, output, index, accelerator)
    finally:
        model.train(was_training)
    predictions = results.pop("predictions")
    scores = {name: results.pop(name) for name in (*LOGIT_CRITERIA, *STATE_CRITERIA)}
    targets = predictions[:, -1].clone() if target == "last_layer" else results["labels"]
    return TokenStates(
        targets=targets,
        rows=torch.from_numpy(rows),
        right=predictions == targets[:, None],
        agrees=predictions == predictions[:, -1:],
        scores=scores,
        **results,
    )


def draw_tokens(
    dataset: TokenizedPrompts, max_tokens: int | None, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Response tokens of a data set, at most so many of them drawn evenly at random.

    Args:
        dataset: tokenized texts.
        max_tokens: None draws all.
        seed: same seed, same tokens.

    Returns:
        The text of each, ascending, and the position that predicts it, both (tokens,).
    """
    counts = response_counts(
        torch.from_numpy(dataset.lengths), torch.from_numpy(dataset.prompt_lengths)
    ).numpy()
    ends = counts.cumsum()
    flat = np.arange(ends[-1] if len(ends) else 0)
    if max_tokens is not None and max_tokens < len(flat):
        flat = np.sort(np.random.default_rng(seed).permutation(len(flat))[:max_tokens])
    rows = np.searchsorted(ends, flat, side="right")
    offsets = flat - (ends - counts)[rows]
    return rows, np.maximum(dataset.prompt_lengths[rows], 1) - 1 + offsets


def _exits_of(
    model: EarlyExitForCausalLM,
    batch: dict[str, Tensor],
    rows: Tensor,
    positions: Tensor,
    *,
    first_exit: int,
    logit_rows: int,
    keep_pooled: bool,
) -> dict[str, Tensor]:
    """All exits from a layer on of some tokens of a batch: results by name, (tokens, layers[, hidden]), and labels."""
    labels = batch["labels"][rows, positions + 1]
    normed = torch.empty(0)
    state = decoders.decoder_state(model.backbone, batch["input_ids"], batch["attention_mask"])
    by_layer: dict[str, list[Tensor]] = {}
    for index in range(model.num_layers):
        before = state.hidden_states[rows, positions]
        state.hidden_states = decoders.run_decoder_layer(model.backbone, index, state)
        if index < first_exit:
            continue
        after = state.hidden_states[rows, positions]
        normed = model.exit_norm(index, after)
        values = _read_heads(model, index, normed, labels, logit_rows)
        for name, criterion in STATE_CRITERIA.items():
            values[name] = criterion.function(before, after)
        if keep_pooled:
            values["pooled"] = normed
        for name, value in values.items():
            by_layer.setdefault(name, []).append(value)
    output = {name: torch.stack(values, 1) for name, values in by_layer.items()}
    parts = zip(normed.split(logit_rows), output["predictions"].split(logit_rows), strict=True)
    last = model.num_layers - 1
    output["regret"] = torch.cat(
        [token_regret(model.exit_logits(last, chunk), predictions) for chunk, predictions in parts]
    )
    return {**output, "labels": labels}


def token_regret(last_logits: Tensor, tokens: Tensor) -> Tensor:
    """How much likelier the full model holds its own token than others, in nats.

    Args:
        last_logits: (tokens, vocabulary), of the last layer.
        tokens: (tokens, layers), int64, what each exit would have said.

    Returns:
        (tokens, layers), float32, 0 where an exit says what the last layer says.

    Example:
        >>> token_regret(torch.tensor([[1.0, 3.0, 2.5]]), torch.tensor([[0, 2, 1]]))
        tensor([[2.0000, 0.5000, 0.0000]])
    """
    logits = last_logits.float()
    return logits.amax(-1, keepdim=True) - logits.gather(1, tokens)


def _read_heads(
    model: EarlyExitForCausalLM, layer_index: int, normed: Tensor, labels: Tensor, logit_rows: int
) -> dict[str, Tensor]:
    """Loss, prediction and exit scores of tokens at one exit, by name, (tokens,) each."""
    parts: list[dict[str, Tensor]] = []
    for chunk, target in zip(normed.split(logit_rows), labels.split(logit_rows), strict=True):
        logits = model.exit_logits(layer_index, chunk).float()
        part = {name: criterion.function(logits) for name, criterion in LOGIT_CRITERIA.items()}
        part["losses"] = logits.logsumexp(-1) - logits.gather(1, target[:, None]).squeeze(1)
        part["predictions"] = logits.argmax(-1)
        parts.append(part)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
