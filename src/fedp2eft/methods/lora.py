"""LoRA: uniform rank r on every adapted layer, alpha = 2r (paper section 5, baselines)."""

from __future__ import annotations

import torch

from fedp2eft.methods.method import ClientSide, Outcome


def lora(client: ClientSide, rank: int) -> Outcome:
    """The first r ranks of every layer, with λ = 1; at the same learning rate as FedP²EFT."""
    ones = torch.ones(len(client.bt.names), client.bt.settings.r_max)
    keep = torch.zeros_like(ones, dtype=torch.bool)
    keep[:, :rank] = True
    return client.fit(ones, keep)
