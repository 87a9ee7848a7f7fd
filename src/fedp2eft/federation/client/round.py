"""A client's turn in a round, from the message that asks for it."""

from __future__ import annotations

from flwr.app import Message

from fedp2eft.client.phase import Phase, Turn
from fedp2eft.federation.wire.compression import DOWN, unpack
from fedp2eft.federation.wire.messages import LABEL_PRIOR, the_arrays, the_config
from fedp2eft.runtime.workspace import Workspace
from fedp2eft.seeding import derive_seed


def learn(workspace: Workspace, message: Message) -> None:
    """Take from a message what the server tells everybody: q, if anything needs it."""
    q = the_config(message).get(LABEL_PRIOR)
    if isinstance(q, list):
        workspace.know_label_prior(q)  # type: ignore[arg-type]


def turn_of(workspace: Workspace, phase: Phase, message: Message, name: str) -> Turn:
    """Return client `name`'s turn in the round of the message, its parameters checked."""
    learn(workspace, message)
    s = workspace.settings
    round_ = int(the_config(message)["server-round"])  # type: ignore[arg-type]
    whose = f"What the server sent ({phase.title})"
    parameters = unpack(the_arrays(message), workspace.shapes(phase), DOWN[phase.wire_of(s)], whose)
    seed = derive_seed(s.seed, phase.name, round_, name)
    return Turn(workspace, name, phase.name, round_, seed, parameters)
