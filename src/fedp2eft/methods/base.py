"""The untouched base model."""

from __future__ import annotations

from fedp2eft.client.side import ClientSide, Outcome


def base(client: ClientSide, rank: int) -> Outcome:
    """Score the base model as it is; the budget plays no part."""
    with client.bt.off():
        return Outcome(client.score(client.bt.model), None)
