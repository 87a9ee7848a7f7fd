"""PEFT's LoRA on an nn.Linear with its three products in one autograd function.

PEFT's own forward pass scales the low-rank product and adds it to the base's output in two passes
over memory, each with a backward pass of its own. Here the second low-rank product is added to the
base's output where it stands, and its gradient to the base's. Same function, up to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn


class FusedLinear(lora.Linear):  # type: ignore[misc]
    """A `lora.Linear` that has become one of these; see `fuse`.

    PEFT finds layers to adapt by "Linear" in the name of their class.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return W·x + bias + s·B·A·x, x: … × d_in, the result … × d_out."""
        weights = None if args or kwargs else self._weights(x)
        if weights is None:
            plain: Tensor = super().forward(x, *args, **kwargs)
            return plain
        fused: Tensor = _Products.apply(x, *weights)  # type: ignore[no-untyped-call]
        return fused

    def _weights(self, x: Tensor) -> tuple[Any, ...] | None:
        """Return what `_Products` needs; None where PEFT's forward pass does more than it."""
        active = self.active_adapters
        if self.disable_adapters or self.merged or len(active) != 1:
            return None
        if torch.is_autocast_enabled(x.device.type):
            return None
        name, base = active[0], self.base_layer
        if name not in self.lora_A or name in self.lora_variant or self.lora_bias[name]:
            return None
        dropout: nn.Module = self.lora_dropout[name]
        if not isinstance(dropout, nn.Identity) and dropout.training:
            return None
        A, B = self.lora_A[name].weight, self.lora_B[name].weight
        if not x.dtype == A.dtype == B.dtype == base.weight.dtype or base.weight.requires_grad:
            return None
        return base.weight, base.bias, A, B, self.scaling[name]


class _Products(torch.autograd.Function):
    """x·Wᵀ + bias + s·(x·Aᵀ)·Bᵀ, of a frozen W."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, s: float
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        inner = flat @ A.T
        out = torch.nn.functional.linear(flat, weight, bias)
        out.addmm_(inner, B.T, alpha=s)
        ctx.save_for_backward(x, weight, A, B, inner)
        ctx.s = s
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B, inner = ctx.saved_tensors
        flat, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        if torch.is_grad_enabled():  # differentiated again: what was kept has no history
            inner = flat @ A.T
        to_inner = (grad @ B) * ctx.s
        to_x = to_A = to_B = None
        if ctx.needs_input_grad[0]:
            to_x = (grad @ weight).addmm_(to_inner, A).view(x.shape)
        if ctx.needs_input_grad[3]:
            to_A = to_inner.T @ flat
        if ctx.needs_input_grad[4]:
            to_B = (grad.T @ inner) * ctx.s
        return to_x, None, None, to_A, to_B, None


def fuse(module: nn.Module) -> None:
    """Let a `lora.Linear` on an nn.Linear take its products in one function; others stay."""
    layer: Any = module
    if type(layer) is lora.Linear and type(layer.get_base_layer()) is nn.Linear:
        layer.__class__ = FusedLinear
