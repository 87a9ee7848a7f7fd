"""Who gets which rows: the Dirichlet split of a pool over its clients, and held-out rows.

The protocol is the paper's (arXiv 2502.04387, experimental setup): a language's pool is split over
clients of equal size, label proportions drawn from a Dirichlet distribution with alpha = 0.5.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedp2eft.data.federation import Client, Rows
from fedp2eft.errors import UserError


def rng_for(seed: int, *key: str) -> np.random.Generator:
    """A generator that depends on `seed` and `key` alone, on any machine and in any order."""
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
) -> list[tuple[Rows, Rows]]:
    """Split a pool over clients of equal size whose label proportions differ.

    Every client gets floor(N / clients) train rows and floor(M / clients) test rows, and no row
    goes to two clients. For each client, proportions over the labels are drawn once from
    Dirichlet(alpha, ..., alpha). Its train part holds these proportions times its size, rounded by
    largest remainder; its test part is rounded likewise from the proportions that its train part
    came out with, so train and test agree also where a label ran short.

    Shortage: clients are served in order. Where fewer rows of a label are left than a client
    should get, it gets all that are left, and what is missing is shared over the labels that still
    have rows, in the client's own proportions; once none of the client's labels has rows left, in
    the proportions of what is left. The last clients therefore take what the others left over,
    which is the less so the more rows remain unused (`max_train`, `max_test`).

    Args:
        train_labels: label of every train row of the pool, shape (N,).
        test_labels: label of every test row of the pool, shape (M,).
        clients: how many clients share the pool.
        alpha: concentration: small is skewed, large is alike.
        rng: the only source of chance; the same state gives the same split.
        max_train: at most this many train rows a client.
        max_test: at most this many test rows a client.

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
    proportions = rng.dirichlet(np.full(len(labels), float(alpha)), size=clients)
    train_stock = _Stock(codes[: len(train)], len(labels), rng)
    test_stock = _Stock(codes[len(train) :], len(labels), rng)
    parts = []
    for wanted in proportions:
        counts = _quota(wanted, train_stock.left, train_size)
        test_counts = _quota(counts / train_size, test_stock.left, test_size)
        parts.append((train_stock.take(counts), test_stock.take(test_counts)))
    return parts


def partition_pools(
    pools: Mapping[tuple[str, str], tuple[Rows, Rows]],
    labels: NDArray[Any],
    *,
    clients: int,
    alpha: float,
    seed: int,
    max_train: int | None = None,
    max_test: int | None = None,
) -> tuple[Client, ...]:
    """Split several pools, each from a generator of its own: adding one changes no other.

    Args:
        pools: (language, pool) -> (train rows, test rows) of the table.
        labels: label of every row of the table, shape (rows of the table,).
        clients: clients per pool, named `<language>-<pool>-<number>`.
        alpha: see `dirichlet_partition`.
        seed: with the language and the pool's name it seeds the pool's generator.
        max_train: see `dirichlet_partition`.
        max_test: see `dirichlet_partition`.

    Raises:
        UserError: as `dirichlet_partition`, naming the language and the pool.
    """
    width = max(2, len(str(clients - 1)))
    made = []
    for (language, pool), (train, test) in pools.items():
        try:
            parts = dirichlet_partition(
                labels[train],
                labels[test],
                clients,
                alpha,
                rng_for(seed, language, pool),
                max_train=max_train,
                max_test=max_test,
            )
        except UserError as error:
            raise UserError(f"{language}, {pool} pool: {error}") from None
        made += [
            Client(f"{language}-{pool}-{n:0{width}d}", language, pool, train[mine], test[held])
            for n, (mine, held) in enumerate(parts)
        ]
    return tuple(sorted(made, key=lambda client: client.name))


def local_validation_split(
    labels: Sequence[Any] | NDArray[Any], fraction: float, rng: np.random.Generator
) -> tuple[Rows, Rows]:
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
    stock = _Stock(codes, len(names), rng)
    held = stock.take(_quota(stock.left / rows, stock.left, size))
    return np.setdiff1d(np.arange(rows, dtype=np.int64), held), held


class _Stock:
    """The rows not yet given away, by label, each label's in an order drawn at the start."""

    def __init__(self, codes: NDArray[np.int64], labels: int, rng: np.random.Generator) -> None:
        self.rows = [rng.permutation(np.flatnonzero(codes == label)) for label in range(labels)]
        self.left = np.array([len(rows) for rows in self.rows], dtype=np.int64)

    def take(self, counts: NDArray[np.int64]) -> Rows:
        """Give away `counts[label]` rows of each label, shape (labels,)."""
        taken = [
            rows[left - count : left]
            for rows, left, count in zip(self.rows, self.left, counts, strict=True)
        ]
        self.left = self.left - counts
        return np.sort(np.concatenate(taken)).astype(np.int64)


def _quota(wanted: NDArray[np.float64], left: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Rows of each label, shape (labels,): `size` in all, near `wanted`, at most `left`."""
    counts = np.zeros(len(left), dtype=np.int64)
    while (missing := size - int(counts.sum())) > 0:
        room = left - counts
        weight = np.where(room > 0, wanted, 0.0)
        if weight.sum() <= 0:
            weight = room.astype(np.float64)
        # Either this hands out all that is missing, or it empties a label: the loop ends.
        counts += np.minimum(_largest_remainder(weight / weight.sum(), missing), room)
    return counts


def _largest_remainder(share: NDArray[np.float64], size: int) -> NDArray[np.int64]:
    """Whole numbers near `share * size` that sum to `size`; ties go to the earlier label."""
    exact = share * size
    counts = np.floor(exact).astype(np.int64)
    first = np.argsort(counts - exact, kind="stable")[: size - int(counts.sum())]
    counts[first] += 1
    return counts


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
