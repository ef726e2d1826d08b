"""What attention in float32 costs a training step in bfloat16 on CPU, and what attention in bfloat16 does to gradients.

    OMP_NUM_THREADS=1 python benchmarks/training_step.py --backbone MODELS/e5-12l

A step is forward and backward of the weighted sum of all exits' losses, under accelerate's autocast, with the
backbone's own dropout. The two ways take turns in one run; ratios are of medians. Gradients are compared without
dropout, in one batch of random tokens, with those of float32: the length of the difference over theirs.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from consistentee import EarlyExitForSequenceClassification
from consistentee.functional.losses import layer_losses, weighted_sum_loss
from consistentee.training.steps import attention_in_bfloat16, make_accelerator


def main() -> None:
    """Time both ways at every length, compare gradients, and print two tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", type=Path, required=True)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 32, 48, 64, 96, 128])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        accelerator = make_accelerator(folder, mixed_precision="bf16")
    model = EarlyExitForSequenceClassification.from_backbone(options.backbone, num_labels=2)
    prepared = accelerator.prepare(model)
    ways = {"float32": nullcontext, "bfloat16": lambda: attention_in_bfloat16(accelerator)}

    steps = Table("tokens a row", *(f"attention in {name}, s" for name in ways), "times faster")
    for length in options.lengths:
        batch = _batch(options.batch_size, length)
        times: dict[str, list[float]] = {name: [] for name in ways}
        for repeat in range(options.repeats + 1):
            for name, way in ways.items():
                start = time.perf_counter()
                with way():
                    _backward(prepared.train(), batch, accelerator.backward)
                if repeat:  # the first is for warming up
                    times[name].append(time.perf_counter() - start)
        before, after = (statistics.median(values) for values in times.values())
        steps.add_row(str(length), f"{before:.2f}", f"{after:.2f}", f"{before / after:.2f}x")
    Console().print(steps)

    batch, errors = _batch(options.batch_size, 64), Table("attention in", "difference from float32, %")
    wanted = _gradients(model, batch)
    for name, way in ways.items():
        with way(), accelerator.autocast():
            found = _gradients(model, batch)
        apart = sum(float((found[of] - gradient).square().sum()) for of, gradient in wanted.items())
        whole = sum(float(gradient.square().sum()) for gradient in wanted.values())
        errors.add_row(name, f"{100 * (apart / whole) ** 0.5:.2f}")
    Console().print(errors)
    Console().print(
        f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {options.backbone.name}, batches of "
        f"{options.batch_size}, {torch.backends.cpu.get_cpu_capability()}"
    )


def _batch(rows: int, length: int) -> dict[str, Tensor]:
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[: rows // 2, -2:] = 0
    labels = torch.arange(rows) % 2
    return {"input_ids": torch.randint(5, 500, (rows, length)), "attention_mask": mask, "labels": labels}


def _backward(
    model: torch.nn.Module, batch: Mapping[str, Tensor], backward: Callable[[Tensor], object]
) -> None:
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    losses = layer_losses(model(**inputs).classifier_logits, batch["labels"])
    backward(weighted_sum_loss(losses).mean())
    model.zero_grad()


def _gradients(model: torch.nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of every parameter, in float64. Without dropout torch would take a fused kernel; this takes that of dropout."""
    found: dict[str, Tensor] = {}
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0

    def backward(loss: Tensor) -> None:
        loss.backward()
        found.update((name, p.grad.double()) for name, p in model.named_parameters() if p.grad is not None)

    with sdpa_kernel([SDPBackend.MATH]):
        _backward(model, batch, backward)
    return found


if __name__ == "__main__":
    main()
