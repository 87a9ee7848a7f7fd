"""The local engine keeps to Flower's Grid."""

from __future__ import annotations

import time
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedp2eft.errors import UserError
from fedp2eft.federation.local import LocalGrid

NODES = [{"client": name} for name in ("anna", "bert", "carl")]


def echo_app(seen: list[str] | None = None, pause: float = 0.0) -> ClientApp:
    """Answers with the client's name, its run config and how often it was asked."""
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        time.sleep(pause)
        name = str(context.node_config["client"])
        if seen is not None:
            seen.append(name)
        before = context.state.metric_records.get("asked", MetricRecord({"n": 0}))
        context.state["asked"] = MetricRecord({"n": int(before["n"]) + 1})  # type: ignore[arg-type]
        answer = ConfigRecord({"client": name, "flavour": str(context.run_config["flavour"])})
        content = RecordDict({"answer": answer, "asked": context.state["asked"]})
        return Message(content, reply_to=message)

    return app


def grid_of(app: ClientApp) -> LocalGrid:
    return LocalGrid(app, [dict(node) for node in NODES], {"flavour": "sour"})


def ask(node: int) -> Message:
    return Message(RecordDict(), node, "query")


def name_in(reply: Message) -> Any:
    return reply.content.config_records["answer"]["client"]


def test_it_is_a_grid_with_one_node_per_client() -> None:
    grid = grid_of(echo_app())
    assert isinstance(grid, Grid)
    ids = list(grid.get_node_ids())
    assert len(ids) == len(set(ids)) == len(NODES)
    assert all(isinstance(node, int) for node in ids)


def test_messages_get_ids_and_run_when_they_are_pulled() -> None:
    seen: list[str] = []
    grid = grid_of(echo_app(seen))
    nodes = list(grid.get_node_ids())
    ids = list(grid.push_messages([ask(node) for node in nodes]))
    assert len(set(ids)) == len(nodes)
    assert seen == []
    replies = []
    for done in range(1, len(nodes) + 1):
        replies += grid.pull_messages(ids)
        assert len(replies) == len(seen) == done
    assert grid.pull_messages(ids) == []
    assert [reply.metadata.reply_to_message_id for reply in replies] == ids
    assert [reply.metadata.src_node_id for reply in replies] == nodes
    assert [name_in(reply) for reply in replies] == ["anna", "bert", "carl"]


def test_a_pull_of_one_message_leaves_the_others_waiting() -> None:
    grid = grid_of(echo_app())
    first, second = grid.push_messages([ask(node) for node in list(grid.get_node_ids())[:2]])
    assert [name_in(reply) for reply in grid.pull_messages([second])] == ["bert"]
    assert grid.pull_messages([second, "no such id"]) == []
    assert [name_in(reply) for reply in grid.pull_messages([second, first])] == ["anna"]


def test_an_unknown_node_is_refused() -> None:
    grid = grid_of(echo_app())
    with pytest.raises(ValueError, match="no node 77"):
        grid.push_messages([ask(77)])


def test_send_and_receive_gives_every_reply() -> None:
    grid = grid_of(echo_app())
    replies = list(grid.send_and_receive([ask(node) for node in grid.get_node_ids()]))
    assert [name_in(reply) for reply in replies] == ["anna", "bert", "carl"]
    assert {reply.content.config_records["answer"]["flavour"] for reply in replies} == {"sour"}


def test_replies_after_the_timeout_are_not_waited_for() -> None:
    seen: list[str] = []
    grid = grid_of(echo_app(seen, pause=0.05))
    replies = list(grid.send_and_receive([ask(n) for n in grid.get_node_ids()], timeout=0.01))
    assert [name_in(reply) for reply in replies] == seen == ["anna"]


def test_a_node_keeps_its_state_and_only_its_own() -> None:
    grid = grid_of(echo_app())
    anna, bert, _ = grid.get_node_ids()
    replies = list(grid.send_and_receive([ask(anna), ask(anna), ask(bert)]))
    counts = [reply.content.metric_records["asked"]["n"] for reply in replies]
    assert counts == [1, 2, 1]


def test_create_message_and_run() -> None:
    grid = grid_of(echo_app())
    node = next(iter(grid.get_node_ids()))
    message = grid.create_message(RecordDict(), "query", node, "group")
    assert (message.metadata.dst_node_id, message.metadata.group_id) == (node, "group")
    assert grid.run.run_id == message.metadata.run_id
    [reply] = grid.send_and_receive([message])
    assert reply.metadata.group_id == "group"


def failing_app(error: BaseException) -> ClientApp:
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        raise error

    return app


def test_a_users_mistake_in_a_client_is_an_error_reply() -> None:
    grid = grid_of(failing_app(UserError("No text here.")))
    [reply] = grid.send_and_receive([ask(next(iter(grid.get_node_ids())))])
    assert reply.has_error()
    assert reply.error.reason == "No text here."


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError("a bug")])
def test_an_interrupt_or_a_bug_passes_through(error: BaseException) -> None:
    grid = grid_of(failing_app(error))
    with pytest.raises(type(error)):
        grid.send_and_receive([ask(next(iter(grid.get_node_ids())))])
