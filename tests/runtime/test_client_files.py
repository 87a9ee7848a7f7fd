"""A client's files are those that some round may yet start from, on disk as in memory."""

from __future__ import annotations

from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedp2eft.runtime.client_files import ClientFiles


@settings(max_examples=30, deadline=None)
@given(
    rounds=st.sets(st.integers(1, 30), min_size=1), keep=st.integers(2, 4), back=st.integers(0, 4)
)
def test_every_round_starts_from_what_came_before_it(
    tmp_path_factory, rounds: set[int], keep: int, back: int
) -> None:
    """Also rounds that are repeated, from any checkpoint that the server still has."""
    folder: Path = tmp_path_factory.mktemp("files")
    for files in (ClientFiles(folder, "base", keep), ClientFiles(None, "base", keep)):
        last = max(rounds)
        again = max(1, last - min(back, keep - 1))
        for round_ in [*range(1, last + 1), *range(again, last + 1)]:
            if round_ not in rounds:
                continue
            before = max((r for r in rounds if r < round_), default=None)
            found = files.before("c", round_)
            assert (found and found["t"].item()) == before
            files.write("c", round_, {"t": torch.tensor(round_)})
        newest = files.before("c")
        assert newest is not None
        assert newest["t"].item() == last
        assert files.before("d") is None
    kept = {int(path.stem.split("-")[1]) for path in (folder / "c").iterdir()}
    assert kept <= rounds
    assert len([r for r in kept if r <= last - keep]) <= 1
