"""What goes wrong between server and clients: each fault costs its own share, and is counted."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from deployed import Deployment, careless_first_process, deployment, ended
from flwr.app import Error, Message
from flwr.serverapp import Grid
from toy import CLIENTS, FIRST, Notes, apart, app, lines, members, settings, train

import fedp2eft
from fedp2eft.errors import UserError
from fedp2eft.federation.local import LocalGrid
from fedp2eft.federation.server.admission import Failures
from fedp2eft.federation.server.aggregation import Averaging
from fedp2eft.federation.server.checkpoints import load_checkpoint
from fedp2eft.federation.server.exchange import roster
from fedp2eft.federation.server.faults import Faults, summary_line
from fedp2eft.federation.server.presence import wait_for_nodes
from fedp2eft.federation.server.rounds import run_rounds
from fedp2eft.federation.server.run_folder import RunFolder
from fedp2eft.federation.wire.messages import CONFIG
from fedp2eft.runtime.phases import PSG_PHASE
from fedp2eft.settings.experiment import FederationSettings, Settings
from fedp2eft.settings.reading import settings_text

BAD = "c03"


class Remote(Grid):
    """An engine whose clients are elsewhere: `fate` says what becomes of each reply."""

    def __init__(
        self, inner: LocalGrid, fate: Callable[[str, int, Message], list[Message]] | None = None
    ) -> None:
        self.inner = inner
        self.fate = fate
        self.here: Callable[[], Iterable[int]] = inner.get_node_ids
        self.asked: list[tuple[str, int]] = []
        self._sent: dict[str, tuple[str, int]] = {}

    def set_run(self, run: Any) -> None:
        self.inner.set_run(run)

    @property
    def run(self) -> Any:
        return self.inner.run

    def create_message(self, *args: Any, **options: Any) -> Message:
        return self.inner.create_message(*args, **options)

    def get_node_ids(self) -> list[int]:
        return list(self.here())

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        messages = list(messages)
        ids = self.inner.push_messages(messages)
        for id_, message in zip(ids, messages, strict=True):
            client = CLIENTS[message.metadata.dst_node_id - 2]
            round_ = int(message.content.config_records[CONFIG]["server-round"])  # type: ignore[arg-type]
            self._sent[id_] = (client, round_)
            self.asked.append((client, round_))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """All replies there are: clients elsewhere work at the same time."""
        replies = []
        for id_ in message_ids:
            for reply in self.inner.pull_messages([id_]):
                replies += self.fate(*self._sent[id_], reply) if self.fate else [reply]
        return replies

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> list[Message]:
        raise NotImplementedError


def rounds(
    folder: Path,
    grid: Remote,
    s: Settings,
    number: int = 3,
    notes: Notes | None = None,
    size: int = 6,
) -> dict[str, torch.Tensor]:
    s = replace(s, federation=replace(s.federation, rounds=number, clients_per_round=size))
    run = RunFolder(folder, s)
    aggregator = Averaging(s, PSG_PHASE, members())
    try:
        return run_rounds(grid, run, PSG_PHASE, aggregator, FIRST, notes or Notes())
    finally:
        run.close()


def remote(s: Settings, fate: Callable[[str, int, Message], list[Message]] | None = None) -> Remote:
    config = {"settings": settings_text(s)}
    return Remote(LocalGrid(app(), [{"client": name} for name in CLIENTS], config), fate)


def report(folder: Path) -> dict[str, Any]:
    return Faults(folder, 0).summarise()


# ── replies ─────────────────────────────────────────────────────────────────────────────────────


def test_a_late_reply_is_left_out_and_ignored_when_it_comes(tmp_path: Path) -> None:
    s = settings(federation__timeout=0.3)
    late: list[Message] = []

    def fate(client: str, round_: int, reply: Message) -> list[Message]:
        if client == asked and round_ == 1:
            late.append(reply)
            return []
        given = [reply]
        if round_ == 2 and late:
            given.append(late.pop())
        return given

    asked = CLIENTS[0]
    grid = remote(s, fate)
    notes = Notes()
    rounds(tmp_path / "late", grid, s, 2, notes, size=20)
    first, second = lines(tmp_path / "late")
    assert list(first["left-out"]) == [asked]
    assert "no reply within 0 s" in first["left-out"][asked]
    assert (first["clients"], second["clients"]) == (19, 20)
    assert "left-out" not in second
    found = report(tmp_path / "late")
    assert found["counts"] == {"ignored": 1, "late": 1}
    assert found["clients"] == {asked: {"ignored": 1, "late": 1}}
    # the late φ of round 1 is nowhere in the numbers
    never = remote(s, lambda c, r, reply: [] if (c, r) == (asked, 1) else [reply])
    one = rounds(tmp_path / "never", never, s, 2, size=20)
    other = rounds(tmp_path / "late", grid, s, 2, size=20)
    assert apart(one, other) == 0


def test_a_second_reply_is_ignored(tmp_path: Path) -> None:
    s = settings()
    twice = remote(s, lambda client, _, reply: [reply] * (2 if client == BAD else 1))
    with_it = rounds(tmp_path / "twice", twice, s, size=20)
    without = rounds(tmp_path / "once", remote(s), s, size=20)
    assert apart(with_it, without) == 0
    assert lines(tmp_path / "twice") == lines(tmp_path / "once")
    assert report(tmp_path / "twice")["counts"] == {"ignored": 3}
    assert report(tmp_path / "once")["counts"] == {}


@pytest.mark.parametrize(("code", "kind"), [(5, "lost"), (4, "lost"), (2, "failed"), (8, "failed")])
def test_a_client_that_is_cut_off_is_not_one_that_failed(
    tmp_path: Path, code: int, kind: str
) -> None:
    def fate(client: str, round_: int, reply: Message) -> list[Message]:
        if (client, round_) != (BAD, 2):
            return [reply]
        gone = Message(Error(code, "gone"), reply_to=remade[reply.metadata.reply_to_message_id])
        return [gone]

    s = settings()
    grid = remote(s, fate)
    remade: dict[str, Message] = {}
    push = grid.inner.push_messages

    def pushing(messages: Iterable[Message]) -> list[str]:
        messages = list(messages)
        ids = push(messages)
        remade.update(zip(ids, messages, strict=True))
        return ids

    grid.inner.push_messages = pushing  # type: ignore[method-assign]
    rounds(tmp_path, grid, s, size=20)
    assert [line["clients"] for line in lines(tmp_path)] == [20, 19, 20]
    assert report(tmp_path) == {"counts": {kind: 1}, "clients": {BAD: {kind: 1}}}


def test_a_superlink_that_takes_no_messages_is_an_error(tmp_path: Path) -> None:
    s = settings()
    grid = remote(s)
    grid.inner.push_messages = lambda messages: []  # type: ignore[method-assign]
    grid.push_messages = grid.inner.push_messages  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"did not accept the messages \(round 1 of psg\)"):
        rounds(tmp_path, grid, s)


def test_one_that_cannot_be_sent_to_is_left_out(tmp_path: Path) -> None:
    s = settings()
    grid = remote(s)
    push = grid.push_messages

    def pushing(messages: Iterable[Message]) -> list[str]:
        ids = push(messages)
        return ["" if grid._sent[id_][0] == BAD else id_ for id_ in ids]

    grid.push_messages = pushing  # type: ignore[method-assign]
    rounds(tmp_path, grid, s, 1, size=20)
    assert report(tmp_path)["clients"] == {BAD: {"lost": 1}}


# ── quarantine ──────────────────────────────────────────────────────────────────────────────────


def failing(rounds_: Callable[[int], bool], asked: list[int]) -> Callable[..., Any]:
    def spoil(client: str, round_: int, _sent: Any, good: Any) -> Any:
        if client == BAD:
            asked.append(round_)
            if rounds_(round_):
                return {"w": good["w"]}
        return None

    return spoil


def test_a_client_that_always_fails_is_quarantined_and_named(tmp_path: Path) -> None:
    asked: list[int] = []
    notes = Notes()
    train(tmp_path, failing(lambda _: True, asked), 6, 20, reporter=notes)
    assert asked == [1, 2, 3]
    assert [line["clients"] for line in lines(tmp_path)] == [19] * 6
    assert sum("quarantine" in line for line in notes.lines) == 1
    (said,) = [line for line in notes.lines if "quarantine" in line]
    assert BAD in said
    assert "3 times" in said
    summary = Faults(tmp_path, 3).summarise()
    assert summary["clients"] == {BAD: {"quarantined": 1, "refused": 3}}
    assert summary_line(summary) == f"Faults: 1 quarantined, 3 refused ({BAD}); see faults.jsonl."
    # starting again gives it another chance
    train(tmp_path, failing(lambda _: False, asked), 8, 20)
    assert asked == [1, 2, 3, 7, 8]
    assert [line["clients"] for line in lines(tmp_path)] == [19] * 6 + [20] * 2


def test_failures_must_be_in_a_row(tmp_path: Path) -> None:
    asked: list[int] = []
    train(tmp_path, failing(lambda round_: round_ % 3 != 0, asked), 8, 20)
    assert asked == list(range(1, 9))


def test_quarantine_can_be_off(tmp_path: Path) -> None:
    asked: list[int] = []
    train(tmp_path, failing(lambda _: True, asked), 5, 20, peers__quarantine=0)
    assert asked == [1, 2, 3, 4, 5]


def test_others_are_sampled_in_its_place(tmp_path: Path) -> None:
    asked: list[int] = []
    train(tmp_path, failing(lambda _: True, asked), 8, 6, names=CLIENTS[:7], peers__quarantine=1)
    assert len(asked) == 1
    clients = [line["clients"] for line in lines(tmp_path)]
    assert sorted(clients) == [5] + [6] * 7


# ── who is here ─────────────────────────────────────────────────────────────────────────────────


def test_too_few_clients_are_waited_for_and_given_up(tmp_path: Path) -> None:
    s = settings(federation__min_clients=3, federation__wait=0.4)
    grid, notes = remote(s), Notes()
    grid.here = lambda: [2, 3]
    start = time.monotonic()
    with pytest.raises(UserError, match=r"2 clients are connected after 0\.4 s .* asks for 3"):
        wait_for_nodes(grid, s.federation, notes)
    assert time.monotonic() - start >= 0.4
    assert notes.lines == ["Waiting for clients: 2 of at least 3 are connected; giving up in 0 s."]


def test_the_run_starts_when_enough_are_here_and_no_more_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fedp2eft.federation.server.presence.SETTLE_SECONDS", 0.0)
    coming = iter([[], [2], [2, 3], [2, 3], [2, 3, 4], [2, 3, 4], [2, 3, 4], [2, 3, 4]])
    last: list[list[int]] = []
    s = settings(federation__min_clients=2, federation__wait=5.0)
    grid = remote(s)

    def here() -> list[int]:
        last.append(next(coming))
        return last[-1]

    grid.here = here
    wait_for_nodes(grid, s.federation, Notes())
    assert last[-1] == [2, 3, 4]


def test_a_round_waits_for_its_clients_and_nothing_finished_is_lost(tmp_path: Path) -> None:
    s = settings(federation__min_clients=4, federation__wait=0.3)
    grid = remote(s)
    everyone = grid.inner.get_node_ids()

    def here() -> list[int]:
        return everyone if len(lines_or_none(tmp_path)) < 2 else everyone[:3]

    grid.here = here
    with pytest.raises(UserError, match=r"resumes from its last finished round"):
        rounds(tmp_path, grid, s, 4)
    assert len(lines(tmp_path)) == 2
    grid.here = lambda: everyone
    gone_on = rounds(tmp_path, grid, s, 4)
    whole = rounds(tmp_path.with_name("whole"), remote(s), s, 4)
    assert apart(gone_on, whole) == 0


def lines_or_none(folder: Path) -> list[Any]:
    return lines(folder) if (folder / "metrics.jsonl").exists() else []


def test_a_federation_smaller_than_the_minimum_needs_all_its_clients(tmp_path: Path) -> None:
    s = settings(federation__min_clients=1000, federation__wait=0.0)
    grid = remote(s)
    rounds(tmp_path, grid, s, 1)  # all 20 are here
    grid.here = lambda: [*grid.inner.get_node_ids()[:19], 999]  # a stranger does not stand in
    with pytest.raises(UserError, match="asks for 20"):
        rounds(tmp_path, grid, s, 2)


# ── time, and the report ────────────────────────────────────────────────────────────────────────


def test_a_clock_that_jumps_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = settings(federation__timeout=30.0, federation__min_clients=3, federation__wait=30.0)
    before = rounds(tmp_path / "before", remote(s), s)
    jumps = iter(range(10**9))
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + (-1) ** next(jumps) * 10.0**7)
    grid = remote(s)
    wait_for_nodes(grid, FederationSettings(min_clients=3), Notes())
    assert apart(rounds(tmp_path / "after", grid, s), before) == 0
    assert report(tmp_path / "after")["counts"] == {}


def test_deadlines_are_on_the_monotonic_clock() -> None:
    folder = Path(fedp2eft.__file__).parent / "federation"
    for path in folder.glob("*.py"):
        assert not re.search(r"\btime\.time\(|datetime\.now|utcnow", path.read_text()), path


def test_faults_are_counted_over_all_starts(tmp_path: Path) -> None:
    for _ in range(2):
        faults = Faults(tmp_path, 2)
        faults.happened("late", "a", "no answer")
        faults.happened("started-again")
        faults.answered("a")
        assert not faults.happened("lost", "a")
        assert faults.happened("failed", "a")
        assert faults.quarantined == {"a"}
    with (tmp_path / "faults.jsonl").open("ab") as file:
        file.write(b'{"kind": "la')  # killed here
    counts = {"failed": 2, "late": 2, "lost": 2, "quarantined": 2, "started-again": 2}
    summary = Faults(tmp_path, 2).summarise()
    assert summary["counts"] == counts
    assert summary_line(Faults(tmp_path / "..", 2).summarise()) == "Faults: none."


def test_a_failure_that_stops_the_run_is_no_fault_of_it(tmp_path: Path) -> None:
    faults = Faults(tmp_path, 1)
    failures = Failures(settings().peers, stop=True, reporter=Notes(), faults=faults)
    with pytest.raises(UserError, match="broken"):
        failures.add("a", "broken")
    assert faults.summarise()["counts"] == {}


# ── processes ───────────────────────────────────────────────────────────────────────────────────

TOY = Path(__file__).parent / "toy_app"


def start(there: Deployment, s: Settings) -> None:
    """`flwr run` of the toy's app."""
    config = there.folder / "settings.yaml"
    config.write_text(settings_text(s), encoding="utf-8")
    there.flwr("run", TOY, "--run-config", f"settings='{config}' run='{there.folder / 'run'}'")


def toy_settings(rounds_: int, nodes: int, **changes: Any) -> Settings:
    return settings(
        federation__rounds=rounds_, federation__clients_per_round=nodes, federation__wait=600.0,
        federation__min_clients=nodes, **changes,
    )  # fmt: skip


def finished(folder: Path) -> int:
    """Rounds with a whole line."""
    path = folder / "run" / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_killed_supernode_and_a_slow_one_cost_their_own_share(tmp_path: Path) -> None:
    for patience in (2, 8, 30):  # a busy machine may be busier still in the second round
        folder = tmp_path / str(patience)
        if one_dies_and_one_is_slow(folder, patience):
            break
    one, two = lines(folder / "run")
    assert (one["clients"], two["clients"]) == (3, 1)
    assert sorted(two["left-out"]) == ["killed", "slow"]
    found = report(folder / "run")["clients"]
    assert found["slow"] == {"late": 1}
    assert list(found["killed"]) in (["late"], ["lost"])


def one_dies_and_one_is_slow(folder: Path, patience: float) -> bool:
    """A round with three clients, then one with a deadline; whether the fast client met it."""
    with deployment(folder) as there:
        late = {"from": "2", "sleep": "10000"}
        there.start_supernode("fast", client="fast")
        there.start_supernode("slow", client="slow", **late)
        there.start_supernode("killed", client="killed", mark=str(folder / "begun"), **late)
        there.run_until(lambda: start(there, toy_settings(1, 3)), lambda: finished(folder) == 1)
        there.wait_for(lambda: not there.child("superlink", "flwr-serverapp"))
        timing = json.loads((folder / "run" / "timings.jsonl").read_text())
        (folder / "begun").unlink()
        deadline = 4 + patience * timing["seconds"]
        s = toy_settings(2, 3, federation__timeout=deadline, peers__min_share=0.3)
        there.run_until(lambda: start(there, s), (folder / "begun").exists)
        there.kill("killed")
        there.wait_for(lambda: not there.child("superlink", "flwr-serverapp"))
        return finished(folder) == 2


def test_a_killed_serverapp_and_a_killed_superlink_go_on_from_their_round(tmp_path: Path) -> None:
    names, number = ("c00", "c01"), 4

    def at_work(round_: int) -> bool:
        """Whether all clients are inside a round."""
        marks = [tmp_path / name for name in names]
        return all(mark.exists() and mark.read_text() == str(round_) for mark in marks)

    with careless_first_process(), deployment(tmp_path) as there:
        for name in names:
            slow = {"from": "2", "sleep": "1"}
            there.start_supernode(name, client=name, mark=str(tmp_path / name), **slow)
        s = toy_settings(number, len(names))
        there.run_until(lambda: start(there, s), lambda: at_work(2))
        server_app = there.child("superlink", "flwr-serverapp")
        assert server_app, there.logs()
        server_app.kill()
        there.wait_for(lambda: ended(server_app))
        assert 1 <= finished(tmp_path) < number
        there.run_until(lambda: start(there, s), lambda: at_work(3))
        server_app = there.child("superlink", "flwr-serverapp")
        there.kill("superlink")
        if server_app:  # it ends when its SuperLink does; its run folder is free then
            there.wait_for(lambda: ended(server_app))
        assert 2 <= finished(tmp_path) < number
        there.start_superlink()
        there.run_until(lambda: start(there, s), lambda: finished(tmp_path) == number)
        there.wait_for(lambda: "started-again" in report(tmp_path / "run")["counts"])
    assert [line["round"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4]
    assert all(line["clients"] == len(names) for line in lines(tmp_path / "run"))
    last = load_checkpoint(tmp_path / "run" / "checkpoints", "psg")
    assert last is not None
    assert torch.equal(last.parameters["w"], toy_numbers(tmp_path / "whole", names, number))


def toy_numbers(folder: Path, names: Sequence[str], number: int) -> torch.Tensor:
    """What the same clients come to in one process."""
    sys.path.insert(0, str(TOY))
    try:
        toy_client, toy_server = (import_module(f"toy_app.{name}") for name in ("client", "server"))
    finally:
        sys.path.remove(str(TOY))
    s = toy_settings(number, len(names))
    grid = LocalGrid(toy_client.app, [{"client": name} for name in names], {})
    aggregator = Averaging(s, PSG_PHASE, roster(grid, 60.0))
    run = RunFolder(folder, s)
    try:
        return run_rounds(grid, run, PSG_PHASE, aggregator, toy_server.FIRST, Notes())["w"]
    finally:
        run.close()
