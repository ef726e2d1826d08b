"""Retrofit's exits with a memory of the layers before, against the default: do they learn more of a frozen model?

    python benchmarks/side_networks.py MODEL --texts FILE... --judge FILE... --cache FOLDER [--only token row]

`token`: a transformer beside the frozen one, 64 wide, whose layer reads the states of the backbone's layer and its own
of the layer before, for every token (ladder side-tuning, arXiv:2206.06522); each exit reads both. `row`: each exit's
pooled vector goes into that of the next. All else, texts and figures are those of `ablate_retrofit.py`, with as many
texts for the exits as retrofit takes. An exit of `token` costs more than a default one, which the layers do not show.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from ablate_retrofit import DEFAULTS, Bench
from torch import Tensor, nn

from consistentee.heads.classifiers import AttentionPooling
from consistentee.models.sequence_classification import EarlyExitForSequenceClassification

KINDS = ("default", "token", "row")
SIDE_WIDTH, SIDE_HEADS = 64, 4


class SideLayer(nn.Module):
    """A layer of the transformer at the side, norms first: (batch, tokens, width) to the same."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.down = nn.Linear(hidden_size, SIDE_WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(SIDE_WIDTH) for _ in range(2))
        self.attention = nn.MultiheadAttention(SIDE_WIDTH, SIDE_HEADS, batch_first=True)
        self.feed_forward = nn.Sequential(
            nn.Linear(SIDE_WIDTH, 2 * SIDE_WIDTH), nn.GELU(), nn.Linear(2 * SIDE_WIDTH, SIDE_WIDTH)
        )

    def forward(self, before: Tensor | None, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        """What the side knows after one more layer of the backbone."""
        states = self.down(self.norm(hidden_states))
        states = states if before is None else before + states
        normed = self.norms[0](states)
        states = states + self.attention(normed, normed, normed, attention_mask == 0, need_weights=False)[0]
        return states + self.feed_forward(self.norms[1](states))


class ExitsWithMemory(nn.Module):
    """Attention exits of all layers but the last, and what they hand on; called layer by layer from the first."""

    def __init__(self, kind: str, num_layers: int, hidden_size: int, num_labels: int) -> None:
        super().__init__()
        queries, width = DEFAULTS["num_queries"], DEFAULTS["classifier_hidden_size"]
        self.kind = kind
        self.poolings = nn.ModuleList(AttentionPooling(hidden_size, queries) for _ in range(num_layers))
        read = queries * hidden_size + (SIDE_WIDTH if kind == "token" else 0)
        self.dense = nn.ModuleList(nn.Linear(read, width) for _ in range(num_layers))
        self.output = nn.ModuleList(nn.Linear(width, num_labels) for _ in range(num_layers))
        self.dropout = nn.Dropout(DEFAULTS["head_dropout"])
        if kind == "token":
            self.side = nn.ModuleList(SideLayer(hidden_size) for _ in range(num_layers))
            self.side_poolings = nn.ModuleList(AttentionPooling(SIDE_WIDTH, 1) for _ in range(num_layers))
        else:
            self.carry = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(num_layers))
        self._memory: Tensor | None = None

    def classifiers(self, index: int, hidden_states: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled state (batch, width) and logits (batch, classes)."""
        memory = None if index == 0 else self._memory
        pooled = self.poolings[index](hidden_states, attention_mask)
        if self.kind == "token":
            self._memory = self.side[index](memory, hidden_states, attention_mask)
            pooled = torch.cat([pooled, self.side_poolings[index](self._memory, attention_mask)], dim=-1)
            pooled = torch.tanh(self.dense[index](pooled))
        else:
            pooled = self.dense[index](pooled)
            pooled = torch.tanh(pooled if memory is None else pooled + self.carry[index](memory))
            self._memory = pooled
        return pooled, self.output[index](self.dropout(pooled))

    def forward(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits (batch, layers - 1, classes) of states (batch, tokens, layers - 1, hidden)."""
        both = [
            self.classifiers(index, layer, attention_mask) for index, layer in enumerate(states.unbind(2))
        ]
        return torch.stack([logits for _, logits in both], dim=1).float()


class SideBench(Bench):
    """`Bench` whose exits are of a kind."""

    kind = "default"

    def use(self, kind: str) -> None:
        """Train exits of this kind from now on."""
        self.kind, self._trained = kind, {}

    def new_exits(self, model: EarlyExitForSequenceClassification) -> Any:
        """Untrained exits."""
        if self.kind == "default":
            return super().new_exits(model)
        sizes = (model.num_layers - 1, model.config.hidden_size, model.config.num_classes)
        return ExitsWithMemory(self.kind, *sizes)


def main() -> None:
    """Train and judge each kind of exits; a line for each judged file and rule."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--texts", nargs="+", required=True)
    parser.add_argument("--judge", nargs="*", default=[])
    parser.add_argument("--exit-texts", type=int, default=28_050)
    parser.add_argument("--policy-texts", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--cache", type=Path)
    options = parser.parse_args()
    bench = SideBench(options)
    print("| exits | judged on | rule | at 2x | 2.5x | 3x | 4x | fastest at 99 % | 98 % |")
    print("|---" * 9 + "|")
    for kind in options.only:
        start = time.perf_counter()
        bench.use(kind)
        for judged, rules in bench.run({**vars(options), **DEFAULTS}, options.seed).items():
            for rule in ("policy", "confidence"):
                figures = " | ".join(f"{value:.2f}" for value in rules[rule])
                print(f"| {kind} | {judged} | {rule} | {figures} |", flush=True)
        print(f"{kind}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
