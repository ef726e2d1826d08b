"""Hooks of mkdocs: links that exit docs/ go where the site has what they name.

Pages of docs/ are read in the repository as well, so they link to its other files by path. CHANGELOG.md and the like
become pages of the site, README.md is its home page, and any other file (kept figures) is copied into it under its own
path.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File
from pymdownx.slugs import slugify

ROOT = Path(__file__).resolve().parents[1]
ROOT_PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
PLACES = {**ROOT_PAGES, "README.md": "index.md"}
LINK = re.compile(r"(\]\()(?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?(\))")


def on_config(config: Any) -> Any:
    """Headings get the anchors that GitHub gives them."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = slugify(case="lower")
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of the repository's root, and the files outside docs/ that pages link to."""
    for name, place in ROOT_PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, place, content=text))
    wanted: set[str] = set()
    for page in files.documentation_pages():
        for match in LINK.finditer(page.content_string):
            path = repository_path(page.src_uri, match[2])
            if not path.startswith("docs/") and path not in PLACES and (ROOT / path).is_file():
                wanted.add(path)
    for path in sorted(wanted):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite the links of a page."""

    def rewritten(match: re.Match[str]) -> str:
        before, link, anchor, after = match.groups()
        path = repository_path(page.file.src_uri, link)
        place = PLACES.get(path, path.removeprefix("docs/"))
        start = posixpath.dirname(page.file.src_uri) or "."
        return f"{before}{posixpath.relpath(place, start)}{anchor or ''}{after}"

    return LINK.sub(rewritten, markdown)


def on_post_page(output: str, **_: Any) -> str:
    """Wide tables can be scrolled by keyboard (the theme sees to blocks of code), and the search has a name."""
    output = re.sub(r"<table>(?=\n<thead>\n<tr>\n(?:<th[^\n]*\n){5})", '<table tabindex="0">', output)
    search = 'data-md-component="search" role="dialog"'
    return output.replace(search, f'{search} aria-label="Search"')


def repository_path(src_uri: str, link: str) -> str:
    """Where a link of a page points to, from the root of the repository."""
    of_root = {place: name for name, place in ROOT_PAGES.items()}
    page = PurePosixPath(of_root.get(src_uri, f"docs/{src_uri}"))
    return os.path.normpath(page.parent / link).replace(os.sep, "/")
