"""Data that stays on SuperNodes: each reads one client's file, which its node config names.

flower-supernode … --node-config "client='fr-00' path='/data/fr.jsonl' language='fr'"
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from fedp2eft.data.ablation import without_text
from fedp2eft.data.clients import SEEN, ClientData, check_client_name
from fedp2eft.data.files import clients_from_files
from fedp2eft.data.partition import hold_out
from fedp2eft.errors import ShareableError, UserError, nearest
from fedp2eft.settings.data import ClientFile, DataSettings

NODES = "nodes"
KNOWN = (
    *("client", "path", "test-path", "language", "pool", "keep"),
    *("text-columns", "label-column", "target-column"),
)
"""What a node config may say where the data set is `nodes`."""

Value = bool | float | int | str


def data_without_clients(settings: DataSettings) -> ClientData:
    """Return what the server knows of the data: columns and classes.

    Raises:
        UserError: The settings do not name the classes: nobody sees the rows of all clients.
    """
    import pyarrow as pa
    from datasets import Dataset

    if settings.label_column is not None and not settings.labels:
        raise UserError(
            "data.dataset is nodes: set data.labels to the class names in the order of their ids, "
            "or data.label_column to null for a task without classes."
        )
    columns = [*settings.text_columns, settings.label_column, settings.target_column]
    names = list(dict.fromkeys(name for name in columns if name))
    table = Dataset(pa.table({name: pa.array([], pa.string()) for name in names}))
    return ClientData(
        NODES,
        table,
        tuple(settings.text_columns),
        settings.label_column,
        tuple(settings.labels),
        (),
        settings.target_column,
    )


def clients_of_node(config: Mapping[str, Value], settings: DataSettings) -> ClientData:
    """Return a SuperNode's own client.

    Args:
        config: The node config: `client` and `path`; `test-path`, `language` and `pool` as in
            `ClientFile`; `text-columns` (joined by commas), `label-column` and `target-column`
            where this file has other names for the columns than the experiment.
        settings: The experiment's; all clients have its classes.

    Raises:
        UserError: The config names no client or file, or the file is not as it should be.
    """
    for key in sorted(set(config) - set(KNOWN)):
        raise ShareableError(
            f"The node config has an unknown key {key!r}.{nearest(key, list(KNOWN))} "
            f"Known: {', '.join(KNOWN)}."
        )
    for key in ("client", "path"):
        if key not in config:
            raise ShareableError(f"The node config names no {key}: add {key}='…'.")
    text = {key: str(value) for key, value in config.items()}
    name = text["client"]
    check_client_name(name)
    changes: dict[str, Any] = {"path": None}
    changes["text_columns"] = text.get("text-columns", ",".join(settings.text_columns)).split(",")
    if len(changes["text_columns"]) != len(settings.text_columns):
        raise ShareableError(
            f"text-columns of the node config names {len(changes['text_columns'])} columns; the "
            f"experiment has {len(settings.text_columns)}: {', '.join(settings.text_columns)}."
        )
    for key in ("label-column", "target-column"):
        if key in text:
            if getattr(settings, key.replace("-", "_")) is None:
                raise ShareableError(f"The node config names a {key}; the experiment has none.")
            changes[key.replace("-", "_")] = text[key]
    data_without_clients(settings)  # the classes are agreed on, or this raises
    given = {f.name: text.get(f.name.replace("_", "-")) for f in fields(ClientFile)}
    file = ClientFile(**{"pool": SEEN} | {k: v for k, v in given.items() if v is not None})
    data = clients_from_files(replace(settings, files={name: file}, **changes))
    data = replace(data, name=NODES)
    data = hold_out(data, settings) if settings.holdout else data
    return without_text(data) if settings.texts == "one-token" else data
