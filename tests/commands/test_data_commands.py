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


def test_classes_stand_on_one_line_and_all_on_demand(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    rows = tmp_path / "rows.jsonl"
    counts = {"few": 1, "some": 3, "many": 9, "more": 6, "most": 11}
    each = [label for label, count in counts.items() for _ in range(count)]
    lines = [
        {"text": f"row {n}", "label": label, "client": "a", "language": "de", "split": "train"}
        for n, label in enumerate(each)
    ]
    rows.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    data = ["--data.dataset", "files", "--data.path", str(rows)]
    assert main(["data", "describe", *data]) == 0
    out = capsys.readouterr().out
    assert "most 11, many 9, more 6, 2 more" in out
    assert "some 3" not in out
    assert main(["data", "describe", *data, "--classes", "true"]) == 0
    assert "a: most 11, many 9, more 6, some 3, few 1\n" in capsys.readouterr().out


def test_partition(world: World, tmp_path: Path, capsys):
    out = tmp_path / "partition.json"
    data = ["--data.dataset", "files", "--data.path", str(world.rows)]
    assert main(["data", "partition", *data, "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"6 clients: {out}\n"
    text = out.read_text(encoding="utf-8")
    json.loads(text)
    assert all(client in text for client in CLIENTS)
