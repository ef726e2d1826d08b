"""Time of a greedy token's search: the LM head read whole, and screened in int8, on states that texts give.

    python benchmarks/lm_head_argmax.py MODEL TEXTS.jsonl [--dtypes float32 bfloat16] [--counts 1 8 32 64]

MODEL is a decoder of transformers, TEXTS rows with an `instruction`. One thread; milliseconds a call, means, both ways
on the same batches, the trials of both that the screened one begins with included. Every token is compared.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from consistentee.inference.decoder.screened_argmax import ScreenedArgmax
from consistentee.inference.timing import environment

ROWS = 3072


@torch.no_grad()
def main() -> None:
    """Print a table row for each precision and number of tokens."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("texts", type=Path)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--counts", nargs="+", type=int, default=[1, 8, 32, 64])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    states, weight = states_and_weight(arguments.model, arguments.texts)
    print(environment(torch.device("cpu")))
    print("| precision | tokens | whole, ms | screened, ms |\n|---|---:|---:|---:|")
    for name in arguments.dtypes:
        dtype = getattr(torch, name)
        head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=dtype)
        head.weight.copy_(weight)
        screened = ScreenedArgmax(head)
        for count in arguments.counts:
            batches = states.to(dtype).split(count)[: min(60, ROWS // count)]
            whole, expected = timed(nn.Sequential(head, Argmax()), batches)
            milliseconds, found = timed(screened, batches)
            if not all(map(torch.equal, found, expected)):
                raise SystemExit(f"{name}, {count} tokens: the screened head gives other tokens.")
            print(f"| {name} | {count} | {whole:.1f} | {milliseconds:.1f} |", flush=True)


class Argmax(nn.Module):
    """The index of the largest logit."""

    def forward(self, logits: Tensor) -> Tensor:
        return logits.argmax(-1)


def states_and_weight(model: str, texts: Path) -> tuple[Tensor, Tensor]:
    """Final states (ROWS, hidden), shuffled with seed 0, and the LM head's weights (vocabulary, hidden)."""
    tokenizer, decoder = (
        AutoTokenizer.from_pretrained(model),
        AutoModelForCausalLM.from_pretrained(model).eval(),
    )
    found: list[Tensor] = []
    with texts.open(encoding="utf-8") as lines:
        for row in map(json.loads, itertools.islice(lines, 600)):
            text = f"{row['instruction']} {row.get('output', '')}"
            tokens = tokenizer(text, return_tensors="pt", truncation=True, max_length=80).input_ids
            found.append(decoder.model(tokens).last_hidden_state[0])
            if sum(map(len, found)) >= ROWS:
                break
    states = torch.cat(found)
    order = torch.randperm(len(states), generator=torch.Generator().manual_seed(0))[:ROWS]
    return states[order], decoder.lm_head.weight.detach()


def timed(way: Callable[[Tensor], Tensor], batches: tuple[Tensor, ...]) -> tuple[float, list[Tensor]]:
    """Milliseconds a batch, and what came of each; the first one is run before it counts."""
    way(batches[0])
    times, found = [], []
    for batch in batches:
        start = time.perf_counter()
        found.append(way(batch))
        times.append(1000 * (time.perf_counter() - start))
    return mean(times), found


if __name__ == "__main__":
    main()
