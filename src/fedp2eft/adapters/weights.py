"""The adapter that a client ends with, as plain tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerWeights:
    """The kept ranks of one layer; k may be 0.

    Args:
        name: Module path inside the base model.
        A: k × d_in.
        B: d_out × k.
        lam: λ of the kept ranks, k.
        embedding: Whether the layer is an embedding (PEFT names its weights differently).
    """

    name: str
    A: Tensor
    B: Tensor
    lam: Tensor
    embedding: bool = False

    @property
    def rank(self) -> int:
        """Kept ranks k."""
        return self.A.shape[0]


@dataclass(frozen=True)
class EmbeddingRows:
    """Rows that take the place of some rows of an embedding.

    Args:
        name: Module path of the embedding inside the base model.
        rows: Row indices, k, int64.
        values: k × width.
    """

    name: str
    rows: Tensor
    values: Tensor


@dataclass(frozen=True)
class Head:
    """What takes the place of a classification head.

    Args:
        name: Module path inside the base model.
        weight: C × d.
        bias: C.
    """

    name: str
    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class AdapterWeights:
    """W + s·B·diag(λ)·A for every adapted layer, in module order.

    Args:
        layers: All L adapted layers, those without ranks included.
        scaling: The factor s.
        rows: Embeddings that the client has rows of its own in.
        offset: Added to the logits, one value per class; None if nothing is.
        temperature: What the logits are divided by before.
        head: The head that has the offset and its own low-rank part in it
            (`fedp2eft.adapters.head.with_head`).
    """

    layers: tuple[LayerWeights, ...]
    scaling: float
    rows: tuple[EmbeddingRows, ...] = ()
    offset: Tensor | None = None
    temperature: float = 1.0
    head: Head | None = None

    @property
    def ranks(self) -> dict[str, int]:
        """Kept ranks per module."""
        return {layer.name: layer.rank for layer in self.layers}

    @property
    def max_rank(self) -> int:
        """Largest rank of any layer, at least 1."""
        return max([1, *(layer.rank for layer in self.layers)])

    def parameters(self) -> int:
        """Return parameters in A and B of the kept ranks, in the offset and the temperature."""
        prior = 0 if self.offset is None else self.offset.numel() + (self.temperature != 1)
        return sum(layer.A.numel() + layer.B.numel() for layer in self.layers) + prior

    def folded(self) -> AdapterWeights:
        """Return the same adapter with s and λ folded into B, so that its scale is exactly 1."""
        return replace(
            self,
            layers=tuple(
                replace(each, B=each.B * (self.scaling * each.lam), lam=torch.ones_like(each.lam))
                for each in self.layers
            ),
            scaling=1.0,
        )

    def is_finite(self) -> bool:
        """Return whether every value of the adapter is finite."""
        values = [value for layer in self.layers for value in (layer.A, layer.B, layer.lam)]
        values += [each.values for each in self.rows]
        values += [self.head.weight, self.head.bias] if self.head else []
        return all(bool(torch.isfinite(value).all()) for value in values)
