"""The page about fleets: its tables and ratios are those of the kept files."""

from __future__ import annotations

import math
from typing import Any

import pytest

from benchmark_scripts import ROOT, missing, read, script

pytest.importorskip("simpy", reason="needs simpy, which `dev` brings")
PAGE = "docs/scale.md"
TEXT = (ROOT / PAGE).read_text(encoding="utf-8")
rendered: Any = script("render_fleet")
FIGURES: Any = read("serving", "fleet.json")


def test_tables() -> None:
    by_slo = FIGURES["by_slo"]
    for table in (
        rendered.times_table(FIGURES["measured"]),
        *map(rendered.goodput_table, by_slo),
        rendered.order_table(by_slo),
        rendered.transfer_table(by_slo),
        rendered.flat_table(by_slo),
        rendered.million_table(FIGURES["million"]),
        rendered.scaling_table(FIGURES["autoscaled"]),
    ):
        assert table in TEXT


def test_times_are_those_that_were_measured() -> None:
    assert FIGURES["measured"] == read("serving", "layer-times-e5-12l_m-cid.json")


def test_ratios() -> None:
    tight, loose = FIGURES["by_slo"]

    def of(found: Any, *names: str) -> float:
        for name in names:
            found = found[name]
        return found["per_core"]

    per_minute = 1e6 / 60
    order, queue = (
        of(loose, "fullest_first", "whole") / of(loose, "whole", "16"),
        of(tight, "one_queue") / of(tight, "whole", "16"),
    )
    on_top = of(loose, "fullest_first", "split") / of(loose, "fullest_first", "whole")
    best = of(tight, "fullest_first", "split")
    said = (
        f"take {math.ceil(per_minute / of(loose, 'whole', '16'))} cores of whole replicas with exits "
        f"(full depth: {math.ceil(per_minute / of(loose, 'full_depth', '16'))})",
        f"Splitting by depth takes {of(loose, 'split', '16') / of(loose, 'whole', '16'):.2f}x of what as many cores "
        f"take whole, {of(tight, 'split', '16') / of(tight, 'whole', '16'):.2f}x within {tight['slo_ms']:.0f} ms",
        f"layer go first take {order:.2f}x, and on one queue {queue:.2f}x within {tight['slo_ms']:.0f} ms",
        f"worth {on_top:.2f}x within {loose['slo_ms']:.0f} ms",
        f"worth {best / of(tight, 'one_queue'):.1f}x of one queue, {best / of(tight, 'whole', '16'):.1f}x of a "
        "balancer",
        f"{FIGURES['bytes_per_request']:,} bytes a text",
    )
    assert missing(PAGE, *said) == []


def test_the_check_on_ray() -> None:
    found = read("serving", "ray-e5-12l_m-cid.json")
    assert rendered.ray_table(found) in TEXT
    alone, one, two = (found["median"][way] for way in ("engine", "ray, 1 worker", "ray, 2 workers"))
    rounds = [
        f"{each['ray, 2 workers']['texts_per_second'] / each['ray, 1 worker']['texts_per_second']:.2f}x"
        for each in found["rounds"]
    ]
    costs = [f"{each['cpu_ms_per_text']:.2f}" for each in (alone, one, two)]
    said = (
        f"{costs[0]} ms alone and {costs[1]} and {costs[2]} ms in a worker",
        f"says {rendered.predicted_ms(FIGURES['measured']):.2f} ms",
        f"seen {two['texts_per_second'] / one['texts_per_second']:.2f}x in the median ({' and '.join(rounds)} in",
        f"{min(found['load_average']):.0f} to {max(found['load_average']):.0f} processes ready to run",
    )
    assert missing(PAGE, *said) == []
