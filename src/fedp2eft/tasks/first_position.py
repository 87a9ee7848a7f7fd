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

from fedp2eft.tasks.frozen_blocks import plain

# Classifiers that read the first position alone, with blocks of BERT's shape.
_READS_FIRST = ("bert", "camembert", "roberta", "xlm-roberta")


@contextmanager
def only_first_position(model: nn.Module, starts: Tensor | None = None) -> Iterator[None]:
    """Cut the hidden states of the last block to the first position while this is open.

    Nothing happens to models of other kinds, or under gradient checkpointing, which runs the block
    again after this has closed.

    Args:
        model: With or without an adapter around it.
        starts: Where each row starts, where the rows stand end to end in one.
    """
    encoder = reads_first(model)
    if encoder is None:
        yield
        return

    def first(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the first position of the attention's output and of the block's input."""
        if starts is None:
            return tuple(states[:, :1] for states in inputs)
        return tuple(states[0, starts].unsqueeze(1) for states in inputs)

    handle = encoder.encoder.layer[-1].attention.output.register_forward_pre_hook(first)
    try:
        yield
    finally:
        handle.remove()


def reads_first(model: nn.Module) -> Any | None:
    """Return the encoder of a classifier that reads only its first position, else None."""
    whole = plain(model)
    if getattr(getattr(whole, "config", None), "model_type", None) not in _READS_FIRST:
        return None
    encoder = whole.base_model
    return None if encoder.encoder.layer[-1].gradient_checkpointing else encoder
