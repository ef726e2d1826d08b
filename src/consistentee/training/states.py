"""One pass over a data set with every layer run for every row: what evaluation reads and the policy learns from.

Kept states are half precision, and go to a memory-mapped file beyond a size, so that a policy can be fitted on data
whose states do not fit into memory.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from consistentee.atomic_files import room_in
from consistentee.data.batches import TokenizedDataset
from consistentee.functional.criteria import exit_scores
from consistentee.functional.losses import layer_losses
from consistentee.heads.exit_signals import SIGNALS
from consistentee.models.sequence_classification import EarlyExitForSequenceClassification
from consistentee.progress import track
from consistentee.training.steps import Collate, default_accelerator


@dataclass(frozen=True)
class LayerStates:
    """Every layer's outputs for every row of a data set, on the CPU, in the data set's order.

    Attributes:
        classifier_logits: (rows, layers, classes), float32, each classifier's own logits.
        layer_logits: (rows, layers, classes), float32, each layer's prediction as an exit there would give it.
        exit_probs: (rows, layers), float32, the policy's conditional exit probabilities.
        labels: (rows,), int64.
        pooled: (rows, layers, hidden), float16, the states; None where they were not kept. May be memory-mapped.
        null_shares: (rows, layers), float32, share of a state that its layer's classifier does not see.
        right_probs: (rows, layers), float32, of the model's `learnt_to_exit`; None where it has none.
        layer_weights: (rows, layers), float32, the model's.
        temperatures: (rows, layers), float32, the model's; None where it has none.
        has_exit: (rows, layers), bool, which layers have an exit; None where all have.
    """

    classifier_logits: Tensor
    layer_logits: Tensor
    exit_probs: Tensor
    labels: Tensor
    pooled: Tensor | None = None
    null_shares: Tensor | None = None
    right_probs: Tensor | None = None
    layer_weights: Tensor | None = None
    temperatures: Tensor | None = None
    has_exit: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, start: int, end: int) -> LayerStates:
        """The rows from `start` to before `end`."""
        parts: dict[str, Any] = {
            name: None if value is None else value[start:end] for name, value in vars(self).items()
        }
        return LayerStates(**parts)

    @property
    def signals(self) -> dict[str, Tensor]:
        """What exit criteria read beside predictions and exit probabilities (`criteria.ExitCriterion`)."""
        found = {name: getattr(self, name) for name in SIGNALS}
        return {name: value for name, value in found.items() if value is not None}

    def exit_scores(self, criterion: str) -> Tensor:
        """Exit scores of all rows at all layers under a criterion, (rows, layers)."""
        return exit_scores(criterion, self.layer_logits, self.exit_probs, **self.signals)

    @property
    def outcomes(self) -> dict[str, Tensor]:
        """What reward losses and hardness measures may read."""
        return {
            "losses": layer_losses(self.layer_logits, self.labels),
            "right": self.layer_logits.argmax(-1) == self.labels[:, None],
            "last_logits": self.layer_logits[:, -1],
            "labels": self.labels,
        }


@torch.no_grad()
def run_all_layers(
    model: EarlyExitForSequenceClassification,
    dataset: TokenizedDataset,
    *,
    collate: Collate,
    batch_size: int = 64,
    accelerator: Accelerator | None = None,
    keep_pooled: bool = False,
    memory_limit_mb: float = math.inf,
    scratch_dir: Path | None = None,
    description: str | None = None,
) -> LayerStates:
    """Run every layer for every row, rows of similar length together, and bring the results into the rows' order.

    Args:
        model: the (unwrapped) model; left in the mode it was in.
        dataset: rows to run.
        collate: turns a list of items into a padded batch.
        batch_size: rows per process and step.
        accelerator: shares the rows among its processes; every process returns all rows, and the pooled states are
            kept by the main process only.
        keep_pooled: whether to keep the states.
        memory_limit_mb: states larger than this go to a memory-mapped file in `scratch_dir`.
        scratch_dir: where that file goes. It has no name and is gone when the states are.
        description: label of the progress bar; none without it.

    Raises:
        ValueError: if the states exceed the limit and there is no `scratch_dir`.
    """
    accelerator = accelerator or default_accelerator()
    rows, layers, classes = len(dataset), model.num_layers, cast(int, model.config.num_labels)
    results = {
        "classifier_logits": torch.empty(rows, layers, classes),
        "layer_logits": torch.empty(rows, layers, classes),
        "exit_probs": torch.empty(rows, layers),
        "null_shares": torch.empty(rows, layers),
    }
    if model.learnt_to_exit is not None:
        results["right_probs"] = torch.empty(rows, layers)
    if keep_pooled and accelerator.is_main_process:
        shape = (rows, layers, model.config.pooled_size)
        results["pooled"] = state_storage(shape, memory_limit_mb, scratch_dir)
    wanted = ("classifier_logits", "layer_logits", "exit_probs", *(("pooled",) if keep_pooled else ()))
    signals = model.exit_signals(("null_shares", "right_probs"))

    def all_layers(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        output = model(**inputs, all_layers=True)
        found = signals(output.pooled, output.classifier_logits)
        return {name: output[name] for name in wanted} | found

    _run_rows(model, dataset, all_layers, results, collate, batch_size, accelerator, description)
    constant = model.exit_signals(("temperatures", "layer_weights", "has_exit"))
    results |= constant(results["exit_probs"], results["classifier_logits"])
    return LayerStates(labels=dataset.labels.clone(), **results)


@torch.no_grad()
def run_full_depth(
    model: PreTrainedModel,
    dataset: TokenizedDataset,
    *,
    collate: Collate,
    batch_size: int = 64,
    accelerator: Accelerator | None = None,
    description: str | None = None,
) -> Tensor:
    """Logits of a plain sequence classifier for every row, (rows, classes), float32, on the CPU.

    Arguments as in `run_all_layers`.
    """
    results = {"logits": torch.empty(len(dataset), cast(int, model.config.num_labels))}
    accelerator = accelerator or default_accelerator()

    def full_depth(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"logits": model(**inputs).logits}

    _run_rows(model, dataset, full_depth, results, collate, batch_size, accelerator, description)
    return results["logits"]


def _run_rows(
    model: PreTrainedModel,
    dataset: TokenizedDataset,
    run: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    results: dict[str, Tensor],
    collate: Collate,
    batch_size: int,
    accelerator: Accelerator,
    description: str | None,
) -> None:
    """Run all rows, shared among the processes, and put what comes out into `results`, row by row."""
    was_training = model.training
    model.eval()
    try:
        for mine, padding in row_shares(dataset.lengths, batch_size, accelerator, description):
            batch = collate([dataset[row] for row in mine + padding])
            inputs = {
                name: batch[name].to(model.device)
                for name in ("input_ids", "attention_mask", "token_type_ids")
                if name in batch
            }
            with accelerator.autocast():
                output = run(inputs)
            gather_into(results, output, torch.tensor(mine + [-1] * len(padding)), accelerator)
    finally:
        model.train(was_training)


def row_shares(
    lengths: NDArray[np.int64], batch_size: int, accelerator: Accelerator, description: str | None
) -> Iterator[tuple[list[int], list[int]]]:
    """Rows in batches of similar length, longest first: out of memory at once, or not at all.

    Args:
        lengths: (rows,), tokens of every row.
        batch_size: rows per process and step.
        accelerator: among whose processes every batch is shared.
        description: label of the progress bar; none without it.

    Yields:
        This process's rows of a batch, and rows that fill them up to as many as every other process has.
    """
    rows = len(lengths)
    order = np.argsort(-lengths, kind="stable")
    step = batch_size * accelerator.num_processes
    shown = description is not None and accelerator.is_main_process
    for start in track(range(0, rows, step), description or "", shown=shown):
        share = math.ceil(min(step, rows - start) / accelerator.num_processes)
        first = start + accelerator.process_index * share
        mine = order[first : min(first + share, start + step)].tolist()
        yield mine, [int(order[-1])] * (share - len(mine))


def gather_into(
    results: Mapping[str, Tensor], output: Mapping[str, Tensor], index: Tensor, accelerator: Accelerator
) -> None:
    """Put what all processes computed into its places; what this process keeps no place for is dropped.

    Args:
        results: by name, (rows, ...), on the CPU.
        output: by name, (rows of this process, ...); equally many on every process.
        index: (rows of this process,), their places, -1 for what has none.
        accelerator: whose processes take part.
    """

    def of_all(value: Tensor) -> Tensor:
        if accelerator.num_processes == 1:
            return value.cpu()
        return cast(Tensor, accelerator.gather(value.to(accelerator.device))).cpu()

    places = of_all(index)
    real = places >= 0
    for name, value in output.items():
        gathered = of_all(value.float().contiguous())
        if name in results:
            results[name][places[real]] = gathered[real].to(results[name].dtype)


def state_storage(shape: tuple[int, int, int], memory_limit_mb: float, scratch_dir: Path | None) -> Tensor:
    """Room for states, float16: in memory, or beyond the limit in a memory-mapped file that has no name.

    Raises:
        OSError: there is no room for that file.
        ValueError: if the states exceed the limit and there is no `scratch_dir`.
    """
    size = 2 * math.prod(shape)  # bytes
    if size <= memory_limit_mb * 1e6:
        return torch.empty(shape, dtype=torch.float16)
    if scratch_dir is None:
        raise ValueError(
            f"States of shape {shape} exceed {memory_limit_mb} MB and there is no scratch_dir to map them from. "
            "Give one, or a higher memory_limit_mb."
        )
    scratch_dir.mkdir(parents=True, exist_ok=True)
    # A file without a name goes when the last tensor on it goes, however the process ends.
    with room_in(scratch_dir), tempfile.TemporaryFile(dir=scratch_dir) as file:
        if hasattr(os, "posix_fallocate"):  # a full disk is an error now, not a crash while writing
            os.posix_fallocate(file.fileno(), 0, size)
        return torch.from_numpy(np.memmap(file, dtype=np.float16, mode="w+", shape=shape))
