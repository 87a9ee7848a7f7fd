"""A whole federation with φ in fewer bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedp2eft.experiment.train import train
from tiny_run import World, assert_same, outcome

QUICK = {"evaluation__methods": ["base"], "base__rounds": 1, "federation__clients_per_round": 3}


def phi(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "psg" / "model.safetensors")


def bytes_up(run: Path) -> float:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return sum(line["bytes-up"] for line in lines if line["phase"] == "psg")


@pytest.fixture(scope="module")
def plain(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("wire") / "fp32"
    train(world.settings(**QUICK), run)
    return run


@pytest.mark.parametrize(("wire", "bound", "most"), [("bf16", 0.02, 0.75), ("int8", 0.03, 0.65)])
def test_fewer_bytes_end_near_the_same_phi(world, plain, tmp_path, wire, bound, most) -> None:
    run = tmp_path / wire
    train(world.settings(**QUICK, federation__wire=wire), run)
    assert bytes_up(run) < most * bytes_up(plain)
    settings = {**QUICK, "federation__rounds": 0}
    train(world.settings(**settings), tmp_path / "start")
    start, end, got = phi(tmp_path / "start"), phi(plain), phi(run)
    moved = torch.cat([(end[n] - start[n]).flatten() for n in end]).norm()
    apart = torch.cat([(got[n] - end[n]).flatten() for n in end]).norm()
    assert 0 < float(apart / moved) < bound


def test_a_stopped_run_sends_the_same_bits_again(world, tmp_path, monkeypatch) -> None:
    settings = world.settings(**QUICK, federation__wire="int8")
    train(settings, tmp_path / "whole")
    from fedp2eft.federation.server.run_folder import RunFolder

    finish = RunFolder.finish_round

    def stop(self, checkpoint, *rest):
        if (checkpoint.phase, checkpoint.round) == (
            "psg",
            3,
        ):  # all clients have sent, the server has not kept it
            raise KeyboardInterrupt
        finish(self, checkpoint, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "finish_round", stop)
        with pytest.raises(KeyboardInterrupt):
            train(settings, tmp_path / "run")
    train(settings, tmp_path / "run")
    assert_same(outcome(tmp_path / "run"), outcome(tmp_path / "whole"))
