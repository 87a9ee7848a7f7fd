"""Tables from cells: pooled within a language, then the plain mean of the languages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedp2eft.errors import UserError
from fedp2eft.files import write_text
from fedp2eft.results.rows import collect
from fedp2eft.settings.experiment import Settings
from fedp2eft.settings.reading import settings_text


def cell(folder: Path, method: str, rank: int, client: str, correct: int, examples: int) -> None:
    language, pool, _ = client.split("-")
    path = folder / "cells" / f"{method}-r{rank}" / f"{client}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"client": client, "language": language, "pool": pool, "parameters": 10 * rank}
    path.write_text(json.dumps(facts | {"correct": correct, "examples": examples}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_text(tmp_path / "settings.yaml", settings_text(Settings()))
    cell(tmp_path, "base", 0, "de-seen-00", 5, 10)
    cell(tmp_path, "base", 0, "de-seen-01", 10, 30)
    cell(tmp_path, "base", 0, "fr-seen-00", 3, 4)
    cell(tmp_path, "lora", 2, "de-seen-00", 4, 10)
    cell(tmp_path, "lora", 2, "de-seen-01", 20, 30)
    cell(tmp_path, "lora", 2, "fr-seen-00", 4, 4)
    cell(tmp_path, "lora", 2, "fr-unseen-00", 1, 4)
    cell(tmp_path, "lora", 2, "it-unseen-00", 0, 0)  # a client without test rows
    return tmp_path


def test_rows(folder: Path):
    results = collect(folder)
    base, lora = results.row("base", 0, "seen"), results.row("lora", 2, "seen")
    assert base.languages == {"de": 15 / 40, "fr": 3 / 4}
    assert base.mean == pytest.approx((15 / 40 + 3 / 4) / 2)
    assert (base.worst_language, base.worst_client) == (15 / 40, 1 / 3)
    assert base.worse_than_base == 0
    assert lora.languages == {"de": 24 / 40, "fr": 1.0}
    assert lora.worse_than_base == pytest.approx(1 / 3)
    assert (lora.clients, lora.parameters) == (3, 20)
    unseen = results.row("lora", 2, "unseen")
    assert (unseen.languages, unseen.clients) == ({"fr": 0.25}, 1)
    assert unseen.worse_than_base is None
    on_disk = json.loads((folder / "results.json").read_text())
    assert [row["mean"] for row in on_disk["rows"]] == [row.mean for row in results.rows]


def test_a_row_that_was_not_computed(folder: Path):
    with pytest.raises(UserError, match="no result for lora, rank 8, pool seen"):
        collect(folder).row("lora", 8, "seen")


def test_damaged_cells_are_left_out(folder: Path):
    (folder / "cells" / "lora-r2" / "fr-seen-00.json").write_text('{"client": "fr')
    assert collect(folder).row("lora", 2, "seen").clients == 2
