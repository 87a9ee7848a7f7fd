"""Clients of a table that has its own pools and splits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fedp2eft.data.clients import NEW_LANGUAGE, POOLS, SEEN, UNSEEN, ClientData, Rows
from fedp2eft.data.languages import choose_languages
from fedp2eft.data.partition import distinct, partition_pools
from fedp2eft.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset


def clients_of_pools(
    name: str,
    table: Dataset,
    known: Sequence[str],
    languages: Sequence[str] | None,
    new_languages: Sequence[str],
    *,
    text_columns: tuple[str, ...],
    labels: tuple[str, ...],
    target_column: str | None,
    clients_per_language: int,
    alpha: float,
    max_train: int | None,
    max_test: int | None,
    seed: int,
    unique: bool = False,
    pools: Sequence[str] = (SEEN, UNSEEN),
) -> ClientData:
    """Each language's pool split over its clients by label; a row's number is its place in `table`.

    Args:
        name: the data set's name.
        table: has columns `language`, `pool` (seen or unseen), `split` (train or test) and `label`.
        known: its languages.
        languages: languages of the seen and unseen clients; None: all but `new_languages`.
        new_languages: languages that no seen client speaks. The rows of their unseen pool become
            clients of the pool `new-language`; their seen rows stay unused.
        text_columns: see `ClientData`.
        labels: see `ClientData`.
        target_column: see `ClientData`.
        clients_per_language: clients per language and pool.
        alpha: concentration of the Dirichlet distribution.
        max_train: at most this many train rows a client.
        max_test: at most this many test rows a client.
        seed: decides the split, together with language and pool alone.
        unique: of a pool's rows with the same text, keep the first, train rows before test rows.
        pools: which pools of `languages` become clients.

    Raises:
        UserError: an unknown language or pool, a language in both lists, or too many clients.
    """
    spoken, new = choose_languages(name, known, languages, new_languages)
    if wrong := [pool for pool in pools if pool not in (SEEN, UNSEEN)]:
        raise UserError(f"Pool {wrong[0]!r} is not one of {list(POOLS[:2])}.")
    texts = [table[column][:] for column in text_columns] if unique else []
    language, pool, split = (np.asarray(table[c][:]) for c in ("language", "pool", "split"))

    def rows(name: str, source: str) -> tuple[Rows, Rows]:
        mine = (language == name) & (pool == source)
        train, test = (np.flatnonzero(mine & (split == part)) for part in ("train", "test"))
        if unique:
            train, test = distinct(texts, train, test)
        return train, test

    parts = {(name, source): rows(name, source) for name in spoken for source in pools}
    parts |= {(name, NEW_LANGUAGE): rows(name, UNSEEN) for name in new}
    clients = partition_pools(
        parts,
        np.asarray(table["label"][:]),
        clients=clients_per_language,
        alpha=alpha,
        seed=seed,
        max_train=max_train,
        max_test=max_test,
    )
    return ClientData(name, table, text_columns, "label", labels, clients, target_column)
