"""FedP²EFT: the ranks and λ that the PSG predicts for this client (paper section 4)."""

from __future__ import annotations

from torch import Tensor

from fedp2eft.client.side import ClientSide, Outcome
from fedp2eft.client.training import structure


def predicted(client: ClientSide, rank: int) -> tuple[Tensor, Tensor]:
    """Return λ = PSG(ξ) and its largest entries within the budget: (λ, mask), both L × r_max."""
    return structure(client.psg, client.features(), rank, client.costs)


def fedp2eft(client: ClientSide, rank: int) -> Outcome:
    """Fit λ = PSG(ξ), its largest entries kept and frozen: fine-tune A and B."""
    return client.fit(*predicted(client, rank))
