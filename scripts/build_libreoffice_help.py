"""Build the data set libreoffice-help from Debian's packages: title -> first paragraphs.

    python scripts/build_libreoffice_help.py whole.jsonl.gz libreoffice-help-*.deb

Debian has the same pages, at the same paths, in a package `libreoffice-help-<lang>` for each of
some thirty languages. Fetch them first, with `apt-get download libreoffice-help-fr
libreoffice-help-en-us …` on Debian or from https://packages.debian.org. Then set data.path to the
file that this script writes. The pages are LibreOffice's and its translators', under the MPL-2.0.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path

from fedp2eft.data.table import first_line
from fedp2eft.errors import UserError
from fedp2eft.files import write_whole

ENGLISH = "en_US"
PARAGRAPHS, CHARACTERS = 3, 600
"""The most that is taken of a page: so many paragraphs, none begun behind so many characters."""
SHORTEST = 30
"""Characters below which a page's text says too little to be a response."""
TEST_SHARE = 0.2


@dataclass(frozen=True)
class Page:
    """One help page in one language.

    Attributes:
        title: its heading.
        paragraphs: its running text.
    """

    title: str
    paragraphs: tuple[str, ...]


class _Reader(HTMLParser):
    """Takes the heading and the running text of a help page, without menus, notes and steps."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.title, self.paragraphs = "", list[str]()
        self._inside = False
        self._spans: list[bool] = []
        self._into: str | None = None
        self._text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        facts = dict(attrs)
        if tag == "div":
            # The page proper; what follows it are frames and a footer.
            self._inside = facts.get("id") == "DisplayArea" or (
                self._inside and facts.get("id") is None
            )
        elif tag == "span":
            # Of the wordings for several systems the one without a class is everybody else's.
            self._spans.append("hidden" in facts and "class" in facts)
        elif self._inside and (
            (tag == "h1" and not self.title) or (tag == "p" and facts.get("class") == "paragraph")
        ):
            self._into, self._text = tag, []

    def handle_data(self, data: str) -> None:
        if self._into and not any(self._spans):
            self._text.append(data)

    def handle_endtag(self, tag: str) -> None:
        if tag == "span" and self._spans:
            self._spans.pop()
        if tag != self._into:
            return
        self._spans = []
        said = " ".join("".join(self._text).split())
        if tag == "h1":
            self.title = said
        elif said:
            self.paragraphs.append(said)
        self._into = None


def read_page(html: str) -> Page:
    """Heading and running text of one page; both may be empty."""
    reader = _Reader()
    reader.feed(html)
    return Page(reader.title, tuple(reader.paragraphs))


def build(
    packages: Sequence[str | Path], out: str | Path, pages: int | None = None
) -> Counter[str]:
    """Write the pages of several packages as gzipped JSON lines: one row per language and page.

    Rows have `language` (as Debian's descriptions name it: `fr`, `pt_BR`), `path`, `label` (the
    part of LibreOffice: scalc, swriter, …), `title`, `text`, `split` and `pool`. Split and pool
    follow the page's path alone, so nothing of a page crosses train/test or seen/unseen in any
    language. Paragraphs that are the same in English, and so were not translated, are left out.

    Args:
        packages: `.deb` files, or folders that such a file was unpacked into; English among them.
        out: the file, ending in .jsonl.gz.
        pages: keep the so many pages that most languages have; None: all.

    Returns:
        Rows by language.

    Raises:
        UserError: a package that cannot be read, no English one, or two of one language.
    """
    found: dict[str, dict[str, Page]] = {}
    for package in packages:
        for language, mine in pages_of(Path(package)).items():
            if language in found:
                raise UserError(f"Language {language} comes twice, the second time in {package}.")
            found[language] = mine
    if ENGLISH not in found:
        raise UserError(
            "Untranslated paragraphs are found by the English pages: add libreoffice-help-en-us."
        )
    rows = list(_rows(found))
    if pages is not None:
        spread = Counter(row["path"] for row in rows)
        ranked = sorted(spread, key=lambda path: (-spread[path], _hash("page", path)))
        kept = set(ranked[:pages])
        rows = [row for row in rows if row["path"] in kept]
    lines = "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows)
    packed = gzip.compress(lines.encode(), mtime=0)  # no time of day: the same file every time
    write_whole(Path(out), lambda scratch: _write(scratch, packed))
    return Counter(row["language"] for row in rows)


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _rows(found: Mapping[str, Mapping[str, Page]]) -> Iterator[dict[str, str]]:
    for language in sorted(found):
        for path, page in sorted(found[language].items()):
            english = found[ENGLISH].get(path)
            same = set(english.paragraphs) if english and language != ENGLISH else set()
            text = _cut(paragraph for paragraph in page.paragraphs if paragraph not in same)
            if page.title and len(text) >= SHORTEST:
                yield {
                    "language": language,
                    "path": path,
                    "label": path.split("/")[0],
                    "title": page.title,
                    "text": text,
                    "split": "test" if _hash("split", path) < TEST_SHARE else "train",
                    "pool": "unseen" if _hash("pool", path) < 0.5 else "seen",
                }


def _cut(paragraphs: Iterable[str]) -> str:
    taken: list[str] = []
    for paragraph in paragraphs:
        if len(taken) == PARAGRAPHS or sum(map(len, taken)) + len(paragraph) > CHARACTERS:
            break
        taken.append(paragraph)
    return "\n".join(taken)


def _hash(what: str, path: str) -> float:
    """A number in [0, 1) that depends on the page's path alone."""
    return int.from_bytes(sha256(f"{what}\x1f{path}".encode()).digest()[:8], "big") / 2**64


def pages_of(package: Path) -> dict[str, dict[str, Page]]:
    """Language -> path -> page, of one package.

    Args:
        package: a `.deb` file, or a folder with its files.

    Raises:
        UserError: it is not there, is damaged, or holds no help pages.
    """
    found: dict[str, dict[str, Page]] = {}
    for name, data in _files(package):
        # …/help/fr/text/scalc/01/02120000.html
        parts = name.split("/")
        if not name.endswith(".html") or "help" not in parts:
            continue
        place = parts[parts.index("help") + 1 :]
        if len(place) < 4 or place[1] != "text":
            continue
        language = place[0].replace("-", "_")
        path = "/".join(place[2:]).removesuffix(".html")
        found.setdefault(language, {})[path] = read_page(data.decode("utf-8", "replace"))
    if not found:
        raise UserError(f"{package} holds no help pages: name a libreoffice-help-<lang> package.")
    return found


def _files(package: Path) -> Iterator[tuple[str, bytes]]:
    """Path and bytes of every file of a package."""
    if package.is_dir():
        for path in sorted(package.rglob("*.html")):
            yield path.relative_to(package).as_posix(), path.read_bytes()
        return
    try:
        with tarfile.open(fileobj=io.BytesIO(_data_member(package))) as archive:
            for member in archive:
                if member.isfile() and (stream := archive.extractfile(member)):
                    yield member.name, stream.read()
    except (OSError, tarfile.TarError, EOFError) as error:
        raise UserError(
            f"{package} cannot be read ({first_line(error)}): fetch it again, or unpack it with "
            "dpkg-deb -x and name the folder."
        ) from error


def _data_member(package: Path) -> bytes:
    """The archive inside a .deb that holds the package's files.

    A .deb is an ar archive: a line, then members behind headers of 60 bytes, at even offsets.
    """
    raw = package.read_bytes()
    if not raw.startswith(b"!<arch>\n"):
        raise tarfile.TarError("it is no Debian package")
    at = 8
    while at + 60 <= len(raw):
        name = raw[at : at + 16].decode("ascii", "replace").rstrip(" /")
        length = raw[at + 48 : at + 58].strip()
        if not length.isdigit():
            break
        size = int(length)
        if name.startswith("data.tar"):
            return raw[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    raise tarfile.TarError("it has no data archive")


def main(arguments: Sequence[str] | None = None) -> str | None:
    """Run the script; a mistake is returned as one line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", help="the file to write, ending in .jsonl.gz")
    parser.add_argument(
        "packages",
        nargs="+",
        help=".deb files, or folders that such a file was unpacked into; libreoffice-help-en-us "
        "among them, by which untranslated text is recognised",
    )
    parser.add_argument("--pages", type=int, help="keep only the pages that most languages have")
    chosen = parser.parse_args(arguments)
    try:
        rows = build(chosen.packages, chosen.out, chosen.pages)
    except UserError as error:
        return str(error)
    print(", ".join(f"{language} {count}" for language, count in sorted(rows.items())))
    print(f"{sum(rows.values())} rows: {chosen.out}")
    return None


if __name__ == "__main__":
    sys.exit(main())
