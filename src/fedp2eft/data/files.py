"""Clients from a user's own files: one file per client, or one file with a column `client`."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedp2eft.data.clients import SEEN, UNSEEN, Client, ClientData, Indices
from fedp2eft.data.delimited import clean
from fedp2eft.data.labels import check_names, class_name, found_names
from fedp2eft.data.partition import distinct, local_validation_split, rng_for
from fedp2eft.data.table import Columns, Table, check_text, read_columns
from fedp2eft.errors import UserError, visible
from fedp2eft.settings.data import ClientFile

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


@dataclass(frozen=True)
class _Use:
    """What the columns are for, and how test rows are drawn."""

    text_columns: Sequence[str]
    label_column: str | None
    target_column: str | None
    labels: Sequence[str] | None
    test_fraction: float
    seed: int
    unique: bool

    def __post_init__(self) -> None:
        if self.chat and list(self.text_columns) != [self.chat]:
            raise UserError(
                f"Column {self.chat!r} is text column and target column, so it holds "
                "conversations: name no other text column."
            )

    @property
    def chat(self) -> str | None:
        """The column of conversations, if there is one."""
        return self.target_column if self.target_column in self.text_columns else None

    @property
    def texts(self) -> list[str]:
        """The columns of text."""
        extra = [self.target_column] if self.target_column else []
        return [c for c in dict.fromkeys([*self.text_columns, *extra]) if c != self.chat]


def client_from_file(
    path: str | Path,
    *,
    text_columns: Sequence[str] = ("text",),
    label_column: str | None = "label",
    target_column: str | None = None,
    labels: Sequence[str] | None = None,
    test_path: str | Path | None = None,
    test_fraction: float = 0.2,
    seed: int = 0,
    unique: bool = False,
    name: str | None = None,
    language: str = "und",
    only_test: bool = False,
) -> ClientData:
    """Load one file as one client, which joined after training (pool `unseen`).

    Test rows are, in this order: those that a column `split` calls "test"; those of `test_path`;
    `test_fraction` of the rows, drawn label by label. The file may have columns `client`,
    `language` and `pool`, with one value each.

    Args:
        path: JSON, CSV, TSV or Parquet; see `read_columns`.
        text_columns: columns of the model's input.
        label_column: column of the class; None for a task without classes.
        target_column: column a generating model shall answer with.
        labels: the class names in the order of their ids: those the federation was trained with;
            None: the values found, sorted. See `class_name` for values that are ids.
        test_path: another file whose rows are test rows: those that its column `split` calls
            "test", or else all.
        test_fraction: share of the rows to test on, 0 <= test_fraction < 1.
        seed: decides which.
        unique: of a client's rows with the same text, keep the first alone.
        name: the client's name; None: the file's.
        language: the language of its text; "und", ISO 639's code for an unknown one: as the file
            says, if it does.
        only_test: `path` is read as a `test_path`: the client does not train.

    Raises:
        UserError: as `read_columns`; a label that `labels` does not hold; rows of two clients; no
            train rows, or none to test on where `only_test`.
    """
    who = name or _stem(path)
    spoken = None if language == "und" else language
    parts = [_Part(str(path), who, spoken, test=only_test)]
    if test_path is not None:
        parts.append(_Part(str(test_path), who, spoken, test=True))
    use = _Use(
        text_columns, label_column, target_column, labels, test_fraction, seed, unique
    )  # fmt: skip
    return _client_data(who, parts, use, trains=not only_test)


def clients_from_files(
    source: str | Path | Mapping[str, ClientFile],
    *,
    text_columns: Sequence[str] = ("text",),
    label_column: str | None = "label",
    target_column: str | None = None,
    labels: Sequence[str] | None = None,
    test_fraction: float = 0.2,
    seed: int = 0,
    unique: bool = False,
) -> ClientData:
    """Clients from one file each, or all from one file that has a column `client`.

    The one file may also have the columns `language` (else "und") and `pool` (else "seen"), the
    same in all rows of a client; without a column `client` it is one client of the pool `unseen`.
    A client's own file may have these columns too, as far as they agree with `source`. Any file may
    have a column `split` ("train" or "test"); without it the test rows are drawn as in
    `client_from_file`, for each client alone.

    Args:
        source: the one file, or client name -> its file.
        text_columns: see `client_from_file`.
        label_column: see `client_from_file`.
        target_column: see `client_from_file`.
        labels: see `client_from_file`.
        test_fraction: see `client_from_file`.
        seed: see `client_from_file`.
        unique: see `client_from_file`.

    Raises:
        UserError: as `client_from_file`; a client with two languages or pools; no clients.
    """
    if isinstance(source, (str, Path)):
        name, parts = _stem(source), [_Part(str(source))]
    else:
        name = next(iter(source)) if len(source) == 1 else "files"
        parts = [
            _Part(path, client, None if file.language == "und" else file.language, file.pool, test)
            for client, file in source.items()
            for path, test in ((file.path, False), (file.test_path, True))
            if path is not None
        ]
    if not parts:
        raise UserError("Name at least one client's file.")
    use = _Use(text_columns, label_column, target_column, labels, test_fraction, seed, unique)
    return _client_data(name, parts, use)


def _client_data(
    name: str, parts: Sequence[_Part], use: _Use, *, trains: bool = True
) -> ClientData:
    import pyarrow as pa
    from datasets import Dataset

    label = use.label_column
    read = [_read(part, use) for part in parts]
    tables = [table for table, _ in read]
    # What labels are is settled once for all files: by the names given, or else by all values.
    classes = tuple(map(clean, use.labels)) if label and use.labels is not None else ()
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
        pa.table(
            {k: pa.array(v, turns if k == use.chat else pa.string()) for k, v in every.items()}
        )
    )
    texts = [data[column] for column in use.text_columns]
    clients = _clients(who, data.get(label or ""), texts, use, trains=trains)
    forms = dict.fromkeys(table.form for table in tables if table.form)
    notes = tuple(
        f"{', '.join(dict.fromkeys(t.path.name for t in tables if t.form == form))}: {form}"
        for form in forms
    )
    return ClientData(
        name, table, tuple(use.text_columns), label, classes, clients, use.target_column, notes
    )


def _read(part: _Part, use: _Use) -> tuple[Table, Columns]:
    """A file's named columns, and what it says of client, language, pool and split."""
    named = [*use.texts, *(column for column in (use.label_column, use.chat) if column)]
    fixed = [column for column in WHO if column not in named]
    table = read_columns(
        part.path, text_columns=use.texts, columns=named[len(use.texts) :], optional=fixed
    )
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
    if use.chat:
        data[use.chat] = [_turns(table.where(n), talk) for n, talk in enumerate(data[use.chat])]
    lines = None if table.lines is None else [table.lines[n] for n in kept]
    chosen = {name: [values[n] for n in kept] for name, values in data.items()}
    return (
        Table(table.path, chosen, lines, table.form),
        {name: [values[n] for n in kept] for name, values in who.items()},
    )


def _words(table: Table, column: str) -> list[str]:
    """A column of names, in NFC and without blanks around them; whole numbers are names too."""
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
    """A conversation that ends with the assistant's turn, checked."""
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
    """A client's name from a file's."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", Path(path).name.split(".")[0]).strip("-") or "client"


def _clients(
    who: Columns,
    labels: Sequence[str] | None,
    texts: Sequence[Sequence[Any]],
    use: _Use,
    *,
    trains: bool,
) -> tuple[Client, ...]:
    """Each client's rows, those to test on drawn where no file says them."""
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
        if use.unique:
            train, test = distinct(texts, train, test)
        if len(test) == 0 and all(value is None for value in split[rows]):
            rng = rng_for(use.seed, str(name), "test")
            kept, held = local_validation_split(kinds[train], use.test_fraction, rng)
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
