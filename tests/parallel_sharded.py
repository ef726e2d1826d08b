"""A text generator with weights sharded over processes: `python parallel_sharded.py FOLDER OUTPUT`, under torchrun.

Writes the loss and the gradients of one step, gathered.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed import destroy_process_group, get_rank, get_world_size, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from consistentee.models.causal_lm import EarlyExitForCausalLM
from consistentee.training.tasks.token_objectives import weighted_sum_objective

WEIGHTED_SUM = weighted_sum_objective(layers_per_step=9, last_layer_share=0.5, logit_rows=1024)
"""Of all layers: nothing is drawn."""


def step(model: Any, rows: torch.Tensor) -> torch.Tensor:
    """One forward and backward pass over all exits of some rows; the loss."""
    labels = rows.clone()
    labels[:, :2] = -100

    def losses(*batch: Any) -> torch.Tensor:  # a wrapper sees tensors in what `forward` returns
        return WEIGHTED_SUM(*batch).losses

    loss = model(input_ids=rows, labels=labels, objective=losses).mean()
    loss.backward()
    return loss.detach()


def rows_of_all() -> torch.Tensor:
    """(rows, tokens) what the processes share."""
    return torch.randint(5, 40, (4, 12), generator=torch.Generator().manual_seed(0))


def main(folder: Path, output: Path) -> None:
    """Shard the layers and the rest, take this process's rows, and write what all have."""
    init_process_group("gloo")
    mesh = init_device_mesh("cpu", (get_world_size(),))
    model: Any = EarlyExitForCausalLM.from_pretrained(folder).train()
    for layer in model.backbone.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    sharded = next(iter(model.backbone.model.layers[0].parameters()))
    loss = step(model, rows_of_all().chunk(get_world_size())[get_rank()])
    gradients = {
        name: parameter.grad.full_tensor()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    torch.distributed.all_reduce(loss)
    if get_rank() == 0:
        here = sharded.to_local().numel()
        torch.save(
            {"loss": loss / get_world_size(), "gradients": gradients, "held": here / sharded.numel()}, output
        )
    destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
