"""The average over the clients of a round: of their replies, or of a secure sum of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import ArrayRecord, Message
from flwr.serverapp import Grid
from torch import Tensor

from fedp2eft.client.phase import Phase
from fedp2eft.errors import UserError
from fedp2eft.federation.server.admission import Failures, Offer, mean_metrics, offer_of
from fedp2eft.federation.server.aggregation import Averaging
from fedp2eft.federation.server.exchange import Member, read_replies
from fedp2eft.federation.server.sums import SecureSum, fixed
from fedp2eft.federation.wire.layouts import CAPPED, METRICS, WEIGHT, phase_layout
from fedp2eft.federation.wire.messages import nbytes, the_arrays
from fedp2eft.settings.experiment import Settings

Averaged = tuple[ArrayRecord | None, dict[str, Any]]
"""The average, None if there is none, and the metrics of the round."""


@dataclass(frozen=True)
class Round:
    """A round that is under way.

    Args:
        grid: The engine.
        settings: The experiment.
        phase: What is trained.
        aggregator: Averages.
        number: Of the round, from 1.
        messages: One to each client that was sampled.
        sent: The parameters in them.
        failures: Receives clients that fail.
    """

    grid: Grid
    settings: Settings
    phase: Phase
    aggregator: Averaging
    number: int
    messages: Sequence[Message]
    sent: Mapping[str, Tensor]
    failures: Failures

    @property
    def what(self) -> str:
        """Name it in an error."""
        return f"round {self.number} of {self.phase.name}"

    @property
    def members(self) -> dict[int, Member]:
        """Clients by node."""
        return {member.node: member for member in self.aggregator.members}


def average(this: Round) -> Averaged:
    """Collect what the clients trained, and average it over those that are usable.

    Raises:
        UserError: Too few clients, or the first failure where a failure ends the run.
    """
    return _of_sum(this) if this.settings.privacy.secure else _of_replies(this)


def _of_replies(this: Round) -> Averaged:
    """Average replies that the server reads one by one."""
    # 1. Check every reply by itself.
    failures, what, asked = this.failures, this.what, len(this.messages)
    offers = _offers(this)
    bytes_up = sum(offer.nbytes for offer in offers)
    # 2. Leave out what must not count, looking at the replies together.
    offers = this.aggregator.limits(offers, failures, what)
    for offer in offers:
        failures.usable(offer.client)
    failures.check(len(offers), asked, what)
    # 3. Average over the clients that are left.
    averaged, facts = this.aggregator.aggregate(this.number, offers)
    bytes_down = asked and asked * nbytes(the_arrays(this.messages[0]))
    counts = {"clients": len(offers), "bytes-down": bytes_down, "bytes-up": bytes_up}
    return averaged, mean_metrics(offers) | facts | counts


def _of_sum(this: Round) -> Averaged:
    """Average by a secure sum: the server sees no reply, and can check none by itself."""
    privacy, timeout = this.settings.privacy, this.settings.federation.timeout
    what, phase, members = this.what, this.phase, this.members
    asked = [members[message.metadata.dst_node_id] for message in this.messages]
    layout = phase_layout(phase, this.sent, privacy, len(asked))
    secure = SecureSum(this.grid, asked, privacy, timeout, what, this.failures)
    found = secure.run(this.messages, fixed(layout), this.aggregator.before_unmasking)
    weight = round(float(found.values[WEIGHT][0]))
    if not len(found.clients) <= weight <= len(found.clients) * layout[WEIGHT].limit:
        raise UserError(
            f"The sum of {what} has {weight} examples of {len(found.clients)} clients, which "
            "cannot be: a client sent what is no part of it. Start again to repeat the round."
        )
    averaged, facts = this.aggregator.of_sum(this.number, this.sent, found.values, weight)
    metrics = dict(zip(phase.metrics, (found.values[METRICS] / weight).tolist(), strict=True))
    capped = round(float(found.values[CAPPED][0]))
    facts |= {"examples-cut": capped} if capped else {}
    facts |= {"entries-cut": found.cut} if found.cut else {}
    counts = {"bytes-down": found.bytes_down, "bytes-up": found.bytes_up}
    return averaged, metrics | facts | {"clients": len(found.clients)} | counts


def _offers(this: Round) -> list[Offer]:
    """Return the usable replies, in the order of the clients' names.

    Sums of floats depend on their order: the names fix it.
    """
    phase, bit, wire = this.phase, this.aggregator.bit, this.phase.wire_of(this.settings)

    def check(member: Member, reply: Message) -> Offer:
        return offer_of(member.client, reply, this.sent, wire, phase.metrics, bit)

    replies = read_replies(
        this.grid, this.messages, this.members, this.settings.federation.timeout, this.what,
        check, this.failures,
    )  # fmt: skip
    return sorted((offer for _, offer in replies), key=lambda offer: offer.client)
