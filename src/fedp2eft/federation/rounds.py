"""Rounds that can be stopped after any one of them and gone on with.

Flower's own `Strategy.start` always begins at round 1, so the loop is ours; sampling, aggregation
and messages are Flower's FedAvg.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from fedp2eft.errors import UserError
from fedp2eft.federation.compression import DOWN, pack, unpack
from fedp2eft.federation.messages import (
    ABOUT,
    ARRAYS,
    DESCRIBE,
    EXAMPLES,
    from_arrays,
    nbytes,
    scalars,
    the_arrays,
    to_arrays,
)
from fedp2eft.federation.reporting import Reporter
from fedp2eft.federation.run_folder import RunFolder
from fedp2eft.seeding import derive_seed
from fedp2eft.settings import Wire

PULL_SECONDS = 0.2


@dataclass(frozen=True)
class Member:
    """A node as the server knows it."""

    node: int
    client: str
    language: str
    pool: str
    examples: int


class SeededFedAvg(FedAvg):
    """FedAvg weighted by N whose sample of clients depends on (seed, phase, round) alone.

    Args:
        members: Clients to sample from.
        clients_per_round: How many to sample.
        seed: The experiment's seed.
        message_type: "train.base" or "train.psg".
    """

    def __init__(
        self, members: list[Member], clients_per_round: int, seed: int, message_type: str
    ) -> None:
        super().__init__(weighted_by_key=EXAMPLES)
        self.members = sorted(members, key=lambda member: member.client)
        self.size = min(clients_per_round, len(members))
        self.seed = seed
        self.message_type = message_type

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Messages to this round's sample, in the order of the clients' names."""
        draw = random.Random(derive_seed(self.seed, self.message_type, server_round))
        sample = sorted(draw.sample(range(len(self.members)), self.size))
        config["server-round"] = server_round
        record = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: config})
        nodes = [self.members[i].node for i in sample]
        return list(self._construct_messages(record, nodes, self.message_type))


def exchange(
    grid: Grid, messages: list[Message], members: dict[int, Member], timeout: float, what: str
) -> Iterator[tuple[Member, Message]]:
    """Send messages and yield every reply as it comes, with the client that it is from.

    Raises:
        UserError: A client failed, or not all replies came within `timeout` seconds.
    """
    waiting = list(grid.push_messages(messages))
    end = time.monotonic() + timeout
    while waiting:
        replies = list(grid.pull_messages(waiting))
        for reply in replies:
            waiting.remove(reply.metadata.reply_to_message_id)
            member = members[reply.metadata.src_node_id]
            if reply.has_error():
                raise UserError(f"Client {member.client}, {what}: {reply.error.reason}")
            yield member, reply
        if waiting and time.monotonic() > end:
            raise UserError(
                f"{len(waiting)} clients gave no answer within {timeout:.0f} s ({what}): start "
                "again to go on from the last finished round, or raise federation.timeout."
            )
        if not replies:
            time.sleep(PULL_SECONDS)


def roster(grid: Grid, timeout: float) -> list[Member]:
    """Ask every node who it is; sorted by client name."""
    messages = [Message(RecordDict(), node, DESCRIBE) for node in grid.get_node_ids()]
    nodes = {node: Member(node, f"on node {node}", "", "", 0) for node in grid.get_node_ids()}
    members = []
    for member, reply in exchange(grid, messages, nodes, timeout, "at the start"):
        about = reply.content.config_records[ABOUT]
        members.append(
            Member(
                member.node,
                str(about["client"]),
                str(about["language"]),
                str(about["pool"]),
                int(scalars(reply)[EXAMPLES]),
            )
        )
    return sorted(members, key=lambda member: member.client)


def run_rounds(
    grid: Grid,
    run: RunFolder,
    strategy: SeededFedAvg,
    phase: str,
    rounds: int,
    first: dict[str, Tensor],
    reporter: Reporter,
    wire: Wire = "fp32",
) -> dict[str, Tensor]:
    """Rounds of one phase from where the run folder says it stands; returns the last numbers.

    Args:
        grid: The engine.
        run: Holds metrics and checkpoints.
        strategy: Samples and aggregates.
        phase: "base" or "psg".
        rounds: Rounds in all.
        first: Numbers before round 1; their names and shapes are what every reply must have.
        reporter: Hears of every round.
        wire: What the numbers travel in.

    Raises:
        UserError: A client failed, a reply does not fit, or too few clients.
    """
    if not strategy.members:
        raise UserError("No seen client is in the federation, so nothing can be trained.")
    done, kept = run.resume(phase, rounds)
    numbers = first if kept is None else kept
    members = {member.node: member for member in strategy.members}
    reporter.start(phase, rounds, done)
    for round_ in range(done + 1, rounds + 1):
        start = time.perf_counter()
        arrays = pack(numbers, DOWN[wire])
        messages = strategy.configure_train(round_, arrays, ConfigRecord(), grid)
        what = f"round {round_} of {phase}"
        replies: list[tuple[str, Message]] = []
        bytes_up = 0
        for member, reply in exchange(
            grid, messages, members, run.settings.federation.timeout, what
        ):
            sent = the_arrays(reply)
            bytes_up += nbytes(sent)
            whose = f"Reply of client {member.client} in {what}"
            values = unpack(sent, first, wire, whose)
            if wire != "fp32":  # what came is by how much φ changed
                reply.content[ARRAYS] = to_arrays({n: numbers[n] + values[n] for n in numbers})
            replies.append((member.client, reply))
        # Sums of floats depend on their order: the clients' names fix it.
        ordered = [reply for _, reply in sorted(replies, key=lambda pair: pair[0])]
        numbers, metrics = _aggregate(strategy, round_, ordered, first, what)
        metrics["clients"] = len(ordered)
        metrics["bytes-down"] = nbytes(arrays) * len(messages)
        metrics["bytes-up"] = bytes_up
        run.finish_round(phase, round_, numbers, metrics, time.perf_counter() - start)
        loss = metrics.get("psg-loss", metrics.get("loss"))
        reporter.advance(phase, f"loss {loss:.4g}")
    return numbers


def _aggregate(
    strategy: SeededFedAvg,
    round_: int,
    replies: Iterable[Message],
    like: dict[str, Tensor],
    what: str,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    arrays, metrics = strategy.aggregate_train(round_, replies)
    if arrays is None or metrics is None:
        raise UserError(f"No client answered in {what}: start again to repeat the round.")
    return from_arrays(arrays, like, f"The average of {what}"), {
        key: value for key, value in metrics.items() if isinstance(value, float)
    }
