"""The paper's data sets by the real loading code, on small files laid out as on the hub."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedp2eft.data import registry
from fedp2eft.data.clients import ClientData
from fedp2eft.data.known import XNLI
from fedp2eft.data.partition import partition_pools
from fedp2eft.data.registry import load_clients
from fedp2eft.errors import UserError
from fedp2eft.settings.data import DataSettings

LABELS = datasets.ClassLabel(names=["entailment", "neutral", "contradiction"])
TOPICS = datasets.ClassLabel(
    names=["business", "entertainment", "health", "politics", "religion", "sports", "technology"]
)
SIZES = {"hau": (60, 13, 31), "lin": (27, 6, 22)}
"""MasakhaNEWS rows by language: train, validation, test."""


def write(path: Path, columns: dict[str, Any], label: datasets.ClassLabel) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = {name: datasets.Value("string") for name in columns if name != "label"}
    features = datasets.Features(kinds | {"label": label})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory):
    """XNLI with a configuration a language, MasakhaNEWS as the hub's own conversion to Parquet."""
    root = tmp_path_factory.mktemp("hub")
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    rng = np.random.default_rng(0)
    labels = {"train": rng.integers(0, 3, 500), "test": rng.integers(0, 3, 140)}
    card = ["---", "configs:"]
    for language in ("de", "fr", "sw"):
        card += [f"- config_name: {language}", "  data_files:"]
        for split, values in labels.items():
            columns = {
                "premise": [f"{language} {split} {n}" for n in range(len(values))],
                "hypothesis": [f"h {n}" for n in range(len(values))],
                "label": values.tolist(),
            }
            write(root / "facebook/xnli" / language / f"{split}-0.parquet", columns, LABELS)
            card += [f"  - split: {split}", f"    path: {language}/{split}-*"]
    (root / "facebook/xnli/README.md").write_text("\n".join([*card, "---", ""]))
    for language, sizes in SIZES.items():
        for split, size in zip(("train", "validation", "test"), sizes, strict=True):
            columns = {
                "label": rng.integers(0, 7, size).tolist(),
                "headline": [f"h{n}" for n in range(size)],
                "text": [f"{language} {split} {n}" for n in range(size)],
                "headline_text": [f"h{n} {language} {split} {n}" for n in range(size)],
                "url": ["/news"] * size,
            }
            folder = root / "masakhane/masakhanews" / language / split
            write(folder / "0000.parquet", columns, TOPICS)
            (folder / "index.duckdb").write_bytes(b"not a table")
    load = datasets.load_dataset

    def from_disk(path: str, name: str | None = None, *, revision: str | None, **options: Any):
        wanted = "refs/convert/parquet" if "masakhanews" in path else None
        assert revision == wanted
        return load(str(root / path), name, cache_dir=str(root / "cache"), **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_dataset", from_disk)
        small = replace(XNLI, pool_train=120, pool_test=40)
        patch.setitem(registry.KNOWN, "xnli", small)
        yield
    if bars:
        datasets.enable_progress_bars()


def xnli(**changes: Any) -> ClientData:
    options: dict[str, Any] = {"languages": ["de", "fr"], "clients_per_language": 5}
    return load_clients(DataSettings("xnli", **(options | changes)))


def texts(federation: ClientData, rows: Any) -> list[str]:
    return federation.rows(rows)[federation.text_columns[0]]


def check(federation: ClientData) -> None:
    """No row twice, no train row in a test, each client its own language, pools disjoint."""
    used = np.concatenate([part for c in federation.clients for part in (c.train, c.test)])
    assert len(np.unique(used)) == len(used)
    for client in federation.clients:
        for part, splits in ((client.train, {"train", "validation"}), (client.test, {"test"})):
            words = [text.split() for text in texts(federation, part)]
            assert {word[-3] for word in words} == {client.language}
            assert {word[-2] for word in words} <= splits


@pytest.mark.parametrize("kind", ["per-pool", "reference"])
def test_xnli(hub: None, kind: str):
    federation = xnli(new_languages=["sw"], partition=kind)
    assert len(federation.clients) == (2 * 2 + 1) * 5
    assert {(len(c.train), len(c.test)) for c in federation.clients} == {(24, 8)}
    assert federation.labels == tuple(LABELS.names)
    check(federation)
    # no sentence is seen in one language and unseen in another
    sentences: dict[bool, set[str]] = {True: set(), False: set()}
    for client in federation.clients:
        rows = [*client.train, *client.test]
        sentences[client.pool == "seen"] |= {t.split(" ", 1)[1] for t in texts(federation, rows)}
    assert not sentences[True] & sentences[False]


def test_xnli_reference_repeats_the_seen_partition(hub: None):
    federation = xnli(new_languages=["sw"], partition="reference")
    ids: dict[tuple[str, str], list[list[str]]] = {}
    for client in federation.clients:
        own = [text.split(" ", 1)[1] for text in texts(federation, client.train)]
        ids.setdefault((client.language, client.pool), []).append(own)
    assert ids["de", "seen"] == ids["fr", "seen"]
    assert ids["de", "unseen"] == ids["fr", "unseen"] == ids["sw", "new-language"]
    whole = xnli(partition="reference", languages=["fr"])
    for client in whole.clients:
        [same] = [c for c in federation.clients if c.name == client.name]
        assert texts(whole, client.train) == texts(federation, same.train)
    other = xnli()
    german = [texts(other, c.train) for c in other.clients if c.name.startswith("de-seen")]
    french = [texts(other, c.train) for c in other.clients if c.name.startswith("fr-seen")]
    assert [[t[2:] for t in part] for part in german] != [[t[2:] for t in part] for part in french]


def test_only_xnli_has_a_reference_partition():
    for name in ("masakhanews", "debian-descriptions", "files", "hub"):
        with pytest.raises(UserError, match=r"ignores data\.partition"):
            load_clients(DataSettings(name, partition="reference"))


def test_masakhanews(hub: None):
    federation = load_clients(DataSettings("masakhanews", languages=["hau", "lin"]))
    check(federation)
    assert federation.labels == tuple(TOPICS.names)
    for language, (train, validation, test) in SIZES.items():
        for pool, rows, held in (
            ("seen", (train + validation) // 2, test // 2),
            ("unseen", (train + validation + 1) // 2, (test + 1) // 2),
        ):
            mine = [c for c in federation.clients if (c.language, c.pool) == (language, pool)]
            assert {(len(c.train), len(c.test)) for c in mine} == {(rows // 5, held // 5)}
            assert len(mine) == 5
    trained = [text for c in federation.clients for text in texts(federation, c.train)]
    assert any(" validation " in text for text in trained)  # both splits are trained on
    words = [text.split() for text in trained]
    assert all(first == f"h{last}" for first, *_, last in words)  # headline, then text


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(["per-pool", "reference"]),
    *[st.integers(1, 6)] * 2,
    *[st.integers(6, 60)] * 2,
    st.integers(1, 6),
    st.floats(0.05, 10),
    st.integers(0, 99),
)
def test_invariants(
    kind: Any,
    languages: int,
    kinds: int,
    train: int,
    test: int,
    clients: int,
    alpha: float,
    seed: int,
):
    """Whatever the sizes: equal clients, rows at most once and in their pool, a seed one split."""
    labels, pools, at = [], {}, 0
    common = np.random.default_rng(seed).integers(0, kinds, train + test)
    for number in range(languages):
        for pool in ("seen", "unseen") if number else ("seen", "unseen", "new-language"):
            rows = np.arange(at, at + train + test)
            pools[f"l{number}", pool] = (rows[:train], rows[train:])
            labels.append(np.roll(common, 0 if pool == "seen" else 1))
            at += train + test
    names = np.concatenate(labels)
    how = DataSettings(clients_per_language=clients, alpha=alpha, seed=seed, partition=kind)
    split: Callable[[], Any] = partial(partition_pools, pools, names, how)
    made = split()
    assert len(made) == len(pools) * clients
    assert {(len(c.train), len(c.test)) for c in made} == {(train // clients, test // clients)}
    used = np.concatenate([part for c in made for part in (c.train, c.test)])
    assert len(np.unique(used)) == len(used)
    for client in made:
        own, held = pools[client.language, client.pool]
        assert np.isin(client.train, own).all()
        assert np.isin(client.test, held).all()
    for one, other in zip(made, split(), strict=True):
        np.testing.assert_array_equal(one.train, other.train)
        np.testing.assert_array_equal(one.test, other.test)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["per-pool", "reference"]),
    st.integers(2, 5),
    st.integers(2, 6),
    st.sampled_from([0.1, 0.5, 5.0]),
    st.integers(0, 99),
)
def test_train_and_test_have_the_same_labels(
    kind: Any, kinds: int, clients: int, alpha: float, seed: int
):
    """With rows of every label to spare, a seen client's two parts differ by rounding alone."""
    rows, held = 40 * clients * kinds, 20 * clients * kinds
    labels = np.tile(np.concatenate([np.arange(rows) % kinds, np.arange(held) % kinds]), 2)
    pools = {
        (language, "seen"): (at + np.arange(rows), at + rows + np.arange(held))
        for at, language in ((0, "de"), (rows + held, "fr"))
    }
    limits = {"max_train": 40, "max_test": 20}
    for client in partition_pools(
        pools,
        labels,
        DataSettings(
            clients_per_language=clients, alpha=alpha, seed=seed, partition=kind, **limits
        ),
    ):
        share = np.bincount(labels[client.train], minlength=kinds) / 40
        test_share = np.bincount(labels[client.test], minlength=kinds) / 20
        assert np.abs(share - test_share).max() < 1 / 20


def test_reference_leaves_unseen_clients_nearly_alike():
    """Positions drawn for the seen labels mean nothing to the unseen pool's."""
    rng = np.random.default_rng(0)
    rows, held = np.arange(2000), np.arange(500)
    labels = rng.integers(0, 3, 5000)
    pools = {
        ("de", "seen"): (rows, 2000 + held),
        ("de", "unseen"): (2500 + rows, 4500 + held),
    }

    def skew(kind: Any, pool: str) -> float:
        made = partition_pools(pools, labels, DataSettings(clients_per_language=20, partition=kind))
        mine = [client for client in made if client.pool == pool]
        return float(np.mean([np.bincount(labels[c.train]).max() / len(c.train) for c in mine]))

    assert skew("reference", "seen") > 0.5
    assert skew("reference", "unseen") < 0.45
    assert skew("per-pool", "unseen") > 0.5


@pytest.mark.parametrize(
    ("pools", "message"),
    [
        ({("de", "unseen"): (6, 6)}, "is drawn from a seen pool"),
        (
            {("de", "seen"): (6, 6), ("fr", "seen"): (6, 5)},
            r"fr, seen has 6 train and 5 test rows, de, seen has 6 and 6\. Set data\.partition",
        ),
        ({("de", "seen"): (2, 6)}, "de, seen pool: 2 train rows cannot be split over 3"),
    ],
)
def test_impossible_reference_partitions_are_refused(pools: Any, message: str):
    rows = {pool: (np.arange(n), 10 + np.arange(m)) for pool, (n, m) in pools.items()}
    with pytest.raises(UserError, match=message):
        partition_pools(
            rows, np.zeros(20), DataSettings(clients_per_language=3, partition="reference")
        )


def test_new_language_clients_of_the_shipped_data_have_equal_sizes():
    federation = load_clients(
        DataSettings(languages=["de", "ru"], new_languages=["ko", "uk", "zh_CN"])
    )
    new = federation.pool("new-language")
    assert {client.language for client in new} == {"ko", "uk", "zh_CN"}
    for language in ("ko", "uk", "zh_CN"):
        mine = [client for client in new if client.language == language]
        assert len(mine) == 5
        assert len({(len(client.train), len(client.test)) for client in mine}) == 1
        assert all(len(client.train) and len(client.test) for client in mine)
