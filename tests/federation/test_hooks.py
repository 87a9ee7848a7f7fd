"""A new version of Flower has all that `fedp2eft.federation.hooks` takes from it."""

from __future__ import annotations

import re

import pytest
from flwr.app import Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import strategy as flower
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedp2eft.federation import hooks


def test_messages_have_their_sender_and_id_from_where_they_are_written() -> None:
    assert hooks.begin_run().run_id == Run.create_empty(run_id=1).run_id == 1
    assert (TaskIdentity.run_id, TaskIdentity.node_id) == (1, hooks.SERVER_NODE_ID)
    message = Message(RecordDict(), 2, "query.describe")
    hooks.give_id(message, "an id")
    assert message.metadata.message_id == "an id"
    assert message.metadata.src_node_id == hooks.SERVER_NODE_ID


def test_error_codes_are_flowers() -> None:
    assert hooks.CLIENT_APP_RAISED == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    named = {value: name for name, value in vars(ErrorCode).items() if not name.startswith("_")}
    assert [named[code] for code in hooks.UNAVAILABLE] == [
        "MESSAGE_UNAVAILABLE", "REPLY_MESSAGE_UNAVAILABLE", "NODE_UNAVAILABLE",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", [hooks.ServerQuantile, hooks.ClientQuantile])
def test_what_is_overridden_is_there_to_override(kind: type) -> None:
    ours, theirs = kind.__mro__[1], kind.__mro__[2:]
    for name in (name for name in vars(ours) if re.fullmatch(r"_[a-z]\w*[a-z]", name)):
        if callable(getattr(ours, name)):
            assert any(name in vars(base) for base in theirs), name


def test_strategies_keep_their_memory_under_these_names() -> None:
    assert {"m_t", "v_t"} <= vars(flower.FedAdam()).keys()
    assert "momentum_vector" in vars(flower.FedAvgM())
