"""Who gets which rows: the Dirichlet split of a pool over its clients, and held-out rows.

The protocol is the paper's (arXiv 2502.04387, experimental setup): a language's pool is split over
clients of equal size, label proportions drawn from a Dirichlet distribution with alpha = 0.5.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedp2eft.data.allocation import allocate, fit_to_both
from fedp2eft.data.clients import SEEN, Client, ClientData, Indices
from fedp2eft.errors import UserError
from fedp2eft.settings.data import DataSettings, Proportions


def rng_for(seed: int, *key: str) -> np.random.Generator:
    """Return a generator that depends on `seed` and `key` alone, on any machine."""
    digest = hashlib.sha256("\x1f".join([str(seed), *key]).encode()).digest()
    return np.random.default_rng(np.random.SeedSequence(int.from_bytes(digest, "big")))


def dirichlet_partition(
    train_labels: ArrayLike,
    test_labels: ArrayLike,
    clients: int,
    alpha: float,
    rng: np.random.Generator,
    *,
    max_train: int | None = None,
    max_test: int | None = None,
    proportions: Proportions = "train",
) -> list[tuple[Indices, Indices]]:
    """Split a pool over clients of equal size whose label proportions differ.

    Every client gets floor(N / clients) train rows and floor(M / clients) test rows, and no row
    goes to two clients. For each client, proportions over the labels are drawn once from
    Dirichlet(alpha, ..., alpha). Its train part holds these proportions times its size, rounded;
    its test part is rounded likewise from the proportions that its train part came out with, so
    train and test agree also where a label ran short.

    Shortage: where the clients together ask for more rows of a label than there are, `allocate`
    scales that label down alike for all of them and their other labels up. No client is served
    before another, so none is left with what nobody else wanted. Where the test rows alone run
    short, the test parts differ from the train parts, unless `proportions` is "both": the drawn
    proportions are then fitted to what train and test rows can both give before rows are dealt.

    Args:
        train_labels: label of every train row of the pool, shape (N,).
        test_labels: label of every test row of the pool, shape (M,).
        clients: how many clients share the pool.
        alpha: concentration: small is skewed, large is alike.
        rng: the only source of chance; the same state gives the same split.
        max_train: at most this many train rows per client.
        max_test: at most this many test rows per client.
        proportions: "train" or "both"; the split is the same where no test rows run short.

    Returns:
        (train positions, test positions) per client, each ascending, into `train_labels` and
        `test_labels`.

    Raises:
        UserError: fewer train or test rows than clients, or an argument that is not positive.
    """
    train, test = np.asarray(train_labels), np.asarray(test_labels)
    _check_positive("clients", clients)
    _check_positive("alpha", alpha)
    train_size = _client_size("train", len(train), clients, max_train)
    test_size = _client_size("test", len(test), clients, max_test)
    labels, codes = np.unique(np.concatenate([train, test]), return_inverse=True)
    shares = rng.dirichlet(np.full(len(labels), float(alpha)), size=clients)
    train_stock = _stock(codes[: len(train)], len(labels), rng)
    test_stock = _stock(codes[len(train) :], len(labels), rng)
    counts = allocate(shares, _sizes(train_stock), train_size)
    asked = (counts / train_size * test_size).sum(axis=0)
    if proportions == "both" and (asked > _sizes(test_stock)).any():
        shares = fit_to_both(shares, _sizes(train_stock), _sizes(test_stock), train_size, test_size)
        counts = allocate(shares, _sizes(train_stock), train_size)
    test_counts = allocate(counts / train_size, _sizes(test_stock), test_size)
    return list(zip(_deal(train_stock, counts), _deal(test_stock, test_counts), strict=True))


def partition_pools(
    pools: Mapping[tuple[str, str], tuple[Indices, Indices]],
    labels: NDArray[Any],
    settings: DataSettings,
) -> tuple[Client, ...]:
    """Split several pools over their clients.

    Kind "per-pool" draws each pool's split from its own labels and a generator of its own: adding
    a pool changes no other. Kind "reference" does as the public implementation of the paper
    (arXiv 2502.04387) does for XNLI: one split is drawn from the labels of the first seen pool,
    and every pool is split at the same positions. Where row n has the same label in all languages
    the seen clients are as skewed as they are with "per-pool"; the unseen pool's rows have other
    labels at these positions, so the unseen clients' label proportions come out nearly alike.

    Args:
        pools: (language, pool) -> (train rows, test rows) of the table.
        labels: label of every row of the table, shape (rows of the table,).
        settings: how; clients are named `<language>-<pool>-<number>`.

    Raises:
        UserError: as `dirichlet_partition`, naming the language and the pool; for "reference" no
            seen pool, or pools of different sizes.
    """

    clients, kind = settings.clients_per_language, settings.partition

    def split(language: str, pool: str, *key: str) -> list[tuple[Indices, Indices]]:
        train, test = pools[language, pool]
        try:
            return dirichlet_partition(
                labels[train],
                labels[test],
                clients,
                settings.alpha,
                rng_for(settings.seed, *key),
                max_train=settings.max_train,
                max_test=settings.max_test,
                proportions=settings.proportions,
            )
        except UserError as error:
            raise UserError(f"{language}, {pool} pool: {error}") from None

    common = split(*_common_pool(pools), kind) if kind == "reference" else None
    width = max(2, len(str(clients - 1)))
    made = []
    for (language, pool), (train, test) in pools.items():
        parts = common or split(language, pool, language, pool)
        made += [
            Client(f"{language}-{pool}-{n:0{width}d}", language, pool, train[mine], test[held])
            for n, (mine, held) in enumerate(parts)
        ]
    return tuple(sorted(made, key=lambda client: client.name))


def _common_pool(pools: Mapping[tuple[str, str], tuple[Indices, Indices]]) -> tuple[str, str]:
    """Return the first seen pool at whose positions all others can be split too."""
    sizes = {pool: (len(train), len(test)) for pool, (train, test) in pools.items()}
    first = next((pool for pool in pools if pool[1] == SEEN), None)
    if first is None:
        raise UserError("A reference partition is drawn from a seen pool: name its languages.")
    for pool, size in sizes.items():
        if size != sizes[first]:
            raise UserError(
                f"A reference partition needs pools of equal size: {', '.join(pool)} has "
                f"{size[0]} train and {size[1]} test rows, {', '.join(first)} has "
                f"{sizes[first][0]} and {sizes[first][1]}. Set data.partition to per-pool."
            )
    return first


def local_validation_split(
    labels: Sequence[Any] | NDArray[Any], fraction: float, rng: np.random.Generator
) -> tuple[Indices, Indices]:
    """Hold out some of one client's rows, label by label, for choosing settings without its test.

    round(fraction * rows) rows are held out, at least one and never all, with the labels'
    proportions rounded by largest remainder. A single row, or a fraction of 0, holds out nothing.

    Args:
        labels: label of every row, shape (rows,).
        fraction: share to hold out, 0 <= fraction < 1.
        rng: the only source of chance.

    Returns:
        (kept positions, held-out positions), each ascending, into `labels`.

    Raises:
        UserError: `fraction` is outside its range.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"The share of held-out rows must be at least 0 and below 1: {fraction}.")
    values = np.asarray(labels)
    rows = len(values)
    if rows < 2 or fraction == 0:
        return np.arange(rows, dtype=np.int64), np.empty(0, dtype=np.int64)
    size = min(max(round(fraction * rows), 1), rows - 1)
    names, codes = np.unique(values, return_inverse=True)
    stock = _stock(codes, len(names), rng)
    [held] = _deal(stock, allocate(_sizes(stock)[None] / rows, _sizes(stock), size))
    return np.setdiff1d(np.arange(rows, dtype=np.int64), held), held


def distinct(
    texts: Sequence[Sequence[Any]], *parts: Indices, seen: set[str] | None = None
) -> list[Indices]:
    """Return the parts without those rows whose text an earlier row has, in them or before.

    Args:
        texts: one sequence per text column, indexed by row.
        parts: row indices, those to keep a text first.
        seen: texts that no part may have; those of the parts are added.
    """
    seen = set() if seen is None else seen
    kept: list[Indices] = []
    for part in parts:
        mine = []
        for row in part.tolist():
            text = repr([column[row] for column in texts])
            if text not in seen:
                seen.add(text)
                mine.append(row)
        kept.append(np.asarray(mine, dtype=np.int64))
    return kept


def _stock(codes: NDArray[np.int64], labels: int, rng: np.random.Generator) -> list[Indices]:
    """Return the rows of each label, in a drawn order."""
    return [rng.permutation(np.flatnonzero(codes == label)) for label in range(labels)]


def _sizes(stock: Sequence[Indices]) -> NDArray[np.int64]:
    return np.array([len(rows) for rows in stock], dtype=np.int64)


def _deal(stock: Sequence[Indices], counts: NDArray[np.int64]) -> list[Indices]:
    """Return each client's rows, ascending, for counts of shape (clients, labels)."""
    ends = counts.cumsum(axis=0)
    return [
        np.sort(
            np.concatenate(
                [
                    rows[end - count : end]
                    for rows, end, count in zip(stock, mine, wanted, strict=True)
                ]
            )
        ).astype(np.int64)
        for mine, wanted in zip(ends, counts, strict=True)
    ]


def _client_size(part: str, rows: int, clients: int, limit: int | None) -> int:
    if limit is not None:
        _check_positive(f"max_{part}", limit)
    if rows < clients:
        raise UserError(
            f"{rows} {part} rows cannot be split over {clients} clients: ask for fewer."
        )
    return rows // clients if limit is None else min(rows // clients, limit)


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise UserError(f"{name} must be above 0: {value}.")


def hold_out(data: ClientData, settings: DataSettings) -> ClientData:
    """Return the same clients, scored on held-out train rows; their test rows are left out."""
    clients = []
    for client in data.clients:
        labels = data.label_ids(client.train) if data.labels else client.train * 0
        rng = rng_for(settings.seed, "holdout", client.name)
        kept, held = local_validation_split(labels, settings.holdout, rng)
        clients.append(replace(client, train=client.train[kept], test=client.train[held]))
    return replace(data, clients=tuple(clients))
