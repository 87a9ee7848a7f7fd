"""Ranks by the client's own gradient at the base: an alternative to the PSG without a federation.

One pass over the client's rows, with λ = 1 and B = 0, gives the gradient G = ∂L/∂W of every layer
along each direction of the common A (rows a_i):

    ∂L/∂B[:,i] = s·G·a_i        score of rank i: ‖∂L/∂B[:,i]‖₂

The ranks with the largest scores over the whole model are kept within the budget, each with λ = 1.

`gradient-shared` takes the federation's mean gradient as the common A in place of random
directions. A seen client sends, of each layer, its gradient by A at A = 0 and B = Ωᵀ, the same
random r_max × d_out matrix for all clients:

    ∂L/∂A = s·Ω·G               (r_max × d_in)

The mean of these sketches is the sketch of the mean gradient, and its right singular vectors span
the directions in which the mean gradient is largest (Halko et al. 2011). They get the mean length
of a row of a Kaiming-uniform A, 1/√3, so that a learning rate means the same. Where a layer has
fewer of them (a head of few classes), rows of the random A remain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fedp2eft.adapters.budget import keep_largest
from fedp2eft.client.descent import local_order, rows_loss
from fedp2eft.client.side import ClientSide, Outcome
from fedp2eft.seeding import derive_seed

LENGTH = 3**-0.5
"""Of a direction."""
SMALLEST = 1e-5
"""Singular values below this share of the largest one are noise."""


def gradient(client: ClientSide, rank: int) -> Outcome:
    """Fine-tune the ranks with the largest gradient, λ = 1."""
    return client.fit(*structure(client, rank))


def structure(client: ClientSide, rank: int) -> tuple[Tensor, Tensor]:
    """Return λ = 1 and the kept ranks, both L × r_max."""
    scores = gradient_norms(client)
    return torch.ones_like(scores), keep_largest(scores, rank, client.costs)


def gradient_norms(client: ClientSide) -> Tensor:
    """Return ‖∂L/∂B[:,i]‖₂ of every rank at the base, L × r_max."""
    bt = client.bt
    bt.reset(torch.ones_like(bt.lam))
    return torch.stack([each.norm(dim=0) for each in _gradients(client, bt.B)]).cpu()


def _gradients(client: ClientSide, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Return the gradient of the mean loss over the client's training rows, from one pass."""
    bt, rows = client.bt, len(client.train)
    loss_of, _ = rows_loss(client.task, bt.model, client.train)
    total = [torch.zeros_like(each) for each in parameters]
    for batch in local_order(rows, 1, client.settings.batch_size, client.seed):
        loss = loss_of(batch) * (len(batch) / rows)
        for sum_, part in zip(total, torch.autograd.grad(loss, parameters), strict=True):
            sum_ += part
    return total


# ── the federation's directions ─────────────────────────────────────────────────────────────────


def gradient_shared(client: ClientSide, rank: int) -> Outcome:
    """Fit the same along the directions of the federation's mean gradient."""
    bt = client.bt
    with bt.directions([client.prepared[name] for name in bt.names]):
        return gradient(client, rank)


def ask_sketch(client: ClientSide, _rank: int) -> dict[str, Tensor]:
    """Answer Ω·G of every layer, r_max × d_in: gradients of text, whose mean is used."""
    bt = client.bt
    bt.reset(torch.ones_like(bt.lam))
    with torch.no_grad():
        for name, A, B in zip(bt.names, bt.A, bt.B, strict=True):
            seed = derive_seed("sketch", bt.settings.seed, name)
            omega = torch.randn(B.shape, generator=torch.Generator().manual_seed(seed))
            A.zero_()
            B.copy_(omega)
    try:
        found = _gradients(client, bt.A)
        return {name: each.cpu() for name, each in zip(bt.names, found, strict=True)}
    finally:
        bt.reset()


def mean_directions(sums: Mapping[str, Tensor], clients: int) -> dict[str, Tensor]:
    """Return the directions of every layer, r_max × d_in; zeros where there are no more."""
    found = {}
    for name, total in sums.items():
        mean = total / clients
        _, sizes, vectors = torch.linalg.svd(mean, full_matrices=False)
        used = sizes > SMALLEST * sizes.max().clamp(min=torch.finfo(torch.float32).tiny)
        rows = torch.zeros_like(mean)
        rows[: len(vectors)] = LENGTH * vectors * used[:, None]
        found[name] = rows
    return found
