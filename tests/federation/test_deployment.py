"""SuperLink and SuperNodes in processes of their own, each SuperNode with a file of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from deployed import deployment
from safetensors.torch import load_file
from test_simulation import PYPROJECT, cells

from fedp2eft.experiment.train import train
from tiny_run import LABELS, World, all_rows, write_jsonl

THREE = ("de-seen-00", "fr-seen-00", "de-unseen-00")
OTHER_NAMES = "fr-seen-00"


def own_files(folder: Path) -> dict[str, Path]:
    """Each client's rows in a file of its own; one of them calls its columns otherwise."""
    files = {}
    for client in THREE:
        rows = [
            {"text": row["text"], "label": row["label"], "split": row["split"]}
            for row in all_rows()
            if row["client"] == client
        ]
        if client == OTHER_NAMES:
            rows = [{"titre": r["text"], "genre": r["label"], "split": r["split"]} for r in rows]
        (folder / client).mkdir(parents=True)
        files[client] = write_jsonl(folder / client / "rows.jsonl", rows)
    return files


def small(world: World, **data: object) -> dict[str, object]:
    return world.raw(
        data=data, base__rounds=1, base__clients_per_round=1, federation__rounds=2,
        federation__timeout=1500.0, federation__min_clients=3, federation__wait=600.0,
        evaluation__methods=["fedp2eft"], evaluation__ranks=[2],
    )  # fmt: skip


def test_three_supernodes_give_the_local_engines_numbers(world: World, tmp_path: Path) -> None:
    import yaml

    project, nodes = tmp_path / "project", tmp_path / "nodes"
    files = own_files(nodes)
    (project / "configs").mkdir(parents=True)
    shutil.copy(PYPROJECT, project)
    raw = small(world, dataset="nodes", labels=list(LABELS))
    (project / "configs" / "tiny.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    with deployment(tmp_path / "deployed") as there:
        for client, path in files.items():
            language, pool, _ = client.split("-")
            other = {"text_columns": "titre", "label_column": "genre"}
            there.start_supernode(
                client, client=client, path=str(path), language=language, pool=pool,
                keep=str(nodes / client / "keep"), **(other if client == OTHER_NAMES else {}),
            )  # fmt: skip
        there.flwr("run", project, "--run-config", "config='configs/tiny.yaml' run='runs/deployed'")
        run = there.folder / "server" / "runs" / "deployed"
        there.wait_for(lambda: (run / "faults.json").exists())
        assert (run / "results.json").exists(), there.logs()
        number = there.flwr("ls", "--format", "json")
        log = there.flwr("log", json.loads(number)["runs"][0]["run-id"], "--show")
    here = tmp_path / "here"
    train(world_settings(world, tmp_path / "reference"), here)

    for part in ("base", "psg"):
        ours, theirs = (load_file(r / part / "model.safetensors") for r in (here, run))
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            torch.testing.assert_close(theirs[name], value, rtol=0, atol=1e-6)
    ours_cells, their_cells = cells(here), cells(run)
    assert len(their_cells) == len(THREE)
    assert their_cells.keys() == ours_cells.keys()
    for name, cell in ours_cells.items():
        assert their_cells[name] == {**cell, "loss": pytest.approx(cell["loss"], abs=1e-5)}, name
    assert json.loads((run / "faults.json").read_text())["counts"] == {}
    assert not (run / "adapters").exists()
    for client in THREE:
        (kept,) = (nodes / client / "keep" / client).iterdir()
        adapter = f"adapters/{client}/fedp2eft-r2/adapter_model.safetensors"
        ours, theirs = load_file(here / adapter), load_file(kept / adapter)
        for name, value in ours.items():
            torch.testing.assert_close(theirs[name], value, rtol=0, atol=1e-5)
        assert (
            load_file(kept / "base" / "model.safetensors").keys()
            == load_file(run / "base" / "model.safetensors").keys()
        )
    assert "psg 2/2 loss" in log
    assert "Waiting for clients" in log or "deliver 3/3" in log


def world_settings(world: World, folder: Path):
    """The same experiment with all files in one process."""
    from fedp2eft.reading import settings_from

    files = {}
    for client in THREE:
        language, pool, _ = client.split("-")
        rows = [
            {"text": row["text"], "label": row["label"], "split": row["split"]}
            for row in all_rows()
            if row["client"] == client
        ]
        (folder / client).mkdir(parents=True)
        path = write_jsonl(folder / client / "rows.jsonl", rows)
        files[client] = {"path": str(path), "language": language, "pool": pool}
    return settings_from(small(world, dataset="files", files=files, labels=list(LABELS)))
