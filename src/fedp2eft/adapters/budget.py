"""The rank budget: which of the L × r_max candidate ranks a client keeps (paper section 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from fedp2eft.errors import UserError
from fedp2eft.settings.experiment import check_rank


def keep_largest(lam: Tensor, rank: int) -> Tensor:
    """Return the mask of kept ranks: the r·L largest entries of λ over the whole model.

    r·L is ⌊(r / r_max)·L·r_max⌋. Ties go to the earlier (layer, rank), so the result is the same on
    every machine that computes the same λ.

    Args:
        lam: λ, L × r_max. A layer-wise λ is one column repeated.
        rank: Budget r, from 1 to r_max.

    Returns:
        Boolean mask, L × r_max, with exactly r·L true entries.

    Raises:
        UserError: The budget is not in 1..r_max, or λ holds NaN.
    """
    layers, r_max = lam.shape
    check_rank(rank, r_max)
    if lam.isnan().any():
        raise UserError("λ holds NaN, so no ranks can be chosen: train the PSG again.")
    order = torch.sort(lam.reshape(-1), descending=True, stable=True).indices
    mask = torch.zeros(layers * r_max, dtype=torch.bool, device=lam.device)
    mask[order[: rank * layers]] = True
    return mask.reshape(layers, r_max)
