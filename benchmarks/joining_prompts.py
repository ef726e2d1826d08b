"""Prompts that join a running batch beside prompts that wait until it is through: tokens per second, time to the first.

    python benchmarks/joining_prompts.py MODEL --texts FILE --rates 0.3 0.6 --seconds 40 --json FILE

One process: the server's own thread writes, and an open loop of Poisson arrivals asks, without HTTP. The two ways take
turns with the same arrivals, prompts and lengths (uniform up to `--longest`). The way that waits is what the server did
before prompts could join: a batch of those that wait, and nobody else until it is through. Greedy, with the model's
saved exits, or at full depth where it has none.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from consistentee.atomic_files import write_json
from consistentee.data.files import read_texts
from consistentee.inference.timing import environment
from consistentee.models.loaded import LoadedGenerator, load_model
from consistentee.pipelines.decoding_options import DecodingOptions
from consistentee.pipelines.generator import TextGenerator
from consistentee.serving.generation import MOST_ROWS, GeneratorService
from consistentee.serving.requests import ServerLimits

LONGEST_PROMPT = 32
"""Tokens of a prompt; longer texts are cut."""


class WaitingService(GeneratorService):
    """Prompts that arrive wait until the batch is through."""

    def _newcomers(self, options: DecodingOptions, room: int) -> Any:
        return [] if room < MOST_ROWS else super()._newcomers(options, room)


WAYS: dict[str, type[GeneratorService]] = {"joining": GeneratorService, "waiting": WaitingService}


@dataclass
class Figures:
    """What was measured: seconds, tokens, and in ms times to first tokens and the gaps between tokens of a text."""

    seconds: float = 0.0
    tokens: int = 0
    first_ms: list[float] = field(default_factory=list[float])
    gap_ms: list[float] = field(default_factory=list[float])

    def summary(self) -> dict[str, float]:
        """Tokens per second, median and 95th percentile."""
        found = {"texts": len(self.first_ms), "tokens_per_second": self.tokens / self.seconds}
        for name, values in (("first_token", self.first_ms), ("gap", self.gap_ms)):
            found[f"{name}_p50_ms"], found[f"{name}_p95_ms"] = np.percentile(values, (50, 95)).tolist()
        return found


async def load(
    service: GeneratorService, prompts: list[list[int]], rate: float, seconds: float, longest: int, seed: int
) -> Figures:
    """Ask at a mean rate for some time, then wait for the texts."""
    rng, figures = np.random.default_rng(seed), Figures()
    options = service.generator.check(DecodingOptions())

    async def ask(due: float, prompt: list[int], limit: int) -> None:
        before = 0.0
        async for event in service.texts([prompt], [limit], options):
            now = time.perf_counter()
            if event.exit_layer is None:
                continue
            if before:
                figures.gap_ms.append(1000 * (now - before))
            else:
                figures.first_ms.append(1000 * (now - due))
            before = now
            figures.tokens += 1

    begun = due = time.perf_counter()
    tasks: list[asyncio.Task[None]] = []
    while True:
        due += float(rng.exponential(1 / rate))
        if due - begun > seconds:
            break
        prompt, limit = prompts[int(rng.integers(len(prompts)))], int(rng.integers(1, longest + 1))
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.ensure_future(ask(due, prompt, limit)))
    await asyncio.gather(*tasks)
    figures.seconds = time.perf_counter() - begun
    return figures


async def measure(generator: TextGenerator, prompts: list[list[int]], given: Any) -> list[dict[str, Any]]:
    """Every rate, the two ways in turn."""
    limits = ServerLimits(deadline_ms=1e9)
    services = {name: kind(generator, limits=limits) for name, kind in WAYS.items()}
    rows: list[dict[str, Any]] = []
    for service in services.values():
        service.start()
        await load(service, prompts, 20.0, 0.2, 4, 0)  # kernels, weights laid out
    for number, rate in enumerate(given.rates):
        row: dict[str, Any] = {"rate": rate}
        for name in sorted(WAYS, reverse=bool(number % 2)):
            found = await load(
                services[name], prompts, rate, given.seconds, given.longest, given.seed + number
            )
            row[name] = found.summary()
            print(
                f"{rate:g}/s {name}: " + ", ".join(f"{key} {value:.1f}" for key, value in row[name].items())
            )
        rows.append(row)
    for service in services.values():
        await service.stop()
    return rows


def render(report: dict[str, Any]) -> str:
    """The rows of the table in docs/serve.md."""

    def cell(found: dict[str, float]) -> str:
        first = " / ".join(f"{found[f'first_token_{share}_ms'] / 1000:.1f}" for share in ("p50", "p95"))
        gap = " / ".join(f"{found[f'gap_{share}_ms']:.0f}" for share in ("p50", "p95"))
        return f"{found['tokens_per_second']:.1f}, {first}, {gap}"

    return "\n".join(
        f"| {load['rate']:g} ({load['joining']['texts']} texts) | {cell(load['joining'])} | {cell(load['waiting'])} |"
        for load in report["loads"]
    )


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.3, 0.6])
    parser.add_argument("--seconds", type=float, default=40)
    parser.add_argument("--longest", type=int, default=48)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    generator = TextGenerator(load_model(given.model, LoadedGenerator, device="cpu"))
    texts = [" ".join(text) for text in read_texts(given.texts)][:200]
    prompts = [generator.encode_text(text)[:LONGEST_PROMPT] for text in texts]
    report = {
        "environment": environment(torch.device("cpu"), given.seed),
        "workload": {
            "model": Path(given.model).name,
            "texts": given.texts.name,
            "seconds": given.seconds,
            "longest": given.longest,
            "threads": given.threads,
        },
        "loads": asyncio.run(measure(generator, prompts, given)),
    }
    if given.json is not None:
        write_json(given.json, report)


if __name__ == "__main__":
    main()
