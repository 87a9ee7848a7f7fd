"""Attention of packed rows: inside each row alone, many rows at a time.

Rows of similar length attend together, padded to the longest of them. Rows of a causal LM may begin
with the same tokens: these stand once in front of all rows, and every row attends to them, too.

transformers hands attention over to a function of the user's through `AttentionInterface`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fedp2eft.modes import with_values

ATTENTION = "packed_rows"


@dataclass(frozen=True)
class Block:
    """Rows that attend together.

    Args:
        start: Their first position in the packed row.
        stop: The position after their last.
        rows: How many they are.
        width: Positions of the longest.
        places: The packed position behind each of rows · width places, the row's first one where
            the row has ended; None where all rows are `width` long.
        real: Which of these places are no padding, rows × width.
        kept: Their indices.
        before: Positions at the start of the packed row that these rows attend to, too.
    """

    start: int
    stop: int
    rows: int
    width: int
    places: Tensor | None
    real: Tensor | None
    kept: Tensor | None
    before: int = 0

    @classmethod
    def of(cls, lengths: NDArray[np.int64], start: int, before: int = 0) -> Block:
        """Return rows of these lengths, packed from `start` on."""
        rows, width, stop = len(lengths), int(lengths.max()), start + int(lengths.sum())
        if (lengths == width).all():
            return cls(start, stop, rows, width, None, None, None, before)
        real = np.arange(width) < lengths[:, None]
        firsts = start + lengths.cumsum() - lengths
        places = np.repeat(firsts[:, None], width, axis=1)
        places[real] = np.arange(start, stop)
        masks = [torch.from_numpy(each) for each in (places.ravel(), real, np.flatnonzero(real))]
        return cls(start, stop, rows, width, masks[0], masks[1], masks[2], before)

    @property
    def firsts(self) -> Tensor | slice:
        """The packed position of each row's first."""
        if self.places is None:
            return slice(self.start, self.stop, self.width)
        return self.places[:: self.width]

    def spread(self, values: Tensor) -> Tensor:
        """Return positions × heads × d as rows × heads × width × d."""
        mine = values[self.start : self.stop] if self.places is None else values[self.places]
        return mine.view(self.rows, self.width, *values.shape[1:]).transpose(1, 2)

    def seen(self, values: Tensor) -> Tensor:
        """Return what the rows attend to, rows × heads × (before + width) × d."""
        own = self.spread(values)
        if not self.before:
            return own
        shared = values[: self.before].transpose(0, 1).expand(self.rows, -1, -1, -1)
        return torch.cat([shared, own], dim=2)

    def packed(self, values: Tensor) -> Tensor:
        """Return the real ones of rows × heads × width × d as positions × heads × d."""
        flat = values.transpose(1, 2).reshape(-1, values.shape[1], values.shape[3])
        return flat if self.kept is None else flat[self.kept]

    def add_seen(self, total: Tensor, gradient: Tensor) -> None:
        """Put the gradient of what `seen` returned into that of all positions.

        The rows' own positions are set, those that they share are added to.
        """
        if self.before:
            total[: self.before] += gradient[:, :, : self.before].sum(dim=0).transpose(0, 1)
            gradient = gradient[:, :, self.before :]
        total[self.start : self.stop] = self.packed(gradient)


@dataclass(frozen=True)
class Packing:
    """How rows stand in the packed row.

    Args:
        blocks: Rows that attend together, in order.
        starts: The first position of each row, after those that all rows share.
        causal: Whether a position sees those before it alone.
    """

    blocks: Sequence[Block]
    starts: Tensor
    causal: bool = False


def attending(config: Any) -> AbstractContextManager[None]:
    """Let a model of this config attend as the `packing` that its forward pass is given says."""
    _register()
    return with_values(config, _attn_implementation=ATTENTION)


@cache
def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface  # takes a second

    AttentionInterface.register(ATTENTION, _attend)
    AttentionMaskInterface.register(ATTENTION, _no_mask)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    packing: Packing,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute attention as transformers calls it: q, k and v are 1 × heads × positions × d."""
    layer: Any = module
    first_only = not packing.causal and layer.layer_idx == layer.config.num_hidden_layers - 1
    # Under autocast, rotary embeddings return queries and keys in fp32, unlike the values.
    states = [each.to(value.dtype) for each in (query, key, value)]
    packed = [each.squeeze(0).transpose(0, 1) for each in states]  # views, as their gradients are
    how = (scaling, dropout, first_only, packing.causal)
    own: Tensor = _Attention.apply(*packed, packing.blocks, *how)  # type: ignore[no-untyped-call]
    return own.unsqueeze(0), None


class _Attention(torch.autograd.Function):
    """softmax(Q·Kᵀ·scaling)·V inside each row; positions × heads × d.

    With `first_only` zero everywhere but at the first position of each row. With `causal` no
    position sees a later one; so none sees padding, which stands behind. Several heads of queries
    may share one of keys and values: their positions are taken as more of the same head's.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        blocks: Sequence[Block],
        scaling: float,
        dropout: float,
        first_only: bool,
        causal: bool,
    ) -> Tensor:
        out = torch.zeros_like(query) if first_only else torch.empty_like(query)
        query = query * scaling
        saved: list[Tensor | None] = []
        with torch.autocast(query.device.type, enabled=False):
            for block in blocks:
                q, k, v = block.spread(query), block.seen(key), block.seen(value)
                if first_only:
                    q = q[:, :, :1]
                q = _by_head(q, k.shape[1])
                scores = q @ k.mT
                least = torch.finfo(scores.dtype).min
                if causal:
                    later = torch.ones(block.width, k.shape[2], dtype=torch.bool)
                    later.triu_(1 + block.before)
                    scores.masked_fill_(later.repeat(scores.shape[2] // block.width, 1), least)
                elif block.real is not None:
                    scores.masked_fill_(~block.real[:, None, None], least)
                p, drop = scores.softmax(dim=-1), None
                if dropout:
                    drop = F.dropout(torch.ones_like(p), dropout)
                own = _by_head((p if drop is None else p * drop) @ v, query.shape[1])
                if first_only:
                    out[block.firsts] = own.squeeze(2)
                else:
                    out[block.start : block.stop] = block.packed(own)
                saved += [q, k, v, p, drop]
        ctx.save_for_backward(*saved)
        ctx.blocks, ctx.scaling, ctx.first_only = blocks, scaling, first_only
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        queries = torch.zeros_like(grad) if ctx.first_only else torch.empty_like(grad)
        keys = grad.new_empty(len(grad), ctx.saved_tensors[1].shape[1], grad.shape[2])
        values = torch.empty_like(keys)
        for number, block in enumerate(ctx.blocks):
            q, k, v, p, drop = ctx.saved_tensors[5 * number : 5 * number + 5]
            if ctx.first_only:
                own = grad[block.firsts].unsqueeze(2)
            else:
                own = block.spread(grad)
                if block.real is not None:
                    own = own.masked_fill(~block.real[:, None, :, None], 0.0)
            own = _by_head(own, k.shape[1])
            to_p = own @ v.mT
            if drop is not None:
                to_p = to_p * drop
            to_scores = torch.ops.aten._softmax_backward_data(to_p, p, -1, p.dtype)
            to_query = _by_head(to_scores @ k * ctx.scaling, grad.shape[1])
            if ctx.first_only:
                queries[block.firsts] = to_query.squeeze(2)
            else:
                queries[block.start : block.stop] = block.packed(to_query)
            block.add_seen(keys, to_scores.mT @ q)
            block.add_seen(values, (p if drop is None else p * drop).mT @ own)
        return queries, keys, values, None, None, None, None, None


def _by_head(values: Tensor, heads: int) -> Tensor:
    """Rows × any heads × positions × d as that many heads, whose positions follow each other."""
    if values.shape[1] == heads:
        return values
    return values.reshape(len(values), heads, -1, values.shape[-1])


def _no_mask(*_args: Any, **_options: Any) -> None:
    """Return no mask: no position of packed rows sees another row's."""
