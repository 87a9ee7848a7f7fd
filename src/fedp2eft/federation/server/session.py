"""What the server has at hand from the start of a run to its end."""

from __future__ import annotations

from dataclasses import dataclass

from flwr.serverapp import Grid

from fedp2eft.data.clients import SEEN
from fedp2eft.federation.server.admission import Failures
from fedp2eft.federation.server.exchange import Member
from fedp2eft.federation.server.run_folder import RunFolder
from fedp2eft.progress import Reporter
from fedp2eft.runtime.workspace import Workspace
from fedp2eft.settings.experiment import Settings


@dataclass(frozen=True)
class Session:
    """One start of a run, as the server sees it.

    Args:
        grid: The engine.
        run: Where everything is kept.
        workspace: The base model (on the local engine the clients' own).
        members: All clients.
        reporter: Receives progress.
    """

    grid: Grid
    run: RunFolder
    workspace: Workspace
    members: list[Member]
    reporter: Reporter

    @property
    def seen(self) -> list[Member]:
        """The seen clients, held-out ones too."""
        return [member for member in self.members if member.pool == SEEN]

    @property
    def settings(self) -> Settings:
        """The experiment."""
        return self.run.settings

    def failures(self) -> Failures:
        """Return the failures of a new round of questions: none yet."""
        return Failures.on(self.grid, self.settings.peers, self.reporter, self.run.faults)
