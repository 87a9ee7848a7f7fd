"""What a page holds, as a reader finds it, and folders to make pages of."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import yaml

from fedp2eft.files import write_json


@dataclass
class Seen(HTMLParser):
    """Sections, tables (rows of cell texts, by id or caption), scripts and addresses of a page."""

    text: str
    sections: list[str] = field(default_factory=list)
    tables: dict[str, list[list[str]]] = field(default_factory=dict)
    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    data: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        self._table: list[list[str]] | None = None
        self._cell = False
        self._script = ""
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        if tag == "section":
            self.sections.append(str(found["id"]))
        elif tag == "table":
            self._table = self.tables[found.get("id") or f"table {len(self.tables)}"] = []
        elif tag == "tr" and self._table is not None:
            self._table.append([])
        elif tag in ("td", "th") and self._table is not None:
            self._table[-1].append("")
            self._cell = True
        elif tag == "script":
            self._script = str(found.get("id", "code"))

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            self._table = None
        elif tag in ("td", "th"):
            self._cell = False
        elif tag == "script":
            self._script = ""

    def handle_data(self, data: str) -> None:
        if self._script:
            self.data[self._script] = self.data.get(self._script, "") + data
        elif self._cell and self._table:
            self._table[-1][-1] += data

    def rows(self, table: str) -> list[dict[str, str]]:
        """Its rows as mappings of head to text."""
        head, *rows = self.tables[table]
        return [dict(zip(head, row, strict=True)) for row in rows]


def copied(run: Path, to: Path) -> Path:
    """A run folder that a test may change."""
    return shutil.copytree(run, to)


def write_comparison(folder: Path, without: tuple[str, ...] = ()) -> Path:
    """A small comparison of two seeds, three languages and two methods; `without` some cells."""
    settings: dict[str, Any] = {
        "data": {"dataset": "debian-descriptions"},
        "evaluation": {"methods": ["base", "lora", "fedp2eft"], "ranks": [2], "pools": ["seen"]},
        "compare": {"seeds": [1, 2]},
    }
    folder.mkdir(parents=True)
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    for seed in (1, 2):
        for number, (method, rank) in enumerate((("base", 0), ("lora", 2), ("fedp2eft", 2))):
            name = f"standard-fl/s{seed}/seen/{method}-r{rank}"
            if name not in without:
                write_json(folder / "cells" / f"{name}.json", cell(method, rank, seed, number))
    (folder / "locks").mkdir()
    return folder


def cell(method: str, rank: int, seed: int, better: int) -> dict[str, Any]:
    clients = [
        {
            "client": f"{language}-seen-0{i}", "language": language, "examples": 20,
            "loss": 1.0, "correct": 8 + 2 * better + i + seed + at, "parameters": 100 * rank,
            "seconds": 0.5,
        }
        for at, language in enumerate(("de", "fr", "pl"))
        for i in range(2)
    ]  # fmt: skip
    return {
        "method": method, "base": "standard-fl", "rank": rank, "seed": seed, "pool": "seen",
        "clients": clients, "seconds": 3.0, "bytes_up": 1000, "bytes_down": 1000,
        "peak_memory": 10**9, "versions": {"fedp2eft": "0.1.0"}, "machine": "x86_64, 1 threads",
    }  # fmt: skip


def write_texts(run: Path, method: str, rank: int, client: str, said: str) -> None:
    """What a client's model wrote, in a run folder."""
    rows = [{"prompt": "Hello", "reference": "Hallo Welt", "generated": said}]
    about = {"client": client, "language": "de", "pool": "seen", "method": method, "rank": rank}
    write_json(
        run / "generations" / f"{method}-r{rank}" / f"{client}.json", {**about, "rows": rows}
    )


def add_line(path: Path, value: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value) + "\n")
