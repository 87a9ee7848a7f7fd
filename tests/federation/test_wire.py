"""What arrives over the wire is checked before it is used."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib import format as npy

from fedp2eft.errors import UserError
from fedp2eft.federation.local import LocalGrid
from fedp2eft.federation.wire.messages import (
    array_digest,
    from_arrays,
    nbytes,
    read_array,
    read_in_place,
    scalars,
    the_arrays,
    the_config,
    to_arrays,
)


@pytest.fixture(autouse=True)
def _an_engine_gives_messages_their_sender() -> None:
    LocalGrid(ClientApp(), [], {})


LIKE = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1.5])}


def record(**changes: np.ndarray) -> ArrayRecord:
    """LIKE as a record, with some arrays put in place of its own."""
    arrays = {name: value.numpy() for name, value in LIKE.items()} | changes
    return ArrayRecord({name: Array(value) for name, value in arrays.items()})


def test_there_and_back_is_the_same_bits() -> None:
    back = from_arrays(to_arrays(LIKE), LIKE, "φ")
    assert list(back) == list(LIKE)
    assert all(torch.equal(back[name], LIKE[name]) for name in LIKE)
    back["a"][0, 0] = 7.0  # writable, and nobody else's
    assert LIKE["a"][0, 0] == 0.0


def test_half_precision_and_gradients_travel_as_float32() -> None:
    sent = {"a": torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True), "b": torch.zeros(1)}
    back = from_arrays(to_arrays(sent), LIKE, "φ")
    assert back["a"].dtype == torch.float32


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"c": np.zeros(1, np.float32)}, "other parameters than expected (first: 'c')"),
        ({"a": np.zeros((3, 2), np.float32)}, "a is float32 (3, 2), expected float32 (2, 3)"),
        ({"a": np.zeros((2, 3), np.float64)}, "a is float64 (2, 3)"),
        ({"b": np.array([1], np.int64)}, "b is int64 (1,)"),
        ({"b": np.array(["text"])}, "b is"),
        ({"b": np.array([np.nan], np.float32)}, "b holds NaN"),
        ({"b": np.array([np.inf], np.float32)}, "b holds NaN or infinity"),
        ({"b": np.zeros(0, np.float32)}, "b is float32 (0,)"),
    ],
)
def test_what_does_not_fit_is_refused(bad: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(UserError) as caught:
        from_arrays(record(**bad), LIKE, "φ of client x")
    assert "φ of client x" in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
        np.arange(4, dtype=np.int8),
        np.float32(3),
        np.zeros((0, 5), np.float32),
        np.zeros((1,) * 9 + (2,), np.uint16),
    ],
)
def test_an_array_is_read_where_it_is(value: np.ndarray) -> None:
    array = Array(np.asarray(value))
    back = read_array(array, value.dtype.type, value.shape, "x")
    np.testing.assert_array_equal(back, array.numpy())
    assert not back.flags.writeable
    whole = np.frombuffer(array.data, np.uint8)
    assert np.shares_memory(back, whole) or not back.size


def test_a_header_of_another_version_is_read_too() -> None:
    stream = io.BytesIO()
    npy.write_array(stream, np.arange(3, dtype=np.float32), version=(2, 0))
    array = Array(dtype="float32", shape=(3,), stype="numpy.ndarray", data=stream.getvalue())
    assert read_array(array, np.float32, (3,), "x").tolist() == [0, 1, 2]
    [again] = read_in_place(ArrayRecord({"a": array}), ["a"]).values()
    assert again.numpy().tolist() == [0, 1, 2]


def test_flower_reads_checked_arrays_where_they_are() -> None:
    sent = record()
    shared = read_in_place(sent, ["a"])
    assert list(shared) == ["a"]
    assert shared["a"].data is sent["a"].data
    whole = np.frombuffer(sent["a"].data, np.uint8)
    assert np.shares_memory(shared["a"].numpy(), whole)
    assert not np.shares_memory(sent["a"].numpy(), whole)


def test_missing_names_are_refused() -> None:
    with pytest.raises(UserError, match="first: 'b'"):
        from_arrays(ArrayRecord({"a": Array(LIKE["a"].numpy())}), LIKE, "φ")
    with pytest.raises(UserError, match="other parameters"):
        from_arrays(ArrayRecord(), LIKE, "φ")


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(["a", "b", "c", ""]),
    dtype=st.sampled_from(["float32", "float16", "int8", "object", "<U4", "nonsense", ""]),
    shape=st.lists(st.integers(-2, 2**40), max_size=3),
    kind=st.sampled_from(["numpy.ndarray", "pickle", ""]),
    data=st.binary(max_size=64) | st.just(b"\x93NUMPY\x01\x00"),
)
def test_no_garbage_gets_through(
    name: str, dtype: str, shape: list[int], kind: str, data: bytes
) -> None:
    good = record()
    try:
        good[name] = Array(dtype=dtype, shape=tuple(shape), stype=kind, data=data)
    except (TypeError, ValueError):
        return  # Flower itself refuses it
    with pytest.raises(UserError):
        from_arrays(good, LIKE, "φ")


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_damaged_bytes_give_numbers_of_the_right_kind_or_an_error(data: st.DataObject) -> None:
    whole = record()
    raw = bytearray(whole["a"].data)
    place = data.draw(st.integers(0, len(raw) - 1))
    raw[place] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.integers(0, len(raw)))
    raw = raw[:cut] if data.draw(st.booleans()) else raw
    old = whole["a"]
    whole["a"] = Array(dtype=old.dtype, shape=old.shape, stype=old.stype, data=bytes(raw))
    try:
        numbers = from_arrays(whole, LIKE, "φ")
    except UserError:
        return
    assert numbers["a"].shape == (2, 3)
    assert bool(torch.isfinite(numbers["a"]).all())


def test_a_pickled_array_is_never_loaded(tmp_path) -> None:
    import pickle

    trap = tmp_path / "trap"

    class Trap:
        def __reduce__(self):
            return (trap.touch, ())

    stream = io.BytesIO()
    np.save(stream, np.array([Trap()], dtype=object), allow_pickle=True)
    bad = record()
    for data in (stream.getvalue(), pickle.dumps(Trap())):
        bad["b"] = Array(dtype="object", shape=(1,), stype="numpy.ndarray", data=data)
        with pytest.raises(UserError, match="not a readable array"):
            from_arrays(bad, LIKE, "φ")
    assert not trap.exists()


def test_only_single_numbers_count_as_metrics() -> None:
    def message(record: MetricRecord) -> Message:
        return Message(RecordDict({"metrics": record}), 2, "train")

    assert scalars(message(MetricRecord({"loss": 0.5, "n": 3}))) == {"loss": 0.5, "n": 3}
    with pytest.raises(UserError, match="'xi' of a client is a list"):
        scalars(message(MetricRecord({"xi": [0.1, 0.2]})))


def test_records_that_are_missing_are_empty() -> None:
    message = Message(RecordDict(), 2, "train")
    assert len(the_arrays(message)) == len(the_config(message)) == 0
    full = RecordDict({"arrays": record(), "config": ConfigRecord({"rank": 2})})
    message = Message(full, 2, "train")
    assert the_config(message)["rank"] == 2
    assert nbytes(the_arrays(message)) > 7 * 4


def test_the_digest_tells_numbers_apart_and_knows_no_order() -> None:
    turned = ArrayRecord({name: record()[name] for name in ("b", "a")})
    assert array_digest(turned) == array_digest(record())
    assert array_digest(record(b=np.array([2.5], np.float32))) != array_digest(record())
