"""Checkpoints: whole or passed over."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedp2eft.federation.server.checkpoints import Checkpoint, load_checkpoint, save_checkpoint

NUMBERS = {"w": torch.arange(12.0).reshape(3, 4), "b": torch.tensor([0.1, float("1e-30")])}


def save(folder: Path, round_: int, keep: int = 2) -> None:
    numbers = {name: value + round_ for name, value in NUMBERS.items()}
    save_checkpoint(folder, Checkpoint("psg", round_, numbers), keep)


def test_the_newest_comes_back_bit_for_bit_and_old_ones_go(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path, "psg") is None
    for round_ in (1, 2, 3):
        save(tmp_path, round_)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "psg-000002.safetensors",
        "psg-000003.safetensors",
    ]
    found = load_checkpoint(tmp_path, "psg")
    assert found is not None
    assert (found.phase, found.round) == ("psg", 3)
    assert all(torch.equal(found.parameters[name], NUMBERS[name] + 3) for name in NUMBERS)
    assert load_checkpoint(tmp_path, "base") is None


def test_the_same_numbers_are_the_same_file(tmp_path: Path) -> None:
    files = []
    for i in range(8):  # safetensors writes several header keys in a random order
        save(tmp_path / str(i), 1)
        files.append((tmp_path / str(i) / "psg-000001.safetensors").read_bytes())
    assert len(set(files)) == 1


def test_a_damaged_round_number_is_not_believed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One flipped bit makes the space before the round a 1."""
    save(tmp_path, 1)
    save(tmp_path, 2)
    newest = tmp_path / "psg-000002.safetensors"
    raw = newest.read_bytes()
    damaged = raw.replace(rb"\"round\": 2", rb"\"round\":12")
    assert damaged != raw
    newest.write_bytes(damaged)
    found = load_checkpoint(tmp_path, "psg")
    assert found is not None
    assert found.round == 1
    assert "its header says round 12 of psg" in caplog.text


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_damaged_newest_one_is_passed_over(
    tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    save(folder, 1)
    save(folder, 2)
    newest = folder / "psg-000002.safetensors"
    raw = bytearray(newest.read_bytes())
    if data.draw(st.booleans()):
        raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
    else:
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    newest.write_bytes(bytes(raw))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        found = load_checkpoint(folder, "psg")
    assert found is not None
    if found.round == 1:
        assert "psg-000002.safetensors is damaged" in caplog.text
        assert "falling back to the one before" in caplog.text
    wanted = found.round  # a flipped byte that changes no number (a space, say) does no harm
    assert all(torch.equal(found.parameters[name], NUMBERS[name] + wanted) for name in NUMBERS)


def test_when_all_are_damaged_the_phase_starts_over(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "psg-000001.safetensors").write_bytes(b"")
    assert load_checkpoint(tmp_path, "psg") is None
