"""A path that begins with ~ is in the home folder, wherever a path is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedp2eft.cli import main
from tiny_run import World, write_jsonl


def test_every_command_knows_the_home_folder(
    finished, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").symlink_to(finished.folder)
    write_jsonl(tmp_path / "rows.jsonl", world.client_rows("fr-unseen-00", "train"))
    model = ["--model", "~/run/base", "--data", "~/rows.jsonl"]
    made = ["--psg", "~/run/psg", *model, "--rank", "2", "--out", "~/adapter", "--epochs", "1"]
    assert main(["personalize", *made]) == 0, capsys.readouterr().err
    assert main(["evaluate", *model, "--adapter", "~/adapter"]) == 0, capsys.readouterr().err
    for layout in ("compact", "merged"):
        out = ["--adapter", "~/adapter", "--out", f"~/{layout}", "--layout", layout]
        assert (
            main(["export", *out, "--model", "~/run/base"][: 7 if layout == "compact" else 9]) == 0
        )
    data = ["--data.dataset", "files", "--data.path", "~/rows.jsonl"]
    assert main(["data", "partition", *data, "--out", "~/partition.json"]) == 0
    assert json.loads((tmp_path / "partition.json").read_text())["rows"]
    assert main(["show", "~/run"]) == 0
    assert not (tmp_path / "~").exists()
    world.yaml(tmp_path / "one.yaml", base__rounds=0)
    (tmp_path / "there").write_text("")
    assert main(["train", "~/one.yaml", "--run", "~/there"]) == 2
    assert f"{tmp_path}/there" in capsys.readouterr().err
