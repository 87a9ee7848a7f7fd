"""What auto chose and what it cost: in cells, tables, results.json, the terminal and the page."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from fedp2eft.cli import main
from fedp2eft.files import write_json
from fedp2eft.report.page import _shaded, page
from fedp2eft.report.source import read_report
from fedp2eft.results.choices import Choice, Tried, choice_from, choices_of, chosen_by
from fedp2eft.results.layout import choice_table, difference
from fedp2eft.results.metrics import ACCURACY, RESPONSE_LOSS
from fedp2eft.results.rows import read_results
from fedp2eft.results.summary import Difference
from fedp2eft.results.tables import as_csv, escape, markdown, write_tables

CHOSEN = [2, 1e-3, 4, 2]
TABLE = [[0, 0, 0, 0, -1.25, 0.5, 0.125], [1, 0, 0, 0, -1.0, 0.25, 0.125], [*CHOSEN, -0.75, 0, 0]]
TEXT = (
    "auto, r = 2, seed 7: of 3 candidates the seen clients chose lora, rank 2, learning rate "
    "0.001, 4 epochs, at 1,200 fine-tuning steps in all."
)
GUARD = (
    "auto, r = 2, seen clients, all seeds: lora 2, prior 1; 10.0 fine-tuning steps per client, "
    "lora 8.0."
)


def cell(method: str, rank: int, steps: list[int], choices: list[str], **more: Any) -> dict:
    clients = [
        {"client": f"de-seen-0{n}", "language": "de", "examples": 4, "correct": n, "loss": 1.0,
         "parameters": 3, "seconds": 1.0, "steps": count}
        for n, count in enumerate(steps)
    ]  # fmt: skip
    for client, choice in zip(clients, choices, strict=False):
        client["choice"] = choice
    about = {"method": method, "base": "standard-fl", "rank": rank, "seed": 7, "pool": "seen"}
    cost = {"seconds": 1.0, "bytes_up": 0, "bytes_down": 0, "peak_memory": 1}
    return {**about, "clients": clients, **cost, "versions": {}, "machine": "m", **more}


AUTO = cell(
    "auto", 2, [16, 6, 8], ["lora", "prior", "lora"],
    prepared={"chosen": CHOSEN, "table": TABLE, "steps": [1200.0]},
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    methods = {"methods": ["lora", "auto"], "ranks": [2], "pools": ["seen"]}
    write_json(
        tmp_path / "settings.yaml", {"evaluation": methods, "compare": {"seeds": [7]}}
    )  # JSON is YAML
    for facts in (AUTO, cell("lora", 2, [8, 8, 8], [])):
        write_json(tmp_path / f"cells/standard-fl/s7/seen/{facts['method']}-r2.json", facts)
    return tmp_path


def test_a_choice_in_numbers_and_words() -> None:
    [choice] = choices_of([AUTO, AUTO | {"pool": "unseen"}, cell("lora", 2, [1], [])])
    assert choice == Choice(
        "standard-fl", 7, 2, "lora, rank 2, learning rate 0.001, 4 epochs",
        (
            Tried("base", -1.25, 0.5, 0.125), Tried("prior", -1.0, 0.25, 0.125),
            Tried("lora, rank 2, learning rate 0.001, 4 epochs", -0.75, 0.0, 0.0),
        ), 1200,
    )  # fmt: skip
    assert choice.text == TEXT
    old = {**AUTO, "prepared": {"chosen": [1, 0, 0, 0], "table": TABLE}}
    [before] = choices_of([old])
    assert before.text.endswith("the seen clients chose prior.")
    assert chosen_by(AUTO["clients"]) == {"lora": 2, "prior": 1}
    assert chosen_by(cell("auto", 2, [1], [])["clients"]) == {}


def test_one_minus_sign_everywhere_but_in_latex() -> None:
    [choice] = choices_of([AUTO])
    assert choice_table(choice).rows[0] == ["base", "−1.2500", "0.5000", "0.1250"]
    assert difference(Difference("lora", 2, -0.01, -0.02, 0.003), ACCURACY) == "−1.0 [−2.0, +0.3]"
    assert difference(Difference("lora", 2, 0.25, None, None), RESPONSE_LOSS) == "+0.250"
    assert difference(Difference("lora", 2, -1e-5, None, None), ACCURACY) == "0.0"
    assert escape("−1.0") == "-1.0"
    assert _shaded(-0.5)["text"] == "−0.50"


def test_tables_say_it(folder: Path) -> None:
    made = write_tables(folder)
    auto, lora = (made.line("standard-fl", "seen", name, 2) for name in ("auto", "lora"))
    assert (auto.cost.steps, lora.cost.steps) == (10.0, 8.0)
    assert auto.choices == {"lora": 2, "prior": 1}
    text = markdown(made)
    assert f"## What auto chose\n\n{TEXT}\n\n{GUARD}\n\n## " in text
    assert "| seeds | steps | seconds |" in text
    rows = {row["method"]: row["steps"] for row in csv.DictReader(io.StringIO(as_csv(made)))}
    assert rows == {"auto": "10.0", "lora": "8.0"}
    kept = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert choice_from(kept["choices"][0]) == made.choices[0]
    # A cell of an earlier version has no steps: neither does the line, and the text leaves it out.
    for path in folder.glob("cells/*/*/*/*.json"):
        old = json.loads(path.read_text())
        old["clients"] = [{k: v for k, v in c.items() if k != "steps"} for c in old["clients"]]
        write_json(path, old)
    made = write_tables(folder)
    assert {line.cost.steps for line in made.lines} == {None}
    assert "seen clients, all seeds: lora 2, prior 1.\n" in markdown(made)


def test_terminal_and_page_say_it(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    assert main(["show", str(folder)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert TEXT in out
    assert GUARD in out
    made = page(read_report(folder, ask=False))
    assert f"<li>{TEXT}</li>" in made
    assert f"<li>{GUARD}</li>" in made
    assert '<td class="name">prior</td><td>−1.0000</td><td>0.2500</td><td>0.1250</td>' in made


def test_a_run_keeps_choice_and_steps(all_methods) -> None:
    results = read_results(all_methods.folder)
    [choice] = results.choices
    assert (choice.rank, choice.seed, len(choice.tried)) == (2, 3, 5)
    # Two clients × three adapters × two folds × one mini-batch of the other fold's six rows.
    assert choice.steps == 12
    for pool, clients in (("seen", 2), ("unseen", 1)):
        assert sum(results.row("auto", 2, pool).choices.values()) == clients
        assert {each: results.row(*each, pool).steps for each in STEPS} == STEPS
    report = read_report(all_methods.folder, ask=False)
    assert report.comparison.choices == results.choices


# 12 rows in mini-batches of six, and two passes to personalize; stage 1 of bt-lora is one more.
STEPS = {("base", 0): 0, ("prior", 0): 0, ("lora", 2): 4, ("adalora", 2): 4, ("bt-lora", 2): 6}
