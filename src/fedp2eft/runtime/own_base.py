"""The base as one client has it, where clients have parts of it for themselves.

One process holds one base for all of its clients; `for_client` puts a client's own part into it
before any work for that client.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import nn

from fedp2eft.adapters.weights import AdapterWeights
from fedp2eft.bases import BaseTraining, LocalWork
from fedp2eft.bases.parts import Overlay, Part
from fedp2eft.runtime.client_files import ClientFiles


class PrivateParts:
    """Each client's own part of the base; it never travels.

    Args:
        folder: Where the clients keep them (`ClientFiles`).
        keep: Rounds that the server may go back by.
        base: How the base is trained.
        finished: Gives the run's own base in fp32.
        work: What a client brings to the training of its part.

    Attributes:
        files: A client's part after each of its last rounds.
    """

    def __init__(
        self,
        folder: Path | None,
        keep: int,
        base: BaseTraining,
        finished: Callable[[], nn.Module],
        work: Callable[[str], LocalWork],
    ) -> None:
        self.files = ClientFiles(folder, "base", keep)
        self._base, self._finished, self._work = base, finished, work
        self._overlay: Overlay | None = None
        self._present: str | None = None

    def of(self, name: str) -> Part:
        """Return a client's part of the finished base, trained now if it was not yet."""
        kept = self.files.before(name)
        if kept is None:
            work = self._work(name)
            kept = self._base.own_part(self._finished, work)
            if kept:
                self.files.write(name, work.settings.base.rounds, kept)
        return kept

    def put(self, parameters: Mapping[str, nn.Parameter], name: str) -> None:
        """Make the frozen base the client's own, whoever's it was before.

        Args:
            parameters: Those of the frozen base, by name.
            name: The client.
        """
        if self._present == name:
            return
        part = self.of(name)
        self._overlay = self._overlay or Overlay(parameters)
        self._present = None  # nobody's, should this fail half-way
        self._overlay.put(self._base.replacements(self._finished, part))
        self._present = name

    def carried(self, name: str, weights: AdapterWeights) -> AdapterWeights:
        """Return a client's adapter with its own part of the base, for use on the common base."""
        return self._base.carried(weights, self.of(name)) if self._base.private else weights
