"""What a process of the federation keeps between the messages of its clients."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fedp2eft.data.nodes import Value
from fedp2eft.federation.client.lookahead import LookAhead
from fedp2eft.federation.wire.compression import Feedback
from fedp2eft.runtime.inputs import check_inputs
from fedp2eft.runtime.workspace import Workspace
from fedp2eft.settings.experiment import Settings


class ClientState:
    """One process's workspace, with what its clients keep from message to message.

    Args:
        workspace: The model, data and caches of the process.

    Attributes:
        ahead: Rounds of several clients that were computed in one batch.
        feedback: What rounding kept back of each client's changes; never sent.
    """

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.ahead = LookAhead()
        keep = workspace.settings.federation.keep_checkpoints
        self.feedback = Feedback(workspace.client_folder, keep)


_Key = tuple[Settings, Path | None, Mapping[str, Value] | None]
_kept: list[tuple[_Key, ClientState]] = []


def shared_state(
    settings: Settings, run: Path | None, node: Mapping[str, Value] | None = None
) -> ClientState:
    """Return this process's state for an experiment; that of any other is released before.

    Args:
        settings: The experiment.
        run: The run folder, or None if this process has none.
        node: The node config of a SuperNode that reads its own client's file.

    Raises:
        ShareableError: A SuperNode's rows or model are not those that its run began with.
    """
    key: _Key = (settings, run, node)
    if not _kept or _kept[0][0] != key:
        release_state()
        workspace = Workspace(settings, run, node)
        if node is not None and run is not None:
            check_inputs(run, workspace)  # what nobody else can see
        _kept.append((key, ClientState(workspace)))
    return _kept[0][1]


def release_state() -> None:
    """Let go of the model and caches that this process keeps."""
    _kept.clear()
