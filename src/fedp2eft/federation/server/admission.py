"""What the server takes from clients: a hostile or broken one costs the round its own share only.

`messages` checks that a reply is what it should be; here replies of one round are looked at
together, and what happens with clients that fail is decided.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from statistics import median

from flwr.app import Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedp2eft.errors import UserError, shortened
from fedp2eft.federation.local import LocalGrid
from fedp2eft.federation.server.faults import Faults, Kind
from fedp2eft.federation.wire.compression import unpack
from fedp2eft.federation.wire.messages import (
    ARRAYS,
    EXAMPLES,
    METRICS,
    nbytes,
    read_in_place,
    scalars,
    the_arrays,
    to_arrays,
    whole,
)
from fedp2eft.progress import LogReporter, Reporter
from fedp2eft.settings.experiment import Wire
from fedp2eft.settings.peers import PeerSettings

MOST_TEXT = 300


class Failures:
    """Clients that failed in one round of questions; the first one ends the run, or none does.

    Args:
        settings: Of peers.
        stop: Whether a failure ends the run.
        reporter: Receives every failure that does not end the run.
        faults: Keeps what went wrong.

    Attributes:
        reasons: Why each client was left out, by name.
    """

    def __init__(
        self, settings: PeerSettings, stop: bool, reporter: Reporter, faults: Faults | None = None
    ) -> None:
        self.settings = settings
        self.stop = stop
        self.reasons: dict[str, str] = {}
        self._reporter = reporter
        self._faults = faults

    @classmethod
    def on(
        cls, grid: Grid, settings: PeerSettings, reporter: Reporter, faults: Faults | None = None
    ) -> Failures:
        """Return failures that end the run or not, as `settings.failures` says for this engine."""
        auto = "stop" if isinstance(grid, LocalGrid) else "continue"
        chosen = auto if settings.failures == "auto" else settings.failures
        return cls(settings, chosen == "stop", reporter, faults)

    def add(self, client: str, reason: str, kind: Kind = "failed") -> None:
        """Count a client's failure.

        Raises:
            UserError: The reason, where a failure ends the run.
        """
        if self.stop:
            raise UserError(reason)
        self.leave_out(client, reason, kind)

    def leave_out(self, client: str, reason: str, kind: Kind = "refused") -> None:
        """Continue without a client, whatever `failures` says: nobody failed."""
        self.reasons[client] = reason
        self._count(client, reason, kind, "Left out")

    def blame(self, client: str, reason: str, kind: Kind = "refused") -> None:
        """Count the fault of a client whose reply is in the sum already: it is not left out.

        Raises:
            UserError: The reason, where a failure ends the run.
        """
        if self.stop:
            raise UserError(reason)
        self._count(client, reason, kind, "Fault")

    def blaming(self) -> Failures:
        """Return failures of clients whose reply is in the sum already: `blame` for each."""
        made = copy(self)
        made.leave_out = made.blame  # type: ignore[method-assign]
        return made

    def remark(self, reason: str) -> None:
        """Keep something that went wrong and that no client can be held to."""
        self._count("", reason, "refused", "Fault")

    def _count(self, client: str, reason: str, kind: Kind, title: str) -> None:
        self._reporter.note(f"{title}: {reason}")
        if self._faults and self._faults.happened(kind, client, reason):
            self._reporter.note(
                f"In quarantine: client {client}, which failed {self.settings.quarantine} times in "
                "a row; it is not asked again until the run is restarted."
            )

    def ignored(self, client: str, what: str) -> None:
        """Count a reply that nobody waits for."""
        if self._faults:
            self._faults.happened("ignored", client, f"A reply too many, {what}.")

    def usable(self, client: str) -> None:
        """Reset the failures in a row of a client whose reply was usable."""
        if self._faults:
            self._faults.answered(client)

    def check(self, usable: int, asked: int, what: str) -> None:
        """Raise `UserError` where too few of those asked gave a usable reply."""
        least = max(1, math.ceil(self.settings.min_share * asked))
        if usable < least:
            first = next(iter(self.reasons.values()), "nobody was asked.")
            raise UserError(
                f"Only {usable} of {asked} clients are usable in {what}, and peers.min_share asks "
                f"for {least}. The first unusable one: {first}"
            )


FIRST_ENDS = Failures(PeerSettings(), stop=True, reporter=LogReporter())
"""The first failure is an error."""


def plain(text: str | None) -> str:
    """Return a peer's text as one line of printable characters, safe for a terminal."""
    text = text or "no reason given."
    line = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * MOST_TEXT]).split())
    return line if len(line) <= MOST_TEXT else line[:MOST_TEXT] + "…"


@dataclass
class Offer:
    """A reply that is what it should be, before it is compared with the others of its round.

    Args:
        client: Who sent it.
        message: A copy of the reply; its arrays are fp32, by the expected names.
        examples: N as the client reports it, 1 or more.
        metrics: Its other metrics; finite.
        norm: L2 norm of the change that the client made to the parameters.
        size: How many parameters there are.
        nbytes: Bytes of the arrays as they came.
        weight: In the average; see `weigh`.
    """

    client: str
    message: Message
    examples: int
    metrics: dict[str, int | float]
    norm: float
    size: int
    nbytes: int
    weight: int = 0


def offer_of(
    client: str,
    reply: Message,
    sent: Mapping[str, Tensor],
    wire: Wire,
    expected: Sequence[str],
    bit: str | None = None,
) -> Offer:
    """Check one reply by itself.

    Args:
        client: Who sent it.
        reply: The reply.
        sent: The parameters that the client started from.
        wire: What the reply travelled in; not "fp32": it holds changes.
        expected: Metrics that it reports beside N; no more, no less.
        bit: Name of a metric that is 0 or 1 and that the strategy reads in the message.

    Raises:
        UserError: Its parameters, its N or its metrics are not what they should be.
    """
    record = the_arrays(reply)
    values = unpack(record, sent, wire, "its reply")
    metrics = scalars(reply)
    examples = whole(metrics, EXAMPLES, least=1)
    if bit and whole(metrics, bit) > 1:
        raise UserError(f"its {bit} is {metrics[bit]}, not 0 or 1")
    known = {EXAMPLES, *expected, *([bit] if bit else [])}
    if set(metrics) != known:
        odd = min(set(metrics) ^ known)
        raise UserError(f"its reply has other metrics than expected (first: {shortened(odd)}).")
    if wire == "fp32":
        changes = (values[name] - sent[name] for name in sent)
        arrays = read_in_place(record, sent)
    else:
        changes = (values[name] for name in sent)
        arrays = to_arrays({name: sent[name] + values[name] for name in sent})
    norm = math.sqrt(sum(map(_square, changes)))
    # Nothing else of the reply is kept: a stray record would stop Flower's aggregation.
    message = copy(reply)
    read = MetricRecord({bit: metrics[bit]}) if bit else MetricRecord()
    message.content = RecordDict({ARRAYS: arrays, METRICS: read})
    metrics = {name: metrics[name] for name in expected}
    size = sum(value.numel() for value in sent.values())
    return Offer(client, message, examples, metrics, norm, size, nbytes(record))


def _square(change: Tensor) -> float:
    """Return Σ change²; in float64, three times as slow, only where float32 cannot hold it."""
    flat = change.flatten()
    found = float(flat @ flat)
    return found if found and math.isfinite(found) else float((flat.double() ** 2).sum())


def within_limits(
    offers: Sequence[Offer], most: float, failures: Failures, what: str
) -> list[Offer]:
    """Return the offers whose change is at most `most` times the round's median.

    The others are left out and noted. With two offers or fewer there is nothing to compare.
    """
    middle = median(offer.norm for offer in offers) if offers else 0.0
    if not most or not middle:
        return list(offers)
    kept = []
    for offer in offers:
        times = offer.norm / middle
        if times <= most:
            kept.append(offer)
            continue
        failures.leave_out(
            offer.client,
            f"client {offer.client} in {what} moved the parameters {times:.3g} times as far as the "
            f"median client; peers.max_norm is {most:g}.",
        )
    return kept


def weigh(offers: Sequence[Offer], most: float, alike: bool = False) -> list[str]:
    """Give every offer its weight, and write it where Flower's strategies read it.

    Args:
        offers: Their messages are changed.
        most: A weight is at most this multiple of the median N; 0 for no limit.
        alike: The same weight for all, whatever their N.

    Returns:
        Names of the clients whose N was cut.
    """
    limit = most * median(offer.examples for offer in offers) if most and offers else math.inf
    cut = []
    for offer in offers:
        weight = 1 if alike else int(min(offer.examples, limit))
        if weight < offer.examples and not alike:
            cut.append(offer.client)
        offer.weight = weight
        offer.message.content.metric_records[METRICS][EXAMPLES] = weight
    return cut


def mean_metrics(offers: Sequence[Offer]) -> dict[str, float]:
    """Return the mean of each metric, weighted like the parameters."""
    total = sum(offer.weight for offer in offers)
    return {
        name: sum(offer.metrics[name] * (offer.weight / total) for offer in offers)
        for name in offers[0].metrics
    }
