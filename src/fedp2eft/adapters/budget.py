"""The budget: which of the L × r_max candidate ranks a client keeps (paper section 4).

A budget of r is as many ranks, or as many parameters, as r ranks on every layer have. A rank of a
layer has d_in + d_out parameters, so a budget in ranks rewards wide layers.

Both budgets take ranks in the order of λ, as the paper does: the kind of budget decides how many.
In parameters, a rank that no longer fits is skipped for the next one that does. What is unspent is
then less than any rank that was left out, so adapters of one budget are of one size.

The other order, λ per parameter, would let widths decide in place of the PSG: of three PSGs trained
on MasakhaNEWS it keeps, at r = 8, all ranks of the narrow layers of every client (docs/methods.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedp2eft.errors import UserError
from fedp2eft.settings.experiment import check_rank


def keep_largest(lam: Tensor, rank: int, costs: Sequence[int] | None = None) -> Tensor:
    """Return the mask of kept ranks: the largest entries of λ over the whole model.

    Ties go to the earlier (layer, rank), so the result is the same on every machine that computes
    the same λ.

    Args:
        lam: λ, L × r_max. A layer-wise λ is one column repeated.
        rank: Budget r, from 1 to r_max.
        costs: Parameters of a rank of each layer, L, for a budget in parameters: at most
            r · Σ costs. Default: a budget in ranks, r·L = ⌊(r / r_max)·L·r_max⌋ of them.

    Returns:
        Boolean mask, L × r_max.

    Raises:
        UserError: The budget is not in 1..r_max, or λ holds NaN.
    """
    layers, r_max = lam.shape
    check_rank(rank, r_max)
    if lam.isnan().any():
        raise UserError("λ holds NaN, so no ranks can be chosen: train the PSG again.")
    if costs is not None:
        return within(lam, rank * sum(costs), costs)
    mask = torch.zeros(layers * r_max, dtype=torch.bool, device=lam.device)
    mask[_order(lam)[: rank * layers]] = True
    return mask.reshape(layers, r_max)


def within(scores: Tensor, parameters: int, costs: Sequence[int]) -> Tensor:
    """Return the mask of the ranks that so many parameters pay for, the highest scores first.

    Args:
        scores: One per rank, L × r_max.
        parameters: The budget.
        costs: Parameters of a rank of each layer, L.

    Returns:
        Boolean mask, L × r_max.
    """
    r_max, least, kept = scores.shape[1], min(costs), []
    for number in _order(scores).tolist():
        cost = costs[number // r_max]
        if cost <= parameters:
            parameters -= cost
            kept.append(number)
        if parameters < least:
            break
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[kept] = True
    return mask.reshape(scores.shape)


def _order(scores: Tensor) -> Tensor:
    return torch.sort(scores.reshape(-1), descending=True, stable=True).indices
