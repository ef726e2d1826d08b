"""One HTML page that holds all it shows: its templates, its file, and how figures and untrusted texts are written.

Templates, style sheet and script lie in `page/`. Texts, labels and names of files are untrusted: the templates escape
everything, and a Content-Security-Policy lets nothing be loaded and nothing run but the page's own script.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from consistentee import __version__
from consistentee.evaluation.svg_charts import BarBox, mini_bars
from consistentee.functional.criteria import digits
from consistentee.serving.html_theme import content_policy, with_theme

GENERATOR = "consistentee report"
"""How a page of ours begins to name what made it; only such a file is overwritten."""

LONGEST_SHOWN = 600
"""Characters of a text that the page shows."""

EMPTY = "(empty)"
PAGE = Path(__file__).with_name("page")


def check_report_file(path: Path) -> None:
    """Raise unless a report may be written to this name; to be called before a long computation.

    Raises:
        ValueError: a file is there that is no report of ours, and not empty.
        IsADirectoryError: it is a folder.
    """
    if path.is_dir():
        raise IsADirectoryError(f'"{path}" is a folder. Give the name of a file.')
    if not path.is_file():
        return
    with path.open("rb") as stream:
        start = stream.read(2048)
    if start and f'<meta name="generator" content="{GENERATOR}'.encode() not in start:
        raise ValueError(
            f'"{path}" is there and is no report of ours. Give another name, or remove the file.'
        )


def render_page(template: str, **values: Any) -> str:
    """A page of `page/`, with style, script and policy in place.

    Args:
        template: name of the file.
        values: what it shows; `title`, `eyebrow` and `sections` (id and name of each) for all pages.
    """
    environment = Environment(
        loader=FileSystemLoader(PAGE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= FILTERS
    style, script = ((PAGE / name).read_text(encoding="utf-8") for name in ("style.css", "script.js"))
    style = with_theme(style)
    return environment.get_template(template).render(
        style=style,
        script=script,
        policy=content_policy(style, script),
        generator=f"{GENERATOR} {__version__}",
        version=__version__,
        **values,
    )


def shown(text: object) -> str:
    """A text as it is shown: cut where it is very long, without control characters, and not empty."""
    whole = str(text)
    cut = whole[:LONGEST_SHOWN] + " \u2026" if len(whole) > LONGEST_SHOWN else whole
    clean = "".join(
        "\ufffd"
        if (char < " " and char not in "\n\t") or "\x7f" <= char < "\xa0" or "\ud800" <= char < "\ue000"
        else char
        for char in cut
    )
    return clean if clean.strip() else EMPTY


def isolated(text: object) -> str:
    """A text as shown, for the middle of a sentence: what is written from right to left turns nothing around it."""
    return f"\u2068{shown(text)}\u2069"


def _hundred(share: float | None, digits: int) -> str:
    return "" if share is None else f"{100 * share:.{digits}f}"


def percent(share: float, digits: int) -> str:
    """A share in percent, with its sign."""
    return f"{100 * share:.{digits}f}\u00a0%"


def span(interval: Sequence[float], digits: int, unit: str = "\u00a0%") -> str:
    """Both ends of an interval of a share in percent, with its sign."""
    return f"{100 * interval[0]:.{digits}f} to {100 * interval[1]:.{digits}f}{unit}"


def _signed(difference: float, digits: int) -> str:
    rounded = f"{100 * difference:+.{digits}f}"
    return rounded.replace("-", "\u2212") if float(rounded) else rounded[1:]


def _signed_span(interval: Sequence[float], digits: int) -> str:
    return " to ".join(_signed(end, digits) for end in interval)


def _heights(scores: Sequence[float], low: float, high: float, *size: int) -> list[BarBox]:
    return mini_bars([(score - low) / (high - low) for score in scores], *size)


def _shares(histogram: Sequence[int], top: float, *size: int) -> list[BarBox]:
    return mini_bars([count / sum(histogram) / top for count in histogram], *size)


FILTERS = {
    "shown": shown,
    "hundred": _hundred,
    "percent": percent,
    "span": span,
    "signed": _signed,
    "signed_span": _signed_span,
    "threshold": digits,
    "heights": _heights,
    "shares": _shares,
    "spoken": lambda values: ", ".join(f"{value:.2f}" for value in values),
    "spoken_shares": lambda counts: ", ".join(f"{100 * count / sum(counts):.0f}" for count in counts),
}
