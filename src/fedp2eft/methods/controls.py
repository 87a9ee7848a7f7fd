"""FedP²EFT taken apart: how much of its gain is structure, how much scale, how much the client?

A PSG's strategy is a structure (which ranks are kept) and a scale (their λ). Each control here
keeps one of the two and replaces the other.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedp2eft.adapters.budget import keep_largest
from fedp2eft.client.side import ClientSide, Outcome
from fedp2eft.client.training import cut_to
from fedp2eft.methods.fedp2eft import predicted
from fedp2eft.methods.lora import uniform
from fedp2eft.seeding import derive_seed


def structure_only(client: ClientSide, rank: int) -> Outcome:
    """Fit FedP²EFT's kept ranks, each with λ = 1 as in LoRA."""
    lam, keep = predicted(client, rank)
    return client.fit(torch.ones_like(lam), keep)


def scale_only(client: ClientSide, rank: int) -> Outcome:
    """Fit LoRA's uniform structure, with the mean of FedP²EFT's kept λ on every rank."""
    lam, keep = predicted(client, rank)
    ones, first = uniform(client.bt, rank)
    return client.fit(ones * lam[keep].mean(), first)


def random_structure(client: ClientSide, rank: int) -> Outcome:
    """Fit FedP²EFT's kept λ on ranks drawn at random from the client's seed.

    A budget in parameters may pay for fewer or more of them: λ are then left out, or dealt twice,
    evenly.
    """
    lam, keep = predicted(client, rank)
    values = lam[keep]
    generator = torch.Generator().manual_seed(derive_seed("random structure", client.seed))
    order = torch.randperm(lam.numel(), generator=generator)
    drawn = order[: len(values)]
    if client.costs is not None:
        place = order.argsort().reshape(lam.shape)
        chosen = keep_largest(-place.float(), rank, client.costs).flatten()
        drawn = order[chosen[order]]
    moved, kept = torch.zeros(lam.numel()), torch.zeros(lam.numel(), dtype=torch.bool)
    moved[drawn] = values[torch.arange(len(drawn)) * len(values) // len(drawn)]
    kept[drawn] = True
    return client.fit(moved.reshape(lam.shape), kept.reshape(lam.shape))


def global_lambda(client: ClientSide, rank: int) -> Outcome:
    """Fit the mean λ̂ of the seen clients: the same ranks and λ for every client."""
    return client.fit(
        *cut_to(rank, client.prepared["lambda"], client.bt.settings.r_max, client.costs)
    )


def ask_lambda(client: ClientSide, _rank: int) -> dict[str, Tensor]:
    """Return λ̂ of a seen client, whose mean is used."""
    with torch.no_grad():
        return {"lambda": client.psg(client.features())}


def mean_lambda(sums: Mapping[str, Tensor], clients: int) -> dict[str, Tensor]:
    """Return the mean of λ̂ over the seen clients."""
    return {"lambda": (sums["lambda"] / clients).float()}
