"""Only the first position of the last block is read by some classifiers: compute no other there.

BERT's pooler and RoBERTa's head take the first position of the last hidden state. What the last
block computes at the others after its attention, three quarters of that block's products, is
thrown away, and its gradients are zero. Logits, loss and gradients stay the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

# Classifiers that read the first position alone, with blocks of BERT's shape.
_READS_FIRST = ("bert", "camembert", "roberta", "xlm-roberta")


@contextmanager
def only_first_position(model: nn.Module) -> Iterator[None]:
    """Cut the hidden states of the last block to the first position while this is open.

    Nothing happens to models of other kinds, or under gradient checkpointing, which runs the block
    again after this has closed.
    """
    last = _after_last_attention(model)
    if last is None:
        yield
        return

    def first(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        attended, residual = inputs
        return attended[:, :1], residual[:, :1]

    handle = last.register_forward_pre_hook(first)
    try:
        yield
    finally:
        handle.remove()


def _after_last_attention(model: nn.Module) -> nn.Module | None:
    """What follows the attention of the last block, given its output and the block's input."""
    whole: Any = model
    if hasattr(whole, "get_base_model"):  # an adapter's wrapper
        whole = whole.get_base_model()
    kind = getattr(getattr(whole, "config", None), "model_type", None)
    if kind not in _READS_FIRST:
        return None
    block: Any = whole.base_model.encoder.layer[-1]
    found: nn.Module = block.attention.output
    return None if block.gradient_checkpointing else found
