"""A run belongs to its rows and its model, as it belongs to its settings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fedp2eft.errors import ShareableError, UserError
from fedp2eft.experiment.compare import compare
from fedp2eft.experiment.train import train
from fedp2eft.federation.client.state import release_state, shared_state
from fedp2eft.runtime.inputs import INPUTS_FILE, check_inputs, rows_digest
from fedp2eft.runtime.workspace import Workspace
from fedp2eft.settings.experiment import Settings
from tiny_run import World, all_rows, assert_same, outcome, write_jsonl

Change = Any


def other_label(rows: list[dict[str, Any]]) -> None:
    row = next(r for r in rows if r["client"] == "fr-unseen-00" and r["split"] == "test")
    row["label"] = "stone" if row["label"] == "animal" else "animal"


def other_text(rows: list[dict[str, Any]]) -> None:
    next(r for r in rows if r["client"] == "fr-unseen-00")["text"] += " roc"


def other_split(rows: list[dict[str, Any]]) -> None:
    next(r for r in rows if r["client"] == "fr-unseen-00")["split"] = "test"


def one_row_more(rows: list[dict[str, Any]]) -> None:
    rows.append(next(r for r in rows if r["client"] == "fr-unseen-00"))


def other_order(rows: list[dict[str, Any]]) -> None:
    mine = [i for i, r in enumerate(rows) if r["client"] == "fr-unseen-00"]
    rows[mine[0]], rows[mine[1]] = rows[mine[1]], rows[mine[0]]


def other_pool(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if row["client"] == "fr-unseen-00":
            row["pool"] = "seen"


def without(rows: list[dict[str, Any]]) -> None:
    rows[:] = [r for r in rows if r["client"] != "fr-unseen-00"]


def one_client_more(rows: list[dict[str, Any]]) -> None:
    mine = [r for r in rows if r["client"] == "fr-unseen-00"]
    rows += [{**r, "client": "fr-unseen-01"} for r in mine]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (other_label, "The rows of client fr-unseen-00 are others"),
        (other_text, "The rows of client fr-unseen-00 are others"),
        (other_split, "The rows of client fr-unseen-00 are others"),
        (one_row_more, "The rows of client fr-unseen-00 are others"),
        (other_order, "The rows of client fr-unseen-00 are others"),
        (other_pool, "The rows of client fr-unseen-00 are others"),
        (without, "Client fr-unseen-00 is missing"),
        (one_client_more, "Client fr-unseen-01 is new"),
    ],
)
def test_a_change_of_the_rows_names_the_client(world: World, tmp_path: Path, change: Change, told):
    rows = all_rows()
    settings = world.settings(data__path=str(write_jsonl(tmp_path / "rows.jsonl", rows)))
    check_inputs(tmp_path, Workspace(settings))
    check_inputs(tmp_path, Workspace(settings))
    kept = (tmp_path / INPUTS_FILE).read_bytes()
    change(rows)
    write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError) as caught:
        check_inputs(tmp_path, Workspace(settings))
    assert str(caught.value).startswith(told)
    assert "\n" not in str(caught.value)
    assert (tmp_path / INPUTS_FILE).read_bytes() == kept


def test_a_column_that_is_not_used_may_change(world: World, tmp_path: Path):
    rows = all_rows()
    settings = world.settings(data__path=str(write_jsonl(tmp_path / "rows.jsonl", rows)))
    check_inputs(tmp_path, Workspace(settings))
    write_jsonl(tmp_path / "rows.jsonl", [{**row, "note": i} for i, row in enumerate(rows)])
    check_inputs(tmp_path, Workspace(settings))


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_change_of_the_model_is_named(world: World, tmp_path: Path, file: str):
    model = Path(shutil.copytree(world.encoder, tmp_path / "model"))
    settings = world.settings(model__name=str(model))
    check_inputs(tmp_path, Workspace(settings))
    changed = bytearray((model / file).read_bytes())
    changed[-1:] = changed[-1:] + b" " if file.endswith("json") else bytes([changed[-1] ^ 1])
    (model / file).write_bytes(bytes(changed))
    with pytest.raises(UserError, match=rf"^The files of model {model} are others"):
        check_inputs(tmp_path, Workspace(settings))


def moved(finished, world: World, folder: Path) -> tuple[Settings, Path]:
    """A copy of the finished run whose rows lie in a file of their own."""
    rows = write_jsonl(folder / "rows.jsonl", all_rows())
    run = Path(shutil.copytree(finished.folder, folder / "run"))
    text = (run / "settings.yaml").read_text().replace(str(world.rows), str(rows))
    (run / "settings.yaml").write_text(text)
    return world.settings(data__path=str(rows)), run


def test_a_finished_run_is_not_gone_on_with_on_other_rows(finished, world: World, tmp_path: Path):
    settings, run = moved(finished, world, tmp_path)
    before = outcome(run)
    rows = all_rows()
    other_label(rows)
    write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match=rf"fr-unseen-00 are others than when {run} was begun"):
        train(settings, run)
    assert_same(outcome(run), before)


def test_a_run_from_before_digests_resumes_and_gets_them(finished, world: World, tmp_path: Path):
    settings, run = moved(finished, world, tmp_path)
    kept = json.loads((run / INPUTS_FILE).read_text())
    assert sorted(kept["clients"]) == sorted({row["client"] for row in all_rows()})
    (run / INPUTS_FILE).unlink()
    train(settings, run)
    assert json.loads((run / INPUTS_FILE).read_text()) == kept


def test_new_cells_of_a_comparison_are_of_the_same_rows(world: World, tmp_path: Path):
    rows = all_rows()
    changes: dict[str, Any] = {
        "data__path": str(write_jsonl(tmp_path / "rows.jsonl", rows)),
        "base__kind": "none", "federation__rounds": 1, "compare__seeds": [1],
        "evaluation__pools": ["unseen"],
    }  # fmt: skip
    compare(world.settings(evaluation__methods=["base"], **changes), tmp_path / "all")
    other_label(rows)
    write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match=r"The rows of client fr-unseen-00 are others"):
        compare(world.settings(evaluation__methods=["base", "lora"], **changes), tmp_path / "all")


def test_a_supernode_keeps_its_own_digest(world: World, tmp_path: Path):
    rows = [{"text": r["text"], "label": r["label"]} for r in all_rows()[:18]]
    path = write_jsonl(tmp_path / "mine.jsonl", rows)
    settings = world.settings(
        data__dataset="nodes", data__path=None, data__labels=["animal", "plant", "stone"]
    )
    node = {"client": "fr-00", "path": str(path), "keep": str(tmp_path)}
    folder = tmp_path / "kept"
    release_state()
    try:
        shared_state(settings, folder, node)
        assert list(json.loads((folder / INPUTS_FILE).read_text())["clients"]) == ["fr-00"]
        release_state()
        write_jsonl(path, rows[:-1])
        with pytest.raises(ShareableError, match=r"client fr-00 are others than when this run was"):
            shared_state(settings, folder, node)
    finally:
        release_state()


def test_a_digest_is_of_the_rows_and_not_of_where_they_lie(world: World, tmp_path: Path):
    other = write_jsonl(tmp_path / "elsewhere.jsonl", all_rows())
    digests = []
    for settings in (world.settings(), world.settings(data__path=str(other))):
        data = Workspace(settings).data
        digests.append([rows_digest(data, client) for client in data.clients])
    assert digests[0] == digests[1]
    assert len(set(digests[0])) == len(digests[0])
