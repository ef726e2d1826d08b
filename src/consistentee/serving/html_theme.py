"""What pages of this library share: the style sheet, and the policy under which a page loads and runs nothing else.

The pages of `consistentee report` (`evaluation/html_page.py`) and the playground of the server are made with it.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

PAGE_FILES = Path(__file__).with_name("page")


def with_theme(style: str) -> str:
    """A page's style sheet, the shared one before it."""
    return (PAGE_FILES / "theme.css").read_text(encoding="utf-8") + style


def content_policy(style: str, script: str, *, scripts: str = "", more: str = "") -> str:
    """A Content-Security-Policy under which nothing is loaded, and nothing but this style and this script is used.

    Args:
        style, script: what stands in the page.
        scripts: what else may run, such as "'self'".
        more: further directives.
    """
    style_hash, script_hash = (
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)
    )
    also = f" {scripts}" if scripts else ""
    policy = (
        f"default-src 'none'; img-src data:; style-src 'sha256-{style_hash}'; script-src 'sha256-{script_hash}'{also}; "
        "base-uri 'none'; form-action 'none'"
    )
    return f"{policy}; {more}" if more else policy
