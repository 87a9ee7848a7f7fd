"""The base as one client has it, where clients have parts of it for themselves.

One process holds one base for all of its clients; `for_client` puts a client's own part into it
before any work for that client.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from fedp2eft.adapters.weights import AdapterWeights
from fedp2eft.bases import LocalWork
from fedp2eft.bases.parts import Overlay, Part
from fedp2eft.models.precision import resolve_precision
from fedp2eft.runtime.client_files import ClientFiles
from fedp2eft.seeding import derive_seed

if TYPE_CHECKING:
    from fedp2eft.runtime.workspace import Workspace


class PrivateParts:
    """Each client's own part of the base; it never travels.

    Args:
        folder: Where the clients keep them; None keeps them in memory only.
        keep: Rounds that the server may go back by.

    Attributes:
        files: A client's part after each of its last rounds.
    """

    def __init__(self, folder: Path | None, keep: int) -> None:
        self.files = ClientFiles(folder, "base", keep)
        self._overlay: Overlay | None = None
        self._present: str | None = None

    def of(self, workspace: Workspace, name: str) -> Part:
        """A client's part of the finished base; trained now where that is yet to be done."""
        kept = self.files.before(name)
        if kept is None:
            s = workspace.settings
            work = LocalWork(
                name, workspace.task, workspace.encoded(name, "train"), s,
                resolve_precision(s.model.precision, workspace.device),
                derive_seed(s.seed, "local base", name),
            )  # fmt: skip
            kept = workspace.base.own_part(lambda: workspace.finished_base, work)
            if kept:
                self.files.write(name, s.base.rounds, kept)
        return kept

    def put(self, workspace: Workspace, parameters: Mapping[str, nn.Parameter], name: str) -> None:
        """Make the frozen base the client's own, whoever's it was before.

        Args:
            workspace: Holds the base.
            parameters: Those of the frozen base, by name.
            name: The client.
        """
        if self._present == name:
            return
        part = self.of(workspace, name)
        self._overlay = self._overlay or Overlay(parameters)
        self._present = None  # nobody's, should this fail half-way
        self._overlay.put(workspace.base.replacements(lambda: workspace.finished_base, part))
        self._present = name

    def carried(self, workspace: Workspace, name: str, weights: AdapterWeights) -> AdapterWeights:
        """A client's adapter with its own part of the base, for use on the common base."""
        if not workspace.base.private:
            return weights
        return workspace.base.carried(weights, self.of(workspace, name))
