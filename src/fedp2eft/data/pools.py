"""Clients of a table that has its own pools and splits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fedp2eft.data.clients import NEW_LANGUAGE, SEEN, UNSEEN, ClientData, Indices
from fedp2eft.data.languages import choose_languages, new_languages_of
from fedp2eft.data.partition import distinct, partition_pools
from fedp2eft.settings.data import DataSettings

if TYPE_CHECKING:
    from datasets import Dataset


def clients_of_pools(
    name: str,
    table: Dataset,
    known: Sequence[str],
    settings: DataSettings,
    *,
    text_columns: tuple[str, ...],
    labels: tuple[str, ...],
    target_column: str | None,
) -> ClientData:
    """Split each language's pool over its clients by label; row indices refer to `table`.

    Args:
        name: the data set's name.
        table: has columns `language`, `pool` (seen or unseen), `split` (train or test) and `label`.
        known: its languages.
        settings: which languages, and how their pools are split.
        text_columns: see `ClientData`.
        labels: see `ClientData`.
        target_column: see `ClientData`.

    Raises:
        UserError: an unknown language, a language in both lists, or too many clients.
    """
    spoken, new = choose_languages(
        name, known, settings.languages, new_languages_of(name, known, settings)
    )
    texts = [table[column][:] for column in text_columns] if settings.unique else []
    language, pool, split = (np.asarray(table[c][:]) for c in ("language", "pool", "split"))

    def rows(name: str, source: str) -> tuple[Indices, Indices]:
        mine = (language == name) & (pool == source)
        train, test = (np.flatnonzero(mine & (split == part)) for part in ("train", "test"))
        if settings.unique:
            train, test = distinct(texts, train, test)
        return train, test

    parts = {(name, source): rows(name, source) for name in spoken for source in (SEEN, UNSEEN)}
    parts |= {(name, NEW_LANGUAGE): rows(name, UNSEEN) for name in new}
    clients = partition_pools(parts, np.asarray(table["label"][:]), settings)
    return ClientData(name, table, text_columns, "label", labels, clients, target_column)
