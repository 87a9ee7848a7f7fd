"""Results that earlier versions computed are still read, methods that are gone among them."""

from __future__ import annotations

from pathlib import Path

from fedp2eft.results.cells import read_cells
from fedp2eft.results.summary import summarize
from fedp2eft.settings.reading import settings_of_folder

FOLDER = Path(__file__).parents[2] / "results" / "debian-descriptions"


def test_a_method_that_is_gone_keeps_its_lines() -> None:
    settings = settings_of_folder(FOLDER)
    comparison = summarize(settings, read_cells(FOLDER))
    assert not comparison.missing
    gone = [line for line in comparison.lines if line.method == "fedp2eft-normalized"]
    assert [(line.pool, line.rank) for line in gone] == [
        (pool, rank) for pool in ("seen", "unseen", "new-language") for rank in (2, 8)
    ]
    assert f"{100 * gone[0].mean.mean:.1f}" == "47.9"  # docs/findings.md
