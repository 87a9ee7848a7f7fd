"""Data that stays on SuperNodes: each reads one client's file, which its node config names.

flower-supernode … --node-config "client='fr-00' path='/data/fr.jsonl' language='fr'"
"""

from collections.abc import Mapping
from dataclasses import fields, replace

from fedp2eft.data.clients import SEEN, ClientData, check_client_name
from fedp2eft.data.files import clients_from_files
from fedp2eft.data.partition import hold_out
from fedp2eft.errors import TellableError, UserError, nearest
from fedp2eft.settings.data import ClientFile, DataSettings

NODES = "nodes"
KNOWN = (
    *("client", "path", "test-path", "language", "pool", "keep"),
    *("text-columns", "label-column", "target-column"),
)
"""What a node config may say where the data set is `nodes`."""

Value = bool | float | int | str


def data_without_clients(settings: DataSettings) -> ClientData:
    """What the server knows of the data: columns and classes.

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
    """A SuperNode's own client.

    Args:
        config: The node config: `client` and `path`; `test-path`, `language` and `pool` as in
            `ClientFile`; `text-columns` (joined by commas), `label-column` and `target-column`
            where this file has other names for the columns than the experiment.
        settings: The experiment's; all clients have its classes.

    Raises:
        UserError: The config names no client or file, or the file is not as it should be.
    """
    for key in sorted(set(config) - set(KNOWN)):
        raise TellableError(
            f"The node config has an unknown key {key!r}.{nearest(key, list(KNOWN))} "
            f"Known: {', '.join(KNOWN)}."
        )
    for key in ("client", "path"):
        if key not in config:
            raise TellableError(f"The node config names no {key}: add {key}='…'.")
    text = {key: str(value) for key, value in config.items()}
    name = text["client"]
    check_client_name(name)
    columns = tuple(text.get("text-columns", ",".join(settings.text_columns)).split(","))
    if len(columns) != len(settings.text_columns):
        raise TellableError(
            f"text-columns of the node config names {len(columns)} columns; the experiment has "
            f"{len(settings.text_columns)}: {', '.join(settings.text_columns)}."
        )
    own = {}
    for key in ("label-column", "target-column"):
        own[key] = getattr(settings, key.replace("-", "_"))
        if key in text:
            if own[key] is None:
                raise TellableError(f"The node config names a {key}; the experiment has none.")
            own[key] = text[key]
    data_without_clients(settings)  # the classes are agreed on, or this raises
    given = {f.name: text[f.name.replace("_", "-")] for f in fields(ClientFile)
             if f.name.replace("_", "-") in text}  # fmt: skip
    data = clients_from_files(
        replace(
            settings,
            path=None,
            files={name: ClientFile(**{"pool": SEEN, **given})},
            text_columns=list(columns),
            label_column=own["label-column"],
            target_column=own["target-column"],
        )
    )
    data = replace(data, name=NODES)
    return hold_out(data, settings) if settings.holdout else data
