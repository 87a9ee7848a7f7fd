"""Rows end to end in one pass, with no padding ("packing"), through BERT's and Llama's kind.

Every layer but attention works position by position and so sees real positions alone. Attention
stays inside a row (`packed_attention`). In the last block of an encoder only each row's first
position asks, for the classifier reads no other. The tokens that all rows of a causal LM begin with
(a chat template's system message, mostly) are computed once. Loss and gradients are those of padded
rows up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedp2eft.tasks.encoded import Encoded
from fedp2eft.tasks.first_position import only_first_position, reads_first
from fedp2eft.tasks.frozen_blocks import DECODERS, grows, may_keep, plain, run
from fedp2eft.tasks.packed_attention import Block, Packing, attending

# What one more block costs on a CPU, in positions of padding inside attention.
BLOCK_TOKENS = 32


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
    data: Encoded,
    indices: Sequence[int] | NDArray[np.int64],
    *,
    causal: bool = False,
    shared: int = 0,
) -> tuple[dict[str, Tensor], Packing, NDArray[np.int64]]:
    """Return the given rows end to end, longest first.

    Args:
        data: The rows.
        indices: Which of them.
        causal: Whether a position attends to those before it alone.
        shared: Tokens that all these rows begin with; they come first, once. Causal rows alone.

    Returns:
        input_ids, position_ids counted from 0, and token_type_ids where the rows have them, each
        1 × positions, and states where they have them; how they stand; row indices in their order.
    """
    parts = [part for part, _ in data.parts(indices, BLOCK_TOKENS)]
    order = np.concatenate(parts)
    lengths = data.lengths - shared
    starts = shared + lengths[order].cumsum() - lengths[order]
    blocks = [Block.of(np.array([shared]), 0)] if shared else []
    for part in parts:
        blocks.append(Block.of(lengths[part], blocks[-1].stop if blocks else 0, shared))
    own = np.arange(shared, blocks[-1].stop) - np.repeat(starts - shared, lengths[order])
    position = np.concatenate([np.arange(shared), own])
    row = np.concatenate([np.repeat(order[0], shared), np.repeat(order, lengths[order])])
    where = position + data.offsets[row]
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
    with attending(encoder.config), only_first_position(model, packing.starts):
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
    # With dropout, each row draws its own masks at the tokens that it shares with others.
    shared = shared_tokens(data, indices) if may_keep(model) else 0
    inputs, packing, order = pack(data, indices, causal=True, shared=shared)
    first = np.repeat(data.first_targets[order], data.lengths[order] - shared)
    positions = inputs["position_ids"][0, shared:].numpy()
    response = shared + torch.from_numpy(positions >= first).nonzero().squeeze(1)
    with attending(plain(model).config):
        out = run(model, inputs, packing=packing, use_cache=False, logits_to_keep=response - 1)
    return out.logits[0], inputs["input_ids"][0][response], order


def shared_tokens(data: Encoded, indices: Sequence[int] | NDArray[np.int64]) -> int:
    """Return how many tokens all these rows begin with, before what predicts their responses.

    0 if that saves less than a block of attention costs.
    """
    chosen = np.asarray(indices, dtype=np.int64)
    # The token before a response predicts its first, and stays in its row.
    most = int(data.first_targets[chosen].min()) - 1
    begins = data.tokens[data.offsets[chosen][:, None] + np.arange(most)]
    differs = (begins != begins[0]).any(axis=0)
    shared = int(differs.argmax()) if differs.any() else most
    return shared if shared * (len(chosen) - 1) >= BLOCK_TOKENS else 0
