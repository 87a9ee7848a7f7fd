"""Parts of the base that a client has for itself, in one model that serves all clients.

A part is tensors by name, as the client's own file holds them. Changed rows of a matrix `name` are
two of them: `name`, the rows, and `name#rows`, their indices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Part = dict[str, Tensor]
ROWS = "#rows"  # no parameter name has a "#" in it


@dataclass(frozen=True)
class Replacement:
    """Values in place of those of a parameter.

    Args:
        values: fp32; of the parameter's shape, or of as many of its rows as `rows` names.
        rows: Row indices, int64; None for the whole parameter.
    """

    values: Tensor
    rows: Tensor | None = None


class Overlay:
    """Lends the frozen base to one client after the other.

    What a client replaces is copied away before and copied back after, so the base is the same bits
    again, however often and in whatever order clients come.

    Args:
        parameters: The base's, by name, of any dtype.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = parameters
        self._before: list[tuple[nn.Parameter, Replacement]] = []

    @torch.no_grad()
    def put(self, replacements: Iterable[tuple[str, Replacement]]) -> None:
        """Remove the last client's values, and put these in place."""
        self.restore()
        for name, new in replacements:
            parameter = self._parameters[name]
            if new.rows is None:
                self._before.append((parameter, Replacement(parameter.detach().clone())))
                parameter.copy_(new.values)
            else:
                rows = new.rows.to(parameter.device)
                self._before.append((parameter, Replacement(parameter[rows].clone(), rows)))
                parameter[rows] = new.values.to(parameter)

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the base that all clients share."""
        for parameter, old in reversed(self._before):
            parameter[... if old.rows is None else old.rows] = old.values
        self._before = []


@contextmanager
def own_rows(parameters: Mapping[str, nn.Parameter], part: Part) -> Iterator[Part]:
    """Give a client its rows of some matrices to train; all get the common ones back at the end.

    Args:
        parameters: Matrices by name, with the common values.
        part: The client's rows as it left them; empty at first.

    Yields:
        The rows that differ from the common ones: filled when the block ends without an error.
    """
    common = {name: p.detach().clone() for name, p in parameters.items()}
    changed: Part = {}
    with torch.no_grad():
        for name, rows in rows_of(part):
            parameters[name][rows] = part[name].to(parameters[name])
    try:
        yield changed
        with torch.no_grad():
            for name, p in parameters.items():
                rows = (p != common[name]).any(dim=1).nonzero().squeeze(1)
                if len(rows):
                    changed[name] = p[rows].cpu().clone()
                    changed[name + ROWS] = rows.cpu()
    finally:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(common[name])


def rows_of(part: Part) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, row indices) of every matrix that a part holds rows of."""
    for key, rows in part.items():
        if key.endswith(ROWS):
            yield key.removesuffix(ROWS), rows
