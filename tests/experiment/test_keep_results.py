"""scripts/keep_results.py: all that tables need, and no row of text or path of a machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from keep_results import main

from fedp2eft.files import write_json
from fedp2eft.report.source import read_report
from fedp2eft.results.cells import name_of, read_cells
from fedp2eft.results.tables import markdown, write_tables

SECRET = "what a client wrote"


def cell(method: str, rank: int, pool: str) -> dict[str, Any]:
    clients = [
        {"client": f"{language}-{pool}-0{n}", "language": language, "examples": 8,
         "correct": 2 + n + rank, "loss": 1 / 3, "parameters": 10 * rank, "seconds": 0.25,
         "steps": 4, "text": SECRET}
        for language in ("hau", "ibo")
        for n in range(3)
    ]  # fmt: skip
    about = {"method": method, "base": "standard-fl", "rank": rank, "seed": 7, "pool": pool}
    cost = {"seconds": 1.0, "bytes_up": 5, "bytes_down": 6, "peak_memory": 1}
    more = {"versions": {"torch": "2.13"}, "machine": "m", "texts": [SECRET]}
    return {**about, "clients": clients, **cost, **more}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    model = tmp_path / "the-base"
    model.mkdir()
    evaluation = {"methods": ["lora"], "ranks": [2], "pools": ["unseen"]}  # of the last start
    settings = {
        "data": {"dataset": "masakhanews", "path": str(tmp_path)},
        "model": {"name": str(model)},
        "evaluation": evaluation,
        "compare": {"seeds": [7]},
    }
    write_json(folder / "settings.yaml", settings)  # JSON is YAML
    for method, rank in (("base", 0), ("lora", 2)):
        for pool in ("seen", "unseen"):
            name = f"standard-fl/s7/{pool}/{method}-r{rank}"
            write_json(folder / "cells" / f"{name}.json", cell(method, rank, pool))
    other = cell("lora", 2, "seen") | {"budget": "parameters"}
    write_json(folder / "cells" / f"{name_of(other)}.json", other)
    spread = {"round": 1, "level": 0.5, "spread": 0.1, "personal": 0.2, "overlap": {"2": 0.5}}
    write_json(folder / "runs" / "standard-fl-s7" / "structure.json", [spread])
    write_json(folder / "runs" / "standard-fl-s7" / "generations" / "x.json", [SECRET])
    return folder


def test_tables_are_those_of_the_run_and_nothing_else_is_kept(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results" / "masakhanews"
    assert main([str(run), str(out)]) == 0
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    assert capsys.readouterr().out == f"{out}: {size / 1e6:.2f} MB\n"
    evaluation = {"methods": ["base", "lora"], "ranks": [2], "pools": ["seen", "unseen"]}
    whole = json.loads((run / "settings.yaml").read_text()) | {"evaluation": evaluation}
    write_json(run / "settings.yaml", whole)
    text = markdown(write_tables(run))
    assert (out / "table.md").read_text(encoding="utf-8") == text
    for path in out.rglob("*"):
        if path.is_file():
            content = path.read_text(encoding="utf-8")
            assert SECRET not in content
            assert str(tmp_path) not in content
    assert sorted(path.name for path in out.iterdir()) == [
        "cells", "figures", "results.json", "settings.yaml", "structure", "table.csv", "table.md",
        "table.tex",
    ]  # fmt: skip
    assert {path.suffix for path in (out / "figures").iterdir()} == {".svg"}
    kept = out / "cells/standard-fl/s7/seen/lora-r2.json"
    assert json.loads(kept.read_text())["clients"][0] == {
        "client": "hau-seen-00", "language": "hau", "examples": 8, "loss": 0.333333, "correct": 4,
        "parameters": 20, "seconds": 0.25, "steps": 4,
    }  # fmt: skip
    budgets = [each.get("budget") for each in read_cells(out)]
    assert (len(budgets), budgets.count("parameters")) == (5, 1)
    report = read_report(out)
    assert (report.settings.data.path, report.settings.model.name) == (None, "the-base")
    assert [training.name for training in report.trainings] == ["standard-fl-s7"]
    assert report.trainings[0].structure[0]["level"] == 0.5
    # Once more, with a cell less: nothing of before is left.
    (run / "cells/standard-fl/s7/unseen/lora-r2.json").unlink()
    assert main([str(run), str(out)]) == 0
    assert len(list(out.rglob("lora-r2.json"))) == 1


def test_what_cannot_be_kept_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("x", encoding="utf-8")
    assert main([str(run), str(taken)]) == 2
    assert "holds no results" in capsys.readouterr().err
    assert (taken / "mine.txt").exists()
    settings = json.loads((run / "settings.yaml").read_text())
    settings["data"]["dataset"] = "files"
    write_json(run / "settings.yaml", settings)
    assert main([str(run), str(tmp_path / "out")]) == 2
    assert "not for others" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
