"""How many rows of each label every client gets, when there are only so many of each."""

import numpy as np
from numpy.typing import NDArray

_TOLERANCE = 1e-3
_STEPS = 300


def allocate(wanted: NDArray[np.float64], stock: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Return whole numbers of rows, `size` per client, near the wanted shares and within stock.

    Where `wanted * size` asks for more of no label than there is, it is only rounded. Else the
    shares are fitted first: a label that runs short is scaled down alike for all clients, and each
    client's other labels are scaled up to fill the gap, until sizes and stock both hold: the
    allocation nearest to the wanted shares in Kullback-Leibler divergence, where the scaling
    settles (with a tiny alpha it may not: then stock comes before nearness). No client is served
    before another. Then every number is rounded down, and the rows still missing go to the largest
    remainders first.

    Args:
        wanted: each client's shares over the labels, shape (clients, labels), rows sum to 1.
        stock: rows there are of each label, shape (labels,), sum at least `clients * size`.
        size: rows for each client.

    Returns:
        Rows of each label for each client, shape (clients, labels): rows sum to `size`, columns
        to at most `stock`.
    """
    exact = _fit(wanted, stock.astype(np.float64), size)
    # The tolerance keeps 3.0 from becoming 2 where the arithmetic said 2.9999999.
    counts = np.floor(exact + 1e-9).astype(np.int64)
    for label in np.flatnonzero(counts.sum(axis=0) > stock).tolist():
        # The scaling stopped above the stock: take back where rounding down cost least.
        for _ in range(int(counts[:, label].sum() - stock[label])):
            cost = np.where(counts[:, label] > 0, exact[:, label] - counts[:, label], np.inf)
            counts[np.argmin(cost), label] -= 1
    missing, room = size - counts.sum(axis=1), stock - counts.sum(axis=0)
    for cell in np.argsort((counts - exact).ravel(), kind="stable"):
        client, label = divmod(int(cell), len(stock))
        if missing[client] > 0 and room[label] > 0 and exact[client, label] > counts[client, label]:
            counts[client, label] += 1
            missing[client] -= 1
            room[label] -= 1
    for client in np.flatnonzero(missing > 0).tolist():
        # What rounding has left over: the label with the largest remainder that still has rows.
        for _ in range(int(missing[client])):
            spare = np.argmax(np.where(room > 0, exact[client] - counts[client], -np.inf))
            counts[client, spare] += 1
            room[spare] -= 1
    return counts


def fit_to_both(
    wanted: NDArray[np.float64],
    train_stock: NDArray[np.int64],
    test_stock: NDArray[np.int64],
    train_size: int,
    test_size: int,
) -> NDArray[np.float64]:
    """Return shares near the wanted ones that the train and the test rows can both give.

    A label has room for as many clients as the scarcer of its two stocks has: the smaller one of
    `train_stock / train_size` and `test_stock / test_size`. Shares are fitted to that as in
    `allocate`. Where there is not room for all clients, since labels are distributed differently in
    the two stocks, it is raised by the same factor for every label.

    Args:
        wanted: each client's shares over the labels, shape (clients, labels), rows sum to 1.
        train_stock: train rows of each label, shape (labels,).
        test_stock: test rows of each label, shape (labels,).
        train_size: train rows for each client.
        test_size: test rows for each client.

    Returns:
        Shares, shape (clients, labels), rows sum to 1.
    """
    room = np.minimum(train_stock / train_size, test_stock / test_size)
    if not room.any():  # no label has both train and test rows
        return wanted
    room *= max(1.0, len(wanted) / room.sum())
    return _fit(wanted, room * test_size, test_size) / test_size


def _fit(wanted: NDArray[np.float64], stock: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Scale clients and labels in turn until each client has `size` and no label is overdrawn."""
    clients = len(wanted)
    # A trace of every label, so that any stock can be given away even if nobody asked for it.
    shares = (1 - 1e-6) * wanted + 1e-6 * stock / stock.sum()
    by_label = np.ones(len(stock))
    exact: NDArray[np.float64] = shares * size
    for _ in range(_STEPS):
        drawn = exact.sum(axis=0)
        if (drawn <= stock + _TOLERANCE).all():
            break
        # Never above 1: a label that is not short is not pushed onto anyone.
        by_label = np.minimum(by_label * stock / np.maximum(drawn, 1e-300), 1.0)
        exact = shares * by_label
        exact *= (size / exact.sum(axis=1)).reshape(clients, 1)
    return exact
