"""FedL2P's federation: what travels, what is kept, early stopping, stopped and resumed."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from fedp2eft.errors import UserError
from fedp2eft.experiment.train import train
from fedp2eft.federation.server.rounds import has_stalled
from fedp2eft.federation.wire.messages import PERSONALIZE, array_digest, to_arrays
from fedp2eft.methods.fedl2p.meta_net import MetaNet
from fedp2eft.progress import LogReporter
from fedp2eft.settings.experiment import Settings
from tiny_run import SEEN, World, assert_same, outcome, vocabulary
from turns import TRAIN_FEDL2P
from watching import FinishedRun, watched

ROUNDS = 3
META = {"rounds": ROUNDS, "patience": 50, "rank": 2, "hidden": 6, "steps": 2, "init_lr": 1e-2}


class PowerCutError(Exception):
    """Thrown from inside a run in place of a power cut."""


class Stopper(LogReporter):
    """Ends the run after its first finished unit."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def advance(self, phase: str, text: str) -> None:
        raise PowerCutError

    def note(self, text: str) -> None:
        self.notes.append(text)


def settings(world: World, rows: Path, **changes: Any) -> Settings:
    short = {
        "data__path": str(rows), "base__rounds": 1, "federation__rounds": 1, "fedl2p": META,
        "evaluation": {
            "methods": ["base", "lora", "fedl2p"], "ranks": [2], "pools": ["unseen"],
            "save_adapters": False,
        },
    }  # fmt: skip
    return world.settings(**short | changes)


@pytest.fixture(scope="module")
def whole(
    world: World, three_clients: Path, tmp_path_factory: pytest.TempPathFactory
) -> FinishedRun:
    """An uninterrupted run; tests only read it."""
    return watched(settings(world, three_clients), tmp_path_factory.mktemp("fedl2p") / "run")


def rounds_of(folder: Path, phase: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["phase"] == phase]


def test_the_run_keeps_the_meta_net_and_its_losses(whole: FinishedRun) -> None:
    numbers = load_file(whole.folder / "fedl2p" / "model.safetensors")
    last = load_file(whole.folder / "checkpoints" / f"fedl2p-{ROUNDS:06d}.safetensors")
    assert numbers.keys() == last.keys()
    assert all(torch.equal(numbers[name], last[name]) for name in numbers)
    lines = rounds_of(whole.folder, "fedl2p")
    assert [line["round"] for line in lines] == list(range(1, ROUNDS + 1))
    size = sum(value.numel() * 4 for value in numbers.values())
    for line in lines:
        assert line["validation-loss"] > 0
        assert line["loss"] > 0
        assert line["clients"] == 2
        # each array has a header of 128 bytes
        assert line["bytes-down"] == line["bytes-up"] == 2 * (size + 128 * len(numbers))
    cells = sorted(path.parent.name for path in whole.folder.glob("cells/*/*.json"))
    assert cells == ["base-r0", "fedl2p-r2", "lora-r2"]
    digest = array_digest(to_arrays(numbers))
    for cell in whole.folder.glob("cells/*/*.json"):
        phi = json.loads(cell.read_text()).get("phi")
        assert phi == (digest if cell.parent.name.startswith("fedl2p") else None)


def test_nothing_but_the_meta_nets_numbers_leaves(whole: FinishedRun) -> None:
    numbers = load_file(whole.folder / "fedl2p" / "model.safetensors")
    shapes = {name: tuple(value.shape) for name, value in numbers.items()}
    ours = [pair for pair in whole.messages if pair[0].metadata.message_type == TRAIN_FEDL2P]
    assert len(ours) == 2 * ROUNDS
    for message, reply in ours:
        for content in (message.content, reply.content):
            arrays = {
                name: tuple(array.numpy().shape)
                for record in content.array_records.values()
                for name, array in record.items()
            }
            assert arrays == shapes
            raw = b"".join(record.deflate() for record in content.values())
            assert not any(word.encode() in raw for word in vocabulary() if len(word) >= 5)
        [config] = message.content.config_records.values()
        assert set(config) == {"server-round"}
        [metrics] = reply.content.metric_records.values()
        assert set(metrics) == {"num-examples", "loss", "validation-loss"}
        assert all(type(value) in (int, float) for value in metrics.values())
        assert metrics["num-examples"] == 12  # N, held-out rows included
        [about] = reply.content.config_records.values()
        assert set(about) == {"client"}
        assert about["client"] in SEEN
    for message, reply in whole.messages:
        if message.metadata.message_type == PERSONALIZE:
            config = message.content.config_records["config"]
            sent = message.content.array_records["arrays"]
            assert set(sent) == (set(shapes) if config["method"] == "fedl2p" else set())
            assert not any(len(record) for record in reply.content.array_records.values())


def test_the_mean_of_the_clients_is_weighted_by_n(whole: FinishedRun) -> None:
    replies = [
        reply.content for message, reply in whole.messages
        if message.metadata.message_type == TRAIN_FEDL2P
    ][-2:]  # fmt: skip
    final = load_file(whole.folder / "fedl2p" / "model.safetensors")
    for name, value in final.items():
        both = [next(iter(r.array_records.values()))[name].numpy() for r in replies]
        assert torch.allclose(value, torch.tensor((both[0] + both[1]) / 2), atol=1e-7)
        assert not (both[0] == both[1]).all()


def test_personalization_takes_the_rates_of_the_meta_net(
    whole: FinishedRun, world: World, three_clients: Path, tmp_path: Path
) -> None:
    """With a meta-net that answers 0, FedL2P scores what the base scores."""
    folder = tmp_path / "run"
    shutil.copytree(whole.folder, folder)
    numbers = load_file(folder / "fedl2p" / "model.safetensors")
    from fedp2eft.federation.server import checkpoints

    still = {name: torch.zeros_like(value) for name, value in numbers.items()}
    last = checkpoints.Checkpoint("fedl2p", ROUNDS, still)
    checkpoints.save_checkpoint(folder / "checkpoints", last, 2)
    train(settings(world, three_clients), folder)
    cells = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("cells/*/*")}
    before = json.loads(next(whole.folder.glob("cells/fedl2p-r2/*")).read_text())
    assert cells["fedl2p-r2"]["loss"] == pytest.approx(cells["base-r0"]["loss"], rel=1e-6)
    assert before["loss"] != pytest.approx(cells["base-r0"]["loss"], rel=1e-3)


def test_a_meta_net_that_does_not_fit_is_refused(
    whole: FinishedRun, world: World, three_clients: Path, tmp_path: Path
) -> None:
    from fedp2eft.runtime.workspace import Workspace

    workspace = Workspace(settings(world, three_clients), whole.folder)
    from fedp2eft.federation.client_app import client_side

    [message] = [
        m for m, _ in whole.messages if m.metadata.message_type == PERSONALIZE
        and m.content.config_records["config"]["method"] == "fedl2p"
    ]  # fmt: skip
    numbers = client_side(workspace, message, "de-seen-00").shared
    assert MetaNet.of(numbers).eta().keys() == numbers.keys()
    for bad, named in (
        (numbers | {"lr": torch.zeros(3)}, r"lr is float32 \(3,\)"),
        (numbers | {"lr": torch.full_like(numbers["lr"], float("nan"))}, "lr holds NaN"),
        (numbers | {"more": torch.zeros(3)}, "other parameters than expected"),
    ):
        message.content["arrays"] = to_arrays(bad)
        with pytest.raises(UserError, match=rf"What the server sent \(FedL2P\).*{named}"):
            client_side(workspace, message, "de-seen-00")


# ── stopped and resumed ────────────────────────────────────────────────────────────────────


def run_in_pieces(chosen: Settings, folder: Path) -> int:
    """Stop after every finished unit; gives how many stops it took."""
    for stops in range(60):
        try:
            train(chosen, folder, Stopper())
        except PowerCutError:
            continue
        return stops
    raise AssertionError("it never ends")


@given(losses=st.lists(st.sampled_from([1.0, 2.0, 3.0, 4.0])), patience=st.integers(1, 4))
def test_when_the_validation_loss_has_stalled(losses: list[float], patience: int) -> None:
    best, since = float("inf"), 0
    for loss in losses:
        best, since = (loss, 0) if loss < best else (best, since + 1)
    assert has_stalled(losses, patience) == (since >= patience)


def test_early_stopping_is_the_same_in_pieces(
    world: World, three_clients: Path, tmp_path: Path
) -> None:
    """The first round whose loss is not the lowest ends it, whoever remembers those before."""
    impatient = settings(
        world, three_clients, fedl2p=META | {"rounds": 40, "patience": 1, "hidden": 3},
        evaluation__methods=["fedl2p"],
    )  # fmt: skip
    heard = Listener()
    train(impatient, tmp_path / "whole", heard)
    losses = [line["validation-loss"] for line in rounds_of(tmp_path / "whole", "fedl2p")]
    last = len(losses)
    assert 1 < last < 40
    assert losses[-1] >= losses[-2]
    assert all(right < left for left, right in pairwise(losses[:-1]))
    assert heard.notes == [
        f"fedl2p: stopped after round {last}, the validation loss was lowest 1 rounds ago."
    ]
    stops = run_in_pieces(impatient, tmp_path / "pieces")
    assert stops == 1 + 1 + last + 1  # base, PSG, FedL2P, cells
    assert_same(outcome(tmp_path / "pieces"), outcome(tmp_path / "whole"))


class Listener(LogReporter):
    """Keeps the notes."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


# ── a run that grows ────────────────────────────────────────────────────────────────────────────


def test_methods_and_rounds_added_later(
    whole: FinishedRun, world: World, three_clients: Path, tmp_path: Path
) -> None:
    """FedL2P is added to a finished run; then the PSG, then FedL2P itself get one round more."""
    folder = tmp_path / "run"
    train(settings(world, three_clients, evaluation__methods=["base", "lora"]), folder)
    assert not (folder / "fedl2p").exists()
    train(settings(world, three_clients), folder)
    assert_same(outcome(folder), outcome(whole.folder))

    kept = {path: path.stat().st_mtime_ns for path in folder.glob("cells/fedl2p-*/*.json")}
    # cells and metrics of FedL2P know nothing of φ, nor of being left out
    fewer = settings(world, three_clients, federation__rounds=2, evaluation__methods=["lora"])
    train(fewer, folder)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert rounds_of(folder, "fedl2p") == rounds_of(whole.folder, "fedl2p")
    assert len(rounds_of(folder, "psg")) == 2

    more = META | {"rounds": ROUNDS + 1}
    train(settings(world, three_clients, federation__rounds=2, fedl2p=more), folder)
    assert len(rounds_of(folder, "fedl2p")) == ROUNDS + 1
    assert all(path.stat().st_mtime_ns != kept[path] for path in kept)
    with pytest.raises(UserError, match=r"has 4 finished rounds, more than fedl2p\.rounds = 3"):
        train(settings(world, three_clients, federation__rounds=2), folder)


def test_no_rounds_leave_the_first_meta_net(
    world: World, three_clients: Path, tmp_path: Path
) -> None:
    none = settings(
        world, three_clients, fedl2p=META | {"rounds": 0}, evaluation__methods=["fedl2p"]
    )
    train(none, tmp_path / "run")
    numbers = load_file(tmp_path / "run" / "fedl2p" / "model.safetensors")
    again = MetaNet(numbers["layers.0.weight"].shape[1], 6, len(numbers["lr"]), 1e-2).eta()
    assert all(torch.equal(value, again[name]) for name, value in numbers.items())
