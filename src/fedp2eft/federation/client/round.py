"""What a client trains on in one of the PSG's rounds: φ from the message, rows, mini-batches."""

from __future__ import annotations

from dataclasses import dataclass

from flwr.app import Message
from numpy.typing import NDArray
from torch import Tensor

from fedp2eft.client.training import local_order
from fedp2eft.federation.wire.compression import DOWN, unpack
from fedp2eft.federation.wire.messages import the_arrays, the_config
from fedp2eft.runtime.workspace import Workspace
from fedp2eft.seeding import derive_seed
from fedp2eft.tasks.encoded import Encoded


def set_phi(workspace: Workspace, message: Message) -> dict[str, Tensor]:
    """Load the φ that a `train.psg` message brings into the workspace's PSG, after checking it."""
    psg, wire = workspace.psg, DOWN[workspace.settings.federation.wire]
    phi = unpack(the_arrays(message), psg.state_dict(), wire, "φ from the server")
    psg.set_numbers(phi)
    return phi


@dataclass(frozen=True)
class LocalRun:
    """What a client trains on in one round.

    Args:
        data: Its training rows.
        seed: Seed of the round for this client.
        order: Mini-batches of row numbers.
    """

    data: Encoded
    seed: int
    order: list[NDArray]  # type: ignore[type-arg]


def local_run(workspace: Workspace, message: Message, name: str) -> LocalRun:
    """The rows and mini-batches of client `name` in the round that `message` belongs to."""
    s = workspace.settings
    round_ = int(the_config(message)["server-round"])  # type: ignore[arg-type]
    data = workspace.encoded(name, "train")
    seed = derive_seed(s.seed, "psg", round_, name)
    order = list(local_order(len(data), s.local.epochs, s.local.batch_size, seed))
    return LocalRun(data, seed, order)
