"""Peak memory of a training step against the number of layers: plain fine-tuning beside training with exits.

    python benchmarks/generation_memory.py [--layers 6 12 18 24 30] [--batch-size 8] [--tokens 256] [--json FILE]

SmolLM2's width and vocabulary, random weights, AdamW, bfloat16 autocast, every token a response. Each figure is the
largest resident memory of a process of its own, less what the process holds before its first step. Logits of exits are
held for `logit_rows` (token, layer) pairs at a time: 1,024 x 49,152 x 4 bytes = 192 MiB, whatever the number of layers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

WAYS = ("hugging-face", "plain", "weighted-sum", "consistent")


def main() -> None:
    """Measure every way and depth in a process of its own, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 12, 18, 24, 30])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("WAY", "LAYERS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(step(options.one[0], int(options.one[1]), options.batch_size, options.tokens)))
        return
    rows: list[dict[str, Any]] = []
    for layers in options.layers:
        for way in WAYS:
            command = [sys.executable, __file__, "--one", way, str(layers)]
            command += ["--batch-size", str(options.batch_size), "--tokens", str(options.tokens)]
            result = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append(json.loads(result.stdout.splitlines()[-1]))
    print("| layers | " + " | ".join(WAYS) + " | weighted sum / Hugging Face | consistent / Hugging Face |")
    print("|" + "---|" * (len(WAYS) + 3))
    for layers in options.layers:
        peak = {row["way"]: row["peak_mb"] for row in rows if row["layers"] == layers}
        ratios = [f"{peak[way] / peak['hugging-face']:.2f}" for way in ("weighted-sum", "consistent")]
        print(f"| {layers} | " + " | ".join(f"{peak[way]:,.0f} MB" for way in WAYS), *ratios, "", sep=" | ")
    if options.json:
        from consistentee.atomic_files import write_json

        write_json(options.json, rows)


def step(way: str, layers: int, batch_size: int, tokens: int) -> dict[str, Any]:
    """Two training steps of one way in this process."""
    import resource

    import torch
    from transformers import AutoConfig

    from consistentee.backbones.decoders import build_decoder
    from consistentee.evaluation.speed_generation import GENERATION_SHAPES
    from consistentee.models.causal_lm import EarlyExitForCausalLM
    from consistentee.training.tasks import token_objectives as objectives

    torch.set_num_threads(1)
    torch.manual_seed(0)
    values = {**GENERATION_SHAPES["smollm2-135m-shape"], "num_hidden_layers": layers}
    backbone = build_decoder(AutoConfig.for_model(values.pop("model_type"), **values))
    drawn = {"layers_per_step": 4, "last_layer_share": 0.3, "logit_rows": 1024}
    model: Any = backbone if way == "hugging-face" else EarlyExitForCausalLM.from_backbone(backbone)
    objective: Any = {
        "hugging-face": None,
        "plain": objectives.full_depth_objective(logit_rows=1024),
        "weighted-sum": objectives.weighted_sum_objective(**drawn),
        "consistent": objectives.consistent_objective(weighted_sum_share=0.3, **drawn),
    }[way]
    model.train()
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad])
    ids = torch.randint(values["vocab_size"], (batch_size, tokens))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if objective is None:
                loss = model(input_ids=ids, labels=ids).loss
            else:
                loss = model(
                    input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, objective=objective
                ).losses.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
    return {"way": way, "layers": layers, "batch_size": batch_size, "tokens": tokens, "peak_mb": peak}


if __name__ == "__main__":
    main()
