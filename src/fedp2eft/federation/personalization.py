"""The server's part of personalization: ask, send, and keep the scores that come back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedp2eft.data.federation import SEEN
from fedp2eft.federation.messages import (
    ARRAYS,
    CONFIG,
    EXAMPLES,
    PERSONALIZE,
    PREPARED,
    SURVEY,
    alike_arrays,
    array_digest,
    nbytes,
    scalars,
    the_arrays,
    to_arrays,
)
from fedp2eft.federation.reporting import Reporter
from fedp2eft.federation.rounds import Member, exchange
from fedp2eft.federation.run_folder import RunFolder
from fedp2eft.methods import METHODS

Shared = Mapping[str, Mapping[str, Tensor]]
"""Numbers by name of each federation ("psg", "fedl2p")."""


@dataclass(frozen=True)
class Told:
    """What a client is told before it personalizes with one method and budget.

    Args:
        method: The method's name.
        rank: The budget; 0 for a method without one.
        shared: Numbers of the method's federation; empty where it has none.
        prepared: What the survey gave; empty where there is none.
    """

    method: str
    rank: int
    shared: ArrayRecord
    prepared: ArrayRecord

    def message(self, node: int, kind: str) -> Message:
        """A message of that kind to one node."""
        config = ConfigRecord({"method": self.method, "rank": self.rank})
        content = {ARRAYS: self.shared, PREPARED: self.prepared, CONFIG: config}
        return Message(RecordDict(content), node, kind, group_id=f"{self.method}-r{self.rank}")  # type: ignore[arg-type]

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays, one client."""
        return nbytes(self.shared) + nbytes(self.prepared)


def prepare(
    grid: Grid, shared: Shared, method: str, rank: int, members: list[Member], timeout: float
) -> Told:
    """Gather what the clients must be told; asks the seen clients where the method has a survey.

    Args:
        grid: The engine.
        shared: Trained numbers by federation.
        method: Its name.
        rank: The budget.
        members: All clients of the federation.
        timeout: Seconds to wait for each client.
    """
    kind = METHODS[method]
    numbers = to_arrays(shared[kind.shared]) if kind.shared else ArrayRecord()
    told = Told(method, rank, numbers, ArrayRecord())
    if kind.survey is None:
        return told
    seen = {member.node: member for member in members if member.pool == SEEN}
    messages = [told.message(node, SURVEY) for node in seen]
    what = f"survey of {method}"
    replies = {
        member.client: the_arrays(reply)
        for member, reply in exchange(grid, messages, seen, timeout * max(1, len(seen)), what)
    }
    answers = alike_arrays([replies[client] for client in sorted(replies)], what)
    return Told(method, rank, numbers, to_arrays(kind.survey.combine(answers)))


def personalize(
    grid: Grid, told: Told, members: list[Member], timeout: float
) -> Iterator[tuple[Member, dict[str, Any]]]:
    """Have clients personalize with one method and budget; yields each one's scores as they come.

    Args:
        grid: The engine.
        told: Method, budget and what it starts from.
        members: The clients to personalize.
        timeout: Seconds to wait for each client.
    """
    messages = [told.message(member.node, PERSONALIZE) for member in members]
    by_node = {member.node: member for member in members}
    timeout *= max(1, len(members))
    for member, reply in exchange(grid, messages, by_node, timeout, "personalization"):
        metrics: dict[str, Any] = scalars(reply)
        metrics["examples"] = metrics.pop(EXAMPLES)
        yield member, metrics


def personalize_all(
    grid: Grid, run: RunFolder, shared: Shared, members: list[Member], reporter: Reporter
) -> None:
    """Every client of the chosen pools, with every method and budget; missing cells only."""
    evaluation, timeout = run.settings.evaluation, run.settings.federation.timeout
    digests = {name: array_digest(to_arrays(numbers)) for name, numbers in shared.items()}
    run.drop_cells_of_other_phi(set(digests.values()))
    chosen = [member for member in members if member.pool in evaluation.pools]
    wanted = [
        (method, rank)
        for method in evaluation.methods
        for rank in (evaluation.ranks if METHODS[method].ranked else [0])
    ]
    missing = {
        (method, rank): [m for m in chosen if run.cell(method, rank, m.client) is None]
        for method, rank in wanted
    }
    left, total = sum(map(len, missing.values())), len(wanted) * len(chosen)
    reporter.start("personalize", total, total - left)
    for (method, rank), clients in missing.items():
        if not clients:
            continue
        told = prepare(grid, shared, method, rank, members, timeout)
        federation = METHODS[method].shared
        for member, metrics in personalize(grid, told, clients, timeout):
            about = {"client": member.client, "language": member.language, "pool": member.pool}
            if federation:
                about["phi"] = digests[federation]
            run.write_cell(method, rank, member.client, {**about, **metrics})
            n = metrics["examples"]
            score = f"{metrics['correct'] / n:.0%}" if n else "–"
            reporter.advance("personalize", f"{method} {member.client} {score}")
