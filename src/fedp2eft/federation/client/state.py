"""What a process of the federation keeps between the messages of its clients."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

from fedp2eft.federation.client.lookahead import LookAhead
from fedp2eft.federation.wire.compression import Feedback
from fedp2eft.runtime.workspace import Workspace
from fedp2eft.settings.reading import settings_of_json


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


@lru_cache(maxsize=1)
def shared_state(settings_json: str, run: str | None, node_json: str | None = None) -> ClientState:
    """This process's state for an experiment; the one before is released.

    Args:
        settings_json: The resolved settings as JSON.
        run: The run folder, or None if this process has none.
        node_json: The node config as JSON, of a SuperNode that reads its own client's file.
    """
    node = json.loads(node_json) if node_json else None
    settings = settings_of_json(settings_json)
    return ClientState(Workspace(settings, Path(run) if run else None, node))
