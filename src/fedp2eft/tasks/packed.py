"""Rows end to end in one pass, with no padding ("packing"), through BERT's and Llama's kind.

Every layer but attention works position by position and so sees real positions alone. Attention
stays inside a row: rows of similar length attend together, padded to the longest of them. In the
last block only each row's first position asks, for the classifier reads no other. Loss and
gradients are those of padded rows up to rounding.

transformers hands attention over to a function of the user's through `AttentionInterface`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
from fedp2eft.tasks.encoded import Encoded
from fedp2eft.tasks.first_position import only_first_position, reads_first
from fedp2eft.tasks.frozen_blocks import DECODERS, grows, plain, run

ATTENTION = "packed_rows"
# What one more block costs on a CPU, in positions of padding inside attention.
BLOCK_TOKENS = 32


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
    """

    start: int
    stop: int
    rows: int
    width: int
    places: Tensor | None
    real: Tensor | None
    kept: Tensor | None

    @classmethod
    def of(cls, lengths: NDArray[np.int64], start: int) -> Block:
        """Return rows of these lengths, packed from `start` on."""
        rows, width, stop = len(lengths), int(lengths.max()), start + int(lengths.sum())
        if (lengths == width).all():
            return cls(start, stop, rows, width, None, None, None)
        real = np.arange(width) < lengths[:, None]
        firsts = start + lengths.cumsum() - lengths
        places = np.repeat(firsts[:, None], width, axis=1)
        places[real] = np.arange(start, stop)
        masks = (places.ravel(), real, np.flatnonzero(real))
        return cls(start, stop, rows, width, *map(torch.from_numpy, masks))

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

    def packed(self, values: Tensor) -> Tensor:
        """Return the real ones of rows × heads × width × d as positions × heads × d."""
        flat = values.transpose(1, 2).reshape(-1, values.shape[1], values.shape[3])
        return flat if self.kept is None else flat[self.kept]


@dataclass(frozen=True)
class Packing:
    """How rows stand in the packed row.

    Args:
        blocks: Rows that attend together, in order.
        starts: The first position of each row.
        causal: Whether a position sees those before it alone.
    """

    blocks: Sequence[Block]
    starts: Tensor
    causal: bool = False


def can_pack(model: nn.Module) -> bool:
    """Return whether `packed_logits` takes this model, whose attention must be the plain one."""
    encoder = reads_first(model)
    return encoder is not None and encoder.config._attn_implementation == "eager"


def can_pack_causal(model: nn.Module, data: Encoded) -> bool:
    """Return whether `response_logits` takes this model and rows; its attention must be plain."""
    whole = plain(model)
    config: Any = getattr(whole, "config", None)
    if getattr(config, "model_type", None) not in DECODERS or not len(data):
        return False
    window = getattr(config, "sliding_window", None) or math.inf
    eager = config._attn_implementation == "eager" and not whole.is_activation_checkpointing
    return eager and not grows(whole.base_model) and int(data.lengths.max()) <= window


def pack(
    data: Encoded, indices: Sequence[int] | NDArray[np.int64], *, causal: bool = False
) -> tuple[dict[str, Tensor], Packing, NDArray[np.int64]]:
    """Return the given rows end to end, longest first.

    Returns:
        input_ids, position_ids counted from 0, and token_type_ids where the rows have them, each
        1 × positions, and states where they have them; how they stand; row indices in their order.
    """
    parts = [part for part, _ in data.parts(indices, BLOCK_TOKENS)]
    order = np.concatenate(parts)
    lengths = data.lengths
    ends = lengths[order].cumsum()
    starts = ends - lengths[order]
    blocks: list[Block] = []
    for part in parts:
        blocks.append(Block.of(lengths[part], blocks[-1].stop if blocks else 0))
    position = np.arange(ends[-1]) - np.repeat(starts, lengths[order])
    where = position + np.repeat(data.offsets[order], lengths[order])
    inputs = {"input_ids": data.tokens[where], "position_ids": position}
    if data.types is not None:
        inputs["token_type_ids"] = data.types[where]
    rows = {name: torch.from_numpy(values).long()[None] for name, values in inputs.items()}
    if data.states is not None:
        rows["states"] = data.states[torch.from_numpy(where)][None]
        rows["first_block"] = torch.tensor([data.first_block])
    return rows, Packing(blocks, torch.from_numpy(starts), causal), order


def packed_logits(model: nn.Module, inputs: dict[str, Tensor], packing: Packing) -> Tensor:
    """Return the logits of packed rows, rows × classes, in their order.

    Args:
        model: One that `can_pack`, on the CPU.
        inputs: From `pack`.
        packing: From `pack`.
    """
    encoder = reads_first(model)
    assert encoder is not None
    # RoBERTa counts positions from the one after its padding's.
    first = getattr(encoder.embeddings, "padding_idx", -1) + 1
    inputs = {**inputs, "position_ids": inputs["position_ids"] + first}
    _register()
    attending = with_values(encoder.config, _attn_implementation=ATTENTION)
    with attending, only_first_position(model, packing.starts):
        logits: Tensor = run(model, inputs, packing=packing).logits
    return logits


def response_logits(
    model: nn.Module, data: Encoded, indices: Sequence[int] | NDArray[np.int64]
) -> tuple[Tensor, Tensor, NDArray[np.int64]]:
    """Return what a causal LM predicts at the response tokens of rows, and nowhere else.

    Args:
        model: One that `can_pack_causal`, on the CPU.
        data: The rows.
        indices: Which of them.

    Returns:
        Logits (tokens × vocabulary), the tokens themselves, and row indices in their order; each
        has `Encoded.weights` tokens.
    """
    inputs, packing, order = pack(data, indices, causal=True)
    assert data.starts is not None
    lengths = data.lengths[order]
    # The first token of a row has nothing before it to be predicted from.
    first = np.repeat(np.maximum(data.starts[order], 1), lengths)
    response = torch.from_numpy(inputs["position_ids"][0].numpy() >= first).nonzero().squeeze(1)
    _register()
    whole = plain(model)
    with with_values(whole.config, _attn_implementation=ATTENTION):
        out = run(model, inputs, packing=packing, use_cache=False, logits_to_keep=response - 1)
    return out.logits[0], inputs["input_ids"][0][response], order


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
    # a view, whose gradient is one too
    packed = [states.squeeze(0).transpose(0, 1) for states in (query, key, value)]
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
                q, k, v = (block.spread(states) for states in (query, key, value))
                if first_only:
                    q = q[:, :, :1]
                q = _by_head(q, k.shape[1])
                scores = q @ k.mT
                least = torch.finfo(scores.dtype).min
                if causal:
                    later = torch.ones(block.width, block.width, dtype=torch.bool).triu_(1)
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
            at = slice(block.start, block.stop)
            to_query = _by_head(to_scores @ k * ctx.scaling, grad.shape[1])
            if ctx.first_only:
                queries[block.firsts] = to_query.squeeze(2)
            else:
                queries[at] = block.packed(to_query)
            keys[at] = block.packed(to_scores.mT @ q)
            values[at] = block.packed((p if drop is None else p * drop).mT @ own)
        return queries, keys, values, None, None, None, None, None


def _by_head(values: Tensor, heads: int) -> Tensor:
    """Rows × any heads × positions × d as that many heads, whose positions follow each other."""
    if values.shape[1] == heads:
        return values
    return values.reshape(len(values), heads, -1, values.shape[-1])


def _no_mask(*_args: Any, **_options: Any) -> None:
    """Return no mask: no position of packed rows sees another row's."""
