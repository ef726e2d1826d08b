"""Every link of a built site leads somewhere: `python .ci/check_links.py site`.

Links to other pages, to anchors in them and to files must exist; pictures, scripts and styles must be the site's own.
Links to other hosts are not followed: there is no network here. Exits with 1 and the list of what is wrong.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """Anchors of a page, its links, and what it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.loaded: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what a tag names."""
        found = {name: value for name, value in attrs if value is not None}
        self.anchors |= {found[name] for name in ("id", "name") if name in found}
        if tag == "a" and "href" in found:
            self.links.add(found["href"])
        elif tag == "link" and "href" in found:
            self.loaded.add(found["href"])
        if tag != "a" and "src" in found:
            self.loaded.add(found["src"])


def main() -> None:
    """Read every page, then look up every link."""
    site = Path(sys.argv[1]).resolve()
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    if not pages:
        raise SystemExit(f"{sys.argv[1]} must hold HTML pages. Run make docs.")
    wrong = [
        f"{path.relative_to(site)}: {link}: {fault}"
        for path, page in pages.items()
        for link in sorted(page.links | page.loaded)
        if (fault := fault_of(link, path, site, pages, loaded=link in page.loaded))
    ]
    if wrong:
        raise SystemExit("\n".join([*wrong, f"{len(wrong)} links are wrong."]))
    print(
        f"{sum(len(page.links | page.loaded) for page in pages.values())} links of {len(pages)} pages are right."
    )


def fault_of(link: str, page: Path, site: Path, pages: dict[Path, Page], *, loaded: bool) -> str | None:
    """What is wrong with a link of a page, or None."""
    parts = urlsplit(link)
    if parts.scheme == "data":
        return None
    if parts.scheme or parts.netloc:
        return "is loaded from another host" if loaded else None
    name = unquote(parts.path)
    start = site if name.startswith("/") else page.parent
    target = (start / name.lstrip("/")).resolve() if name else page
    if target.is_dir():
        target /= "index.html"
    if not target.is_relative_to(site) or not target.is_file():
        return "there is no such file"
    anchor = unquote(parts.fragment)
    if anchor and target in pages and anchor not in pages[target].anchors:
        return "there is no such anchor"
    return None


if __name__ == "__main__":
    main()
