"""Rows and labels per client, and the partition as a readable file."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from fedp2eft.data.clients import Client, ClientData
from fedp2eft.data.label_shift import label_shift
from fedp2eft.files import write_text


def describe(data: ClientData) -> list[dict[str, Any]]:
    """Return one row per (language, pool), sorted by both.

    Each has `language`, `pool`, `clients`, `train` and `test` (rows of all its clients), `labels`
    (class name -> rows, train and test together; empty without classes) and `characters` (mean
    length of a row's text columns together, in characters). With classes also `label_shift`: mean
    and largest total variation between a client's train and test labels; empty without test rows.
    """
    columns = [data.table[name][:] for name in data.text_columns]
    lengths = np.sum([[_characters(text) for text in column] for column in columns], axis=0)
    shift, rows = label_shift(data), []
    for language, pool in sorted({(c.language, c.pool) for c in data.clients}):
        mine = [c for c in data.clients if (c.language, c.pool) == (language, pool)]
        used = np.concatenate([part for c in mine for part in (c.train, c.test)])
        rows.append(
            {
                "language": language,
                "pool": pool,
                "clients": len(mine),
                "train": sum(len(client.train) for client in mine),
                "test": sum(len(client.test) for client in mine),
                "labels": _counts(data, mine),
                "characters": round(float(lengths[used].mean()), 1),
            }
        )
        if data.label_column:
            values = [shift[client.name] for client in mine if client.name in shift]
            rows[-1]["label_shift"] = [fmean(values), max(values)] if values else []
    return rows


def classes_of_clients(data: ClientData) -> dict[str, dict[str, int]]:
    """Return each client's rows by class, train and test together, by name of the client."""
    return {client.name: _counts(data, [client]) for client in data.clients}


def _counts(data: ClientData, clients: Sequence[Client]) -> dict[str, int]:
    """Return rows by class; empty without classes."""
    if not data.label_column:
        return {}
    names = data.table[data.label_column]
    count = Counter(names[int(row)] for c in clients for part in (c.train, c.test) for row in part)
    return {label: count[label] for label in data.labels}


def repeats(data: ClientData) -> list[str]:
    """Return lines about texts that occur more than once; an empty list if none does.

    A test row with a copy among train rows does not show what a model has learned: of the same
    client it was seen in personalization, of another client in the federation's training.
    """
    columns = [data.table[name][:] for name in data.text_columns]
    texts = [repr(parts) for parts in zip(*columns, strict=True)]
    trained: dict[str, set[str]] = {}
    for client in data.clients:
        for row in client.train:
            trained.setdefault(texts[row], set()).add(client.name)
    tests = [(c.name, texts[row]) for c in data.clients for row in c.test]
    own = sum(name in trained.get(text, ()) for name, text in tests)
    others = sum(bool(trained.get(text, set()) - {name}) for name, text in tests)
    lines = []
    if own or others:
        lines.append(
            f"Repeated texts: of {len(tests)} test rows {own} ({own / len(tests):.1%}) have a copy "
            f"among the train rows of their client, {others} ({others / len(tests):.1%}) among "
            "those of other clients. data.unique: true keeps the first row of each text."
        )
    if data.label_column:
        labels: dict[str, set[str]] = {}
        names = data.table[data.label_column][:]
        for client in data.clients:
            for row in (*client.train, *client.test):
                labels.setdefault(texts[row], set()).add(names[row])
        if several := sum(len(found) > 1 for found in labels.values()):
            lines.append(f"{several} texts have more than one label.")
    return lines


def _characters(text: Any) -> int:
    """Return the length of a text, or of the turns of a conversation together."""
    return len(text) if isinstance(text, str) else sum(len(turn["content"]) for turn in text)


def save_partition(data: ClientData, path: str | Path) -> None:
    """Write which rows are whose as JSON, one client a line: name -> language, pool, train, test.

    The row indices are those of `data.table`, from 0. The file is written atomically.

    Raises:
        UserError: the file cannot be written.
    """
    clients = []
    for client in data.clients:
        facts = {"language": client.language, "pool": client.pool}
        facts |= {"train": client.train.tolist(), "test": client.test.tolist()}
        clients.append(f"    {json.dumps(client.name)}: {json.dumps(facts, ensure_ascii=False)}")
    head = {"dataset": data.name, "rows": len(data.table), "labels": list(data.labels)}
    start = json.dumps(head, ensure_ascii=False)[:-1]
    text = f'{start}, "clients": {{\n' + ",\n".join(clients) + "\n}}\n"
    write_text(Path(path), text)
