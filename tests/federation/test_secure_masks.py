"""Numbers, keys and masks of secure sums: right to half a step, and nothing else to be seen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from summing import QUESTION, Federation, close, dropping, few, secure
from summing import of as summing_settings

from fedp2eft.errors import ShareableError, UserError
from fedp2eft.federation.client import sums as client_sums
from fedp2eft.federation.wire.keys import UNMASK, neighbors, threshold
from fedp2eft.federation.wire.messages import ARRAYS
from fedp2eft.federation.wire.sums import LEAST_STEPS, Block, add_mask, keystream
from fedp2eft.settings.experiment import FederationSettings
from fedp2eft.settings.peers import AggregationSettings, PeerSettings

# ── numbers ─────────────────────────────────────────────────────────────────────────────────────


@given(
    st.integers(3, 2000), st.floats(1e-6, 1e6), st.sampled_from([32, 64]),
    st.lists(st.floats(-2, 2), min_size=1, max_size=9),
)  # fmt: skip
def test_no_sum_overflows_and_all_are_right_to_half_a_step(clients, limit, bits, shares) -> None:
    """Also of the largest values, and of values beyond the limit, which are cut."""
    block = Block((len(shares),), limit, bits)
    values = np.array(shares) * limit
    part, cut = block.encode(values, clients)
    total = np.zeros_like(part)
    for _ in range(min(clients, 50)):
        total += part
    rest = part.astype(object) * (clients - min(clients, 50))  # exact integers
    total = ((total.astype(object) + rest) % 2**bits).astype(part.dtype)
    wanted = np.clip(values, -limit, limit) * clients
    bound = clients / block.scale(clients) / 2 + 1e-12 * abs(wanted).max()
    np.testing.assert_allclose(block.decode(total, clients), wanted, rtol=0, atol=bound)
    assert cut == (abs(values) > limit).sum()


def test_whole_numbers_are_exact() -> None:
    block = Block((3,), 2.0**20)
    parts = [block.encode([i, 7 * i, -i], 100)[0] for i in range(100)]
    assert block.decode(sum(parts), 100).tolist() == [4950, 34650, -4950]


def test_too_many_clients_for_the_modulus_are_an_error() -> None:
    most = (2**31 - 1) // LEAST_STEPS
    assert Block((1,), 1.0, 32).scale(most) == LEAST_STEPS
    with pytest.raises(UserError, match=r"raise privacy.secure_bits"):
        Block((1,), 1.0, 32).scale(most + 1)


@pytest.mark.parametrize("bad", [[np.nan], [np.inf], [1.0, 2.0]])
def test_what_is_no_number_is_not_sent(bad) -> None:
    with pytest.raises(ShareableError, match="NaN or infinity, or has other shapes"):
        Block((1,), 1.0).encode(bad, 3)


# ── what the server sees ────────────────────────────────────────────────────────────────────────


def bytes_that_arrive(folder: Path) -> np.ndarray:
    """All masked values that a server received in a sum of zeros."""
    layout = {"w": Block((4000,), 1.0, 32), "n": Block((500,), 1.0)}
    federation = Federation(folder, [{"w": np.zeros(4000), "n": np.zeros(500)}] * 4, layout)
    found = federation.sum()
    assert not found.values["w"].any()
    raw = [
        array.numpy().tobytes()
        for _, message, reply in federation.grid.arrived
        if message.metadata.message_type == QUESTION
        for array in reply.content.array_records[ARRAYS].values()
    ]
    return np.frombuffer(b"".join(raw), np.uint8)


def uniform(found: np.ndarray) -> float:
    """p of the bytes being uniform."""
    return float(chisquare(np.bincount(found, minlength=256)).pvalue)


def test_masked_numbers_are_uniform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros of every client arrive as any other bytes; without masks they would be seen."""
    assert uniform(bytes_that_arrive(tmp_path)) > 1e-6
    monkeypatch.setattr(client_sums, "add_mask", lambda *_: None)
    with pytest.raises((AssertionError, UserError)):
        bytes_that_arrive(tmp_path)  # unmasking what was not masked gives no sum
    from fedp2eft.federation.server import sums as server_sums

    monkeypatch.setattr(server_sums, "add_mask", lambda *_: None)
    assert uniform(bytes_that_arrive(tmp_path)) < 1e-6


def test_each_client_has_masks_of_its_own_and_new_ones_each_time(tmp_path: Path) -> None:
    federation = Federation(tmp_path, [{"w": np.zeros(50)}] * 4, {"w": Block((50,), 1.0)})
    for _ in range(2):
        federation.sum()
    sent = [
        reply.content.array_records[ARRAYS]["w"].numpy()
        for _, message, reply in federation.grid.arrived
        if message.metadata.message_type == QUESTION
    ]
    every = np.concatenate(sent)
    assert len(set(every.tolist())) == 8 * 50
    for left in range(4):  # nor do the own masks of two clients, or two sums, cancel
        assert (sent[left] - sent[left + 4]).any()


@pytest.mark.parametrize("bits", [32, 64])
def test_masks_cancel_and_differ_by_array(bits: int) -> None:
    kind = np.dtype(f"<u{bits // 8}")
    zeros = {"a": np.zeros(5, kind), "b": np.zeros((2, 3), kind)}
    add_mask(zeros, b"k" * 32, 1)
    assert not set(zeros["a"].tolist()) & set(zeros["b"].ravel().tolist())
    add_mask(zeros, b"k" * 32, -1)
    assert not zeros["a"].any()
    assert not zeros["b"].any()
    assert keystream(b"k" * 32, 0, 8) != keystream(b"k" * 32, 1, 8)


def test_the_server_gets_shares_of_one_secret_of_each_client(tmp_path: Path) -> None:
    """Seeds of those in the sum, mask keys of those that dropped out after sharing."""
    federation = few(tmp_path, 6)
    federation.grid.fate = dropping({"c01": QUESTION, "c02": UNMASK})
    close(federation, federation.sum())
    for name in ("c00", "c03", "c04", "c05"):
        record = federation.record(name, UNMASK)
        assert len(record["seeds"]) == 5
        assert len(record["keys"]) == 1


# ── keys and settings ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("clients", "wide"), [(5, 32), (40, 8), (9, 8), (10, 8)])
def test_neighbors_are_mutual_and_as_many_as_asked(clients: int, wide: int) -> None:
    s = secure(secure_neighbors=wide)
    near = [neighbors(i, s, clients) for i in range(clients)]
    for i, mine in enumerate(near):
        assert len(set(mine)) == len(mine) == min(wide, clients - 1)
        assert i not in mine
        assert all(i in near[other] for other in mine)
    assert 2 * threshold(s, clients) > min(wide, clients - 1) + 1


def test_the_threshold_is_a_share_of_the_neighbors() -> None:
    assert threshold(secure(), 5) == 3
    assert threshold(secure(secure_threshold=0.8), 5) == 4
    assert threshold(secure(secure_threshold=1.0), 40) == 33
    assert threshold(secure(secure_threshold=0.7), 10) == 7  # not 8: 0.7 · 10 is 7.000…1
    assert threshold(secure(secure_threshold=0.51), 3) == 2


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"secure_neighbors": 5}, "give an even number"),
        ({"secure_neighbors": 0}, "must be 2 or more"),
        ({"secure_threshold": 0.5}, "above 0.5"),
        ({"secure_threshold": 1.1}, "up to 1"),
        ({"secure_bits": 16}, "give 32 or 64"),
        ({"secure_clip": 0.0}, "must be above 0"),
        ({"secure_max_examples": 0}, "must be 1 or more"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        secure(**wrong)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"aggregation": AggregationSettings("krum")}, "krum compares the clients"),
        ({"peers": PeerSettings(max_norm=10, max_examples=0)}, "set peers.max_norm: 0 and"),
        ({"peers": PeerSettings(max_norm=0, max_examples=2)}, "set peers.max_norm: 0 and"),
        ({"federation": FederationSettings(wire="int8")}, "federation.wire: fp32, not int8"),
        ({"privacy": secure(clipping="fixed")}, "the clients clip and add the noise"),
        ({"privacy": secure(clipping="adaptive", clip_on="client")}, "clients clip and add"),
    ],
)
def test_what_needs_single_clients_is_refused_in_one_line(other: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        replace(summing_settings(secure()), **other)
    assert "\n" not in str(error.value)
