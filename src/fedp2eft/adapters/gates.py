"""Gates: diag(λ) on PEFT's LoRA, for every kind of layer that PEFT adapts.

    W' = W + s · B · diag(λ) · A          A: r × d_in,  B: d_out × r,  λ ∈ R^r

B·diag(λ)·A is B·A with row i of A scaled by λ_i. A parametrization of PEFT's own A is therefore all
it takes: nn.Linear, Conv1D, Embedding and quantized layers read their A through it in PEFT's own
forward pass (paper section 3). `fedp2eft.adapters.low_rank` computes that of an nn.Linear faster.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fedp2eft.errors import UserError, first_line

PEFT_PREFIX = "base_model.model."


class RankGate(nn.Module):
    """Scales row i of A by λ_i; λ is row `row` of a shared (L × r) or (L × 1) tensor.

    Args:
        lam: The shared λ, a parameter where it is trained.
        row: This layer's row.
        clamp: (low, high) to clamp to, or None to see it as it is.
        dtype: Dtype of the scaled A. Default: A's.
    """

    lam: Tensor

    def __init__(
        self,
        lam: Tensor,
        row: int,
        clamp: tuple[float, float] | None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dtype = dtype
        if isinstance(lam, nn.Parameter):
            self.lam = lam
        else:
            self.register_buffer("lam", lam, persistent=False)
        self.row = row
        self.clamp = clamp

    def forward(self, A: Tensor) -> Tensor:
        """Return A (r × d_in) with its rows scaled."""
        lam = self.lam[self.row]
        if self.clamp is not None:
            lam = clamp_straight_through(lam, *self.clamp)
        return (A * lam.unsqueeze(1)).to(self.dtype or A.dtype)


class _Rounded(nn.Module):
    """B in the dtype of the base's products; the trained B stays fp32."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, B: Tensor) -> Tensor:
        return B.to(self.dtype)


@dataclass(frozen=True)
class AdaptedLayer:
    """One LoRA layer of one adapter, whatever kind of module it sits on.

    Args:
        name: Module path inside the base model, without PEFT's prefix.
        module: PEFT's layer.
        adapter: Name of the adapter.
    """

    name: str
    module: LoraLayer
    adapter: str

    @property
    def is_embedding(self) -> bool:
        """Whether PEFT keeps this layer's A and B as those of an embedding."""
        return self.adapter in self.module.lora_embedding_A

    def _places(self) -> tuple[tuple[nn.Module, str], tuple[nn.Module, str]]:
        if self.is_embedding:
            m = self.module
            return (m.lora_embedding_A, self.adapter), (m.lora_embedding_B, self.adapter)
        A, B = self.module.lora_A[self.adapter], self.module.lora_B[self.adapter]
        return (A, "weight"), (B, "weight")

    @property
    def A(self) -> nn.Parameter:
        """A before its gate, r × d_in."""
        return _trained(*self._places()[0])

    @property
    def B(self) -> nn.Parameter:
        """B, d_out × r."""
        return _trained(*self._places()[1])

    def gate(self, lam: Tensor, row: int, clamp: tuple[float, float] | None = None) -> None:
        """Gate this layer's A by row `row` of λ.

        A base in bf16 or fp16 gets its low-rank products in the same dtype; A, B and λ
        themselves stay fp32.
        """
        weight = self.module.get_base_layer().weight
        half = weight.dtype if weight.dtype in (torch.bfloat16, torch.float16) else None
        place_A, place_B = self._places()
        # `unsafe` skips a trial run at registration, which would refuse a change of dtype.
        gate = RankGate(lam, row, clamp, half)
        parametrize.register_parametrization(*place_A, gate, unsafe=True)
        if half is not None:
            parametrize.register_parametrization(*place_B, _Rounded(half), unsafe=True)

    @contextmanager
    def lent(self, A: nn.Parameter, B: nn.Parameter, lam: Tensor) -> Iterator[None]:
        """Put another A (k × d_in), B (d_out × k) and frozen λ (k) in place of this gated layer's.

        PEFT's forward pass multiplies by what it finds, whatever its rank.
        """
        own = self.A, self.B
        holder, attribute = self._places()[0]
        gates: Any = holder.parametrizations
        gate = gates[attribute][0]
        gates[attribute][0] = RankGate(lam.unsqueeze(0), 0, None, gate.dtype)
        self._put(A, B)
        try:
            yield
        finally:
            self._put(*own)
            gates[attribute][0] = gate

    @contextmanager
    def idle(self) -> Iterator[None]:
        """Leave the adapter out of this layer alone."""
        self.module.set_adapter([])
        try:
            yield
        finally:
            self.module.set_adapter([self.adapter])

    def _put(self, A: nn.Parameter, B: nn.Parameter) -> None:
        for (holder, attribute), value in zip(self._places(), (A, B), strict=True):
            if parametrize.is_parametrized(holder, attribute):
                gated: Any = holder.parametrizations
                gated[attribute].original = value
            else:
                setattr(holder, attribute, value)


def _trained(holder: nn.Module, attribute: str) -> nn.Parameter:
    """Return the parameter itself, whether or not it is read through a parametrization."""
    if parametrize.is_parametrized(holder, attribute):
        gated: Any = holder.parametrizations
        original: nn.Parameter = gated[attribute].original
        return original
    parameter: nn.Parameter = getattr(holder, attribute)
    return parameter


def add_adapter(
    base: nn.Module, config: PeftConfig, name: str, refusal: str, seed: int | None = None
) -> PeftModel:
    """Return PEFT's model of a base, in the mode that the base is in.

    Args:
        base: Gets the adapter's layers.
        config: The adapter's.
        name: The adapter's.
        refusal: Beginning of the error.
        seed: Of PEFT's first weights, where nothing replaces them; the global random state is left
            as it was.

    Raises:
        UserError: PEFT has no such adapter for a layer of the base, or no layer is named.
    """
    training = base.training
    try:
        with torch.random.fork_rng(devices=[]):
            if seed is not None:
                torch.default_generator.manual_seed(seed)
            model: PeftModel = get_peft_model(base, config, adapter_name=name)
    except ValueError as error:
        raise UserError(f"{refusal}: {first_line(error)}.") from error
    return model.train(training)  # its wrapper is in training mode whatever the base is in


def adapted_layers(model: nn.Module, adapter: str) -> Iterator[AdaptedLayer]:
    """Yield the LoRA layers that carry `adapter`, in module order."""
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer) and adapter in module.r:
            yield AdaptedLayer(path.removeprefix(PEFT_PREFIX), module, adapter)


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
