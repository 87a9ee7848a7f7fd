"""What a run was made of: a digest of every client's rows and of the base model.

They are kept in `inputs.json` of the run folder (a SuperNode's own are in its own folder) and
compared at every start, as the settings are: results of other rows never join one table.
"""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from fedp2eft.data.clients import Client, ClientData
from fedp2eft.errors import ShareableError, UserError
from fedp2eft.files import read_json, write_json
from fedp2eft.models.sources import model_digest
from fedp2eft.runtime.workspace import Workspace

INPUTS_FILE = "inputs.json"


def check_inputs(folder: Path, workspace: Workspace) -> None:
    """Raise `UserError` if a folder was made of other inputs; keep their digests in a new one.

    A folder from before there were digests gets them now.

    Args:
        folder: A run folder, or what a SuperNode has of one.
        workspace: Knows the clients and the model.
    """
    found = {
        "model": model_digest(workspace.source),
        "clients": {c.name: rows_digest(workspace.data, c) for c in workspace.data.clients},
    }
    kept = read_json(folder / INPUTS_FILE)
    if kept == found:
        return
    if isinstance(kept, dict):
        changed = _changed(kept, found, workspace.settings.model.name)
        # A SuperNode reports it to the server: it holds no more than a client's name.
        raise (ShareableError if workspace.node is not None else UserError)(
            f"{changed} than when {'this run' if workspace.node is not None else folder} was "
            "begun: put them back as they were, or name another run folder."
        )
    write_json(folder / INPUTS_FILE, found)


def _changed(kept: dict[str, Any], found: dict[str, Any], model: str) -> str:
    """Return the first input that is another, as the beginning of a sentence."""
    if kept.get("model") != found["model"]:
        return f"The files of model {model} are others"
    before, now = kept.get("clients", {}), found["clients"]
    for name in sorted({*before, *now}):
        if name not in now:
            return f"Client {name} is missing; the clients are others"
        if name not in before:
            return f"Client {name} is new; the clients are others"
        if before[name] != now[name]:
            return f"The rows of client {name} are others"
    return "The inputs are others"


def rows_digest(data: ClientData, client: Client) -> str:
    """Return a digest of a client's rows, their order and their split, 16 hex digits.

    Only columns that are used count, with the client's language and pool.
    """
    columns = [*data.text_columns, data.label_column, data.target_column]
    used = list(dict.fromkeys(name for name in columns if name))
    table = data.table.select_columns(used)
    rows = [table[[int(i) for i in indices]] for indices in (client.train, client.test)]
    content = [client.language, client.pool, *([part[name] for name in used] for part in rows)]
    text = json.dumps(content, ensure_ascii=False, default=str)
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
