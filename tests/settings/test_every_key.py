"""Every key of the data settings and every known column: changing it changes something.

The cases are made from the types, so that a new key or column without an effect fails here: it
needs another value in `OTHER`, and must then change what is loaded, or be refused.
"""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from fedp2eft.data.clients import ClientData
from fedp2eft.data.files import WHO, client_from_file, clients_from_files
from fedp2eft.data.known import KNOWN
from fedp2eft.data.nodes import KNOWN as NODE_KEYS
from fedp2eft.data.nodes import clients_of_node
from fedp2eft.data.registry import DATASETS, load_clients
from fedp2eft.errors import UserError
from fedp2eft.settings.data import ClientFile, DataSettings

LANGUAGES = ("aa", "bb", "cc")
OTHER: dict[str, Any] = {
    "languages": ["aa"],
    "new_languages": ["cc"],
    "clients_per_language": 3,
    "alpha": 0.01,
    "max_train": 2,
    "max_test": 1,
    "proportions": "both",
    "seed": 1,
    "partition": "reference",
    "path": "other",
    "files": {"ann": ClientFile("rows.jsonl")},
    "text_columns": ["title", "text"],
    "label_column": "topic",
    "target_column": "title",
    "labels": ["c", "b", "a"],
    "test_fraction": 0.5,
    "train_split": "train+validation",
    "test_split": "validation",
    "pool_train": 8,
    "pool_test": 4,
    "revision": "main",
    "unique": True,
    "holdout": 0.5,
    "texts": "one-token",
    "merge_clients": True,
}
"""Setting -> a value that is not its default."""
BASES: dict[str, dict[str, Any]] = {
    # Italian has the one text that the shipped rows have twice
    "debian-descriptions": {"languages": ["it", "fr"], "clients_per_language": 2},
    "libreoffice-help": {"languages": ["fr", "de"], "clients_per_language": 2},
    # four train rows as a client wants them, and all test rows: too few of some labels
    **{n: {"path": n, "clients_per_language": 2, "max_train": 4} for n in (*KNOWN, "hub")},
    "fed-aya": {"path": "aya.json"},
    "files": {"path": "rows.jsonl"},
    "nodes": {"labels": ["a", "b", "c"]},
}
"""Data set -> the settings that a case changes one of."""
REFUSED = {("files", "files"), ("hub", "revision"), ("fed-aya", "languages")}
"""Used by the data set, and refused beside what `BASES` says."""
SPECIAL: dict[tuple[str, str], dict[str, Any]] = {
    ("debian-descriptions", "languages"): {"languages": ["fr"]},
    ("debian-descriptions", "new_languages"): {"new_languages": ["ko"]},
    ("libreoffice-help", "languages"): {"languages": ["fr"]},
    ("libreoffice-help", "new_languages"): {"new_languages": ["ja"]},
    ("libreoffice-help", "path"): {"path": "other/help.jsonl"},
    ("nodes", "label_column"): {"labels": ["z", "y", "x"]},
}
"""(Data set, setting) -> other values, or further settings that the value needs."""


def rows(tag: str, count: int, labels: Any = "abc") -> list[dict[str, str]]:
    """Every fifth text is the last but one before it."""
    return [
        {
            "text": f"{tag} {n - 2 * (n % 5 == 4)}",
            "title": f"t {n}",
            "label": labels[n % 3],
            "topic": "xyz"[n % 2],
        }
        for n in range(count)
    ]


def write(path: Path, made: list[dict[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return path


def copy(folder: Path, name: str) -> None:
    """A data set by language as `KNOWN` says that its columns are called."""
    source = KNOWN.get(name)
    columns = source.text_columns if source else ("text",)
    for language in LANGUAGES:
        for split, count in (("train", 40), ("validation", 20), ("test", 30)):
            made = rows(
                f"{folder.parent.name} {language} {split}",
                count,
                source.labels if source else "abc",
            )
            named = [
                {
                    **row,
                    **{column: f"{row['text']} {column}" for column in columns},
                    (source and source.label_column) or "label": row["label"],
                }
                for row in made
            ]
            write(folder / language / f"{split}.jsonl", named)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("keys")
    for name in (*KNOWN, "hub"):
        copy(home / name, name)
        copy(home / "other" / name, name)
    for place in (home, home / "other"):
        made = [{**row, "client": "xy"[n % 2]} for n, row in enumerate(rows(place.name, 40))]
        write(place / "rows.jsonl", made)
        people = {
            f"p{n:02d}": [
                {"instruction": f"{place.name} {k // 2}", "response": "r", "language": "fr"}
                for k in range(8)
            ]
            for n in range(38)
        }
        (place / "aya.json").write_text(json.dumps(people))
    help_rows = [
        {"title": f"{n // 2}", "text": "x", "language": lang, "pool": pool, "split": split,
         "label": "ab"[n % 2]}
        for lang in ("fr", "de") for pool in ("seen", "unseen") for split in ("train", "test")
        for n in range(8)
    ]  # fmt: skip
    write(home / "other/help.jsonl", help_rows)
    return home


def loaded(folder: Path, dataset: str, **changes: Any) -> Any:
    """What the settings load, as values that can be compared."""
    settings = DataSettings(dataset, **(BASES[dataset] | changes))
    if settings.path:
        settings.path = str(folder / settings.path)
    settings.files = {n: replace(f, path=str(folder / f.path)) for n, f in settings.files.items()}
    if dataset == "nodes":
        load_clients(settings)
        node = {"client": "ann", "path": str(folder / "rows-of-one.jsonl")}
        write(Path(node["path"]), rows("one", 20))
        return seen(clients_of_node(node, settings))
    return seen(load_clients(settings))


def seen(federation: ClientData) -> Any:
    clients = [
        (c.name, c.language, c.pool, [list(federation.rows(r).items()) for r in (c.train, c.test)])
        for c in federation.clients
    ]
    columns = (federation.text_columns, federation.label_column, federation.target_column)
    return federation.labels, columns, clients


KEYS = [f.name for f in fields(DataSettings) if f.name != "dataset"]


@pytest.mark.parametrize("dataset", list(DATASETS))
def test_every_setting_changes_what_is_loaded_or_is_refused(folder: Path, dataset: str) -> None:
    before = loaded(folder, dataset)
    assert loaded(folder, dataset) == before
    for key in KEYS:
        changes = {key: OTHER[key], **SPECIAL.get((dataset, key), {})}
        if key == "path" and "path" in BASES[dataset]:
            changes["path"] = f"other/{BASES[dataset]['path']}"
        if key in DATASETS[dataset].unused or (dataset, key) in REFUSED:
            with pytest.raises(UserError):
                loaded(folder, dataset, **changes)
        else:
            assert loaded(folder, dataset, **changes) != before, key


@pytest.mark.parametrize("column", WHO)
@pytest.mark.parametrize("way", ["all", "own", "personalize", "evaluate", "node"])
def test_every_column_changes_what_is_loaded_or_is_refused(
    tmp_path: Path, column: str, way: str
) -> None:
    values = {"pool": ("seen", "unseen"), "split": ("train", "test")}.get(column, ("de", "fr"))

    def load(made: list[dict[str, str]]) -> Any:
        path = write(tmp_path / "rows.jsonl", made)
        if way == "all":
            return seen(clients_from_files(DataSettings(path=str(path))))
        if way == "own":
            return seen(clients_from_files(DataSettings(files={"ann": ClientFile(str(path))})))
        if way == "node":
            settings = DataSettings("nodes", labels=["a", "b", "c"])
            return seen(clients_of_node({"client": "ann", "path": str(path)}, settings))
        return seen(
            client_from_file(path, DataSettings(test_fraction=0), only_test=way == "evaluate")
        )

    made = rows("r", 24)
    before = load(made)
    try:
        after = load([{**row, column: values[n // 3 % 2]} for n, row in enumerate(made)])
    except UserError:
        return
    kept = [[dict(part) for part in client[3]] for client in after[2]]
    texts = [part["text"] for client in kept for part in client]
    assert texts != [dict(part)["text"] for client in before[2] for part in client[3]]


def test_every_fact_of_a_client_file_and_a_node_changes_what_is_loaded(tmp_path: Path) -> None:
    one, two = (str(write(tmp_path / f"{n}.jsonl", rows(n, 20))) for n in "pq")
    other = {"path": two, "language": "fr", "pool": "unseen", "test_path": two}
    before = seen(clients_from_files(DataSettings(files={"ann": ClientFile(one)})))
    for item in fields(ClientFile):
        file = replace(ClientFile(one), **{item.name: other[item.name]})
        assert seen(clients_from_files(DataSettings(files={"ann": file}))) != before, item.name
    node = {"client": "ann", "path": one}
    settings = DataSettings("nodes", labels=["a", "b", "c"], target_column="title")
    before = seen(clients_of_node(node, settings))
    columns = {
        "client": "bo",
        "text-columns": "topic",
        "label-column": "tag",
        "target-column": "tag",
    }
    for key in set(NODE_KEYS) - {"keep"}:  # a folder; see test_deployment
        value = other.get(key.replace("-", "_"), columns.get(key))
        made = [{**row, "tag": row["label"]} for row in rows("p", 20)]
        write(Path(one), made)
        assert seen(clients_of_node({**node, key: str(value)}, settings)) != before, key


def test_classes_without_a_column_of_them_are_refused() -> None:
    with pytest.raises(UserError, match=r"data\.labels names classes and data\.label_column is nu"):
        load_clients(DataSettings("nodes", labels=["a"], label_column=None))
