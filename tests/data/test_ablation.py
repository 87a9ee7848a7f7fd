"""Diagnostics: texts replaced by one token, and the clients of a language merged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from fedp2eft.data.registry import load_clients
from fedp2eft.experiment.compare import compare
from fedp2eft.experiment.train import train
from fedp2eft.models.sources import ModelSource
from fedp2eft.results.cards import origin_of
from fedp2eft.results.cells import read_cells
from fedp2eft.results.rows import read_results
from fedp2eft.results.tables import write_tables
from fedp2eft.settings.data import DataSettings
from tiny_run import World

SMALL = {"languages": ["de", "fr"], "new_languages": ["ko"], "clients_per_language": 3}


def test_texts_are_one_token_and_labels_stay() -> None:
    plain, blank = (load_clients(DataSettings(**SMALL, texts=t)) for t in ("keep", "one-token"))
    for one, other in zip(plain.clients, blank.clients, strict=True):
        for rows, same in ((one.train, other.train), (one.test, other.test)):
            np.testing.assert_array_equal(rows, same)
            np.testing.assert_array_equal(plain.label_ids(rows), blank.label_ids(rows))
            assert set(blank.rows(rows)["text"]) == {"a"}


def test_a_conversation_keeps_its_response(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "Wo?"}, {"role": "assistant", "content": "Hier."}]
    path = tmp_path / "talk.jsonl"
    path.write_text("\n".join([json.dumps({"talk": talk})] * 5), encoding="utf-8")
    columns = {"text_columns": ["talk"], "target_column": "talk", "label_column": None}
    data = load_clients(DataSettings("files", path=str(path), texts="one-token", **columns))
    [client] = data.clients
    assert data.rows(client.train[:1])["talk"][0] == [{"role": "user", "content": "a"}, talk[1]]


def test_merged_clients_have_the_same_rows() -> None:
    plain, merged = (load_clients(DataSettings(**SMALL, merge_clients=m)) for m in (False, True))
    names = ["de-seen-all", "de-unseen-all", "fr-seen-all", "fr-unseen-all", "ko-new-language-all"]
    assert [client.name for client in merged.clients] == names
    for client in merged.clients:
        mine = [c for c in plain.pool(client.pool) if c.language == client.language]
        assert len(mine) == 3
        for part in ("train", "test"):
            rows = np.concatenate([getattr(each, part) for each in mine])
            np.testing.assert_array_equal(getattr(client, part), np.sort(rows))


def test_a_bound_on_the_same_base_and_test_rows(world: World, finished, tmp_path: Path) -> None:
    """Merged clients on a run's base: the base scores as before, whoever has the rows."""
    settings = world.settings(
        data__merge_clients=True, model__name=str(finished.folder / "base"), base__kind="none",
        federation__rounds=0, evaluation__methods=["base", "lora"], evaluation__ranks=[2],
    )  # fmt: skip
    bound, apart = train(settings, tmp_path / "run"), read_results(finished.folder)
    for pool, clients in (("seen", 2), ("unseen", 2)):
        one, other = (results.row("base", 0, pool) for results in (bound, apart))
        assert one.languages == other.languages
        assert one.clients == clients
    lora = bound.row("lora", 2, "seen"), apart.row("lora", 2, "seen")
    assert lora[0].languages != lora[1].languages  # fitted to the rows of two clients


def test_cells_and_cards_say_what_was_done(world: World, tmp_path: Path) -> None:
    settings = world.settings(
        data__texts="one-token", base__rounds=0, federation__rounds=0,
        evaluation__methods=["base", "fedp2eft"], evaluation__ranks=[1], compare__seeds=[3],
    )  # fmt: skip
    folder = compare(settings, tmp_path / "run")
    [cell, *_] = read_cells(folder)
    assert cell["ablations"] == ["every text replaced by one token"]
    write_tables(folder)
    assert "A diagnostic: every text replaced by one token." in (folder / "table.md").read_text()
    source = ModelSource(settings.model.name, settings.model.name, "hash")
    assert origin_of(settings, source)["dataset"] == "files, every text replaced by one token"
