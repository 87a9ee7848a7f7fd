"""The protocol of secure sums: it ends with the sum or one line, whoever drops out or lies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from summing import QUESTION, STAGES, Fate, Federation, close, dropping, few, secure

from fedp2eft.errors import ShareableError, UserError
from fedp2eft.federation.client import sums as client_sums
from fedp2eft.federation.client.sums import give_keys, give_masked, give_shares, unmask
from fedp2eft.federation.hooks import begin_run
from fedp2eft.federation.wire import keys
from fedp2eft.federation.wire.keys import KEYS, SECURE, SHARES, UNMASK, threshold
from fedp2eft.federation.wire.layouts import Part
from fedp2eft.federation.wire.messages import ARRAYS
from fedp2eft.federation.wire.sums import CUT, Block

# ── sums ────────────────────────────────────────────────────────────────────────────────────────


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_the_sum_is_the_plain_one_whoever_drops_out(data, tmp_path: Path) -> None:
    """Over numbers of clients, sizes, neighbors and dropouts at every stage."""
    clients = data.draw(st.integers(3, 9))
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=2)))
    layout = {"w": Block(shape, 2.0, data.draw(st.sampled_from([32, 64])))}
    wide = data.draw(st.sampled_from([4, 32]))
    rng = np.random.default_rng(clients)
    values = [{"w": rng.uniform(-2, 2, shape)} for _ in range(clients)]
    privacy = secure(secure_neighbors=wide)
    federation = Federation(tmp_path, values, layout, privacy)
    least = threshold(privacy, clients)
    spare = min(min(wide, clients - 1) + 1 - least, clients - 3)
    who = data.draw(st.lists(st.sampled_from(federation.names), unique=True, max_size=spare))
    when = {name: data.draw(st.sampled_from(STAGES)) for name in who}
    federation.grid.fate = dropping(when)
    found = federation.sum()
    assert found.clients == sorted(set(federation.names) - {n for n in when if when[n] != UNMASK})
    close(federation, found)
    counted = federation.faults.summarise()["clients"]
    assert set(counted) >= set(when)


@pytest.mark.parametrize("stage", STAGES)
def test_too_few_clients_end_it_in_one_line(tmp_path: Path, stage: str) -> None:
    federation = few(tmp_path)
    federation.grid.fate = dropping(dict.fromkeys(("c00", "c01", "c02"), stage))
    with pytest.raises(UserError, match=r"secure_threshold\): start again to repeat it") as error:
        federation.sum()
    assert "\n" not in str(error.value)
    kinds = [m.metadata.message_type for _, m, _ in federation.grid.arrived]
    assert set(kinds) == set(STAGES[: STAGES.index(stage) + 1])  # nothing is asked after
    federation.grid.fate = None
    close(federation, federation.sum())  # and it can be repeated


def test_two_clients_hide_nobody(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a secure sum takes 3 or more"):
        few(tmp_path, 2).sum()


def test_entries_beyond_the_limit_are_cut_and_counted(tmp_path: Path) -> None:
    federation = few(tmp_path)
    federation.values[1]["w"][0] = [9.0, -9.0, 0.0]
    found = federation.sum()
    assert found.cut == 2
    federation.values[1]["w"][0] = [2.0, -2.0, 0.0]
    close(federation, found)


def test_a_client_of_other_shapes_is_left_out(tmp_path: Path) -> None:
    federation = few(tmp_path)
    federation.values[3]["w"] = np.zeros((3, 2))
    found = federation.sum()  # it says itself that it cannot
    assert "c03" not in found.clients
    close(federation, found)


def test_late_and_second_replies_are_ignored(tmp_path: Path) -> None:
    federation = few(tmp_path, timeout=0.3)
    late: list[Message] = []

    def fate(client: str, message: Message, reply: Message) -> Any:
        kind = message.metadata.message_type
        if (client, kind) == ("c00", QUESTION):
            late.append(reply)
            return []
        given = [reply, reply] if client == "c01" else [reply]
        return [*given, *late] if kind == UNMASK else given

    federation.grid.fate = fate
    found = federation.sum()
    assert found.clients == ["c01", "c02", "c03", "c04"]
    close(federation, found)
    counts = federation.faults.summarise()["clients"]
    assert counts["c00"]["late"] == 1
    assert counts["c00"]["ignored"] >= 1
    assert counts["c01"]["ignored"] >= 3


# ── wrong shares ────────────────────────────────────────────────────────────────────────────────


def altered(reply: Message, message: Message, **changes: Any) -> Message:
    record = ConfigRecord({**reply.content.config_records[SECURE], **changes})
    content = RecordDict({**reply.content, SECURE: record})
    return Message(content, reply_to=message)


def altering(whose: str, stage: str, changes: Mapping[str, Any]) -> Fate:
    """One client's reply of one stage has other entries."""

    def fate(client: str, message: Message, reply: Message) -> Message:
        mine = client == whose and message.metadata.message_type == stage
        return altered(reply, message, **changes) if mine else reply

    return fate


def test_a_client_that_sends_wrong_shares_is_named_and_counted(tmp_path: Path) -> None:
    federation = few(tmp_path, 6)

    def fate(client: str, message: Message, reply: Message) -> Message:
        if client == "c05" and message.metadata.message_type == UNMASK:
            seeds = list(reply.content.config_records[SECURE]["seeds"])
            seeds[0] = bytes(len(seeds[0]))
            return altered(reply, message, seeds=seeds)
        return reply

    federation.grid.fate = fate
    found = federation.sum()
    close(federation, found)  # the others' shares do
    assert "c05" in found.clients
    assert federation.faults.summarise()["clients"] == {"c05": {"refused": 1}}
    assert [
        line for line in federation.notes.lines if "Client c05, a test: wrong shares of c0" in line
    ]
    for _ in range(2):
        federation.sum()
    assert federation.faults.quarantined == {"c05"}


def test_shares_that_are_not_what_was_said_of_them_are_reported_by_both_names(tmp_path) -> None:
    federation = few(tmp_path, 6)

    def fate(client: str, message: Message, reply: Message) -> Message:
        if client == "c05" and message.metadata.message_type == SHARES:
            proofs = list(reply.content.config_records[SECURE]["proofs"])
            proofs[1] = bytes(64)
            return altered(reply, message, proofs=proofs)
        return reply

    federation.grid.fate = fate
    close(federation, federation.sum())
    [line] = [line for line in federation.notes.lines if "one of the two is at fault" in line]
    assert "the shares that client c05 gave it" in line
    assert federation.faults.summarise()["counts"] == {"refused": 1}
    assert not federation.faults.summarise()["clients"]  # nobody can tell which of them


def test_a_client_whose_shares_give_another_secret_is_named(tmp_path: Path, monkeypatch) -> None:
    federation = few(tmp_path, 4)
    split, dealt = keys.split, []

    def wrong(secret: bytes, least: int, number: int) -> list[bytes]:
        dealt.append(secret)
        return split(bytes(len(secret)) if len(dealt) == 1 else secret, least, number)

    monkeypatch.setattr(client_sums, "split", wrong)
    with pytest.raises(UserError, match=r"Client c0\d, a test: its shares do not give its seed"):
        federation.sum()
    [name] = federation.faults.summarise()["clients"]
    assert name in federation.names


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        (KEYS, {"mask-key": b"none"}),
        (KEYS, {"session": "another"}),
        (SHARES, {"to": []}),
        (SHARES, {"proofs": [b"short"] * 6}),
        (SHARES, {"boxes": [b"b" * 9999] * 5}),
    ],
)
def test_malformed_answers_cost_their_client_alone(tmp_path: Path, stage, changes) -> None:
    federation = few(tmp_path, 6)
    federation.grid.fate = altering("c02", stage, changes)
    found = federation.sum()
    assert "c02" not in found.clients
    close(federation, found)
    assert federation.faults.summarise()["clients"] == {"c02": {"refused": 1}}


LISTS = [st.lists(kind, max_size=7) for kind in (st.binary(max_size=80), st.integers(-9, 9))]
VALUES = st.one_of(st.binary(max_size=80), st.integers(), st.text(max_size=9), *LISTS)
NAMES = ("mask-key", "box-key", "to", "boxes", "proofs", "seed", "seeds", "keys", "unreadable")


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(stage=st.sampled_from(STAGES), odd=st.dictionaries(st.sampled_from(NAMES), VALUES))
def test_whatever_a_client_answers_costs_itself_alone(tmp_path: Path, stage, odd) -> None:
    federation = few(tmp_path, 6)
    federation.grid.fate = altering("c02", stage, odd)
    found = federation.sum()
    assert set(found.clients) >= set(federation.names) - {"c02"}
    close(federation, found)
    assert set(federation.faults.summarise()["clients"]) <= {"c02"}


def test_another_clients_key_is_refused(tmp_path: Path) -> None:
    federation, kept = few(tmp_path, 6), []

    def fate(client: str, message: Message, reply: Message) -> Message:
        if message.metadata.message_type != KEYS:
            return reply
        kept.append(reply.content.config_records[SECURE]["mask-key"])
        return altered(reply, message, **{"mask-key": kept[0]})

    federation.grid.fate = fate
    with pytest.raises(UserError, match="have sent keys"):
        federation.sum()


# ── what a client refuses ───────────────────────────────────────────────────────────────────────


class Alone:
    """One client, asked by hand; two others' parts are made by the same code."""

    def __init__(self, count: int = 4) -> None:
        begin_run()
        self.s = secure()
        self.contexts = [Context(1, i, {}, RecordDict(), {}) for i in range(count)]
        self.count = count

    def message(self, kind: str, **record: Any) -> Message:
        content = RecordDict({SECURE: ConfigRecord({"session": "s", **record})})
        return Message(content, 2, kind)

    def keys(self, i: int, **changes: Any) -> Any:
        told = {"clients": self.count, "index": i, **changes}
        return self.answer(give_keys(self.message(KEYS, **told), self.contexts[i], self.s))

    def shares(self, i: int, keys: Any, **changes: Any) -> Any:
        peers = [p for p in range(self.count) if p != i]
        told = {
            "peers": peers,
            "mask-keys": [keys[p]["mask-key"] for p in peers],
            "box-keys": [keys[p]["box-key"] for p in peers],
        }
        message = self.message(SHARES, **{**told, **changes})
        return self.answer(give_shares(message, self.contexts[i], self.s))

    def masked(self, **changes: Any) -> Message:
        keys = [self.keys(i) for i in range(self.count)]
        dealt = [self.shares(i, keys) for i in range(self.count)]
        told = {
            "from": list(range(1, self.count)),
            "boxes": [dealt[i]["boxes"][0] for i in range(1, self.count)],
            "proofs": [dealt[i]["proofs"][1] for i in range(1, self.count)],
        }
        message = self.message(QUESTION, **{**told, **changes})
        part, layout = Part({"w": [0.5]}), {"w": Block((1,), 1.0)}
        return give_masked(message, self.contexts[0], self.s, part, lambda _: layout)

    def unmask(self, alive: list[int], dropped: list[int]) -> Any:
        message = self.message(UNMASK, alive=alive, dropped=dropped)
        return self.answer(unmask(message, self.contexts[0], self.s))

    @staticmethod
    def answer(reply: Message) -> Any:
        return reply.content.config_records[SECURE]


def test_shares_are_given_once() -> None:
    alone = Alone()
    reply = alone.masked()
    assert set(reply.content.array_records[ARRAYS]) == {"w", CUT}
    answer = alone.unmask([0, 1, 2], [3])
    assert (len(answer["seeds"]), len(answer["keys"])) == (3, 1)
    assert SECURE not in alone.contexts[0].state
    with pytest.raises(ShareableError, match="not the next one"):
        alone.unmask([0, 1, 2, 3], [])


@pytest.mark.parametrize(
    ("alive", "dropped"),
    [
        ([0, 1, 2, 3], [3]),  # both secrets of 3
        ([0, 1, 2], []),  # as if 3 were neither
        ([1, 2, 3], [0]),  # its own key
        ([0, 1, 2, 3, 4], []),
        ([0, 1, 1, 2, 3], []),
    ],
)
def test_no_client_gives_another_away(alive: list[int], dropped: list[int]) -> None:
    alone = Alone()
    alone.masked()
    with pytest.raises(ShareableError, match="would give a client away"):
        alone.unmask(alive, dropped)
    with pytest.raises(ShareableError, match="not the next one"):
        alone.unmask([0, 1, 2, 3], [])  # nor is there a second try


def test_too_few_are_not_unmasked() -> None:
    alone = Alone()
    alone.masked()
    with pytest.raises(ShareableError, match="2 clients are left, and unmasking takes 3"):
        alone.unmask([0, 1], [2, 3])


def test_a_client_answers_only_the_next_message_of_its_sum() -> None:
    alone = Alone()
    keys = [alone.keys(i) for i in range(4)]
    alone.shares(0, keys)
    with pytest.raises(ShareableError, match="not the next one"):
        alone.shares(0, keys)
    with pytest.raises(ShareableError, match="not the next one"):
        alone.shares(1, keys, session="other")
    question = Message(RecordDict(), 2, QUESTION)
    with pytest.raises(ShareableError, match="only leaves in a sum"):
        give_masked(question, alone.contexts[0], alone.s, Part({}), lambda _: {})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"peers": [1, 2, 2]}, "neighbors that cannot be"),
        ({"peers": [0, 1, 2]}, "neighbors that cannot be"),
        ({"peers": [1, 2, 9]}, "neighbors that cannot be"),
        ({"peers": [1], "mask-keys": [b"a"], "box-keys": [b"b"]}, "1 neighbors are left"),
        ({"mask-keys": [b"a"] * 3}, "same public key for two"),
        ({"box-keys": [b"a", b"b", b"c"]}, "public key of a secure sum cannot be used"),
    ],
)
def test_neighbors_that_cannot_be_are_refused(changes: dict[str, Any], says: str) -> None:
    alone = Alone()
    keys = [alone.keys(i) for i in range(4)]
    with pytest.raises(ShareableError, match=says):
        alone.shares(0, keys, **changes)


def test_few_clients_or_no_agreement_are_refused() -> None:
    with pytest.raises(ShareableError, match="hides nobody"):
        Alone().keys(0, clients=2)
    alone = Alone()
    with pytest.raises(ShareableError, match="1 neighbors are left"):
        alone.masked(**{"from": [1], "boxes": [b""], "proofs": [b""]})
    alone.s = type(alone.s)()
    with pytest.raises(ShareableError, match=r"privacy.secure_sums is off"):
        alone.keys(0)
