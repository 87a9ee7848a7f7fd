"""`fedp2eft doctor` says what is there and what will be used, and never fails."""

from __future__ import annotations

import json
import sys
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

from fedp2eft.cli import main
from fedp2eft.commands import machine
from fedp2eft.models import sources


def found(capsys: pytest.CaptureFixture[str]) -> dict:
    assert main(["doctor", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return json.loads(out)


def test_it_says_what_is_here(capsys, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("FEDP2EFT_CACHE", str(tmp_path / "not" / "yet"))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    facts = found(capsys)
    assert facts["torch"]["version"] == torch.__version__
    assert facts["torch"]["threads"] == torch.get_num_threads()
    assert facts["hub"] == {"reachable": False, "offline": True, "why": "HF_HUB_OFFLINE is set"}
    assert facts["disks"][0]["folder"] == str(tmp_path / "not" / "yet")
    assert facts["disks"][0]["free"] > 0
    assert 0 < facts["memory"]["available"] <= facts["memory"]["total"]
    assert facts["flower"]["version"].startswith("1.")
    assert facts["use"]["model.precision"] == "bf16"
    assert facts["use"]["model.device"] == "cpu"
    assert not (tmp_path / "not").exists()  # it looks, and writes nothing
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert found(capsys)["use"]["model.precision"] == "fp32"


def test_the_table_says_the_same(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for word in ("torch", "Flower", "HF_HUB_OFFLINE is set", "Will be used", "precision auto"):
        assert word in out


def test_everything_absent(capsys, tmp_path: Path, monkeypatch):
    """No torch that works, no extra, no hub, no writable disk: said, and exit status 0."""

    def absent(package: str) -> str:
        raise PackageNotFoundError(package)

    def broken(*_: object) -> str:
        raise RuntimeError("no driver\nand more")

    monkeypatch.setenv("FEDP2EFT_CACHE", str(tmp_path))
    monkeypatch.setattr(machine, "version", absent)
    monkeypatch.setattr(torch, "get_num_threads", broken)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", "")
    facts = found(capsys)
    assert facts["torch"] == {"version": None, "error": "no driver"}
    assert facts["flower"] == {"version": None, "command": None}
    assert all(package["version"] is None for package in facts["packages"])
    assert facts["use"]["model.quantize"] == "not possible"
    small = facts["models"][0]
    assert small["from"] == "nowhere yet"
    assert "fedp2eft[quickstart]" in small["fix"]
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "no driver" in out
    assert "pip install 'fedp2eft[privacy]'" in out


def test_a_silent_hub_is_asked_once_and_briefly(capsys, monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def silent(name: str, revision: str | None, seconds: float) -> None:
        asked.append(seconds)
        raise sources._HubUnreachableError("no answer in 5 s")

    monkeypatch.setattr(sources, "_ask_hub", silent)
    hub = found(capsys)["hub"]
    assert (hub["reachable"], hub["why"]) == (False, "no answer in 5 s")
    assert len(asked) == 1
    assert asked[0] <= 5
    monkeypatch.setattr(sources, "_ask_hub", lambda *_: None)
    facts = found(capsys)
    assert facts["hub"]["reachable"]
    assert {model["from"] for model in facts["models"]} == {"the hub"}


def test_it_knows_every_extra():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extras = set(project["optional-dependencies"])
    assert set(machine.EXTRAS) == extras - {"dev", "docs"}
