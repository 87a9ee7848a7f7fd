"""LibreOffice's help: the sample, and making the whole from Debian's packages."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections import defaultdict
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from build_libreoffice_help import Page, build, main, pages_of, read_page
from fedp2eft.data.libreoffice import LANGUAGES, load_libreoffice, read_sample
from fedp2eft.data.registry import load_clients
from fedp2eft.data.table import read_table
from fedp2eft.errors import UserError
from fedp2eft.settings.data import DataSettings

HTML = """<!DOCTYPE html><html lang="{language}"><head><title>{title}</title></head><body>
<header><p class="paragraph">Menu</p></header>
<div id="Index"><p class="paragraph">Index</p></div>
<div id="DisplayArea" itemprop="softwareHelp">
<a name="bm"></a><h1 id="hd" dir="auto">{title}</h1>
<p id="par_1" class="paragraph" dir="auto"><span class="avis">{first}</span>
 with <span class="switchinline"><span hidden="true" id="MACx" class="MAC">Cmd</span><span
 hidden="true" id="defaultx">Ctrl</span></span> &amp; more.</p>
<div class="howtoget"><p class="howtogetheader">How</p><p class="embedded">Choose it.</p></div>
<p id="par_2" class="paragraph">{second}</p>
<h1>Another heading</h1><p class="paragraph"> </p>
</div>
<div id="SearchFrame"></div><footer><p class="paragraph">Debug</p></footer></body></html>"""
FIRST = {"en_US": "Sorts the selected rows", "fr": "Trie les lignes choisies", "ja": "行を並べ替え"}
SAME = "This second paragraph was never translated from English."


def page(language: str, title: str = "Sort", second: str = SAME) -> str:
    return HTML.format(language=language, title=title, first=FIRST[language], second=second)


def folder_of(parent: Path, language: str, pages: dict[str, str]) -> Path:
    """A folder as dpkg-deb -x makes it."""
    top = parent / language
    for path, html in pages.items():
        spoken = language.replace("_", "-")
        file = top / "usr/share/libreoffice/help" / spoken / "text" / f"{path}.html"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(html, encoding="utf-8")
    return top


def deb_of(folder: Path, member: str = "data.tar.xz") -> Path:
    """The folder as a .deb."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz") as archive:
        archive.add(folder, arcname=".")
    out = folder.with_suffix(".deb")
    raw = b"!<arch>\n"
    for name, data in (
        ("debian-binary", b"2.0\n"),
        ("control", b"odd"),
        (member, packed.getvalue()),
    ):
        head = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n"
        raw += head.encode() + data + b"\n" * (len(data) % 2)
    out.write_bytes(raw)
    return out


def rows_of(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in gzip.open(path, "rt", encoding="utf-8")]


def test_a_page_is_its_heading_and_running_text():
    read = read_page(page("fr", "Trier", "Deuxième."))
    assert read == Page("Trier", ("Trie les lignes choisies with Ctrl & more.", "Deuxième."))
    assert read_page("") == Page("", ())


@pytest.mark.parametrize("packed", [False, True])
def test_packages_become_rows_without_what_is_untranslated(tmp_path: Path, packed: bool):
    pages = {"scalc/01/sort": "Sort", "swriter/a": "Other", "shared/short": "S"}
    sources = []
    for language in FIRST:
        mine = {path: page(language, f"{title} {language}") for path, title in pages.items()}
        sources.append(folder_of(tmp_path, language, mine))
    if packed:
        sources = [deb_of(folder) for folder in sources]
    counts = build(sources, tmp_path / "out.jsonl.gz")
    assert counts == {"en_US": 3, "fr": 3}  # Japanese is too short without the English paragraph
    rows = rows_of(tmp_path / "out.jsonl.gz")
    [sort] = [row for row in rows if (row["language"], row["path"]) == ("fr", "scalc/01/sort")]
    assert sort["title"] == "Sort fr"
    assert sort["label"] == "scalc"
    assert sort["text"] == "Trie les lignes choisies with Ctrl & more."
    [english] = [r for r in rows if (r["language"], r["path"]) == ("en_US", "scalc/01/sort")]
    assert english["text"].split("\n") == ["Sorts the selected rows with Ctrl & more.", SAME]
    assert (sort["split"], sort["pool"]) == (english["split"], english["pool"])


def test_the_same_packages_make_the_same_bytes_and_a_page_is_on_one_side(tmp_path: Path):
    names = {f"scalc/p{n}": page("en_US", f"Title {n}") for n in range(200)}
    english = folder_of(tmp_path, "en_US", names)
    for name in ("a", "b"):
        build([english], tmp_path / f"{name}.jsonl.gz")
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()
    rows = rows_of(tmp_path / "a.jsonl.gz")
    share = {key: sum(row[key] == value for row in rows) / 200 for key, value in
             (("split", "test"), ("pool", "seen"))}  # fmt: skip
    assert 0.1 < share["split"] < 0.3
    assert 0.4 < share["pool"] < 0.6


def test_the_pages_that_most_languages_have_are_kept(tmp_path: Path):
    both, one = page("fr", "A", "Deuxième paragraphe."), page("fr", "B", "Deuxième paragraphe.")
    french = folder_of(tmp_path, "fr", {"scalc/x": both})
    english = folder_of(tmp_path, "en_US", {"scalc/x": page("en_US"), "scalc/y": one})
    assert build([french, english], tmp_path / "o.jsonl.gz", pages=1) == {"fr": 1, "en_US": 1}
    assert {row["path"] for row in rows_of(tmp_path / "o.jsonl.gz")} == {"scalc/x"}


def test_packages_that_are_none(tmp_path: Path):
    french = folder_of(tmp_path, "fr", {"scalc/x": page("fr")})
    out = tmp_path / "o.jsonl.gz"
    with pytest.raises(UserError, match="add libreoffice-help-en-us"):
        build([french], out)
    with pytest.raises(UserError, match="Language fr comes twice"):
        build([french, french], out)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no help pages"):
        build([tmp_path / "empty"], out)
    with pytest.raises(UserError, match="No such file"):
        pages_of(tmp_path / "none.deb")
    zst = f"{'data.tar.zst':<16}{0:<12}{0:<6}{0:<6}{100644:<8}{4:<10}`\n".encode()
    unreadable = {
        "odd": b"hello",
        "cut": deb_of(french).read_bytes()[:300],
        "headless": b"!<arch>\n",
        "zst": b"!<arch>\n" + zst + b"\x28\xb5\x2f\xfd",
    }
    for name, raw in unreadable.items():
        (tmp_path / f"{name}.deb").write_bytes(raw)
        with pytest.raises(UserError, match=r"cannot be read .*unpack it with dpkg-deb -x"):
            pages_of(tmp_path / f"{name}.deb")
    assert not out.exists()


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    french = folder_of(tmp_path, "fr", {"scalc/x": page("fr", "A", "Deuxième paragraphe.")})
    english = folder_of(tmp_path, "en_US", {"scalc/x": page("en_US")})
    out = tmp_path / "whole.jsonl.gz"
    assert main([str(out), str(french), str(english)]) is None
    assert capsys.readouterr().out == f"en_US 1, fr 1\n2 rows: {out}\n"
    assert read_table(out)["title"][:] == ["Sort", "A"]


# ── the sample ──────────────────────────────────────────────────────────────────────────────────


def test_the_sample_is_small_and_in_twelve_languages_or_more():
    path = files("fedp2eft.data") / "assets" / "libreoffice_help_sample.jsonl.gz"
    assert len(path.read_bytes()) < 300_000  # type: ignore[attr-defined]
    assert tuple(sorted(set(read_sample()["language"][:]))) == LANGUAGES
    assert len(LANGUAGES) >= 12
    text = (files("fedp2eft.data") / "assets" / "README.md").read_text(encoding="utf-8")
    assert "Mozilla Public License 2.0" in text
    assert f"LibreOffice help in {len(LANGUAGES)} languages" in text


def test_no_page_of_the_sample_crosses_train_and_test_or_the_pools():
    sides = defaultdict(set)
    table = read_sample()
    for path, split, pool in zip(*(table[c][:] for c in ("path", "split", "pool")), strict=True):
        sides[path].add((split, pool))
    assert len(sides) == 120
    assert {len(side) for side in sides.values()} == {1}


def test_the_sample_is_a_federation_of_prompts_and_responses():
    settings = DataSettings("libreoffice-help", new_languages=["ja"], clients_per_language=2)
    federation = load_clients(settings)
    assert (federation.text_columns, federation.target_column) == (("title",), "text")
    assert len(federation.clients) == 13 * 2 * 2 + 2
    assert {c.language for c in federation.pool("new-language")} == {"ja"}
    language = np.asarray(federation.table["language"][:])
    for client in federation.clients:
        assert set(language[client.train]) == {client.language}
        assert all(federation.answers(client.train, "causal_lm"))
    client = federation.clients[0]
    assert federation.answers(client.train, "classification").tolist() == [
        federation.labels.index(name) for name in federation.rows(client.train)["label"]
    ]


def test_another_file_is_one_line(tmp_path: Path):
    row = {
        "title": "a",
        "text": "b",
        "language": "fr",
        "pool": "seen",
        "split": "dev",
        "label": "x",
    }
    (tmp_path / "o.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match=r"split 'dev' is not one of .*build_libreoffice_help"):
        load_libreoffice(DataSettings(path=str(tmp_path / "o.jsonl")))
