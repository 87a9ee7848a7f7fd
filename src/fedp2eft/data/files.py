"""A user's own files as a federation: one file a client, or one file with a column `client`."""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedp2eft.data.federation import SEEN, UNSEEN, Client, Federation, Rows
from fedp2eft.data.partition import local_validation_split, rng_for
from fedp2eft.data.table import check_text, read_table
from fedp2eft.errors import UserError, nearest
from fedp2eft.settings.data import ClientFile

logger = logging.getLogger(__name__)

_WHO = ("client", "language", "pool")


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
    name: str | None = None,
    language: str = "und",
) -> Federation:
    """One file as a federation of one client, which has joined after training (pool `unseen`).

    Test rows are, in this order: those that a column `split` calls "test"; those of `test_path`;
    `test_fraction` of the rows, drawn label by label. Values of `label_column` are class names;
    a file in which not all are may give whole numbers that count through `labels` from 0.

    Args:
        path: JSON lines, CSV or Parquet; see `read_table`.
        text_columns: columns of the model's input.
        label_column: column of the class; None for a task without classes.
        target_column: column a generating model shall answer with.
        labels: the class names in the order of their ids: those the federation was trained with;
            None: the values found, sorted.
        test_path: another file whose rows are all test rows.
        test_fraction: share of the rows to test on, 0 <= test_fraction < 1.
        seed: decides which.
        name: the client's name; None: the file's.
        language: the language of its text; "und" is ISO 639's code for an unknown one.

    Raises:
        UserError: as `read_table`; a label that `labels` does not hold; no train rows.
    """
    test = None if test_path is None else str(test_path)
    file = ClientFile(str(path), language=language, pool=UNSEEN, test_path=test)
    return federation_from_files(
        {name or _stem(path): file},
        text_columns=text_columns,
        label_column=label_column,
        target_column=target_column,
        labels=labels,
        test_fraction=test_fraction,
        seed=seed,
    )


def federation_from_files(
    source: str | Path | Mapping[str, ClientFile],
    *,
    text_columns: Sequence[str] = ("text",),
    label_column: str | None = "label",
    target_column: str | None = None,
    labels: Sequence[str] | None = None,
    test_fraction: float = 0.2,
    seed: int = 0,
) -> Federation:
    """Clients from one file each, or all from one file that has a column `client`.

    The one file may also have the columns `language` (else "und") and `pool` (else "seen"), the
    same in all rows of a client; without a column `client` it is one client of the pool `unseen`.
    Any file may have a column `split` ("train" or "test"); without it the test rows are drawn as
    in `client_from_file`, for each client alone.

    Args:
        source: the one file, or client name -> its file.
        text_columns: see `client_from_file`.
        label_column: see `client_from_file`.
        target_column: see `client_from_file`.
        labels: see `client_from_file`.
        test_fraction: see `client_from_file`.
        seed: see `client_from_file`.

    Raises:
        UserError: as `client_from_file`; a client with two languages or pools; no clients.
    """
    import pyarrow as pa
    from datasets import Dataset

    texts = list(dict.fromkeys([*text_columns, *([target_column] if target_column else [])]))
    chat = target_column if target_column in text_columns else None
    if chat and list(text_columns) != [chat]:
        raise UserError(
            f"Column {chat!r} is text column and target column, so it holds conversations: name no "
            "other text column."
        )
    if isinstance(source, (str, Path)):
        parts = [_read(source, texts, label_column, None, None, chat)]
        name = _stem(source)
    else:
        parts = [
            _read(path, texts, label_column, (client, file.language, file.pool), split, chat)
            for client, file in source.items()
            for path, split in ((file.path, None), (file.test_path, "test"))
            if path is not None
        ]
        name = next(iter(source)) if len(source) == 1 else "files"
    if not parts:
        raise UserError("Name at least one client's file.")
    if label_column is not None:
        classes = tuple(labels) if labels is not None else _found(parts, label_column)
        for path, data in parts:
            data[label_column] = _class_names(path, label_column, data[label_column], classes)
    else:
        classes = ()
    data = {key: [value for _, part in parts for value in part[key]] for key in parts[0][1]}
    turns = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    kinds = {key: turns if key == chat else pa.string() for key in data}
    table = Dataset(pa.table({key: pa.array(data[key], kinds[key]) for key in data}))
    clients = _clients(data, data.get(label_column or ""), test_fraction, seed)
    return Federation(
        name, table, tuple(text_columns), label_column, classes, clients, target_column
    )


def _read(
    path: str | Path,
    texts: Sequence[str],
    label_column: str | None,
    who: tuple[str, str, str] | None,
    split: str | None,
    chat: str | None,
) -> tuple[str, dict[str, list[Any]]]:
    """One file's columns: the texts, the label, and client, language, pool and split."""
    read = read_table(
        path,
        text_columns=[column for column in texts if column != chat],
        columns=[column for column in (label_column, chat) if column],
        optional=["split"] if who else [*_WHO, "split"],
    )
    data = {name: read[name][:] for name in read.column_names}
    rows = len(read)
    if chat:
        data[chat] = [_turns(f"{path}, row {n}", talk) for n, talk in enumerate(data[chat], 1)]
    if who is None:
        who = (_stem(path), "und", SEEN if "client" in data else UNSEEN)
    for column, value in zip(_WHO, who, strict=True):
        data.setdefault(column, [value] * rows)
        data[column] = [str(v) if isinstance(v, int) else v for v in data[column]]
        check_text(path, column, data[column])
    if split is not None:
        data["split"] = [split] * rows
    for row, value in enumerate(data.get("split", []), start=1):
        if value not in ("train", "test"):
            raise UserError(f"{path}, row {row}: split {value!r} is neither 'train' nor 'test'.")
    data.setdefault("split", [None] * rows)
    return str(path), data


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


def _found(parts: Iterable[tuple[str, dict[str, list[Any]]]], column: str) -> tuple[str, ...]:
    """The values found, sorted: by number where all are whole numbers, else by name."""
    values = {str(value) for _, data in parts for value in data[column] if value not in (None, "")}
    if all(re.fullmatch(r"-?\d+", value) for value in values):
        return tuple(sorted(values, key=int))
    return tuple(sorted(values))


def _class_names(
    path: str, column: str, values: Sequence[Any], classes: Sequence[str]
) -> list[str]:
    names = []
    # Classes may be called "1", "2", "3": then a 1 is an id only where some value is no name.
    by_id = not all(str(value) in classes for value in values)
    for row, value in enumerate(values, start=1):
        where = f"{path}, row {row}: column {column!r}"
        if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
            found = "nothing" if value in (None, "") else f"{type(value).__name__} {value!r}"
            raise UserError(f"{where} holds {found}, not a class name or a whole number.")
        if by_id and re.fullmatch(r"\d+", str(value)) and int(value) < len(classes):
            names.append(classes[int(value)])
        elif str(value) in classes:
            names.append(str(value))
        else:
            raise UserError(
                f"{where} holds the unknown class {value!r}."
                f"{nearest(str(value), list(classes))} The classes are {', '.join(classes)}."
            )
    return names


def _clients(
    data: Mapping[str, list[Any]], labels: Sequence[str] | None, test_fraction: float, seed: int
) -> tuple[Client, ...]:
    names = np.asarray(data["client"])
    split = np.asarray(data["split"], dtype=object)
    kinds = np.asarray(labels if labels is not None else [""] * len(names))
    clients = []
    for name in np.unique(names):
        rows = np.flatnonzero(names == name)
        who = {key: sorted({data[key][row] for row in rows}) for key in ("language", "pool")}
        for key, found in who.items():
            if len(found) > 1:
                raise UserError(f"Client {name} has two values of {key}: {', '.join(found[:2])}.")
        test = rows[split[rows] == "test"]
        train = rows[split[rows] != "test"]
        if len(test) == 0 and all(value is None for value in split[rows]):
            rng = rng_for(seed, str(name), "test")
            kept, held = local_validation_split(kinds[train], test_fraction, rng)
            train, test = train[kept], train[held]
        _check_train(str(name), train, kinds[train], classes=labels is not None)
        clients.append(Client(str(name), who["language"][0], who["pool"][0], train, test))
    return tuple(clients)


def _check_train(name: str, train: Rows, kinds: Sequence[str], *, classes: bool) -> None:
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
