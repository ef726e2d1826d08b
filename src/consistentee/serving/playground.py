"""The playground: one page that holds all it shows and asks no other host for anything.

A server has it at `/`. It is the same for all models of a kind and says nothing of this one: what it shows it asks
`/layers` for, with the bearer token where one is needed. An exported folder has the classifier's page with the graph in
place of the server. Templates, style sheets and scripts lie in `page/`.
"""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from consistentee import __version__
from consistentee.serving.html_theme import PAGE_FILES, content_policy, with_theme

CONNECTS = "connect-src 'self'; frame-ancestors 'none'"
"""The page's script may ask this server, and no page of others may show it in a frame."""

SCRIPTS = {
    "classifier": ("elements", "server", "classifier_server", "classifier_playground"),
    "generator": ("elements", "server", "generator_playground"),
    "web": ("elements", "classifier_graph", "classifier_playground"),
}
"""What a page's script is made of, in this order."""


def playground_page(kind: str) -> tuple[bytes, dict[str, str]]:
    """The page for a kind of service, `classifier` or `generator`, and the headers it is sent with."""
    style, script = _style_and_script(kind)
    page = _page(kind, style=style, script=script, command="consistentee serve")
    headers = {
        "content-security-policy": content_policy(style, script, more=CONNECTS),
        "cache-control": "no-cache",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }
    return page.encode(), headers


def web_page(megabytes: float) -> str:
    """The classifier's page for an exported folder; its policy stands in it, as a file server sends none.

    Args:
        megabytes: of the graph, which the page says while it loads.
    """
    style, script = _style_and_script("web")
    # WebAssembly is compiled, and modules of the folder run; both from this host alone.
    policy = content_policy(style, script, scripts="'self' 'wasm-unsafe-eval'", more="connect-src 'self'")
    values = {"policy": policy, "megabytes": round(megabytes), "command": "consistentee export"}
    return _page("web", style=style, script=script, **values)


def _style_and_script(kind: str) -> tuple[str, str]:
    """The scripts stand in one function, so that nothing of them is global."""
    style = with_theme((PAGE_FILES / "playground.css").read_text(encoding="utf-8"))
    parts = [(PAGE_FILES / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS[kind]]
    return style, '(() => {\n"use strict";\n' + "\n".join(parts) + "})();\n"


def _page(kind: str, **values: Any) -> str:
    environment = Environment(
        loader=FileSystemLoader(PAGE_FILES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(f"{kind}_playground.html").render(**values, version=__version__)
