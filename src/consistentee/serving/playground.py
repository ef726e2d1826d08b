"""The playground at `/`: one page that holds all it shows and asks no other host for anything.

It is the same for all models of a kind and says nothing of this one: what it shows it asks `/layers` for, with the
bearer token where one is needed. Templates, style sheets and scripts lie in `page/`.
"""

from __future__ import annotations

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from consistentee import __version__
from consistentee.serving.html_theme import PAGE_FILES, content_policy, with_theme

CONNECTS = "connect-src 'self'; frame-ancestors 'none'"
"""The page's script may ask this server, and no page of others may show it in a frame."""


def playground_page(kind: str) -> tuple[bytes, dict[str, str]]:
    """The page for a kind of service, `classifier` or `generator`, and the headers it is sent with."""
    name = f"{kind}_playground"
    style = with_theme((PAGE_FILES / "playground.css").read_text(encoding="utf-8"))
    script = (PAGE_FILES / f"{name}.js").read_text(encoding="utf-8")
    environment = Environment(
        loader=FileSystemLoader(PAGE_FILES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(f"{name}.html").render(style=style, script=script, version=__version__)
    headers = {
        "content-security-policy": content_policy(style, script, more=CONNECTS),
        "cache-control": "no-cache",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }
    return page.encode(), headers
