"""From settings to a federation, and a federation in numbers."""

import json
import subprocess
import sys
from dataclasses import fields
from inspect import getdoc

import datasets
import numpy as np
import pytest

from fedp2eft.data.describe import describe, save_partition
from fedp2eft.data.registry import DATASETS, load_clients
from fedp2eft.errors import UserError
from fedp2eft.settings.data import ClientFile, DataSettings


def test_default_settings_load_all_languages():
    federation = load_clients(DataSettings())
    assert len(federation.clients) == 16 * 2 * 5


def test_settings_reach_the_loader():
    settings = DataSettings(
        languages=["fr"],
        new_languages=["ko"],
        clients_per_language=3,
        max_train=30,
        max_test=7,
        alpha=0.1,
        seed=5,
    )
    federation = load_clients(settings)
    assert len(federation.clients) == 9
    assert {(len(c.train), len(c.test)) for c in federation.clients} == {(30, 7)}
    settings.seed = 6
    other = load_clients(settings)
    assert not np.array_equal(federation.clients[0].train, other.clients[0].train)


def test_files_by_settings(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "".join(f"text {n},{n % 2}\n" for n in range(10)))
    one = load_clients(DataSettings(dataset="files", path=str(path), labels=["no", "yes"]))
    assert [(c.name, c.pool) for c in one.clients] == [("a", "unseen")]
    assert one.labels == ("no", "yes")
    files = {"ann": ClientFile(str(path))}
    two = load_clients(DataSettings(dataset="files", files=files, test_fraction=0.5))
    assert len(two.clients[0].test) == 5
    for wrong in ({}, {"path": str(path), "files": files}):
        with pytest.raises(UserError, match=r"Set either data\.path"):
            load_clients(DataSettings(dataset="files", **wrong))


def test_hub_by_settings(monkeypatch):
    asked = []

    def load_dataset(path, name, *, split, revision):
        asked.append((path, name, split, revision))
        rows = range(40)
        return datasets.Dataset.from_dict(
            {"body": [f"{name} {n}" for n in rows], "topic": [f"t{n % 2}" for n in rows]}
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    settings = DataSettings(
        dataset="hub",
        path="a/news",
        languages=["fr"],
        text_columns=["body"],
        label_column="topic",
        clients_per_language=2,
        train_split="train+validation",
        revision="main",
        pool_train=10,
    )
    federation = load_clients(settings)
    assert asked == [
        ("a/news", "fr", "train+validation", "main"),
        ("a/news", "fr", "test", "main"),
    ]
    assert federation.labels == ("t0", "t1")
    assert {(len(c.train), len(c.test)) for c in federation.clients} == {(5, 10)}
    with pytest.raises(UserError, match="'fr' is not in masakhanews"):
        load_clients(DataSettings(dataset="masakhanews", languages=["fr"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "xnil"}, r"'xnil' is unknown\. Did you mean 'xnli'\? Known: debian-d"),
        ({"path": "a.csv"}, r"debian-descriptions ignores data\.path: remove it"),
        ({"dataset": "files", "alpha": 1.0}, r"files ignores data\.alpha"),
        ({"dataset": "hub"}, r"Set data\.path to the data set's name"),
    ],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        load_clients(DataSettings(**settings))


def test_entries_are_whole():
    names = {item.name for item in fields(DataSettings)}
    for name, entry in DATASETS.items():
        assert set(entry.unused) <= names - {"dataset", "seed"}
        assert entry.description
        assert entry.licence
        assert "\n" not in entry.description + entry.licence
        assert name in (DataSettings.__doc__ or "")


def test_every_setting_is_documented():
    for settings in (DataSettings, ClientFile):
        for item in fields(settings):
            # getdoc: Python 3.13 takes the indentation out of docstrings.
            assert f"\n    {item.name}: " in (getdoc(settings) or ""), item.name


def test_settings_are_light():
    """The command line's help must not wait for heavy imports."""
    code = (
        "import sys, fedp2eft.settings.data;"
        "print([m for m in ('datasets', 'pyarrow', 'torch', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_describe():
    federation = load_clients(
        DataSettings(languages=["fr", "de"], new_languages=["ko"], clients_per_language=2)
    )
    rows = describe(federation)
    assert [(row["language"], row["pool"]) for row in rows] == [
        ("de", "seen"),
        ("de", "unseen"),
        ("fr", "seen"),
        ("fr", "unseen"),
        ("ko", "new-language"),
    ]
    for row in rows:
        mine = [c for c in federation.pool(row["pool"]) if c.language == row["language"]]
        assert row["clients"] == len(mine) == 2
        assert row["train"] == sum(len(c.train) for c in mine)
        assert sum(row["labels"].values()) == row["train"] + row["test"]
        texts = [
            t for c in mine for part in (c.train, c.test) for t in federation.rows(part)["text"]
        ]
        assert row["characters"] == pytest.approx(np.mean([len(t) for t in texts]), abs=0.06)
    assert json.loads(json.dumps(rows)) == rows


def test_partition_is_saved_readably(tmp_path):
    federation = load_clients(DataSettings(languages=["fr"], clients_per_language=2))
    path = tmp_path / "out" / "partition.json"
    save_partition(federation, path)
    save_partition(federation, path)
    text = path.read_text(encoding="utf-8")
    saved = json.loads(text)
    assert saved["dataset"] == "debian-descriptions"
    assert saved["rows"] == 22127
    assert list(saved["clients"]) == [client.name for client in federation.clients]
    assert saved["clients"]["fr-seen-01"]["train"] == federation.clients[1].train.tolist()
    assert len(text.splitlines()) == len(federation.clients) + 2
    assert [p.name for p in path.parent.iterdir()] == ["partition.json"]
    (tmp_path / "file").write_text("")
    for wrong in (tmp_path, tmp_path / "file" / "partition.json"):
        with pytest.raises(UserError, match="Could not write"):
            save_partition(federation, wrong)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "out"]
