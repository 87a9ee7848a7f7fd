"""What a SuperNode has for itself: a folder, and in it the base and its client's adapters.

Its node config names the folder with `keep`. Every run has one of its own in there:

<keep>/<client>/<16 digits>/settings.yaml      the run's settings
                            inputs.json        digests of its rows and of the model
                            base/              its base model, and which one (received.json)
                            adapters/<client>/ the client's PEFT adapters
                            generations/       what its models answered, where that was asked for
                            clients/<client>/  the client's own part of the base, and what rounding
                                               kept back
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Message

from fedp2eft.data.clients import check_client_name
from fedp2eft.data.nodes import Value
from fedp2eft.errors import ShareableError
from fedp2eft.federation.server.run_folder import free_settings
from fedp2eft.federation.wire import messages as wire
from fedp2eft.files import read_json, sweep, write_text
from fedp2eft.models.sources import hash_weights
from fedp2eft.settings.experiment import Settings
from fedp2eft.settings.reading import SETTINGS_FILE, settings_text

if TYPE_CHECKING:
    from fedp2eft.runtime.workspace import Workspace

RECEIVED = "received.json"


def own_folder(node: Mapping[str, Value], settings: Settings, run: str) -> Path:
    """Return this SuperNode's folder for a run; the same one when the run is resumed.

    Nothing that a peer sent becomes part of the path: the name is a digest of the run's name and of
    its settings, those aside that may change between two starts.

    Raises:
        UserError: The node config names no folder, or it cannot be written.
    """
    if "keep" not in node:
        raise ShareableError(
            "The node config names no folder for the base model and adapters: add keep='…'."
        )
    fixed = asdict(settings)
    for section, *rest in free_settings():
        if rest:
            fixed.get(section, {}).pop(rest[0], None)
        else:
            fixed.pop(section)
    digest = sha256(json.dumps([run, fixed], sort_keys=True).encode()).hexdigest()[:16]
    client = str(node.get("client", ""))
    check_client_name(client)
    folder = Path(str(node["keep"])).expanduser() / client / digest
    for place in (folder, folder / "adapters" / client, folder / "clients" / client):
        sweep(place)
    if not (folder / SETTINGS_FILE).exists():
        text = f"# run: {json.dumps(run)}\n{settings_text(settings)}"
        write_text(folder / SETTINGS_FILE, text)
    return folder


def kept_base(workspace: Workspace) -> str:
    """Return the `base_id` of the base that this SuperNode keeps for the run; empty if none."""
    assert workspace.run is not None
    kept = read_json(workspace.run / "base" / RECEIVED)
    return str(kept["base"]) if isinstance(kept, dict) and "base" in kept else ""


def keep_base(workspace: Workspace, message: Message) -> str:
    """Make the run's finished base of what the server sends, and keep it; returns its `base_id`.

    Raises:
        UserError: The parameters do not fit the base, the untrained model's weights differ from
            the server's, or the disk is full.
    """
    record, model = wire.the_arrays(message), hash_weights(Path(workspace.source.path))
    expected = str(wire.the_config(message).get("model", ""))
    if expected != model:
        raise ShareableError(
            f"its weights of {workspace.settings.model.name} are {model}, the server's {expected}: "
            "fetch the same revision on both (model.revision)."
        )
    s = workspace.settings.base
    parameters = {}
    if len(record):
        like = workspace.base.travelling(workspace.trainable_base, s)
        parameters = wire.from_arrays(record, like, "The base from the server")
    made = wire.base_id(wire.array_digest(record), model)
    workspace.save_base(parameters, {RECEIVED: {"base": made}})
    return made
