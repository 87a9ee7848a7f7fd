"""Clients from a user's own files: one file per client, or one file with a column `client`."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedp2eft.data.clients import SEEN, UNSEEN, Client, ClientData, Indices
from fedp2eft.data.delimited import Columns, Table, clean
from fedp2eft.data.labels import check_names, class_name, found_names
from fedp2eft.data.partition import distinct, local_validation_split, rng_for
from fedp2eft.data.table import check_text, read_columns
from fedp2eft.errors import UserError, visible
from fedp2eft.settings.data import DataSettings

logger = logging.getLogger(__name__)

WHO = ("client", "language", "pool", "split")
"""Columns with a meaning of their own, where they are not named as text, label or target."""


@dataclass(frozen=True)
class _Part:
    """One file, and what is known of its rows before it is read; None: what the file says."""

    path: str
    client: str | None = None
    language: str | None = None
    pool: str | None = None
    test: bool = False


def _chat(settings: DataSettings) -> str | None:
    """Return the column of conversations, if there is one."""
    chat = settings.target_column if settings.target_column in settings.text_columns else None
    if chat and list(settings.text_columns) != [chat]:
        raise UserError(
            f"Column {chat!r} is text column and target column, so it holds conversations: name "
            "no other text column."
        )
    return chat


def client_from_file(
    path: str | Path,
    settings: DataSettings | None = None,
    *,
    only_test: bool = False,
) -> ClientData:
    """Load one file as one client, which joined after training (pool `unseen`).

    Test rows are those that a column `split` calls "test", or else `test_fraction` of the rows,
    drawn label by label. The file may have columns `client`, `language` and `pool`, with one value
    each.

    Args:
        path: JSON, CSV, TSV or Parquet; see `read_columns`.
        settings: columns, class names (see `class_name` for values that are ids), `test_fraction`,
            seed and `unique`.
        only_test: read test rows: those that its column `split` calls "test", or else all; the
            client does not train.

    Raises:
        UserError: as `read_columns`; a label that `labels` does not hold; rows of two clients; no
            train rows, or none to test on where `only_test`.
    """
    name = _stem(path)
    part = _Part(str(path), name, test=only_test)
    return _client_data(name, [part], settings or DataSettings(), trains=not only_test)


def clients_from_files(settings: DataSettings) -> ClientData:
    """Load clients from one file each (`files`), or from one with a column `client` (`path`).

    The one file may also have the columns `language` (else "und") and `pool` (else "seen"), the
    same in all rows of a client; without a column `client` it is one client of the pool `unseen`.
    A client's own file may have these columns too, as far as they agree with `files`. Any file may
    have a column `split` ("train" or "test"); without it the test rows are drawn as in
    `client_from_file`, for each client alone.

    Raises:
        UserError: as `client_from_file`; a client with two languages or pools; no clients, or both
            `path` and `files`.
    """
    if (settings.path is None) == (not settings.files):
        raise UserError("Set either data.path (one file) or data.files (client name to its file).")
    if settings.path is not None:
        return _client_data(_stem(settings.path), [_Part(settings.path)], settings)
    name = next(iter(settings.files)) if len(settings.files) == 1 else "files"
    parts = [
        _Part(path, client, None if file.language == "und" else file.language, file.pool, test)
        for client, file in settings.files.items()
        for path, test in ((file.path, False), (file.test_path, True))
        if path is not None
    ]
    return _client_data(name, parts, settings)


def _client_data(
    name: str, parts: Sequence[_Part], settings: DataSettings, *, trains: bool = True
) -> ClientData:
    import pyarrow as pa
    from datasets import Dataset

    label, chat = settings.label_column, _chat(settings)
    read = [_read(part, settings, chat) for part in parts]
    tables = [table for table, _ in read]
    # What labels are is settled once for all files: by the names given, or else by all values.
    classes = tuple(map(clean, settings.labels)) if label else ()
    if label:
        for table in tables:
            values = table.columns[label]
            table.columns[label] = [
                class_name(value, classes, table.where(row), label, values)
                for row, value in enumerate(values)
            ]
        classes = classes or found_names(value for t in tables for value in t.columns[label])
        check_names(classes)
    data = {key: [v for t in tables for v in t.columns[key]] for key in tables[0].columns}
    who = {key: [v for _, facts in read for v in facts[key]] for key in WHO}
    turns = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    every = {**who, **data}  # a column that is named for a purpose has no other
    table = Dataset(
        pa.table({k: pa.array(v, turns if k == chat else pa.string()) for k, v in every.items()})
    )
    texts = [data[column] for column in settings.text_columns]
    clients = _clients(who, data.get(label or ""), texts, settings, trains=trains)
    forms = dict.fromkeys(table.form for table in tables if table.form)
    notes = tuple(
        f"{', '.join(dict.fromkeys(t.path.name for t in tables if t.form == form))}: {form}"
        for form in forms
    )
    return ClientData(
        name,
        table,
        tuple(settings.text_columns),
        label,
        classes,
        clients,
        settings.target_column,
        notes,
    )


def _read(part: _Part, settings: DataSettings, chat: str | None) -> tuple[Table, Columns]:
    """Return a file's named columns, and what it says of client, language, pool and split."""
    given = [*settings.text_columns, settings.target_column]
    texts = [column for column in dict.fromkeys(given) if column and column != chat]
    others = [column for column in (settings.label_column, chat) if column]
    named = [*texts, *others]
    fixed = [column for column in WHO if column not in named]
    table = read_columns(part.path, text_columns=texts, columns=others, optional=fixed)
    who: Columns = {name: _words(table, name) for name in fixed if name in table.columns}
    split = who.get("split", [])
    for row, value in enumerate(split):
        if value not in ("train", "test"):
            raise UserError(f"{table.where(row)}: split {value!r} is neither 'train' nor 'test'.")
    if part.client is not None:
        _check_one(table, who, part)
    rows = len(table)
    pool = part.pool or (UNSEEN if part.client or "client" not in who else SEEN)
    kept = [n for n in range(rows) if not part.test or not split or split[n] == "test"]
    if not kept:
        raise UserError(f"{table.path} has no row that its column split calls 'test': add one.")
    who["client"] = (
        [part.client] * rows if part.client else who.get("client", [_stem(part.path)] * rows)
    )
    who.setdefault("language", [part.language or "und"] * rows)
    who.setdefault("pool", [pool] * rows)
    who["split"] = ["test"] * rows if part.test else who.get("split", [None] * rows)
    data = {name: table.columns[name] for name in dict.fromkeys(named)}
    if chat:
        data[chat] = [_turns(table.where(n), talk) for n, talk in enumerate(data[chat])]
    lines = None if table.lines is None else [table.lines[n] for n in kept]
    chosen = {name: [values[n] for n in kept] for name, values in data.items()}
    return (
        Table(table.path, chosen, lines, table.form),
        {name: [values[n] for n in kept] for name, values in who.items()},
    )


def _words(table: Table, column: str) -> list[str]:
    """Return a column of names, in NFC, stripped; whole numbers are names too."""
    values = table.columns[column]
    table.columns[column] = [
        str(value) if isinstance(value, int) and not isinstance(value, bool) else value
        for value in values
    ]
    check_text(table, column)
    return [clean(value) for value in table.columns[column]]


def _check_one(table: Table, who: Columns, part: _Part) -> None:
    """Raise `UserError` where one client's file says that it is several's, or not this one's."""
    found = {name: list(dict.fromkeys(values)) for name, values in who.items()}
    if len(clients := found.get("client", [])) > 1:
        raise UserError(
            f"{table.path} holds the rows of {len(clients)} clients (column client: "
            f"{', '.join(clients[:3])}{', …' if len(clients) > 3 else ''}): name a file with one "
            "client's rows."
        )
    for name, given in (("language", part.language), ("pool", part.pool)):
        other = [value for value in found.get(name, []) if value != given]
        if given is not None and other:
            raise UserError(
                f"{table.path}: column {name} says {other[0]!r}, and the settings say {given!r} of "
                f"client {part.client}: make them agree."
            )


def _turns(where: str, talk: Any) -> list[dict[str, str]]:
    """Return a conversation that ends with the assistant's turn, checked."""
    turns = talk if isinstance(talk, list) else []
    for turn in turns:
        facts = turn if isinstance(turn, Mapping) else {}
        if not all(isinstance(facts.get(key), str) for key in ("role", "content")):
            raise UserError(f"{where}: a turn of a conversation has no role or no content.")
    if len(turns) < 2 or turns[-1]["role"] != "assistant" or not turns[-1]["content"].strip():
        raise UserError(
            f"{where} holds no conversation that ends with the assistant's turn: write "
            '[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}].'
        )
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def _stem(path: str | Path) -> str:
    """Return a client's name from a file's."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", Path(path).name.split(".")[0]).strip("-") or "client"


def _clients(
    who: Columns,
    labels: Sequence[str] | None,
    texts: Sequence[Sequence[Any]],
    settings: DataSettings,
    *,
    trains: bool,
) -> tuple[Client, ...]:
    """Return each client's rows; test rows are drawn where no file names them."""
    names = np.asarray(who["client"])
    split = np.asarray(who["split"], dtype=object)
    kinds = np.asarray(labels if labels is not None else [""] * len(names))
    for language in sorted(set(who["language"])):
        if visible(language) != language:  # it heads columns of tables
            raise UserError(f"Language {language!r} holds a control character: remove it.")
    check_names(sorted(set(who["language"])), "Language", cases=False)
    clients = []
    for name in np.unique(names):
        rows = np.flatnonzero(names == name)
        facts = {key: sorted({who[key][row] for row in rows}) for key in ("language", "pool")}
        for key, found in facts.items():
            if len(found) > 1:
                raise UserError(f"Client {name} has two values of {key}: {', '.join(found[:2])}.")
        test = rows[split[rows] == "test"]
        train = rows[split[rows] != "test"]
        if settings.unique:
            train, test = distinct(texts, train, test)
        if len(test) == 0 and all(value is None for value in split[rows]):
            rng = rng_for(settings.seed, str(name), "test")
            kept, held = local_validation_split(kinds[train], settings.test_fraction, rng)
            train, test = train[kept], train[held]
        if trains:
            _check_train(str(name), train, kinds[train], classes=labels is not None)
        clients.append(Client(str(name), facts["language"][0], facts["pool"][0], train, test))
    return tuple(clients)


def _check_train(name: str, train: Indices, kinds: Sequence[str], *, classes: bool) -> None:
    if len(train) == 0:
        raise UserError(f"Client {name} has no train rows: give it at least one.")
    if len(train) == 1:
        logger.warning("Client %s has a single train row: its adapter will say little.", name)
    elif classes and len(set(kinds)) == 1:
        logger.warning(
            "Client %s has train rows of one class only (%s): its adapter will favour that class.",
            name,
            kinds[0],
        )
