"""The method that CONTRIBUTING.md has one write works as it says."""

from __future__ import annotations

import re
from pathlib import Path

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
    [(name, function)] = re.findall(r'    "([\w-]+)": Method\((\w+)\),', TEXT)
    monkeypatch.setitem(METHODS, name, Method(names[function]))
    settings = world.settings(
        data__path=str(three_clients), base__rounds=1, federation__rounds=1,
        evaluation__ranks=[2], evaluation__methods=["lora", name],
    )  # fmt: skip
    results = train(settings, tmp_path / "run")
    seen = {row.method: row for row in results.rows if row.pool == "seen"}
    assert set(seen) == {"lora", name}
    assert 0 < seen[name].parameters != seen["lora"].parameters


def test_every_place_on_the_map_exists():
    table = TEXT[TEXT.index("| in `src/fedp2eft/`") : TEXT.index("`tests/` mirrors")]
    for line in table.strip().splitlines()[2:]:
        for place in re.findall(r"`([\w/.]+)`", line.split("|")[1]):
            assert (ROOT / "src" / "fedp2eft" / place).exists(), place
    listed = {place.split("/")[0] for place in re.findall(r"`([\w/.]+)`", table)}
    folders = {path.parent.name for path in (ROOT / "src" / "fedp2eft").glob("*/__init__.py")}
    assert folders <= listed
