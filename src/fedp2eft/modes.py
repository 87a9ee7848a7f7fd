"""A model in training or evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """The model in that mode; the one that it was in comes back, after an error too."""
    before = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(before)
