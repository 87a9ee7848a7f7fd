"""Gradient of an outer loss with respect to what an inner training depends on.

An inner training ends where one more step would change nothing, θ = Φ(θ, η); the outer loss L_V
sees η through θ alone. Differentiating the fixed point (implicit function theorem) gives

    dθ/dη = (I − ∂Φ/∂θ)⁻¹ ∂Φ/∂η = Σ_j (∂Φ/∂θ)ʲ ∂Φ/∂η          (Neumann series)

For gradient descent on L_T with step α, Φ = θ − α·∇L_T, so ∂Φ/∂θ = I − α·H with H = ∂²L_T/∂θ².
Read from the left and cut off after K terms, products with H are all that is needed:

    dL_V/dη ≈ p · ∂Φ/∂η,    p = Σ_{j<K} (I − α·H)ʲ ∂L_V/∂θ

(Lorraine, Vicol and Duvenaud, AISTATS 2020; FedL2P, section 3). α is FedL2P's "hyper lr"; it must
be below 2 / λ_max(H) for the series to converge. What η changes need not be L_T: `step` is what η
does to θ in one step, such as an optimizer's last one at its learning rates. Where that is fixed
and L_T quadratic, K terms are exactly the derivative of L_V after K steps that each add it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def hyper_gradient(
    outer: Sequence[Tensor],
    inner_loss: Tensor,
    inner: Sequence[Tensor],
    hyper: Sequence[Tensor],
    *,
    lr: float,
    terms: int,
    step: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Return dL_V/dη by the implicit function theorem, its series cut off.

    Args:
        outer: ∂L_V/∂θ, one tensor per inner parameter.
        inner_loss: L_T at the inner parameters; differentiable twice.
        inner: θ.
        hyper: η.
        lr: α, the step of the series.
        terms: K, terms of the series, from 1 up.
        step: The part of Φ(θ, η) that η changes, one tensor per inner parameter; −α·∇L_T where none
            is given (then L_T itself depends on η).

    Returns:
        One tensor per hyper-parameter; zeros where nothing depends on it.
    """
    slope = torch.autograd.grad(
        inner_loss, inner, create_graph=True, allow_unused=True, materialize_grads=True
    )
    total = turned = list(outer)
    for _ in range(terms - 1):
        dot = torch.stack([(g * v).sum() for g, v in zip(slope, turned, strict=True)]).sum()
        curved = torch.autograd.grad(
            dot, inner, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        turned = [v - lr * h for v, h in zip(turned, curved, strict=True)]
        total = [p + v for p, v in zip(total, turned, strict=True)]
    if step is None:
        step = [-lr * g for g in slope]
    return list(
        torch.autograd.grad(
            list(step), hyper, grad_outputs=total, allow_unused=True, materialize_grads=True
        )
    )
