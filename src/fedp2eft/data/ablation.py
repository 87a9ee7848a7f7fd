"""Data for diagnostics: texts that say nothing, and clients of a language that share their rows."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import numpy as np

from fedp2eft.data.clients import Client, ClientData

TOKEN = "a"
"""One token in most vocabularies, known or not."""


def without_text(data: ClientData) -> ClientData:
    """Return the same rows with `TOKEN` in place of every text; labels and responses stay.

    Of a conversation every turn but the last one, the response, is replaced.
    """
    table = data.table
    for name in data.text_columns:
        values = [TOKEN] * len(table)
        if name == data.target_column:
            values = [
                [{**turn, "content": TOKEN} for turn in talk[:-1]] + talk[-1:]
                for talk in table[name][:]
            ]
        kind = table.features[name]
        table = table.remove_columns(name).add_column(name, values, feature=kind)
    return replace(data, table=table)


def merge_clients(data: ClientData) -> ClientData:
    """Return one client per language and pool, with the train and test rows of all of them."""
    groups: dict[tuple[str, str], list[Client]] = defaultdict(list)
    for client in data.clients:
        groups[client.language, client.pool].append(client)
    merged = [
        Client(
            f"{language}-{pool}-all",
            language,
            pool,
            np.sort(np.concatenate([client.train for client in mine])),
            np.sort(np.concatenate([client.test for client in mine])),
        )
        for (language, pool), mine in groups.items()
    ]
    return replace(data, clients=tuple(merged))
