"""Gates: diag(λ) on PEFT's LoRA, for every kind of layer that PEFT adapts.

    W' = W + s · B · diag(λ) · A          A: r × d_in,  B: d_out × r,  λ ∈ R^r

B·diag(λ)·A is B·A with row i of A scaled by λ_i. A parametrization of PEFT's own A is therefore all
it takes: nn.Linear, Conv1D, Embedding and quantised layers read their A through it, and no forward
pass is replaced (paper section 3).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fedp2eft.adapters.clamp import clamp_straight_through

PEFT_PREFIX = "base_model.model."


class RankGate(nn.Module):
    """Scales row i of A by λ_i; λ is row `row` of a shared (L × r) or (L × 1) tensor.

    Args:
        lam: The shared λ, a parameter where it is trained.
        row: This layer's row.
        clamp: (low, high) to clamp to, or None to see λ as it is.
    """

    lam: Tensor

    def __init__(self, lam: Tensor, row: int, clamp: tuple[float, float] | None) -> None:
        super().__init__()
        if isinstance(lam, nn.Parameter):
            self.lam = lam
        else:
            self.register_buffer("lam", lam, persistent=False)
        self.row = row
        self.clamp = clamp

    def forward(self, A: Tensor) -> Tensor:
        """A (r × d_in) with its rows scaled."""
        lam = self.lam[self.row]
        if self.clamp is not None:
            lam = clamp_straight_through(lam, *self.clamp)
        return A * lam.unsqueeze(1)


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

    def _holder(self) -> tuple[nn.Module, str]:
        if self.is_embedding:
            return self.module.lora_embedding_A, self.adapter
        return self.module.lora_A[self.adapter], "weight"

    @property
    def A(self) -> nn.Parameter:
        """A before its gate, r × d_in."""
        holder, attribute = self._holder()
        if parametrize.is_parametrized(holder, attribute):
            gated: Any = holder.parametrizations
            original: nn.Parameter = gated[attribute].original
            return original
        weight: nn.Parameter = getattr(holder, attribute)
        return weight

    @property
    def B(self) -> nn.Parameter:
        """B, d_out × r."""
        if self.is_embedding:
            embedding: nn.Parameter = self.module.lora_embedding_B[self.adapter]
            return embedding
        weight: nn.Parameter = self.module.lora_B[self.adapter].weight
        return weight

    def gate(self, gate: RankGate) -> None:
        """Put `gate` on this layer's A."""
        # `unsafe` skips a trial run of the gate at registration; it keeps shape and dtype.
        parametrize.register_parametrization(*self._holder(), gate, unsafe=True)

    def ungate(self) -> None:
        """Take the gate off again; PEFT cannot delete an embedding's A while it is gated."""
        if parametrize.is_parametrized(*self._holder()):
            parametrize.remove_parametrizations(*self._holder(), leave_parametrized=False)


def adapted_layers(model: nn.Module, adapter: str) -> Iterator[AdaptedLayer]:
    """The LoRA layers that carry `adapter`, in module order."""
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer) and adapter in module.r:
            yield AdaptedLayer(path.removeprefix(PEFT_PREFIX), module, adapter)
