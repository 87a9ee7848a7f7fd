"""How long replies are waited for, on a clock that the tests turn."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from toy import CLIENTS, Notes, members, settings

from fedp2eft.federation.server import exchange as module
from fedp2eft.federation.server.admission import Failures
from fedp2eft.federation.server.exchange import exchange
from fedp2eft.federation.server.faults import Faults


class OneASecond:
    """An engine with one reply a second, in the order of the questions."""

    def __init__(self) -> None:
        self.now = 0.0

    def tick(self, _seconds: float = 0.0) -> None:
        self.now += 1

    def push_messages(self, messages: list[Any]) -> list[str]:
        return [str(message.metadata.dst_node_id) for message in messages]

    def pull_messages(self, ids: list[str]) -> list[Any]:
        self.tick()
        metadata = SimpleNamespace(reply_to_message_id=ids[0])
        return [SimpleNamespace(metadata=metadata, has_error=lambda: False)]


@pytest.mark.parametrize(("renewed", "used"), [(False, 3), (True, 6)])
def test_a_rounds_deadline_is_its_timeout_whoever_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renewed: bool, used: int
) -> None:
    """The first pull after the timeout is the last; in personalization every reply renews it."""
    grid: Any = OneASecond()
    clock = SimpleNamespace(monotonic=lambda: grid.now, sleep=grid.tick)
    monkeypatch.setattr(module, "time", clock)
    asked = {member.node: member for member in members()[:6]}
    messages: list[Any] = [
        SimpleNamespace(metadata=SimpleNamespace(dst_node_id=node)) for node in asked
    ]
    faults = Faults(tmp_path, quarantine=0)
    failures = Failures(settings().peers, stop=False, reporter=Notes(), faults=faults)
    replies = exchange(grid, messages, asked, 2.5, "round 1", failures, renewed)
    assert [member.client for member, _ in replies] == list(CLIENTS[:used])
    assert list(failures.reasons) == list(CLIENTS[used:6])
    assert faults.summarise()["counts"] == ({"late": 3} if used == 3 else {})
