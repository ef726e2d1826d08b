"""What worker processes give a server on this machine: answers per second with so many requests at a time, in turn.

    python benchmarks/serving_workers.py MODEL --texts FILE [--operating-point NAME] [--workers 2] [--json out.json]

One server computes on a thread with one thread of torch, one on a thread with N threads, one in N worker processes with
one thread each; the load client takes processor time on the same machine. Every label is compared with the engine's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from consistentee import Engine
from consistentee.atomic_files import write_text
from consistentee.data.files import read_texts
from consistentee.evaluation.load_client import AskedText, LoadClient, closed_load
from consistentee.evaluation.serving_load import served
from consistentee.inference.timing import environment


def main() -> None:
    """Start the servers, load them in turn, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--texts", required=True)
    parser.add_argument("--operating-point")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--at-once", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--seconds", type=float, default=8.0, help="of each load")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    texts = list(read_texts(options.texts))
    answers = Engine.from_pretrained(options.model, device="cpu").predict(
        texts, operating_point=options.operating_point
    )
    asked = [
        AskedText(parts[0] if len(parts) == 1 else list(parts), {}, answer.label)
        for parts, answer in zip(texts, answers, strict=True)
    ]
    command = ["consistentee", "serve", options.model, "--port", "0", "--device", "cpu"]
    if options.operating_point is not None:
        command += ["--operating-point", options.operating_point]
    kinds: dict[str, tuple[list[str], int]] = {
        "a thread, 1 thread": (command, 1),
        f"a thread, {options.workers} threads": (command, options.workers),
        f"{options.workers} workers": (
            [*command, "--workers", str(options.workers)],
            options.workers,
        ),
    }
    with ExitStack() as stack:
        urls = {
            name: stack.enter_context(served(full, threads))[0] for name, (full, threads) in kinds.items()
        }
        rows = asyncio.run(load(urls, asked, options.at_once, options.seconds, options.rounds))
    print("\n".join(table(rows)))
    if options.json is not None:
        found = {
            "rounds": options.rounds,
            "seconds": options.seconds,
            "rows": rows,
            "environment": environment(torch.device("cpu"), 0),
        }
        write_text(options.json, json.dumps(found, indent=1) + "\n")


async def load(
    urls: dict[str, str], asked: Sequence[AskedText], at_once: Sequence[int], seconds: float, rounds: int
) -> list[dict[str, Any]]:
    """Medians of the rounds, and of the rounds' ratios to the first server."""
    clients = {name: LoadClient(url) for name, url in urls.items()}
    rows: list[dict[str, Any]] = []
    for number in at_once:
        for client in clients.values():  # connections, kernels
            await closed_load(client, asked, number, 1.0)
        summaries: dict[str, list[dict[str, Any]]] = {name: [] for name in clients}
        for _ in range(rounds):
            for name, client in clients.items():
                summaries[name].append((await closed_load(client, asked, number, seconds)).summary())
        base = summaries[next(iter(clients))]
        for name, found in summaries.items():
            rows.append(
                {
                    "server": name,
                    "at_once": number,
                    "wrong": sum(each["wrong"] for each in found),
                    "statuses": sorted({status for each in found for status in each["statuses"]}),
                    **{
                        key: statistics.median(each[key] for each in found)
                        for key in ("answers_per_second", "p50_ms", "p95_ms")
                    },
                    "ratio": statistics.median(
                        each["answers_per_second"] / one["answers_per_second"]
                        for each, one in zip(found, base, strict=True)
                    ),
                }
            )
    for client in clients.values():
        await client.close()
    return rows


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each server and number of requests at a time."""
    lines = [
        "| requests at a time | server | answers/s | p50 ms | p95 ms | against the first |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['at_once']} | {row['server']} | {row['answers_per_second']:.1f} | {row['p50_ms']:.1f} | "
        f"{row['p95_ms']:.1f} | {row['ratio']:.2f}x |"
        for row in rows
    ]
    return lines


if __name__ == "__main__":
    main()
