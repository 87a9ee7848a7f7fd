"""What would be wrong with the built site is a warning, and so an error: `sphinx-build -W`.

Beside Sphinx's own checks (links to pages and headings, pages that no contents list names): the
site asks for nothing outside itself, every link inside it leads somewhere, and a page that names a
file of the project (`../configs/…`) names one that exists.
"""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from sphinx.application import Sphinx
from sphinx.util import logging

logger = logging.getLogger(__name__)
ROOT = Path(__file__).parents[2]
PROJECT_LINK = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)#]+)(?:#[^)]*)?\)")
REMOTE_CSS = re.compile(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//", re.I)


class _Page(HTMLParser):
    """The links, anchors and loaded files of one page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.anchors |= {found[name] for name in ("id", "name") if found.get(name)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        elif tag == "link" and found.get("rel") not in ("canonical",):
            self.loads.append(found.get("href", ""))
        elif found.get("src"):
            self.loads.append(found["src"])


def _name_project_files(app: Sphinx, name: str, content: list[str]) -> None:
    """Turn links to files of the project, which a site has not, into their names."""
    folder = (Path(app.srcdir) / name).parent

    def named(match: re.Match[str]) -> str:
        target = (folder / match[2]).resolve()
        if target.is_relative_to(app.srcdir):
            return match[0]
        if not target.exists():
            logger.warning("%s: there is no %s", name, match[2])
        path = f"`{target.relative_to(ROOT)}`"
        return path if match[1].strip("`") == path.strip("`") else f"{match[1]} ({path})"

    content[0] = PROJECT_LINK.sub(named, content[0])


def _check_site(app: Sphinx, error: Exception | None) -> None:
    if error or app.builder.format != "html":
        return
    out = Path(app.outdir)
    pages = {
        path.relative_to(out).as_posix(): _Page(path.read_text(encoding="utf-8"))
        for path in out.rglob("*.html")
    }
    for name, page in pages.items():
        for link in page.loads:
            if urlsplit(link).netloc:
                logger.warning("%s loads %s: nothing may be fetched from elsewhere", name, link)
        for link in page.links + page.loads:
            _check_link(name, link, pages, out)
    for path in out.rglob("*.css"):
        if REMOTE_CSS.search(path.read_text(encoding="utf-8")):
            logger.warning("%s loads something from elsewhere", path.name)


def _check_link(name: str, link: str, pages: dict[str, _Page], out: Path) -> None:
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return
    path = ((out / name).parent / unquote(parts.path)).resolve() if parts.path else out / name
    if not path.is_file():
        logger.warning("%s: the link %s leads nowhere", name, link)
        return
    target = pages.get(path.relative_to(out).as_posix())
    if parts.fragment and target and unquote(parts.fragment) not in target.anchors:
        logger.warning("%s: there is no place %s", name, link)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the checks."""
    app.connect("source-read", _name_project_files, priority=900)
    app.connect("build-finished", _check_site)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
