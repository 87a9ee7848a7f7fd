"""Fed-Aya: instructions and responses of 38 real annotators, as FedLLM-Bench publishes them.

The file is not ours to ship: fetch it from https://github.com/rui-ye/FedLLM-Bench and name its
path. It is one JSON object, an annotator's name to the list of its rows, each with `instruction`,
`response` and `language`.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from fedp2eft.data.clients import SEEN, UNSEEN, Client, ClientData
from fedp2eft.data.partition import local_validation_split, rng_for
from fedp2eft.data.table import read_text
from fedp2eft.errors import UserError, first_line, nearest
from fedp2eft.settings.data import DataSettings

NAME = "fed-aya"
LANGUAGES = ("ar", "en", "es", "fr", "pt", "ru", "te", "zh")
CLIENTS = 38
UNSEEN_CLIENTS = (*range(21, 28), 34)
"""Annotators that never train, by their place in the file (arXiv 2502.04387, data protocol)."""
TEST_SHARE = 0.2
COLUMNS = ("instruction", "response", "language")


def load_fed_aya(settings: DataSettings) -> ClientData:
    """Load Fed-Aya: each client is an annotator, 20 % of its rows are test rows.

    Rows in other languages than the paper's eight are left out. A client's language is that of most
    of its rows; its scores count for that language. The seed decides which rows are test rows, for
    every client alone.

    Returns:
        Client data with `text_columns` ("instruction",) and `target_column` "response"; clients
        are named like `fr-seen-07`, the number being the annotator's place in the file.

    Raises:
        UserError: no such file, another schema, or a client without rows.
    """
    import pyarrow as pa
    from datasets import Dataset

    path, languages = settings.path, settings.languages
    if path is None:
        raise UserError(
            "Set data.path to Fed-Aya's JSON file, which FedLLM-Bench publishes "
            "(https://github.com/rui-ye/FedLLM-Bench)."
        )
    kept = set(languages or LANGUAGES)
    if unknown := sorted(kept - set(LANGUAGES)):
        raise UserError(
            f"Language {unknown[0]!r} is not in {NAME}.{nearest(unknown[0], list(LANGUAGES))} It "
            f"has {', '.join(LANGUAGES)}."
        )
    data: dict[str, list[str]] = {column: [] for column in COLUMNS}
    clients = []
    for place, (name, rows) in enumerate(_read(Path(path).expanduser()).items()):
        mine = [row for row in _checked(path, name, rows) if row["language"] in kept]
        if settings.unique:
            mine = list({row["instruction"]: row for row in reversed(mine)}.values())[::-1]
        if not mine:
            if languages:
                continue
            raise UserError(f"{path}: annotator {name!r} has no row in {', '.join(LANGUAGES)}.")
        first = len(data["language"])
        for column in COLUMNS:
            data[column] += [row[column] for row in mine]
        # Of equals the first by name, so that the order of the rows does not matter.
        spoken = Counter(row["language"] for row in mine)
        language = min(spoken, key=lambda name: (-spoken[name], name))
        pool = UNSEEN if place in UNSEEN_CLIENTS else SEEN
        indices = np.arange(first, first + len(mine), dtype=np.int64)
        train, test = local_validation_split(
            [row["language"] for row in mine], TEST_SHARE, rng_for(settings.seed, NAME, str(place))
        )
        clients.append(
            Client(f"{language}-{pool}-{place:02d}", language, pool, indices[train], indices[test])
        )
    table = Dataset(pa.table({key: pa.array(values, pa.string()) for key, values in data.items()}))
    return ClientData(NAME, table, ("instruction",), None, (), tuple(clients), "response")


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not valid JSON ({first_line(error)}): fetch it again."
        ) from None
    if not isinstance(raw, dict):
        raise UserError(
            f"{path} holds a JSON {type(raw).__name__}, not an object of annotators: it is not "
            "Fed-Aya as FedLLM-Bench publishes it."
        )
    if len(raw) != CLIENTS:
        raise UserError(f"{path} holds {len(raw)} annotators, and Fed-Aya has {CLIENTS}.")
    return raw


def _checked(path: str | Path, name: str, rows: Any) -> list[dict[str, str]]:
    if not isinstance(rows, list):
        raise UserError(f"{path}: annotator {name!r} holds no list of rows.")
    for number, row in enumerate(rows, start=1):
        for column in COLUMNS:
            value = row.get(column) if isinstance(row, dict) else None
            if not isinstance(value, str) or not value.strip():
                raise UserError(f"{path}: annotator {name!r}, row {number} has no {column!r}.")
    return rows
