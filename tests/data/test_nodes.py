"""A client's file as its SuperNode's node config names it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedp2eft.data.nodes import clients_of_node, data_without_clients
from fedp2eft.data.registry import load_clients
from fedp2eft.errors import ShareableError, UserError
from fedp2eft.settings.data import DataSettings

SETTINGS = DataSettings(dataset="nodes", labels=["b", "a"], seed=5)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = [{"text": f"t{i}", "label": "ab"[i % 2], "titre": f"u{i}"} for i in range(10)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def node(path: Path, **more: str) -> dict[str, str]:
    return {"client": "fr-00", "path": str(path)} | {
        key.replace("_", "-"): value for key, value in more.items()
    }


def test_a_node_has_its_own_client_and_no_other(rows: Path) -> None:
    federation = clients_of_node(node(rows, language="fr", pool="unseen"), SETTINGS)
    (client,) = federation.clients
    assert (client.name, client.language, client.pool) == ("fr-00", "fr", "unseen")
    assert len(client.train) == len(client.test) * 4 == 8
    # ids are those of the settings, not of the values found
    assert federation.labels == ("b", "a")
    assert federation.label_ids([0, 1]).tolist() == [1, 0]
    (seen,) = clients_of_node(node(rows), SETTINGS).clients
    assert (seen.language, seen.pool) == ("und", "seen")


def test_it_draws_the_rows_that_one_process_with_all_files_draws(rows: Path) -> None:
    files = {"fr-00": {"path": str(rows)}, "de-00": {"path": str(rows)}}
    from fedp2eft.settings.reading import settings_from

    raw = {"dataset": "files", "files": files, "labels": ["b", "a"], "seed": 5}
    both = load_clients(settings_from({"data": raw}).data)
    (alone,) = clients_of_node(node(rows), SETTINGS).clients
    there = next(c for c in both.clients if c.name == "fr-00")
    texts = both.rows(there.test)["text"]
    assert clients_of_node(node(rows), SETTINGS).rows(alone.test)["text"] == texts


def test_a_file_may_call_its_columns_otherwise(rows: Path) -> None:
    federation = clients_of_node(node(rows, text_columns="titre"), SETTINGS)
    assert federation.rows([3])["titre"] == ["u3"]
    assert federation.text_columns == ("titre",)


def test_a_second_file_for_testing(rows: Path, tmp_path: Path) -> None:
    other = tmp_path / "test.jsonl"
    other.write_text('{"text": "x", "label": "a"}\n')
    (client,) = clients_of_node(node(rows, test_path=str(other)), SETTINGS).clients
    assert (len(client.train), len(client.test)) == (10, 1)


def test_rows_can_be_held_out(rows: Path) -> None:
    held = DataSettings(dataset="nodes", labels=["b", "a"], holdout=0.25)
    (client,) = clients_of_node(node(rows), held).clients
    assert (len(client.train), len(client.test)) == (6, 2)


def test_the_server_knows_columns_and_classes() -> None:
    federation = load_clients(SETTINGS)
    assert federation.clients == ()
    assert federation.labels == ("b", "a")
    assert federation.text_columns == ("text",)
    assert len(federation.table) == 0
    without = DataSettings(dataset="nodes", label_column=None, target_column="answer")
    assert data_without_clients(without).labels == ()


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"client": "a"}, "names no path"),
        ({"path": "x"}, "names no client"),
        (
            {"client": "a", "path": "x", "langauge": "fr"},
            "unknown key 'langauge'. Did you mean 'la",
        ),
        ({"client": "a", "path": "x", "text-columns": "p,h"}, "names 2 columns; .* has 1: text"),
        ({"client": "a", "path": "x", "target-column": "y"}, "a target-column; .* has none"),
    ],
)
def test_mistakes_may_be_told_to_the_server(config: dict[str, str], says: str) -> None:
    with pytest.raises(ShareableError, match=says):
        clients_of_node(config, SETTINGS)


@pytest.mark.parametrize(
    ("more", "says"),
    [({"label_column": "titre"}, "unknown class 'u0'"), ({"text_columns": "nope"}, "nope")],
)
def test_mistakes_that_quote_rows_may_not(rows: Path, more: dict[str, str], says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        clients_of_node(node(rows, **more), SETTINGS)
    assert not isinstance(error.value, ShareableError)


def test_classes_must_be_agreed() -> None:
    with pytest.raises(UserError, match=r"set data\.labels"):
        load_clients(DataSettings(dataset="nodes"))


def test_a_name_becomes_a_folder() -> None:
    with pytest.raises(UserError, match="cannot be a client's name"):
        clients_of_node({"client": "../a", "path": "x"}, SETTINGS)
