"""The gradient steps under both kinds of training: which rows, which learning rate, which process takes what.

A step is a pure function of the run's seed and the step's number: its rows, its dropout and its learning rate follow
from them alone. That is what makes an interrupted run end where an uninterrupted one does.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)
from torch import Tensor, nn

from consistentee.data.batches import LengthGroupedBatches
from consistentee.errors import SettingError, require_extra
from consistentee.heads.original_head import OriginalHead
from consistentee.inference.encoder.prepacked_linear import has_fast_bfloat16
from consistentee.progress import show_progress
from consistentee.training.finite import require_finite

PATIENCE_OF_PROCESSES = timedelta(days=1)  # the others wait while the main process fits policies

Collate = Callable[[list[dict[str, Any]]], dict[str, Tensor]]
Figures = dict[str, Tensor]
Objective = Callable[[nn.Module, dict[str, Tensor], Tensor], tuple[Tensor, Figures]]
"""(model, batch, labels) -> loss of every row, (rows,), and figures of every row for the progress bar, each (rows,),
NaN for a row that has none. The model is the one that accelerate prepared, and its `forward` is to be called once."""


class Batches(Protocol):
    """Batches of row indices, the same for the same epoch; see `batches.LengthGroupedBatches`."""

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the epoch, and its batch to start at."""
        ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[list[int]]: ...


class Rows(Protocol):
    """Tokenized rows: items for the collating function, and their lengths in tokens, (rows,)."""

    lengths: Any

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


def make_accelerator(
    output_dir: str, *, mixed_precision: str = "auto", tracker: str = "none", unused_parameters: bool = False
) -> Accelerator:
    """An accelerator with a precision and a tracker.

    Args:
        output_dir: where the tracker writes.
        mixed_precision: `auto`, `no`, `bf16` or `fp16`.
        tracker: `none`, or an experiment tracker's name.
        unused_parameters: whether steps leave parameters out, which several processes must be told.

    Raises:
        ImportError: the tracker is not installed.
        ValueError: fp16 without a GPU.
        SettingError: the launcher asks for weights that are spread over processes, which is not implemented.
    """
    if tracker == "tensorboard":
        require_extra("tensorboard", "tensorboard")
    elif tracker in ("wandb", "mlflow") and importlib.util.find_spec(tracker) is None:
        raise ImportError(f"tracker {tracker} is not installed. Install it with: pip install {tracker}")
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise SettingError(
                f"Processes of a training must share rows, not weights, and ACCELERATE_USE_{name} is set. Launch it "
                "with --multi_gpu; docs/several-nodes.md says what else there is for a model that is too large."
            )
    # A run before this one in the same process may have had another precision, to which accelerate would hold this one.
    AcceleratorState._reset_state()
    return default_accelerator(
        mixed_precision=resolve_precision(mixed_precision),
        log_with=None if tracker == "none" else tracker,
        project_dir=output_dir,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # `OptimizerSteps` does its own
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=PATIENCE_OF_PROCESSES),
            DistributedDataParallelKwargs(find_unused_parameters=unused_parameters),
        ],
    )


def default_accelerator(**options: Any) -> Accelerator:
    """An accelerator with the processes that a launcher has started, on a GPU if there is one.

    Also for a model on the CPU: the device that the first one in a process is told holds for all after it.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return Accelerator(cpu=several and not torch.accelerator.is_available(), **options)


def resolve_precision(mixed_precision: str) -> str:
    """`no`, `bf16` or `fp16`: the given one, or for `auto` bf16 where the hardware computes in it, else as below.

    A CUDA GPU that has bf16 by emulation alone, which is slower than float32, takes fp16; a processor `no`.
    """
    if mixed_precision == "fp16" and not torch.accelerator.is_available():
        raise SettingError("mixed_precision fp16 needs a GPU, and there is none. Use auto, bf16 or no.")
    if mixed_precision != "auto":
        return mixed_precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if _computes_in_bfloat16() else "no"


def _computes_in_bfloat16() -> bool:
    """Whether this processor has instructions for products of bfloat16, and oneDNN may use them."""
    capabilities = torch.backends.cpu.get_cpu_capability()
    native = "AMX" in capabilities or bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())
    return native and has_fast_bfloat16()


@contextmanager
def attention_in_bfloat16(accelerator: Accelerator) -> Iterator[None]:
    """Attention of bfloat16 in bfloat16 also where PyTorch has no fused kernel, on a processor that computes in it.

    Attention with dropout is such a case on CPU: PyTorch turns queries, keys and values into float32 first, which at
    512 tokens makes it half of a step's time. Elsewhere (GPU, float32, emulated bfloat16) nothing changes.
    """
    if (
        accelerator.device.type != "cpu"
        or accelerator.mixed_precision != "bf16"
        or not _computes_in_bfloat16()
    ):
        yield
        return
    # Named after CUDA, it holds everywhere.
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Backbone and new parameters apart, each with and without weight decay; the policy is trained elsewhere.

    An original's head that is trained goes with the backbone: it is not new.
    """
    heads = [module for module in model.modules() if isinstance(module, OriginalHead)]
    not_new = {id(parameter) for head in heads for parameter in head.parameters()}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_backbone = name.startswith("backbone.") or id(parameter) in not_new
            groups.setdefault((is_backbone, parameter.ndim > 1), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": weight_decay if decays else 0.0,
            "is_backbone": is_backbone,
        }
        for (is_backbone, decays), parameters in groups.items()
    ]


def schedule_factor(step: int, total_steps: int, warmup_ratio: float, schedule: str) -> float:
    """What the peak learning rates are multiplied by at a step: a linear rise, then a linear fall or a constant."""
    rise = math.ceil(warmup_ratio * total_steps)
    if step < rise:
        return (step + 1) / rise
    if schedule == "constant":
        return 1.0
    return max(0.0, (total_steps - step) / max(1, total_steps - rise))


@dataclass
class OptimizerSteps:
    """A model, its optimizer and its rows, and the number of steps taken so far.

    Attributes:
        model: as prepared by the accelerator.
        row_weights: (rows,), what a row's loss weighs in the mean over a batch; None where all weigh the same.
        batch_size: rows per step, over all processes and parts of a batch together.
        head_learning_rate: peak learning rate of new parameters.
        warmup_ratio, schedule: how learning rates rise and fall over the whole run.
        tracked: whether figures go to an experiment tracker.
        checkpoint_every: steps between calls of `checkpoint`.
        total_steps: planned length of the whole run, which the learning rate follows.
        step: optimizer steps taken.
        given_batches: in place of shuffled ones of similar length.
        steps_before: taken by others of the same run, behind which the tracker counts.
        seconds: that the steps took, also before an interruption, and those of another run that were taken over.
    """

    accelerator: Accelerator
    model: nn.Module
    optimizer: Any
    rows: Rows
    collate: Collate
    row_weights: Tensor | None
    batch_size: int
    group_by_length: bool
    gradient_accumulation_steps: int
    head_learning_rate: float
    warmup_ratio: float
    schedule: str
    max_grad_norm: float
    seed: int
    tracked: bool
    checkpoint_every: int
    total_steps: int = 0
    step: int = 0
    checkpoint: Callable[[], None] = lambda: None
    figures: dict[str, float] = field(default_factory=dict)
    given_batches: Batches | None = None
    steps_before: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.batches: Batches = self.given_batches or LengthGroupedBatches(
            self.rows.lengths, self.batch_size, seed=self.seed, group_by_length=self.group_by_length
        )

    def run(
        self,
        until: int,
        objective: Objective,
        *,
        phase: str,
        learning_rate: float,
        before_step: Callable[[], object] = lambda: None,
    ) -> None:
        """Take steps until `step` reaches `until`.

        Args:
            until: the step to stop at.
            objective: gives every row's loss and figures.
            phase: name on the progress bar and in the tracker.
            learning_rate: the backbone's peak in this phase.
            before_step: called with the model in training mode, to put parts of it into another.

        Raises:
            FloatingPointError: the loss, the gradients or the weights are infinite or not a number.
            ValueError: there are no batches left for so many steps.
        """
        self.figures.clear()
        shown = self.accelerator.is_main_process
        end = max(until, self.total_steps)  # the time left is the whole run's, not this phase's
        with (
            attention_in_bfloat16(self.accelerator),
            show_progress(phase, end, unit="step", initial=self.step, shown=shown) as bar,
        ):
            while self.step < until:
                before = self.step
                epoch, offset = divmod(self.step, len(self.batches))
                self.batches.set_epoch(epoch, offset)
                for rows in itertools.islice(self.batches, until - self.step):
                    started = time.monotonic()
                    self._step(rows, objective, learning_rate, before_step)
                    self.seconds += time.monotonic() - started
                    bar.update(figures=self.figures)
                    if self.tracked:
                        self.accelerator.log(
                            {f"{phase}/{name}": v for name, v in self.figures.items()},
                            step=self.steps_before + self.step,
                        )
                    if self.step % self.checkpoint_every == 0 and self.step < until:
                        self._check_weights()
                        self.checkpoint()
                if self.step == before:
                    raise ValueError(
                        f"Steps must be at most {before}, as many as there are batches, got {until}. Plan fewer epochs."
                    )
        self._check_weights()

    def _step(
        self,
        rows: Sequence[int],
        objective: Objective,
        learning_rate: float,
        before_step: Callable[[], object],
    ) -> None:
        accelerator = self.accelerator
        torch.manual_seed(step_seed(self.seed, self.step, accelerator.process_index))
        factor = schedule_factor(self.step, self.total_steps, self.warmup_ratio, self.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = factor * (learning_rate if group["is_backbone"] else self.head_learning_rate)
        self.model.train()
        before_step()

        share = math.ceil(len(rows) / accelerator.num_processes)
        mine = list(rows[accelerator.process_index * share :][:share])
        real = torch.tensor([1.0] * len(mine) + [0.0] * (share - len(mine)), device=accelerator.device)
        # Equally many rows on every process; the extra ones weigh nothing.
        mine += [rows[0]] * (share - len(mine))
        if self.row_weights is not None:
            mean = self.row_weights[list(rows)].mean().clamp_min(torch.finfo(torch.float32).tiny)
            real *= (self.row_weights[mine] / mean).to(real.device)
        parts = torch.arange(share).split(math.ceil(share / self.gradient_accumulation_steps))
        totals: dict[str, Tensor] = {}
        for number, part in enumerate(parts):
            batch = self.collate([self.rows[mine[index]] for index in part.tolist()])
            batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items() if name != "index"}
            labels = batch.pop("labels")
            last = number == len(parts) - 1  # only then are gradients exchanged between processes
            with nullcontext() if last else accelerator.no_sync(self.model):
                losses, figures = objective(self.model, batch, labels)
                weights = real[part.to(real.device)]
                # Processes average their gradients, hence the factor: the mean over the whole batch comes out.
                loss = (losses * weights).sum() / len(rows) * accelerator.num_processes
                accelerator.backward(loss)
            for name, values in {**figures, "loss": losses.detach()}.items():
                known = torch.ones_like(weights) if name == "loss" else (~values.isnan()).to(weights.dtype)
                known_values = values if name == "loss" else values.nan_to_num()
                sums = torch.stack([(known_values * weights).sum(), (known * weights).sum()])
                totals[name] = totals[name] + sums if name in totals else sums
        norm = accelerator.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        reduced = cast(Tensor, accelerator.reduce(torch.stack([*totals.values()])))
        for name, (total, weight) in zip(totals, reduced.tolist(), strict=True):
            if weight == 0:
                continue
            value = float(total / weight)
            self.figures[name] = 0.95 * self.figures.get(name, value) + 0.05 * value  # smoothed, for reading
        if accelerator.scaler is None:  # a scaler leaves out steps that overflow
            self._require_finite("loss", [torch.tensor(self.figures.get("loss", 0.0))])
            self._require_finite("gradient norm", [cast(Tensor, norm)])

    def _check_weights(self) -> None:
        """Look at all of them, before they are kept or measured: a step's loss is from before its update."""
        self._require_finite(
            "weights", [weight for group in self.optimizer.param_groups for weight in group["params"]]
        )

    def _require_finite(self, what: str, values: Sequence[Tensor]) -> None:
        require_finite(what, f"at step {self.step}", values)


def step_seed(seed: int, step: int, process_index: int) -> int:
    """Seed of one step on one process, well mixed."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step * 1_009 + process_index)
    return int(torch.randint(2**62, (1,), generator=generator))
