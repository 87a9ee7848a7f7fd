"""Local copies of known data sets: made-up rows in the hub's layouts and in the authors' own."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from fedp2eft.data.known import KNOWN
from fedp2eft.data.registry import load_clients
from fedp2eft.errors import UserError
from fedp2eft.settings.data import DataSettings

Row = dict[str, Any]
TOPICS = KNOWN["sib-200"].labels


def news(language: str, split: str, rows: int) -> list[Row]:
    return [
        {
            "category": ("business", "health", "sports")[n % 3],
            "headline": f'"{language}" {split} {n}',
            "text": f"one\ntwo\t{n}",
            "url": "x",
        }
        for n in range(rows)
    ]


def topics(language: str, split: str, rows: int) -> list[Row]:
    names = [(split, n) for n in range(rows)]
    return [
        {"index_id": str(n), "category": TOPICS[n % 3], "text": f"{language} {part} {n}"}
        for part, n in names
    ]


def write(path: Path, rows: list[Row], quoting: Any = csv.QUOTE_MINIMAL) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
        return
    with path.open("w", newline="", encoding="utf-8") as file:
        if quoting is None:
            lines = ["\t".join(rows[0]), *("\t".join(row.values()) for row in rows)]
            file.write("\n".join(lines) + "\n")
        else:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t", quoting=quoting)
            writer.writeheader()
            writer.writerows(rows)


def load(dataset: str, folder: Path, **options: Any) -> Any:
    options = {"clients_per_language": 2} | options
    return load_clients(DataSettings(dataset, path=str(folder), **options))


def texts(federation: Any, pool: str) -> set[str]:
    rows = [row for c in federation.pool(pool) for part in (c.train, c.test) for row in part]
    return set(federation.rows(rows)[federation.text_columns[0]])


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("a local copy was looked for on the hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)


AUTHORS = ("data/{}/train.tsv", "data/{}/dev.tsv", "data/{}/test.tsv")
CONVERTED = ("{}/train/0000.parquet", "{}/validation/0000.parquet", "{}/test/0000.parquet")
SHARDED = (
    "{}/train-00000-of-00001.parquet",
    "{}/validation-00000-of-00001.parquet",
    "{}/test-00000-of-00001.parquet",
)


@pytest.mark.parametrize("layout", [AUTHORS, CONVERTED, SHARDED])
def test_masakhanews_in_all_layouts(tmp_path: Path, layout: tuple[str, ...]) -> None:
    for language in ("lin", "run"):
        for path, split, rows in zip(layout, ("train", "dev", "test"), (14, 6, 12), strict=True):
            made = news(language, split, rows)
            if layout is not AUTHORS:
                made = [
                    {"label": r["category"], "headline_text": f"{r['headline']} {r['text']}"}
                    for r in made
                ]
            write(tmp_path / path.format(language), made)
    federation = load("masakhanews", tmp_path)
    assert federation.labels == KNOWN["masakhanews"].labels
    assert {c.language for c in federation.clients} == {"lin", "run"}
    assert {(len(c.train), len(c.test)) for c in federation.clients} == {(5, 3)}
    found = texts(federation, "seen") | texts(federation, "unseen")
    # headline, blank, text; quotes of the writer are gone, those of the text are there
    expected = {
        f'"lin" {s} {n}' for s, c in (("train", 14), ("dev", 6), ("test", 12)) for n in range(c)
    }
    assert {text.split(" one\ntwo\t")[0] for text in found if "lin" in text} == expected
    for client in federation.clients:
        for text, label in zip(*federation.rows(client.train).values(), strict=True):
            assert label == ("business", "health", "sports")[int(text.split("\t")[1]) % 3]
    if layout is AUTHORS:
        assert federation.notes == ("lin, run: tab-separated, quoted",)


def test_a_copy_of_text_alone_is_drawn_as_the_same_rows_in_parquet(tmp_path: Path) -> None:
    """Unquoted tweets that begin with quotation marks keep them (AfriSenti)."""
    tweets = ['""so', '"yes" she said', "plain", '"', 'a "b" c', '"whole"']
    names = KNOWN["afrisenti"].labels
    for split, parquet, rows in (("train", "train", 24), ("test", "test", 12)):
        said = tweets if split == "train" else ['"as if ""quoted"""']
        made = [
            {"tweet": f"{n} {tweet}" if n % 2 else tweet, "label": names[n % 3]}
            for n in range(rows)
            for tweet in [said[n % len(said)]]
        ]
        write(tmp_path / "tsv" / "arq" / f"{split}.tsv", made, None)
        renamed = [{"text": row["tweet"], "label": row["label"]} for row in made]
        write(tmp_path / "parquet" / "arq" / f"{parquet}.parquet", renamed)
    one, other = (load("afrisenti", tmp_path / kind) for kind in ("tsv", "parquet"))
    assert one.notes[0] == "arq: tab-separated, not quoted"
    for mine, same in zip(one.clients, other.clients, strict=True):
        for part in ("train", "test"):
            rows = [f.rows(getattr(c, part)) for f, c in ((one, mine), (other, same))]
            assert rows[0] == rows[1]
    assert '1 "yes" she said' in texts(one, "seen") | texts(one, "unseen")


@pytest.fixture
def sentences(tmp_path: Path) -> Callable[..., Path]:
    def make(change: Callable[[list[Row]], list[Row]] = list) -> Path:
        for language in ("deu_Latn", "ace_Arab", "yor_Latn"):
            for split, rows in (("train", 16), ("dev", 4), ("test", 8)):
                made = topics(language, split, rows)
                made = change(made) if (language, split) == ("yor_Latn", "test") else made
                write(tmp_path / "data/annotated" / language / f"{split}.tsv", made)
        return tmp_path

    return make


@pytest.mark.parametrize("partition", ["per-pool", "reference"])
def test_sib_200_draws_the_same_sentences_in_all_languages(
    sentences: Callable[..., Path], partition: Any
) -> None:
    federation = load(
        "sib-200", sentences(), languages=["deu_Latn", "ace_Arab"], new_languages=["yor_Latn"],
        partition=partition,
    )  # fmt: skip
    assert federation.labels == TOPICS
    spoken: dict[tuple[str, str], set[str]] = {}
    for client in federation.clients:
        rows = federation.rows([*client.train, *client.test])["text"]
        mine = spoken.setdefault((client.language, client.pool), set())
        mine |= {text.split(" ", 1)[1] for text in rows}
        assert {text.split(" ", 1)[0] for text in rows} == {client.language}
    seen, unseen = spoken["deu_Latn", "seen"], spoken["deu_Latn", "unseen"]
    assert len(seen) == len(unseen) == 14
    assert not seen & unseen
    assert spoken["ace_Arab", "seen"] == seen
    assert spoken["ace_Arab", "unseen"] == spoken["yor_Latn", "new-language"] == unseen


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:-1], "yor_Latn has 7 rows and ace_Arab 8"),
        (lambda rows: [rows[1], rows[0], *rows[2:]], r"line 2: sentence 1 where ace_Arab has 0"),
    ],
)
def test_other_sentences_are_refused(
    sentences: Callable[..., Path], change: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load("sib-200", sentences(change))


def test_a_language_with_validation_alone_is_a_new_language(tmp_path: Path) -> None:
    for path in ("lin/train.tsv", "lin/test.tsv", "amh/dev.tsv", "amh/test.tsv"):
        write(tmp_path / path, news(path[:3], "x", 12))
    assert {c.language for c in load("masakhanews", tmp_path).clients} == {"lin"}
    new = load("masakhanews", tmp_path, new_languages=["amh"])
    assert {(c.language, c.pool) for c in new.clients if c.language == "amh"} == {
        ("amh", "new-language")
    }
    assert "amh: train rows from validation alone, there is no split train" in new.notes
    assert "lin: train rows from train alone, there is no split validation" in new.notes
    with pytest.raises(UserError, match="'amh' of masakhanews has no train split"):
        load("masakhanews", tmp_path, languages=["amh", "lin"])


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        load("afrisenti", tmp_path / "none", languages=["hau"])
    good = [{"tweet": f"t {n}", "label": "neutral"} for n in range(8)]
    for split in ("train", "test"):
        write(tmp_path / "hau" / f"{split}.tsv", good, None)
    with pytest.raises(UserError, match=r"'hua' is not in afrisenti\. Did you mean 'hau'\?"):
        load("afrisenti", tmp_path, languages=["hua"])
    write(tmp_path / "hau" / "train.csv", good)
    with pytest.raises(UserError, match=r"has the split train twice, train\.csv and train\.tsv"):
        load("afrisenti", tmp_path)
    (tmp_path / "hau" / "train.csv").unlink()
    write(tmp_path / "hau" / "train.tsv", [{**good[0], "label": "mixed"}, *good], None)
    with pytest.raises(
        UserError, match=r"train\.tsv, line 2: column 'label' holds the unknown cla"
    ):
        load("afrisenti", tmp_path)
    write(tmp_path / "hau" / "train.tsv", [{"body": "x", "label": "neutral"}], None)
    with pytest.raises(UserError, match=r"has no column 'tweet' or 'text'\. It has body, label"):
        load("afrisenti", tmp_path)


def test_class_ids_of_parquet_come_as_the_names_that_it_carries(tmp_path: Path) -> None:
    """A copy of the hub's Parquet holds ids, in an order of its own."""
    names = ["positive", "negative", "neutral"]
    features = datasets.Features(
        {"tweet": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
    )
    for split in ("train", "test"):
        rows = {
            "tweet": [f"{names[n % 3]} {n}" for n in range(12)],
            "label": [n % 3 for n in range(12)],
        }
        path = tmp_path / "hau" / f"{split}.parquet"
        path.parent.mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    federation = load("afrisenti", tmp_path)
    rows = federation.rows(range(len(federation.table)))
    assert all(text.split()[0] == label for text, label in zip(*rows.values(), strict=True))
    assert federation.labels == ("negative", "neutral", "positive")


def test_any_folder_by_language(tmp_path: Path) -> None:
    for split in ("train", "test"):
        rows = [{"body": f"{split} {n}", "topic": "ab"[n % 2]} for n in range(12)]
        write(tmp_path / "news" / "fr" / f"{split}.tsv", rows, None)
    columns = {"text_columns": ["body"], "label_column": "topic"}
    federation = load("hub", tmp_path / "news", **columns)
    assert (federation.name, federation.labels) == ("news", ("a", "b"))
    with pytest.raises(UserError, match=r"has no data\.revision"):
        load("hub", tmp_path / "news", revision="main", **columns)


def test_unique_leaves_each_text_of_a_language_once(tmp_path: Path) -> None:
    for split, numbers in (("train", [*range(20), *range(10)]), ("test", range(15, 35))):
        rows = [{"tweet": f"t {n}", "label": "neutral"} for n in numbers]
        write(tmp_path / "hau" / f"{split}.tsv", rows, None)

    def parts(**options: Any) -> list[list[str]]:
        federation = load("afrisenti", tmp_path, **options)
        return [
            [text for c in federation.clients for text in federation.rows(part(c))["tweet"]]
            for part in (lambda c: c.train, lambda c: c.test)
        ]

    train, test = parts()
    assert len(set(train)) < len(train)
    assert set(train) & set(test)
    train, test = parts(unique=True)
    assert sorted(train) == sorted(f"t {n}" for n in range(20))
    # 15 texts are left: halves of 7 and 8, and equal clients
    assert len(set(test)) == len(test) == 14
    assert set(test) <= {f"t {n}" for n in range(20, 35)}
