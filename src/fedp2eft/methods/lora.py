"""LoRA: uniform rank r on every adapted layer, alpha = 2r (paper section 5, baselines)."""

from __future__ import annotations

import torch
from torch import Tensor

from fedp2eft.adapters.btlora import BTLora
from fedp2eft.client.side import ClientSide, Outcome


def uniform(bt: BTLora, rank: int) -> tuple[Tensor, Tensor]:
    """Return the first r ranks of every layer, with λ = 1: (λ, kept ranks), both L × r_max."""
    ones = torch.ones(len(bt.names), bt.settings.r_max)
    keep = torch.zeros_like(ones, dtype=torch.bool)
    keep[:, :rank] = True
    return ones, keep


def lora(client: ClientSide, rank: int) -> Outcome:
    """Fit the first r ranks of every layer, λ = 1, at the same learning rate as FedP²EFT."""
    return client.fit(*uniform(client.bt, rank))
