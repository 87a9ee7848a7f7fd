"""Label shift: the distance between the distributions of a client's test and train labels."""

import logging
from collections import defaultdict
from statistics import fmean

import numpy as np

from fedp2eft.data.clients import POOLS, ClientData

MOST = 0.15
"""Mean total variation of a pool's clients above which loading warns; rounding alone gives less."""

logger = logging.getLogger(__name__)


def label_shift(data: ClientData) -> dict[str, float]:
    """Return ½ Σ_y |train share of y − test share of y| by client: the total variation, 0 to 1.

    Clients without train or test rows are left out, and all where there are no classes.
    """
    found = {}
    for client in data.clients if data.label_column else ():
        if len(client.train) and len(client.test):
            train, test = (
                np.bincount(data.label_ids(part), minlength=len(data.labels)) / len(part)
                for part in (client.train, client.test)
            )
            found[client.name] = float(np.abs(train - test).sum() / 2)
    return found


def warn_of_label_shift(data: ClientData) -> None:
    """Warn of each pool whose partition gave clients other test labels than train labels."""
    shift = label_shift(data)
    for pool in POOLS:
        by_language: dict[str, list[float]] = defaultdict(list)
        for client in data.pool(pool):
            if client.name in shift:
                by_language[client.language].append(shift[client.name])
        every = [value for values in by_language.values() for value in values]
        if every and fmean(every) > MOST:
            means = {language: fmean(values) for language, values in by_language.items()}
            worst = sorted(means, key=lambda language: -means[language])[:3]
            named = ", ".join(f"{language} {means[language]:.2f}" for language in worst)
            logger.warning(
                "The %s clients' test labels are distributed differently from their train labels: "
                "mean total variation %.2f, largest %.2f (%s): some labels have too few test "
                "rows. Set data.proportions: both, or lower data.max_test; leave out languages "
                "where that does not help.",
                pool, fmean(every), max(every), named,
            )  # fmt: skip
