"""Methods of other packages: the one of docs/own-method.md, and broken ones."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from safetensors.torch import load_file

from fedp2eft.client.phase import lazy
from fedp2eft.errors import UserError
from fedp2eft.methods import METHODS, Method, method, register
from fedp2eft.methods.fedl2p import PHASE as FEDL2P
from tiny_run import World

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "own-method.md").read_text(encoding="utf-8")


def install(folder: Path) -> None:
    """Put the package of the page where Python finds it, as pip would."""
    blocks = re.findall(r"```(python|toml)\n(.*?)```", TEXT, re.S)
    [init] = [code for _, code in blocks if "PHASE = Phase(" in code]
    [work] = [code for _, code in blocks if "def train(turn)" in code]
    [project] = [tomllib.loads(code) for kind, code in blocks if kind == "toml"]
    about = project["project"]
    package, info = folder / "agreed", folder / f"{about['name']}-{about['version']}.dist-info"
    for path, text in {
        package / "__init__.py": init,
        package / "work.py": work,
        info / "METADATA": f"Name: {about['name']}\nVersion: {about['version']}\n",
        info / "entry_points.txt": "[fedp2eft.methods]\n" + "\n".join(
            f"{name} = {value}" for name, value in about["entry-points"]["fedp2eft.methods"].items()
        ),
    }.items():  # fmt: skip
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")


def test_an_installed_package_brings_method_settings_and_phase(
    world: World, three_clients: Path, tmp_path: Path
) -> None:
    site = tmp_path / "site"
    site.mkdir()
    install(site)
    config = world.yaml(
        tmp_path / "tiny.yaml", data__path=str(three_clients), base__rounds=0, federation__rounds=1,
        evaluation__ranks=[2], evaluation__methods=["lora", "agreed"], agreed={"rounds": 2},
    )  # fmt: skip
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [
        sys.executable,
        "-c",
        "from fedp2eft.cli import main; raise SystemExit(main())",
        "train",
        str(config),
    ]
    done = subprocess.run(
        [*command, "--run", str(tmp_path / "run"), "--agreed.factor", "3"],
        env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    mine = [line for line in map(json.loads, lines) if line["phase"] == "agreed"]
    assert [line["round"] for line in mine] == [1, 2]
    assert all(line["loss"] > 0 for line in mine)
    rate = load_file(tmp_path / "run" / "agreed" / "model.safetensors")["log_rate"].exp().item()
    first = world.settings().local.personalize_lr
    assert rate != pytest.approx(first)
    assert first / 9.01 < rate < first * 9.01
    cells = {m: (tmp_path / "run" / "cells" / f"{m}-r2") for m in ("lora", "agreed")}
    losses = {
        m: [json.loads(path.read_text(encoding="utf-8"))["loss"] for path in sorted(at.iterdir())]
        for m, at in cells.items()
    }
    assert len(losses["agreed"]) == len(losses["lora"]) == 3
    assert losses["agreed"] != losses["lora"]


@pytest.mark.parametrize(
    ("target", "named"),
    [("no_such_module:METHOD", "ModuleNotFoundError"), ("json:dumps", "names no Method")],
)
def test_a_broken_package_is_named_in_one_line(
    target: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = EntryPoint("theirs", target, method.GROUP)
    monkeypatch.setattr(method, "entry_points", lambda group: [broken])
    methods = method.Methods()
    for _ in range(2):  # as long as it is broken
        with pytest.raises(UserError, match=named) as caught:
            list(methods)
        assert f"theirs = {target}" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_name_that_is_taken_is_refused() -> None:
    with pytest.raises(UserError, match="a method 'lora' already"):
        register("lora", Method(lazy("no:thing")))
    with pytest.raises(UserError, match="a section 'local' already"):
        register("mine", Method(lazy("no:thing"), settings=dict, section="local"))
    for name in ("psg", "fedl2p", "../away"):
        with pytest.raises(UserError, match="cannot have a phase"):
            register("mine", Method(lazy("no:thing"), phase=replace(FEDL2P, name=name, title="x")))
    assert "mine" not in METHODS
