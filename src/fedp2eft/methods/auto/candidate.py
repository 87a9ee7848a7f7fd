"""One way to personalize that `auto` may choose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from fedp2eft.methods.auto.settings import Kind

KINDS: tuple[Kind, ...] = get_args(Kind)
"""Cheapest first."""
FREE: tuple[Kind, ...] = ("base", "prior")
"""Kinds that train nothing."""


@dataclass(frozen=True)
class Candidate:
    """A way to personalize; `lr`, `epochs` and `rank` are 0 where nothing is trained."""

    kind: Kind
    lr: float = 0.0
    epochs: int = 0
    rank: int = 0

    def values(self) -> list[float]:
        """The candidate as four values, which travel and are kept with a PSG."""
        return [KINDS.index(self.kind), self.lr, self.epochs, self.rank]

    @classmethod
    def of(cls, values: Sequence[float]) -> Candidate:
        """Return the candidate that `values` made, which travelled as float32."""
        kind, lr, epochs, rank = values
        return cls(KINDS[int(kind)], float(f"{lr:.6g}"), int(epochs), int(rank))

    def __str__(self) -> str:
        if self.kind in FREE:
            return self.kind
        return f"{self.kind}, rank {self.rank}, learning rate {self.lr:g}, {self.epochs} epochs"
