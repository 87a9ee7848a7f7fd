"""The clients' data: one Arrow table for all, and which rows belong to which client."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedp2eft.errors import UserError, shortened

if TYPE_CHECKING:
    from datasets import Dataset

Indices = NDArray[np.int64]
"""Row indices into `ClientData.table`, shape (rows,)."""

SEEN, UNSEEN, NEW_LANGUAGE = "seen", "unseen", "new-language"
POOLS = (SEEN, UNSEEN, NEW_LANGUAGE)
"""Clients that train; clients that never train; those of a language that no seen client speaks."""


def check_client_name(name: str) -> None:
    """Raise `UserError` unless the name can be a folder's: it may come from a peer."""
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,100}", name):
        raise UserError(
            f"{shortened(name)} cannot be a client's name: use at most 100 of the letters a-z and "
            "A-Z, digits, - and _."
        )


@dataclass(frozen=True, eq=False)
class Client:
    """One client: a name, and its row indices into the common table.

    Attributes:
        name: for example `fr-seen-00`. It becomes a folder name, so a-z, A-Z, digits, dash and
            underscore only, at most 100.
        language: the language its text is in; metrics are pooled by it.
        pool: one of `POOLS`.
        train: row indices into `ClientData.table`, ascending.
        test: row indices into `ClientData.table`, ascending, none of them in `train`.

    Raises:
        UserError: the name has other characters, or the pool is not one of `POOLS`.
    """

    name: str
    language: str
    pool: str
    train: Indices
    test: Indices

    def __post_init__(self) -> None:
        check_client_name(self.name)
        if self.pool not in POOLS:
            raise UserError(f"Client {self.name}: pool {self.pool!r} is not one of {list(POOLS)}.")


@dataclass(frozen=True, eq=False)
class ClientData:
    """All clients over one table, which is held once however many clients there are.

    Attributes:
        name: the data set's name.
        table: the rows, in memory or memory-mapped.
        text_columns: the model's input: `("text",)`, or `("premise", "hypothesis")` for pairs.
        label_column: the column of class names (strings, each one of `labels`), or None.
        labels: class names in the order of their ids; `()` where there are no classes.
        clients: sorted by name.
        target_column: the column a generating model shall answer with, or None.
        notes: how its files were read, one line each, for `fedp2eft data describe`.
    """

    name: str
    table: "Dataset"
    text_columns: tuple[str, ...]
    label_column: str | None
    labels: tuple[str, ...]
    clients: tuple[Client, ...]
    target_column: str | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        in_order = tuple(sorted(self.clients, key=lambda client: client.name))
        for client, following in pairwise(in_order):
            if client.name == following.name:
                raise UserError(f"Two clients are named {client.name!r}: rename one of them.")
        object.__setattr__(self, "clients", in_order)

    def rows(self, indices: Sequence[int] | Indices) -> dict[str, list[Any]]:
        """Return the columns of those rows, in the order of `indices`: column name → values."""
        return dict(self.table[[int(index) for index in indices]])

    def label_ids(self, indices: Sequence[int] | Indices) -> Indices:
        """Return class ids of those rows, shape (len(indices),): positions in `labels`.

        Raises:
            UserError: the data set has no classes.
        """
        if self.label_column is None:
            raise UserError(f"Data set {self.name!r} has no label column: choose another task.")
        ids = {label: position for position, label in enumerate(self.labels)}
        values = self.table[self.label_column][[int(index) for index in indices]]
        return np.array([ids[value] for value in values], dtype=np.int64)

    def answers(self, indices: Sequence[int] | Indices, task: str) -> Sequence[Any]:
        """Return what a model of that task should answer to those rows: class ids, or texts.

        Raises:
            UserError: the data set has no classes, or no column of answers.
        """
        if task == "classification":
            return self.label_ids(indices)  # type: ignore[return-value]
        if self.target_column is None:
            raise UserError(
                f"Data set {self.name!r} has no column of responses: set data.target_column, or "
                "choose another task."
            )
        values: list[Any] = self.table[self.target_column][[int(index) for index in indices]]
        return values

    def texts_and_answers(
        self, indices: Sequence[int] | Indices, task: str
    ) -> tuple[list[Sequence[Any]], Sequence[Any]]:
        """Return the text columns of those rows, and `answers`, for a task to tokenize."""
        rows = self.rows(indices)
        return [rows[column] for column in self.text_columns], self.answers(indices, task)

    def pool(self, name: str) -> tuple[Client, ...]:
        """Return the clients of one pool, sorted by name; empty if there are none.

        Raises:
            UserError: `name` is not one of `POOLS`.
        """
        if name not in POOLS:
            raise UserError(f"Pool {name!r} is not one of {list(POOLS)}.")
        return tuple(client for client in self.clients if client.pool == name)
