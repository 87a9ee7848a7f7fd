"""A SuperNode's own folder, and the base that it is sent. No processes: messages to the app."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from safetensors.torch import load_file
from toy import Notes

from fedp2eft.errors import UserError
from fedp2eft.federation.client.node import own_folder
from fedp2eft.federation.client.state import release_state
from fedp2eft.federation.client_app import app as client_app
from fedp2eft.federation.local import LocalGrid
from fedp2eft.federation.server.delivery import deliver_base
from fedp2eft.federation.server.exchange import roster
from fedp2eft.federation.server.phases import train_base, train_phase
from fedp2eft.federation.server.run_folder import RunFolder
from fedp2eft.federation.server.session import Session
from fedp2eft.federation.wire.messages import ARRAYS, CONFIG, TAKE_BASE, to_arrays
from fedp2eft.models.sources import hash_weights
from fedp2eft.runtime.phases import PSG_PHASE
from fedp2eft.runtime.workspace import Workspace
from fedp2eft.settings.experiment import FederationSettings
from fedp2eft.settings.reading import settings_from, settings_text
from tiny_run import LABELS, World, all_rows, write_jsonl
from turns import TRAIN_PSG

NAMES = ("de-seen-00", "fr-seen-00")


class Nodes:
    """A server and two SuperNodes in one process."""

    def __init__(self, world: World, folder: Path, **changes: Any) -> None:
        changes = {"base__rounds": 1, "federation__rounds": 1, **changes}
        data = {"dataset": "nodes", "labels": list(LABELS)}
        self.settings = world.settings(data=data, **changes)
        self.folder = folder
        self.configs = []
        for name in NAMES:
            rows = [
                {key: row[key] for key in ("text", "label", "split")}
                for row in all_rows()
                if row["client"] == name
            ]
            place = folder / name
            place.mkdir(parents=True, exist_ok=True)
            write_jsonl(place / "rows.jsonl", rows)
            self.configs.append(
                {"client": name, "path": str(place / "rows.jsonl"), "keep": str(place / "keep")}
            )
        self.run = RunFolder(folder / "run", self.settings)
        self.workspace = Workspace(self.settings, self.run.path)

    def grid(self, configs: list[dict[str, str]] | None = None) -> LocalGrid:
        config = {"settings": settings_text(self.settings), "run": "runs/x"}
        grid = LocalGrid(client_app, configs or self.configs, config)  # type: ignore[arg-type]
        self.sent: list[str] = []
        push = grid.push_messages

        def pushing(messages: Any) -> list[str]:
            messages = list(messages)
            self.sent += [message.metadata.message_type for message in messages]
            return push(messages)

        grid.push_messages = pushing  # type: ignore[method-assign]
        return grid

    def kept(self, name: str) -> Path:
        (folder,) = (self.folder / name / "keep" / name).iterdir()
        return folder

    def start(self, configs: list[dict[str, str]] | None = None) -> LocalGrid:
        grid = self.grid(configs)
        train_base(self.session(grid))
        return grid

    def session(self, grid: LocalGrid, notes: Notes | None = None) -> Session:
        members = roster(grid, 60.0)
        return Session(grid, self.run, self.workspace, members, notes or Notes())

    def close(self) -> None:
        self.run.close()
        release_state()


@pytest.mark.parametrize("kind", ["standard-fl", "fedit", "none"])
def test_every_node_has_the_servers_base_and_is_sent_it_once(
    world: World, tmp_path: Path, kind: str
) -> None:
    nodes = Nodes(world, tmp_path, base__kind=kind)
    try:
        nodes.start()
        assert nodes.sent.count(TAKE_BASE) == 2
        ours = load_file(nodes.run.base / "model.safetensors")
        for name in NAMES:
            theirs = load_file(nodes.kept(name) / "base" / "model.safetensors")
            assert theirs.keys() == ours.keys()
            assert all(torch.equal(theirs[key], ours[key]) for key in ours)
        # a start later they say that they have it
        grid = nodes.start()
        assert TAKE_BASE not in nodes.sent
        # and can train on it
        session = nodes.session(grid)
        train_phase(PSG_PHASE, session, session.members)
    finally:
        nodes.close()


def test_one_that_lost_it_is_sent_it_again(world: World, tmp_path: Path) -> None:
    nodes = Nodes(world, tmp_path, base__kind="fedit")
    try:
        nodes.start()
        (nodes.kept(NAMES[0]) / "base" / "received.json").unlink()
        nodes.start()
        assert nodes.sent.count(TAKE_BASE) == 1
        # not from an older checkpoint than the last one
        (nodes.kept(NAMES[0]) / "base" / "received.json").unlink()
        next((nodes.run.path / "checkpoints").glob("base-*")).unlink()
        with pytest.raises(UserError, match="no complete checkpoint of the base model"):
            nodes.start()
    finally:
        nodes.close()


def reply_to(nodes: Nodes, kind: str, content: RecordDict) -> Message:
    grid = nodes.grid(nodes.configs[:1])
    (id_,) = grid.push_messages([Message(content, 2, kind)])
    (reply,) = grid.pull_messages([id_])
    return reply


def test_without_the_base_a_node_says_so(world: World, tmp_path: Path) -> None:
    nodes = Nodes(world, tmp_path)
    try:
        config = ConfigRecord({"server-round": 1})
        reply = reply_to(nodes, TRAIN_PSG, RecordDict({ARRAYS: ArrayRecord(), CONFIG: config}))
        assert (
            reply.error.reason == "It has not received the run's base model: start the run again."
        )
    finally:
        nodes.close()


@pytest.mark.parametrize("wrong", ["another model", "a number too many", "one too few"])
def test_what_does_not_fit_is_not_kept(world: World, tmp_path: Path, wrong: str) -> None:
    nodes = Nodes(world, tmp_path, base__kind="fedit")
    try:
        model = hash_weights(Path(nodes.workspace.source.path))
        numbers = {
            name: p.detach()
            for name, p in nodes.workspace.base.travelling(
                nodes.workspace.trainable_base, nodes.settings.base
            ).items()
        }
        first = next(iter(numbers))
        if wrong == "another model":
            model = "sha256:0123456789abcdef"
        elif wrong == "a number too many":
            numbers["more"] = torch.zeros(2)
        else:
            numbers[first] = numbers[first][:-1]
        content = RecordDict({ARRAYS: to_arrays(numbers), CONFIG: ConfigRecord({"model": model})})
        reply = reply_to(nodes, TAKE_BASE, content)
        expected = {
            "another model": "fetch the same revision on both",
            "a number too many": "The base from the server has other parameters than expected",
            "one too few": f"The base from the server: {first} is float32",
        }[wrong]
        assert expected in reply.error.reason
        assert not (nodes.kept(NAMES[0]) / "base").exists()
    finally:
        nodes.close()


def test_a_node_that_keeps_another_base_than_it_was_sent_is_refused(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = Nodes(world, tmp_path, base__kind="none", peers__failures="continue")
    try:
        grid = nodes.grid()
        notes = Notes()
        session = nodes.session(grid, notes)
        nodes.workspace.save_base({})
        lied = []
        run_client = grid._run_client

        def lying(message: Message) -> Message:
            reply = run_client(message)
            if not lied:
                lied.append(reply)
                reply.content.config_records["about"]["base"] = "x" * 1000
            return reply

        monkeypatch.setattr(grid, "_run_client", lying)
        deliver_base(session)
        (note,) = notes.lines
        assert "it keeps 'xxx" in note
        assert len(note) < 300
    finally:
        nodes.close()


# ── the folder ──────────────────────────────────────────────────────────────────────────────────


def test_a_run_has_a_folder_of_its_own_that_no_peer_names(tmp_path: Path) -> None:
    settings, node = settings_from({}), {"client": "a", "keep": str(tmp_path)}
    folder = own_folder(node, settings, "../../etc/passwd")
    assert folder.parent == tmp_path / "a"
    assert "passwd" not in folder.name
    assert len(folder.name) == 16
    assert own_folder(node, settings, "../../etc/passwd") == folder
    assert own_folder(node, settings, "other") != folder
    assert own_folder({**node, "client": "b"}, settings, "other").parent == tmp_path / "b"
    # what may change between two starts of a run changes no folder, the rest does
    more = replace(settings, federation=FederationSettings(rounds=151))
    assert own_folder(node, more, "../../etc/passwd") == folder
    more = replace(more, seed=43)
    assert own_folder(node, more, "../../etc/passwd") != folder
    text = (folder / "settings.yaml").read_text()
    assert "seed: 42" in text


def test_what_a_killed_process_left_half_written_is_swept(tmp_path: Path) -> None:
    settings, node = settings_from({}), {"client": "a", "keep": str(tmp_path)}
    folder = own_folder(node, settings, "x")
    (folder / ".base-12345678" / "new").mkdir(parents=True)
    assert own_folder(node, settings, "x") == folder
    assert [path.name for path in folder.iterdir()] == ["settings.yaml"]


@pytest.mark.parametrize(
    ("node", "says"),
    [({"client": "a"}, "names no folder"), ({"client": "..", "keep": "x"}, "a client's name")],
)
def test_a_folder_must_be_named(node: dict[str, str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        own_folder(node, settings_from({}), "x")


def test_the_local_engine_has_no_rows_of_nodes(world: World, tmp_path: Path) -> None:
    from fedp2eft.experiment.train import train

    data = {"dataset": "nodes", "labels": list(LABELS)}
    with pytest.raises(UserError, match="start it with flwr run"):
        train(world.settings(data=data), tmp_path / "run")
