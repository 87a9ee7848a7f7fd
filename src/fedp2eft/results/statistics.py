"""Intervals: over seeds with Student's t, over clients with a paired bootstrap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import sqrt
from statistics import NormalDist, fmean, stdev

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
# The 97.5 % quantile of Student's t for 1 to 10 degrees of freedom.
_T = (12.7062, 4.30265, 3.18245, 2.77645, 2.57058, 2.44691, 2.36462, 2.30600, 2.26216, 2.22814)


def t_quantile(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t, right to four digits.

    Above 10 degrees of freedom by the expansion around the normal quantile z in 1 / freedom
    (Abramowitz & Stegun 26.7.5).

    Args:
        freedom: Degrees of freedom, 1 or more.
    """
    if freedom <= len(_T):
        return _T[freedom - 1]
    z = NormalDist().inv_cdf(0.975)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / float(freedom) ** power for power, term in enumerate(terms))


@dataclass(frozen=True)
class Estimate:
    """A value measured once per seed.

    Args:
        mean: Mean over the seeds.
        half_width: Half the 95 % confidence interval of the mean: t · s / √n; None with one seed.
        seeds: The value by seed.
    """

    mean: float
    half_width: float | None
    seeds: dict[int, float]


def estimate(seeds: Mapping[int, float]) -> Estimate | None:
    """Return mean and interval over seeds; None without a value."""
    if not seeds:
        return None
    values = [seeds[seed] for seed in sorted(seeds)]
    n = len(values)
    half = t_quantile(n - 1) * stdev(values) / sqrt(n) if n > 1 else None
    return Estimate(fmean(values), half, {seed: seeds[seed] for seed in sorted(seeds)})


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval; `low` and `high` are None where there can be none."""

    value: float
    low: float | None
    high: float | None


def language_mean(
    sums: NDArray[np.float64], units: NDArray[np.float64], languages: Sequence[str]
) -> float:
    """Return the mean over seeds of the plain mean over the seed's languages, each pooled.

    Arguments are those of `paired_difference`.
    """
    return _mean(_parts(sums, units, languages), len(sums))


def _mean(parts: Sequence[NDArray[np.float64]], seeds: int) -> float:
    return float(np.mean([part.sum() for part in parts])) / seeds


def _parts(
    sums: NDArray[np.float64], units: NDArray[np.float64], languages: Sequence[str]
) -> list[NDArray[np.float64]]:
    """Return each client's part of its language's mean, by language; `_mean` adds them up.

    A seed with fewer languages than there are in all gives each of them more weight.
    """
    names = np.asarray(languages)
    groups = [np.flatnonzero(names == name) for name in sorted(set(languages))]
    pooled = np.stack([units[:, g].sum(axis=1) for g in groups], axis=1)
    weights = len(groups) / (pooled > 0).sum(axis=1)
    parts = []
    for group, rows in zip(groups, pooled.T, strict=True):
        share = weights[:, None] * sums[:, group] / np.maximum(rows, 1)[:, None]
        parts.append(share[units[:, group] > 0])
    return parts


def paired_difference(
    mine: NDArray[np.float64],
    theirs: NDArray[np.float64],
    units: NDArray[np.float64],
    languages: Sequence[str],
    seed: int,
) -> Interval:
    """Return one method's metric less another's on the same clients and test rows.

    The value is the mean over seeds of the plain mean over the seed's languages of the difference
    between the two, each pooled over the language's test rows.

    The interval is the 2.5 % to 97.5 % range of that value over 10,000 resamples. What is resampled
    are clients, within each language. A client is one of one seed: every seed draws the partition
    anew, so the same name under two seeds is two clients. Of a language with n of them, n - 1 are
    drawn with replacement and their sum is taken n / (n - 1) times (so that the spread of the
    resamples is that of the mean of n clients also where n is small: Rao and Wu, JASA 1988). A
    client that is drawn brings the difference between both methods on its own test rows: the
    comparison is paired. Languages, the rows of a client and what was trained on a seed are not
    resampled, so the interval is about other clients of these languages. There is none where a
    language has a single client in all.

    Args:
        mine: What the method sums up: rows classified right, or nats; shape (seeds, clients).
        theirs: The same for the other method.
        units: Of what it is a mean: test rows, or response tokens; same shape. 0: the client is not
            among the seed's; each seed has at least one.
        languages: Language of every client, length clients.
        seed: Seed of the resampling.
    """
    parts = _parts(mine - theirs, units, languages)
    value = _mean(parts, len(mine))
    sizes = tuple(len(part) for part in parts)
    if min(sizes) < 2:
        return Interval(value, None, None)
    drawn = [
        times @ part * (len(part) / (len(part) - 1))
        for part, times in zip(parts, _draws(sizes, seed), strict=True)
    ]
    values = np.mean(drawn, axis=0) / len(mine)
    low, high = np.quantile(values, [0.025, 0.975])
    return Interval(value, float(low), float(high))


@lru_cache(maxsize=8)
def _draws(sizes: tuple[int, ...], seed: int) -> list[NDArray[np.float64]]:
    """Return how often each client is drawn, per language: resamples × clients, per pool."""
    rng = np.random.default_rng(seed)
    return [
        rng.multinomial(size - 1, [1 / size] * size, size=RESAMPLES).astype(np.float64)
        for size in sizes
    ]
