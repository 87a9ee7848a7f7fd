"""CONTRIBUTING.md: its method works, and its map is the tree."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from fedp2eft.experiment.train import train
from fedp2eft.methods import METHODS, Method
from tiny_run import World

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_method_in_twenty_lines(world: World, three_clients: Path, tmp_path: Path, monkeypatch):
    [code] = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    assert code.count("\n") < 20
    names: dict = {}
    exec(code, names)
    [(name, function)] = re.findall(r'    "([\w-]+)": Method\(_ours\("\w+:(\w+)"\)\),', TEXT)
    monkeypatch.setitem(METHODS, name, Method(names[function]))
    settings = world.settings(
        data__path=str(three_clients), base__rounds=1, federation__rounds=1,
        evaluation__ranks=[2], evaluation__methods=["lora", name],
    )  # fmt: skip
    results = train(settings, tmp_path / "run")
    seen = {row.method: row for row in results.rows if row.pool == "seen"}
    assert set(seen) == {"lora", name}
    assert 0 < seen[name].parameters != seen["lora"].parameters


def places(head: str) -> list[str]:
    """The first cells' names of the table with that head."""
    table = TEXT[TEXT.index(head) :].split("\n\n")[0].splitlines()
    return [place for line in table[2:] for place in re.findall(r"`([^`]+)`", line.split("|")[1])]


def test_the_map_names_every_folder_and_top_level_file_of_the_package():
    package = ROOT / "src" / "fedp2eft"
    files = [path for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    folders = {f"{path.parent.relative_to(package).as_posix()}/" for path in files} - {"./"}
    expected = folders | {path.name for path in files if path.parent == package}
    assert sorted(places("| `src/fedp2eft/` |")) == sorted(expected)


def test_the_map_names_every_folder_of_the_project():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    folders = {f"{path.partition('/')[0]}/" for path in listed.stdout.split("\n") if "/" in path}
    assert sorted(places("| project folder |")) == sorted(folders)
