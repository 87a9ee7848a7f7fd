"""Clamping that lets gradients through."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _StraightThroughClamp(torch.autograd.Function):
    # An autograd function rather than `x + (clamp(x) - x).detach()`: the sum rounds, and the value
    # inside the range must be x to the last bit.
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, low: float, high: float) -> Tensor:
        return x.clamp(low, high)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0], None, None


def clamp_straight_through(x: Tensor, low: float, high: float) -> Tensor:
    """Clamp to [low, high]; the gradient is that of the identity (paper, straight-through)."""
    clamped: Tensor = _StraightThroughClamp.apply(x, low, high)  # type: ignore[no-untyped-call]
    return clamped
