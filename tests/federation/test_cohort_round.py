"""A federation whose clients train in cohorts is the federation of one client at a time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from safetensors.torch import load_file

from fedp2eft.adapters.stacked import NotPerRowError
from fedp2eft.client.cohort import train_cohort
from fedp2eft.client.descent import not_finite
from fedp2eft.errors import UserError
from fedp2eft.experiment.train import train
from fedp2eft.federation.client import lookahead as cohort
from fedp2eft.federation.local import LocalGrid, ManyAtOnce
from fedp2eft.progress import LogReporter
from fedp2eft.runtime import phases
from fedp2eft.settings.experiment import FederationSettings
from tiny_run import SEEN, World, assert_same, outcome


class Notes(LogReporter):
    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


class Counted:
    """Stands in for `train_cohort`; keeps the sizes of the cohorts, and how often one alone ran."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> None:
        self.sizes: list[int] = []
        self.alone = 0
        self.error, self.too_many = error, 0
        one = phases.train_round

        def together(bt: Any, task: Any, clients: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
            self.sizes.append(len(clients))
            if self.error and len(clients) >= self.too_many:
                raise self.error
            return train_cohort(bt, task, clients, *args, **kwargs)

        def by_itself(*args: Any, **kwargs: Any) -> Any:
            self.alone += 1
            return one(*args, **kwargs)

        monkeypatch.setattr(cohort, "train_cohort", together)
        monkeypatch.setattr(phases, "train_round", by_itself)


def run(world: World, folder: Path, reporter: LogReporter | None = None, **changes: Any) -> None:
    """The PSG's rounds of the tiny experiment with all seen clients; nothing is scored."""
    quick = {"base__kind": "none", "evaluation__methods": ["base"], "evaluation__ranks": [1]}
    quick |= {"federation__clients_per_round": len(SEEN), "local__dropout": False}
    train(world.settings(**quick | {"evaluation__pools": ["unseen"]} | changes), folder, reporter)


@pytest.fixture(scope="module")
def alone(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rounds, one client at a time."""
    folder = tmp_path_factory.mktemp("cohorts") / "alone"
    run(world, folder, federation__cohort=1, federation__rounds=2)
    return folder


def assert_close(one: Path, two: Path) -> None:
    """φ to 1e-5, and every number of every round."""
    phi, other = (load_file(folder / "psg" / "model.safetensors") for folder in (one, two))
    assert set(phi) == set(other)
    for name, value in phi.items():
        assert torch.allclose(value, other[name], atol=1e-5, rtol=0), name
    rounds = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (one, two)
    ]
    assert len(rounds[0]) == len(rounds[1])
    for mine, theirs in zip(*rounds, strict=True):
        assert mine.pop("phase") == theirs.pop("phase") == "psg"
        assert mine == pytest.approx(theirs, rel=1e-5)


# ── a whole federation ──────────────────────────────────────────────────────────────────────────


def test_a_federation_in_cohorts_is_the_one_of_single_clients(
    world, alone, tmp_path, monkeypatch
) -> None:
    counted, notes = Counted(monkeypatch), Notes()
    run(world, tmp_path / "run", notes, federation__cohort=3, federation__rounds=2)
    assert counted.sizes == [3, 3]
    assert counted.alone == 2  # the fourth client of each round has no other to go with
    assert notes.notes == []
    assert_close(alone, tmp_path / "run")
    # Going on after a stop gives the same bits: a round is one unit.
    run(world, tmp_path / "stopped", federation__cohort=3, federation__rounds=1)
    run(world, tmp_path / "stopped", federation__cohort=3, federation__rounds=2)
    one, two = outcome(tmp_path / "run"), outcome(tmp_path / "stopped")
    for found in (one, two):
        found.pop("results.json", None)
    assert_same(one, two)


def test_too_little_memory_halves_the_cohort(world, alone, tmp_path, monkeypatch) -> None:
    counted = Counted(monkeypatch, torch.OutOfMemoryError("too much"))
    counted.too_many = 3
    run(world, tmp_path / "run", federation__cohort=16, federation__rounds=2)
    assert counted.sizes == [4, 2, 2, 2, 2]
    assert counted.alone == 0
    assert_close(alone, tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "error", "reason"),
    [
        ({"local__dropout": True}, None, "local.dropout is on"),
        ({}, NotPerRowError("experts.0"), "layer experts.0 mixes"),
        ({}, torch.OutOfMemoryError("too much"), None),
    ],
    ids=["dropout", "mixed rows", "no memory"],
)
def test_where_no_cohort_can_be_clients_train_one_at_a_time(
    world, alone, tmp_path, monkeypatch, changes, error, reason
) -> None:
    counted, notes = Counted(monkeypatch, error), Notes()
    run(world, tmp_path / "run", notes, federation__cohort=4, federation__rounds=2, **changes)
    assert counted.alone == 2 * len(SEEN)
    if reason:
        assert len(notes.notes) == 1
        assert reason in notes.notes[0]
    if not changes:
        one, two = outcome(alone), outcome(tmp_path / "run")
        assert one["psg/model.safetensors"] == two["psg/model.safetensors"]
        assert one["metrics.jsonl"] == two["metrics.jsonl"]


def test_the_client_whose_loss_is_nan_is_named(world, tmp_path, monkeypatch) -> None:
    def with_one_error(bt: Any, task: Any, clients: Sequence[Any], *args: Any, **kw: Any) -> Any:
        found = train_cohort(bt, task, clients, *args, **kw)
        return [found[0], not_finite(float("nan"), 2), *found[2:]]

    monkeypatch.setattr(cohort, "train_cohort", with_one_error)
    with pytest.raises(UserError, match=rf"{SEEN[1]}, round 1 of psg: The loss is nan at step 2"):
        run(world, tmp_path / "run", federation__cohort=3, federation__rounds=2)


# ── the engine ──────────────────────────────────────────────────────────────────────────────────


def test_the_grid_shows_its_app_the_messages_that_wait() -> None:
    app, shown, ran = ClientApp(), [], []

    @app.train("psg")
    def psg(message: Message, context: Context) -> Message:
        ran.append(context.node_id)
        return Message(RecordDict(), reply_to=message)

    @app.query("describe")
    def describe(message: Message, context: Context) -> Message:
        return Message(RecordDict(), reply_to=message)

    def compute(messages: Sequence[Message], contexts: Sequence[Context]) -> None:
        assert [m.metadata.dst_node_id for m in messages] == [c.node_id for c in contexts]
        shown.append((list(ran), [c.node_config["client"] for c in contexts]))

    nodes = [{"client": name} for name in "abcdefg"]
    grid = LocalGrid(app, [dict(node) for node in nodes], {}, ManyAtOnce("train.psg", 3, compute))
    ids = list(grid.get_node_ids())
    messages = [Message(RecordDict(), node, "train.psg") for node in ids]
    messages.insert(1, Message(RecordDict(), ids[0], "query.describe"))
    waiting = grid.push_messages(messages)
    replies = [reply for _ in waiting for reply in grid.pull_messages(waiting)]
    assert [reply.metadata.reply_to_message_id for reply in replies] == waiting
    assert ran == ids
    # the last one goes alone, so it is not shown
    assert shown == [([], list("abc")), (ids[:3], list("def"))]


def test_the_size_of_a_cohort() -> None:
    assert FederationSettings(cohort="auto").cohort_size == 1
    assert FederationSettings(cohort=5).cohort_size == 5
    with pytest.raises(UserError, match=r"federation\.cohort is 0"):
        FederationSettings(cohort=0)


def test_the_setting_is_a_number_or_auto(world) -> None:
    assert world.settings().federation.cohort == "auto"
    assert world.settings(federation__cohort=8).federation.cohort == 8
    with pytest.raises(UserError, match="cohort"):
        world.settings(federation__cohort="many")
