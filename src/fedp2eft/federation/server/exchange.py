"""Questions to clients and their answers, whichever of them fail."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedp2eft.data.clients import POOLS, check_client_name
from fedp2eft.errors import UserError, shortened
from fedp2eft.federation.hooks import UNAVAILABLE
from fedp2eft.federation.server.admission import FIRST_ENDS, Failures, plain
from fedp2eft.federation.server.faults import Kind
from fedp2eft.federation.wire.messages import ABOUT, DESCRIBE, EXAMPLES, scalars, whole

PULL_SECONDS = 0.2
T = TypeVar("T")


@dataclass(frozen=True)
class Member:
    """A node as the server knows it."""

    node: int
    client: str
    language: str
    pool: str
    examples: int
    base: str = ""
    """Which finished base it keeps in a folder of its own: `messages.base_id`."""
    held_out: bool = False
    """Whether the base is not trained on it, although it is seen (`base.held_out`)."""


def exchange(
    grid: Grid,
    messages: Sequence[Message],
    members: dict[int, Member],
    timeout: float,
    what: str,
    failures: Failures = FIRST_ENDS,
    renewed: bool = False,
) -> Iterator[tuple[Member, Message]]:
    """Send messages and yield every reply as it comes, with the client that it is from.

    Args:
        grid: The engine.
        messages: One for each client.
        members: Clients by node.
        timeout: Seconds to wait for all of them.
        what: What is asked, for errors.
        failures: Receives clients that fail. Without it, the first one raises.
        renewed: Every reply renews the time: `timeout` is that without any.

    Raises:
        UserError: A client failed, or gave no reply within `timeout` seconds.
    """
    asked = [members[message.metadata.dst_node_id] for message in messages]
    ids = list(grid.push_messages(messages))
    if len(ids) != len(asked):
        raise UserError(f"The SuperLink did not accept the messages ({what}): see its log.")
    waiting = {}
    for id_, member in zip(ids, asked, strict=True):
        if id_:
            waiting[id_] = member
        else:
            reason = f"Client {member.client}, {what}: it could not be sent its message."
            failures.add(member.client, reason, "lost")
    end = time.monotonic() + timeout
    while waiting:
        replies = list(grid.pull_messages(list(waiting)))
        for reply in replies:
            answering = waiting.pop(reply.metadata.reply_to_message_id, None)
            if answering is None:  # nobody waits for it: a second reply, or one to nothing
                sender = members.get(reply.metadata.src_node_id)
                if sender:
                    failures.ignored(sender.client, what)
            elif reply.has_error():
                kind: Kind = "lost" if reply.error.code in UNAVAILABLE else "failed"
                reason = f"Client {answering.client}, {what}: {plain(reply.error.reason)}"
                failures.add(answering.client, reason, kind)
            else:
                yield answering, reply
        if replies and renewed:
            end = time.monotonic() + timeout
        if waiting and time.monotonic() > end:
            if failures.stop:
                raise UserError(
                    f"{len(waiting)} clients did not reply within {timeout:.0f} s ({what}): start "
                    "again to resume from the last finished round, or raise federation.timeout."
                )
            for member in waiting.values():
                reason = f"Client {member.client}, {what}: no reply within {timeout:.0f} s."
                failures.add(member.client, reason, "late")
            return
        if not replies:
            time.sleep(PULL_SECONDS)


def read_replies(
    grid: Grid,
    messages: Sequence[Message],
    members: dict[int, Member],
    timeout: float,
    what: str,
    check: Callable[[Member, Message], T],
    failures: Failures = FIRST_ENDS,
    renewed: bool = False,
) -> Iterator[tuple[Member, T]]:
    """Yield what `check` reads in every reply; a client whose reply it refuses has failed.

    Args:
        grid: As the others, see `exchange`.
        messages: One for each client.
        members: Clients by node.
        timeout: Seconds to wait for all of them.
        what: What is asked, for errors.
        check: Raises `UserError` if a reply cannot be: the rest of a sentence, "its … is …".
        failures: Receives clients that fail. Without it, the first one raises.
        renewed: Every reply renews the time.

    Raises:
        UserError: A client failed, and a failure ends the run.
    """
    for member, reply in exchange(grid, messages, members, timeout, what, failures, renewed):
        try:
            found = check(member, reply)
        except UserError as error:
            failures.add(member.client, f"Client {member.client}, {what}: {error}", "refused")
        else:
            yield member, found


def roster(grid: Grid, timeout: float, failures: Failures = FIRST_ENDS) -> list[Member]:
    """Ask every node who it is; sorted by client name.

    A name that two nodes give is neither's: either of them may be the client.

    Args:
        grid: The engine.
        timeout: Seconds to wait for all of them.
        failures: Receives the nodes that cannot take part. Without it, the first one
            raises.

    Raises:
        UserError: A node cannot take part, or none can.
    """
    nodes = list(grid.get_node_ids())
    unknown = {node: Member(node, f"on node {node}", "", "", 0) for node in nodes}
    messages = [Message(RecordDict(), node, DESCRIBE) for node in nodes]
    described = read_replies(grid, messages, unknown, timeout, "at the start", _described, failures)
    members = [member for _, member in described]
    times = Counter(member.client for member in members)
    for name in sorted(name for name, number in times.items() if number > 1):
        claim = ", ".join(str(m.node) for m in members if m.client == name)
        reason = f"Nodes {claim} all say that they are client {name}: start one."
        failures.add(name, reason, "refused")
    kept = [member for member in members if times[member.client] == 1]
    if failures.reasons and not kept:
        failures.check(0, len(nodes), "the federation")
    return sorted(kept, key=lambda member: member.client)


def _described(asked: Member, reply: Message) -> Member:
    """Return the client that a node reports, its words checked: they become file names."""
    about = reply.content.config_records.get(ABOUT, ConfigRecord())
    client, language, pool = (str(about.get(key, "")) for key in ("client", "language", "pool"))
    check_client_name(client)
    if pool not in POOLS:
        raise UserError(f"its pool {shortened(pool)} is not one of {', '.join(POOLS)}.")
    if not language.isprintable() or not 1 <= len(language) <= 100:
        raise UserError(f"its language {shortened(language)} is not a valid name.")
    examples = whole(scalars(reply), EXAMPLES)
    return Member(asked.node, client, language, pool, examples, str(about.get("base", "")))
