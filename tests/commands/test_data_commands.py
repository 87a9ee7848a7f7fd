"""`fedp2eft data list | describe | partition`."""

from __future__ import annotations

import json
from pathlib import Path

from fedp2eft.cli import main
from tiny_run import CLIENTS, World


def test_list(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["data", "list"]) == 0
    out = capsys.readouterr().out
    for name in ("debian-descriptions", "files", "hub", "xnli", "masakhanews"):
        assert name in out


def test_describe(world: World, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    data = ["--data.dataset", "files", "--data.path", str(world.rows)]
    assert main(["data", "describe", *data]) == 0
    out = capsys.readouterr().out
    for word in ("seen", "unseen", "de", "fr", "animal"):
        assert word in out


def test_partition(world: World, tmp_path: Path, capsys):
    out = tmp_path / "partition.json"
    data = ["--data.dataset", "files", "--data.path", str(world.rows)]
    assert main(["data", "partition", *data, "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"6 clients: {out}\n"
    text = out.read_text(encoding="utf-8")
    json.loads(text)
    assert all(client in text for client in CLIENTS)
