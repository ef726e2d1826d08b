"""The figures of `serving_load`, as a table and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from consistentee.errors import require_extra
from consistentee.evaluation.serving_load import SERVED, LoadReport


def load_table(report: LoadReport) -> Table:
    """Latencies and goodput by rate."""
    table = Table(title=f"{report.workload['model']} under load; SLO {report.slo_ms:.1f} ms")
    table.add_column("requests/s", justify="right")
    for name in SERVED:
        table.add_column(f"{name}: p50 / p95 / p99 ms", justify="right")
        table.add_column("goodput/s", justify="right")
    table.add_row("one at a time", *_cells(report.unloaded, with_goodput=False))
    for load in report.loads:
        table.add_row(f"{load['rate']:.0f}", *_cells(load))
    return table


def _cells(figures: dict[str, Any], *, with_goodput: bool = True) -> list[str]:
    cells: list[str] = []
    for name in SERVED:
        row = figures[name]
        values = [row[key] for key in ("p50_ms", "p95_ms", "p99_ms")]
        cells.append(" / ".join("-" if value is None else f"{value:.1f}" for value in values))
        cells.append(f"{row['goodput']:.1f}" if with_goodput else "")
    return cells


def load_lines(report: LoadReport) -> list[str]:
    """What else was found, in sentences."""
    exits, full, plain = (report.goodput(name) for name in SERVED)
    over = report.overload
    during = over["during"]
    memory = [over["resident_mb_before"], over["resident_mb_after"]]
    grown = "" if None in memory else f"; memory {memory[0]:.0f} MB before, {memory[1]:.0f} MB after"
    return [
        f"Goodput within the SLO: exits {exits:.1f}, full depth {full:.1f}, transformers {plain:.1f} answers/s.",
        f"A request takes {report.overhead_ms:.2f} ms (median) longer than Engine.predict of the same text.",
        f"Overload: {over['asked_per_second']:.0f} requests/s asked, answers by status {during['statuses']}, "
        f"{during['wrong']} wrong, p99 of accepted ones {_ms(during['p99_ms'])}{grown}; p50 before and after at half "
        f"the rate it can answer: {_ms(over['before']['p50_ms'])}, {_ms(over['after']['p50_ms'])}.",
    ]


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f} ms"


def plot_load(report: LoadReport, path: Path) -> None:
    """Percentiles and goodput over the rate, as PNG, PDF or SVG.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    pyplot: Any = require_extra("plot", "matplotlib.pyplot")
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
    rates = [load["rate"] for load in report.loads]
    for number, name in enumerate(SERVED):
        for key, style in (("p50_ms", "-"), ("p95_ms", "--")):
            values = [load[name][key] for load in report.loads]
            axes[0].plot(rates, values, style, color=f"C{number}", marker=".", label=f"{name}, {key[:3]}")
        axes[1].plot(
            rates,
            [load[name]["goodput"] for load in report.loads],
            color=f"C{number}",
            marker=".",
            label=name,
        )
    axes[0].axhline(report.slo_ms, color="grey", linewidth=0.8)
    axes[0].set(yscale="log", xlabel="requests per second", ylabel="latency (ms)")
    axes[1].set(xlabel="requests per second", ylabel=f"answers per second within {report.slo_ms:.0f} ms")
    for axis in axes:
        axis.legend(fontsize=7)
    figure.suptitle(f"{report.workload['model']}, {report.workload['threads']} thread(s)", fontsize=9)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
