"""What the server takes from clients, and how a round goes on without those that fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from toy import CLIENTS, FIRST, Notes, Numbers, lines, reply_of, train

from fedp2eft.errors import UserError
from fedp2eft.federation.local import LocalGrid
from fedp2eft.federation.server.admission import Failures, _square, plain
from fedp2eft.federation.server.evaluation import alike_answers, scores_of
from fedp2eft.federation.server.exchange import roster
from fedp2eft.federation.wire.messages import ABOUT, EXAMPLES, METRICS
from fedp2eft.settings.peers import PeerSettings

BAD = "c03"


def spoilt(kind: str, good: Numbers) -> Numbers | RecordDict:
    """A reply that is wrong in one way."""
    nan = good["v"].copy()
    nan[2] = np.nan
    stray = reply_of(good)
    stray["more"] = ArrayRecord({"x": Array(np.zeros(2, np.float32))})
    stray["even-more"] = MetricRecord({"x": 1})
    return {
        "nan": {**good, "v": nan},
        "shape": {**good, "v": good["v"][:2]},
        "dtype": {**good, "w": good["w"].astype(np.float64)},
        "missing": {"w": good["w"]},
        "more names": {**good, "x" * 10**6: good["v"]},
        "no examples": reply_of(good, examples=0),
        "half an example": reply_of(good, examples=2.5),
        "infinitely many": reply_of(good, examples=float("inf")),
        "a nan loss": reply_of(good, **{"psg-loss": float("nan")}),
        "a list": reply_of(good, **{"psg-loss": [0.1, 0.2]}),
        "another metric": reply_of(good, round=7),
        "nothing": RecordDict(),
        "far": {name: value + 1e3 for name, value in good.items()},
        "very far": {name: np.full_like(value, 3e38) for name, value in good.items()},
        "stray records": stray,
    }[kind]


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("nan", "v holds NaN"),
        ("shape", "v is float32 (2,), expected float32 (5,)"),
        ("dtype", "w is float64 (3, 4), expected float32 (3, 4)"),
        ("missing", "other parameters than expected (first: 'v')"),
        ("more names", "other parameters than expected (first: 'xxxx"),
        ("no examples", "its num-examples is 0, not a whole number of 1 or more"),
        ("half an example", "its num-examples is 2.5"),
        ("infinitely many", "Metric 'num-examples' of a client is inf"),
        ("a nan loss", "Metric 'psg-loss' of a client is nan"),
        ("a list", "Metric 'psg-loss' of a client is a list"),
        ("another metric", "other metrics than expected (first: 'round')"),
        ("nothing", "other parameters than expected"),
        ("far", "times as far as the median client; peers.max_norm is 10"),
        ("very far", "times as far as the median client; peers.max_norm is 10"),
    ],
)
def test_one_bad_client_is_left_out_named_and_counted(tmp_path: Path, kind: str, says: str) -> None:
    def spoil(client: str, _round: int, _sent: Numbers, good: Numbers) -> Any:
        return spoilt(kind, good) if client == BAD else None

    notes = Notes()
    with_it = train(tmp_path / "a", spoil, 1, 20, reporter=notes)
    line = lines(tmp_path / "a")[0]
    assert line["clients"] == 19
    assert list(line["left-out"]) == [BAD]
    assert says in line["left-out"][BAD]
    assert len(notes.lines) == 1
    assert says in notes.lines[0]
    assert BAD in notes.lines[0]
    assert len(notes.lines[0]) < 400
    # the round is that of the other nineteen
    without = train(tmp_path / "b", rounds=1, clients_per_round=19,
                    names=[name for name in CLIENTS if name != BAD])  # fmt: skip
    assert all(torch.allclose(with_it[n], without[n], atol=1e-7) for n in FIRST)


def test_stray_records_are_taken_off(tmp_path: Path) -> None:
    def spoil(client: str, _round: int, _sent: Numbers, good: Numbers) -> Any:
        return spoilt("stray records", good) if client == BAD else None

    one = train(tmp_path / "a", spoil, 2)
    other = train(tmp_path / "b", None, 2)
    assert all(torch.equal(one[n], other[n]) for n in FIRST)


def test_a_failure_on_the_local_engine_stops_the_run(tmp_path: Path) -> None:
    def spoil(client: str, _round: int, _sent: Numbers, good: Numbers) -> Any:
        return spoilt("nan", good) if client == BAD else None

    for chosen in ("auto", "stop"):
        with pytest.raises(
            UserError, match=f"Client {BAD}, round 1 of psg: its reply: v holds NaN"
        ):
            train(tmp_path / chosen, spoil, 1, 20, peers__failures=chosen)
    # nobody failed where a client merely moved far
    far = lambda client, _r, _s, good: spoilt("far", good) if client == BAD else None  # noqa: E731
    train(tmp_path / "far", far, 1, 20, peers__failures="auto")
    assert lines(tmp_path / "far")[0]["clients"] == 19


@pytest.mark.parametrize(("bad", "goes_on"), [(10, True), (11, False)])
def test_a_round_needs_its_share_of_clients(tmp_path: Path, bad: int, goes_on: bool) -> None:
    def spoil(client: str, _round: int, _sent: Numbers, good: Numbers) -> Any:
        return spoilt("nan", good) if client in CLIENTS[:bad] else None

    if goes_on:
        train(tmp_path, spoil, 1, 20)
        assert lines(tmp_path)[0]["clients"] == 10
        return
    with pytest.raises(UserError, match=r"Only 9 of 20 clients are usable in round 1 of psg, and "
                       r"peers.min_share asks for 10. The first unusable one: .*c00"):  # fmt: skip
        train(tmp_path, spoil, 1, 20)
    assert not (tmp_path / "metrics.jsonl").exists()
    train(tmp_path, spoil, 1, 20, peers__min_share=0.4)  # which may change between two starts


def test_examples_count_up_to_a_multiple_of_the_median(tmp_path: Path) -> None:
    def boast(client: str, _round: int, _sent: Numbers, good: Numbers) -> Any:
        return reply_of(good, examples=10**12) if client == BAD else None

    got = train(tmp_path / "a", boast, 1, 20)
    assert lines(tmp_path / "a")[0]["examples-cut"] == [BAD]
    by_hand = lambda c, _r, _s, good: reply_of(good, examples=100) if c == BAD else None  # noqa: E731
    assert all(torch.equal(got[n], train(tmp_path / "b", by_hand, 1, 20)[n]) for n in FIRST)
    assert "examples-cut" not in lines(tmp_path / "b")[0]
    free = train(tmp_path / "c", boast, 1, 20, peers__max_examples=0)
    alone = train(tmp_path / "d", None, 1, 1, names=[BAD])
    assert all(torch.allclose(free[n], alone[n], atol=1e-6) for n in FIRST)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-3, 1.0, 1e30])
def test_the_square_of_a_change_of_any_size(scale: float) -> None:
    change = torch.randn(300, 70, generator=torch.Generator().manual_seed(1)) * scale
    assert _square(change) == pytest.approx(float((change.double() ** 2).sum()), rel=1e-6)


def test_norms_are_compared_with_the_median_of_the_round(tmp_path: Path) -> None:
    def times(factor: float) -> Any:
        def spoil(client: str, _round: int, sent: Numbers, good: Numbers) -> Any:
            return (
                {n: sent[n] + factor * (good[n] - sent[n]) for n in good} if client == BAD else None
            )

        return spoil

    train(tmp_path / "within", times(9.0), 1, 20)
    assert "left-out" not in lines(tmp_path / "within")[0]
    train(tmp_path / "beyond", times(11.0), 1, 20)
    assert list(lines(tmp_path / "beyond")[0]["left-out"]) == [BAD]
    train(tmp_path / "free", times(11.0), 1, 20, peers__max_norm=0)
    assert "left-out" not in lines(tmp_path / "free")[0]


# ── who the clients are ─────────────────────────────────────────────────────────────────────────

GOOD = {"client": "fr-00", "language": "fr", "pool": "seen"}


def described(*nodes: dict[str, Any] | str, examples: Any = 5) -> tuple[list[str], list[str]]:
    """Names on the roster, and notes, where nodes describe themselves so (a text is an error)."""
    app = ClientApp()

    @app.query("describe")
    def describe(message: Message, context: Context) -> Message:
        about = nodes[int(context.node_config["number"])]
        if isinstance(about, str):
            return Message(Error(2, about), reply_to=message)
        metrics = MetricRecord({EXAMPLES: examples})
        return Message(RecordDict({ABOUT: ConfigRecord(about), METRICS: metrics}), reply_to=message)

    grid = LocalGrid(app, [{"number": i} for i in range(len(nodes))], {})
    notes = Notes()
    failures = Failures(PeerSettings(), False, notes)
    return [member.client for member in roster(grid, 5, failures)], notes.lines


@pytest.mark.parametrize(
    "name",
    ["../../x", "/etc/passwd", "a/b", "a\\b", "..", ".", "", "a\0b", "a\n", "x" * 101, "ünï", "a b",
     "\u202egpj", "~", "$HOME", "a.json", "%2e%2e"],
)  # fmt: skip
def test_a_name_from_a_peer_that_could_be_a_path_is_refused(name: str) -> None:
    names, notes = described(GOOD, {**GOOD, "client": name})
    assert names == ["fr-00"]
    assert len(notes) == 1
    assert notes[0].isprintable()
    assert "cannot be a client's name" in notes[0]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({**GOOD, "client": "x", "pool": "../seen"}, "its pool '../seen' is not one of"),
        ({**GOOD, "client": "x", "language": ""}, "its language '' is not a valid name"),
        ({**GOOD, "client": "x", "language": "f\x1b[31mr"}, "is not a valid name"),
        ({**GOOD, "client": "x", "language": "f" * 10**6}, "is not a valid name"),
        ({}, "'' cannot be a client's name"),
        ("boom\n\x1b[2Jat " + "x" * 10**6, "boom [2Jat xxx"),
    ],
)
def test_other_words_of_a_peer_are_checked(wrong: dict[str, Any] | str, says: str) -> None:
    names, notes = described(GOOD, wrong)
    assert names == ["fr-00"]
    assert says in notes[0]
    assert len(notes[0]) < 500
    assert notes[0].isprintable()


def test_a_name_that_two_nodes_give_is_neithers() -> None:
    names, notes = described(GOOD, {**GOOD, "client": "de-00"}, GOOD)
    assert names == ["de-00"]
    assert "Nodes 2, 4 all say that they are client fr-00" in notes[0]


def test_a_federation_of_nobody_is_an_error() -> None:
    with pytest.raises(UserError, match="Only 0 of 2 clients are usable in the federation"):
        described("boom", "boom")
    with pytest.raises(UserError, match="Only 0 of 1"):
        described(GOOD, examples=-3)


@hypothesis_settings(max_examples=200, deadline=None)
@given(st.text())
def test_a_peers_text_is_one_short_line(text: str) -> None:
    assert plain(text).isprintable()
    assert len(plain(text)) <= 301


# ── scores and answers ──────────────────────────────────────────────────────────────────────────

SCORES: dict[str, Any] = {EXAMPLES: 6, "correct": 4, "loss": 0.5, "parameters": 9, "seconds": 0.1}


def scored(**changes: Any) -> dict[str, Any]:
    LocalGrid(ClientApp(), [], {})  # an engine gives messages their sender
    told = {name: value for name, value in {**SCORES, **changes}.items() if value is not None}
    return scores_of(Message(RecordDict({METRICS: MetricRecord(told)}), 2, "evaluate"))


def test_scores_hold_what_a_cell_keeps_and_nothing_of_the_peers_own() -> None:
    wanted = {"examples": 6, "correct": 4, "loss": 0.5, "parameters": 9, "seconds": 0.1}
    assert scored() == wanted
    assert scored(phi=3, client=1, pool=2) == wanted
    assert "tokens" in scored(correct=None, tokens=40)


@pytest.mark.parametrize(
    "changes",
    [{"correct": 7}, {"correct": -1}, {"correct": 2.5}, {EXAMPLES: -6}, {"loss": float("nan")},
     {"loss": None}, {"loss": -1.0}, {"parameters": None}, {"seconds": float("inf")},
     {"correct": None}, {"tokens": 3}, {"correct": [1, 2]}],
)  # fmt: skip
def test_scores_that_cannot_be_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        scored(**changes)


def test_most_answers_decide_what_an_answer_is() -> None:
    def answer(size: int, value: float = 1.0) -> ArrayRecord:
        return ArrayRecord({"lam": Array(np.full(size, value, np.float32))})

    notes = Notes()
    failures = Failures(PeerSettings(), False, notes)
    replies = {"a": answer(7), "b": answer(3), "c": answer(3), "d": answer(3, np.nan)}
    answers = alike_answers(replies, "survey of mean", failures)
    assert [value["lam"].shape for value in answers] == [(3,), (3,)]
    assert sorted(failures.reasons) == ["a", "d"]
    with pytest.raises(UserError, match=r"client a .* other parameters than most"):
        alike_answers(replies, "survey of mean")
