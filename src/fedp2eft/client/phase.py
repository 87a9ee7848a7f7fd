"""A phase: parameters that clients train in federated rounds, whichever they are.

A run has the phases `base` and `psg` (`fedp2eft.runtime.phases`), and those of the methods that it
names. How parameters travel and are averaged is no part of a phase: nothing here knows Flower, and
nothing heavy is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedp2eft.progress import current, each_of
from fedp2eft.settings.experiment import Settings

if TYPE_CHECKING:
    from torch import Tensor

    from fedp2eft.client.side import ClientSide

Workspace = Any
"""`fedp2eft.runtime.workspace.Workspace`, which stands above and serves the phases."""
VALIDATION_LOSS = "validation-loss"
"""The metric that `Phase.patience` looks at."""


@dataclass(frozen=True)
class Turn:
    """One client's turn in a round.

    Args:
        workspace: Serves the client.
        client: Its name.
        phase: Name of the phase.
        round: Counted from 1.
        seed: Of this phase, round and client.
        parameters: As received, by name, float32: read them, never write into them.
    """

    workspace: Workspace
    client: str
    phase: str
    round: int
    seed: int
    parameters: Mapping[str, Tensor]

    def side(self) -> ClientSide:
        """Return the client as a method sees it."""
        side: ClientSide = self.workspace.side(self.client, self.phase)
        return side

    def each_of(self, steps: int) -> Callable[[float], None]:
        """Return a callback that reports each of so many steps (it gets the step's loss)."""
        reporter = current()
        return each_of(steps, lambda share: reporter.part(self.phase, share, self.client))


@dataclass(frozen=True)
class Trained:
    """What a client's turn gives; it leaves the client.

    Args:
        parameters: Names and shapes of those received.
        metrics: `Phase.metrics`, no more and no less.
    """

    parameters: Mapping[str, Tensor]
    metrics: Mapping[str, float]


def save_parameters(
    workspace: Workspace, folder: Path, parameters: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """Write parameters to model.safetensors; other arguments as in `Phase.write`."""
    from safetensors.torch import save_file

    from fedp2eft.files import write_whole

    tensors = {name: value.contiguous() for name, value in parameters.items()}
    write_whole(folder / "model.safetensors", lambda scratch: save_file(tensors, scratch))


@dataclass(frozen=True)
class Phase:
    """What is trained in federated rounds, and how.

    Settings are named as on the command line, e.g. "federation.rounds".

    Args:
        name: In files, seeds and messages: letters, digits and dashes.
        title: For people.
        rounds: Setting of the number of rounds.
        clients: Setting of the number of seen clients that are sampled in each round.
        metrics: What a client reports of its turn, beside its number of rows; the first one is
            shown while the phase runs.
        first: Return the parameters before round 1, by name; empty if there is nothing to train.
            They may be the model's own: they are copied before a round changes them.
        train: Train one client for one round.
        write: Write what the phase ends with into the folder of that name in the run folder. It
            gets the workspace, the folder, the parameters, and facts for a card.
        wire: Setting of what the parameters travel in; fp32 if absent.
        private: Whether the settings' privacy covers the phase; no run with privacy has another.
        optimize: Whether the server optimizers of `aggregation` apply, or the mean instead.
        patience: Setting of the number of rounds without a new lowest `VALIDATION_LOSS` after which
            the phase ends.
    """

    name: str
    title: str
    rounds: str
    clients: str
    metrics: tuple[str, ...]
    first: Callable[[Workspace], Mapping[str, Tensor]]
    train: Callable[[Turn], Trained]
    write: Callable[[Workspace, Path, Mapping[str, Tensor], Mapping[str, Any]], None] = (
        save_parameters
    )
    wire: str | None = None
    private: bool = False
    optimize: bool = False
    patience: str | None = None

    @property
    def kind(self) -> str:
        """Flower's message type of a client's turn; the sample of each round is drawn from it."""
        return f"train.{self.name}"

    def wire_of(self, settings: Settings) -> Any:
        """Return what the parameters travel in."""
        return settings.value(self.wire) if self.wire else "fp32"


def lazy(target: str) -> Callable[..., Any]:
    """Return a function that is imported when it is first called.

    Args:
        target: Where it is, "package.module:name".
    """
    entry = EntryPoint(target, target, "")
    return lambda *args, **options: entry.load()(*args, **options)
