"""φ in fewer bytes loses nothing over the rounds, and damaged bytes are refused."""

from __future__ import annotations

import pytest
import torch
from flwr.app import Array, ArrayRecord
from hypothesis import given, settings
from hypothesis import strategies as st

from fedp2eft.errors import UserError
from fedp2eft.federation.wire.compression import SCALE, Feedback, pack, unpack
from fedp2eft.federation.wire.messages import nbytes

SIZES = {"first.weight": (40, 30), "first.bias": (40,), "prelu": (1,)}


def numbers(seed: int = 0, scale: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator) * scale for n, s in SIZES.items()}


@pytest.mark.parametrize(
    ("wire", "bound", "share"), [("fp32", 0.0, 1.0), ("bf16", 2**-8, 0.55), ("int8", 0.0, 0.45)]
)
def test_a_packed_record_is_small_and_close(wire, bound, share) -> None:
    given_, like = numbers(), numbers(1)
    record = pack(given_, wire)
    got = unpack(record, like, wire, "φ")
    assert nbytes(record) <= share * nbytes(pack(given_, "fp32"))
    for name, value in given_.items():
        rows = value if value.dim() == 2 else value.reshape(1, -1)
        step = rows.abs().amax(1, keepdim=True).expand_as(rows).reshape(value.shape) / 254
        limit = step * 1.0001 if wire == "int8" else value.abs() * bound
        assert bool(((got[name] - value).abs() <= limit).all()), name


@pytest.mark.parametrize("wire", ["bf16", "int8"])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), rounds=st.integers(2, 12))
def test_error_feedback_loses_nothing_over_the_rounds(wire, seed, rounds) -> None:
    """What was sent in all differs from what was meant by no more than one rounding."""
    feedback, sent, meant = Feedback(None), numbers(0, 0.0), numbers(0, 0.0)
    largest = 0.0
    for round_ in range(1, rounds + 1):
        change = numbers(seed + round_, 1e-3)
        record = feedback.send("c", round_, change, wire)
        for name, value in unpack(record, change, wire, "φ").items():
            sent[name] += value
            meant[name] += change[name]
            largest = max(largest, float(value.abs().max()))
    step = largest / 100
    assert max(float((sent[n] - meant[n]).abs().max()) for n in sent) <= step


def test_kept_back_is_read_from_disk_when_a_run_goes_on(tmp_path) -> None:
    first, again = Feedback(tmp_path), Feedback(tmp_path)
    first.send("c", 1, numbers(1), "int8")
    expected = first.send("c", 2, numbers(2), "int8")
    # round 2 was stopped before the server had it: a new process repeats it
    assert again.send("c", 2, numbers(2), "int8") == expected
    assert pack(numbers(2), "int8") != expected


def test_damaged_kept_back_is_left_out_with_a_warning(tmp_path, caplog) -> None:
    feedback = Feedback(tmp_path)
    feedback.send("c", 1, numbers(1), "int8")
    (tmp_path / "c" / "kept-back-000001.safetensors").write_bytes(b"x")
    assert Feedback(tmp_path).send("c", 2, numbers(2), "int8") == pack(numbers(2), "int8")
    assert "damaged" in caplog.text


@pytest.mark.parametrize("wire", ["bf16", "int8"])
def test_foreign_records_are_refused(wire) -> None:
    like = numbers()
    good = dict(pack(like, wire).items())
    nan = torch.full((40, 30), float("nan"))
    spoilt = [
        {**good, "more": good["prelu"]},
        {k: v for k, v in good.items() if k != "first.bias"},
        {**good, "first.bias": Array(torch.zeros(3, dtype=torch.int8).numpy())},
        {**good, "first.bias": Array(torch.zeros(40).numpy())},
        {**good, "first.bias": Array("int8", (40,), "numpy.ndarray", b"garbage")},
        {**good, **dict(pack({"first.weight": nan}, "bf16").items())}
        if wire == "bf16"
        else {**good, "first.weight" + SCALE: Array(nan[:, :1].numpy())},
    ]
    for record in spoilt:
        with pytest.raises(UserError, match="φ of c"):
            unpack(ArrayRecord(record), like, wire, "φ of c")
