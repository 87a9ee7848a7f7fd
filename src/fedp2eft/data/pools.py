"""Clients of a table that has its own pools and splits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fedp2eft.data.clients import NEW_LANGUAGE, POOLS, SEEN, UNSEEN, ClientData, Indices
from fedp2eft.data.languages import choose_languages
from fedp2eft.data.partition import Partition, distinct, partition_pools
from fedp2eft.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset


def clients_of_pools(
    name: str,
    table: Dataset,
    known: Sequence[str],
    partition: Partition,
    *,
    text_columns: tuple[str, ...],
    labels: tuple[str, ...],
    target_column: str | None,
) -> ClientData:
    """Each language's pool split over its clients by label; a row's number is its place in `table`.

    Args:
        name: the data set's name.
        table: has columns `language`, `pool` (seen or unseen), `split` (train or test) and `label`.
        known: its languages.
        partition: how the pools are split.
        text_columns: see `ClientData`.
        labels: see `ClientData`.
        target_column: see `ClientData`.

    Raises:
        UserError: an unknown language or pool, a language in both lists, or too many clients.
    """
    pools, unique = partition.pools, partition.unique
    spoken, new = choose_languages(name, known, partition.languages, partition.new_languages)
    if wrong := [pool for pool in pools if pool not in (SEEN, UNSEEN)]:
        raise UserError(f"Pool {wrong[0]!r} is not one of {list(POOLS[:2])}.")
    texts = [table[column][:] for column in text_columns] if unique else []
    language, pool, split = (np.asarray(table[c][:]) for c in ("language", "pool", "split"))

    def rows(name: str, source: str) -> tuple[Indices, Indices]:
        mine = (language == name) & (pool == source)
        train, test = (np.flatnonzero(mine & (split == part)) for part in ("train", "test"))
        if unique:
            train, test = distinct(texts, train, test)
        return train, test

    parts = {(name, source): rows(name, source) for name in spoken for source in pools}
    parts |= {(name, NEW_LANGUAGE): rows(name, UNSEEN) for name in new}
    clients = partition_pools(parts, np.asarray(table["label"][:]), partition)
    return ClientData(name, table, text_columns, "label", labels, clients, target_column)
