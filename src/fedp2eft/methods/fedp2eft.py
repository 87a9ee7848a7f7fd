"""FedP²EFT: the ranks and λ that the PSG predicts for this client (paper section 4)."""

from __future__ import annotations

from fedp2eft.client import structure
from fedp2eft.methods.method import ClientSide, Outcome


def fedp2eft(client: ClientSide, rank: int) -> Outcome:
    """λ = PSG(ξ), its r·L largest entries kept and frozen; A and B fine-tuned."""
    lam, keep = structure(client.psg, client.features(), rank)
    return client.fit(lam, keep)
