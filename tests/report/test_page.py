"""A page says what the results say, shows what there is, and nothing in it is code but ours."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from pages import Seen, add_line, copied, write_comparison, write_texts

from fedp2eft.cli import main
from fedp2eft.errors import UserError
from fedp2eft.files import read_json, read_lines, write_json
from fedp2eft.report import page as page_module
from fedp2eft.report.charts import training_charts
from fedp2eft.report.facts import facts
from fedp2eft.report.page import page
from fedp2eft.report.small import Chart
from fedp2eft.report.source import read_report
from fedp2eft.report.write import write_report
from fedp2eft.results.tables import write_tables

NEW = {"stage1-task", "stage1-significance", "stage1-sparsity"}  # later than other metrics
EVIL = "<script>alert(1)</script>\"'$&"


def page_of(folder: Path) -> Seen:
    return Seen(page(read_report(folder, ask=False)))


@pytest.fixture(scope="module")
def seen(finished) -> Seen:
    """The page of a whole run."""
    return page_of(finished.folder)


def test_numbers_of_a_run_are_those_of_its_results(seen, finished):
    results = read_json(finished.folder / "results.json")["rows"]
    pools = list(dict.fromkeys(row["pool"] for row in results))
    for number, pool in enumerate(pools):
        table, languages = seen.rows(f"table-{number}"), seen.rows(f"languages-{number}")
        for row in (row for row in results if row["pool"] == pool):
            mine = {
                each["mean"]: each
                for each in table
                if each["method"] == row["method"] and int(each["rank"]) in (row["rank"], 1, 2)
                and row["rank"] in (0, int(each["rank"]))
            }  # fmt: skip
            assert set(mine) == {f"{100 * row['mean']:.1f}"}
            for each in mine.values():
                assert each["worst language"] == f"{100 * row['worst_language']:.1f}"
                assert each["worst client"] == f"{100 * row['worst_client']:.1f}"
                assert each["parameters"] == f"{row['parameters']:,.0f}"
            for each in languages:
                if (each["method"], int(each["rank"])) == (row["method"], row["rank"]):
                    told = {name: f"{100 * value:.1f}" for name, value in row["languages"].items()}
                    assert {name: each[name] for name in told} == told


def test_numbers_of_a_comparison_are_those_of_its_results(tmp_path):
    folder = write_comparison(tmp_path / "c")
    write_tables(folder)
    made, lines = page_of(folder), read_json(folder / "results.json")["lines"]
    assert len(lines) == 3
    for line in lines:
        row = next(r for r in made.rows("table-0") if r["method"] == line["method"])
        mean = line["mean"]
        assert row["mean"] == f"{100 * mean['mean']:.1f} ± {100 * mean['half_width']:.1f}"
    assert "notes" not in made.sections
    assert "x86_64, 1 threads" in made.text


def test_sections_of_a_run(seen):
    assert seen.sections == [
        "gains",
        "differences",
        "run",
        "results",
        "structure",
        "rounds",
        "training",
        "cost",
    ]


def test_kept_ranks_on_the_page_are_those_of_the_adapters(seen, finished):
    (training,) = json.loads(seen.data["structure-data"])
    total = 0.0
    for client in ("de-seen-00", "de-seen-01", "de-unseen-00"):
        facts = read_json(finished.folder / "adapters" / client / "fedp2eft-r2" / "fedp2eft.json")
        total += facts["ranks"]["bert.encoder.layer.1.attention.self.value"] / 3
    module = training["modules"].index("attention.self.value")
    shown = training["ranks"]["2"]["de"][module][training["layers"].index("1")]
    assert shown == pytest.approx(total, abs=1e-3)


def test_what_only_some_runs_have(finished, tmp_path):
    folder = copied(finished.folder, tmp_path / "run")
    for method, rank, said in (("base", 0, "Hallo"), ("fedp2eft", 2, "Guten Tag")):
        write_texts(folder, method, rank, "de-seen-00", said)
    add_line(folder / "faults.jsonl", {"kind": "refused", "client": "fr-seen-00", "reason": "NaN"})
    add_line(
        folder / "metrics.jsonl",
        {"phase": "psg", "round": 4, "epsilon": 1.5, "left-out": {"fr-seen-01": "late"}},
    )
    made = page_of(folder)
    assert made.sections[-2:] == ["generations", "faults"]
    tables = list(made.tables.values())
    assert [["prompt", "reference", "base", "fedp2eft r=2"],
            ["Hello", "Hallo Welt", "Hallo", "Guten Tag"]] in tables  # fmt: skip
    assert ["refused", "fr-seen-00", "NaN"] in [row for table in tables for row in table]
    assert ["psg", "4", "fr-seen-01", "late"] in [row for table in tables for row in table]
    assert "Privacy: ε spent" in made.text


def test_texts_of_a_comparison_stand_by_training_and_client(tmp_path, monkeypatch):
    folder = write_comparison(tmp_path / "c")
    for seed in (1, 2):
        run = folder / "runs" / f"standard-fl-s{seed}"
        for client in ("de-seen-00", "fr-seen-00"):
            for method, rank in (("fedp2eft", 2), ("base", 0)):
                write_texts(run, method, rank, client, f"{method} s{seed} {client}")
    made = page_of(folder)
    assert made.sections[-1] == "generations"
    told = [table for table in made.tables.values() if table[0][0] == "prompt"]
    assert [table[0] for table in told] == [["prompt", "reference", "base", "fedp2eft r=2"]] * 4
    assert [table[1][2:] for table in told] == [
        [f"base s{seed} {client}", f"fedp2eft s{seed} {client}"]
        for seed in (1, 2) for client in ("de-seen-00", "fr-seen-00")
    ]  # fmt: skip
    assert [attrs["data-choose"] for tag, attrs in made.tags if tag == "select"].count(
        "generations"
    ) == 1
    assert [a["data-generations"] for _, a in made.tags if "data-generations" in a] == ["0", "1"]
    monkeypatch.setattr(page_module, "MOST_CLIENTS", 2)
    assert page_of(folder).text.count("1 of 2 clients.") == 2


def drawn_terms(folder: Path) -> list[tuple[str, list[float]]]:
    """Label and values of each chart of stage 1's terms."""
    found = training_charts(read_report(folder, ask=False).trainings)
    axes = [ax for name, _, figure in found if name == "stage1-terms" for ax in figure.axes]
    return [(ax.get_ylabel(), list(ax.lines[0].get_ydata())) for ax in axes]


def test_terms_of_stage_1_are_drawn_where_a_run_has_them(seen, finished, tmp_path):
    lines = [line for _, line in read_lines(finished.folder / "metrics.jsonl") if line]
    rounds = [line for line in lines if line["phase"] == "psg"]
    for line in rounds:
        terms = [line[f"stage1-{name}"] for name in ("task", "significance", "sparsity")]
        assert sum(terms) == pytest.approx(line["stage1-last"], rel=1e-4)
    assert "Stage 1: parts of the loss at its last steps" in seen.text
    assert drawn_terms(finished.folder) == [
        (name, [line[f"stage1-{name}"] for line in rounds])
        for name in ("task", "significance", "sparsity")
    ]
    folder = copied(finished.folder, tmp_path / "run")  # as an earlier version left it
    old = [{k: v for k, v in line.items() if k not in NEW} for line in lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old))
    text = page_of(folder).text
    assert "Stage 1: loss at its last steps" in text
    assert "Stage 1: parts of the loss" not in text


def test_text_of_the_data_is_never_code(finished, tmp_path):
    clean = page_of(finished.folder)
    folder = copied(finished.folder, tmp_path / "run")
    for path in folder.glob("cells/*/de-seen-00.json"):
        write_json(path, read_json(path) | {"client": EVIL, "language": EVIL})
    rows = [{"prompt": EVIL, "reference": EVIL, "generated": EVIL}]
    write_json(
        folder / "generations" / "base-r0" / "x.json",
        {"client": EVIL, "language": EVIL, "pool": "seen", "method": EVIL, "rank": 0, "rows": rows},
    )
    add_line(folder / "faults.jsonl", {"kind": "refused", "client": EVIL, "reason": EVIL})
    settings = (folder / "settings.yaml").read_text(encoding="utf-8")
    text = settings.replace("labels: []", f"labels: [{json.dumps(EVIL)}, b]")
    assert text != settings
    (folder / "settings.yaml").write_text(text, encoding="utf-8")
    made = page_of(folder)
    assert sum(tag == "script" for tag, _ in made.tags) == 2
    assert sum(tag == "script" for tag, _ in clean.tags) == 2
    assert made.data["code"] == clean.data["code"]
    assert "<script>alert" not in made.text
    assert "&lt;script&gt;alert(1)" in made.text
    assert EVIL in made.tables["languages-0"][0]
    assert not [name for _, attrs in made.tags for name in attrs if name.startswith("on")]


def test_nothing_is_asked_of_anybody(seen):
    assert "://" not in re.sub(r"<pre>.*?</pre>", "", seen.text, flags=re.DOTALL)
    for tag, attrs in seen.tags:
        assert tag not in ("img", "iframe", "object", "embed")
        for name in ("src", "href", "xlink:href", "action"):
            assert (attrs.get(name) or "#").startswith(("#", "data:,")), (tag, attrs)
    policy = next(a["content"] for t, a in seen.tags if a.get("http-equiv", "").startswith("Cont"))
    assert policy.startswith("default-src 'none'")


def test_a_run_that_is_half_done(finished, tmp_path):
    folder = copied(finished.folder, tmp_path / "run")
    (folder / "results.json").unlink()
    shutil.rmtree(folder / "cells" / "fedp2eft-r2")
    (folder / "cells" / "fedp2eft-r1" / "de-seen-00.json").unlink()
    (folder / "cells" / "lora-r1" / "de-seen-00.json").write_text(
        '{"client": "de', encoding="utf-8"
    )
    told = " ".join(read_report(folder, ask=False).notes)
    assert "no results.json yet" in told
    assert "cells/lora-r1/de-seen-00.json is damaged" in told
    assert "fedp2eft r=1: 3 of 4 seen clients" in told
    assert "seen/fedp2eft-r2, unseen/fedp2eft-r2" in told
    assert page_of(folder).sections[0] == "notes"


def test_a_run_that_has_just_begun(finished, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(finished.folder / "settings.yaml", folder)
    lines = (finished.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines(True)
    (folder / "metrics.jsonl").write_text(lines[0] + '{"phase": "ba', encoding="utf-8")
    made = page_of(folder)
    assert made.sections == ["notes", "run", "training", "cost"]
    assert "1 of 2 rounds of base are done." in made.text
    assert "No client is scored yet." in made.text


@pytest.mark.parametrize("damage", ["{", "[1", '"text"', "\x00"])
def test_damaged_results(finished, tmp_path, damage):
    folder = copied(finished.folder, tmp_path / "run")
    (folder / "results.json").write_text(damage, encoding="utf-8")
    made = page_of(folder)
    assert "results.json is damaged" in made.text
    assert made.rows("table-0")


def test_other_damaged_files_are_left_out(finished, tmp_path):
    folder = copied(finished.folder, tmp_path / "run")
    for name in ("structure.json", "machine.json", "lambda.safetensors", "faults.jsonl"):
        (folder / name).write_bytes(b"\x00{]")
    write_json(folder / "generations" / "base-r0" / "x.json", {"rows": [1]})
    made = page_of(folder)
    assert "generations/base-r0/x.json is damaged" in made.text
    assert made.sections == [
        *("notes", "gains", "differences", "run", "results", "training", "cost"),
    ]


def test_missing_cells_of_a_comparison_are_named(tmp_path):
    folder = write_comparison(tmp_path / "c", without=("standard-fl/s2/seen/fedp2eft-r2",))
    made = page_of(folder)
    assert "1 cells of the comparison are not computed yet: standard-fl/s2/seen/fedp2eft-r2." in (
        made.text
    )
    assert next(r for r in made.rows("table-0") if r["method"] == "fedp2eft")["seeds"] == "1"


def test_folders_that_hold_nothing(tmp_path, capsys):
    assert main(["report", str(tmp_path / "none")]) == 2
    assert main(["report", str(tmp_path)]) == 2
    assert main(["show", str(tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "There is no folder" in lines[0]
    assert "holds no run or comparison: it has no settings.yaml" in lines[1]
    (tmp_path / "settings.yaml").write_text("- 1", encoding="utf-8")
    with pytest.raises(UserError, match=r"settings\.yaml is damaged, or not the settings of a run"):
        read_report(tmp_path)


def test_report_writes_page_and_figures(tmp_path, capsys):
    folder = write_comparison(tmp_path / "c")
    assert main(["report", str(folder)]) == 0
    assert not (folder / "report").exists()
    assert main(["report", str(folder), "--figures", "true"]) == 0
    assert f"Page: {folder / 'report.html'}" in capsys.readouterr().out
    names = {path.stem for path in (folder / "report").iterdir()}
    assert names == {
        "gain-standard-fl",
        "accuracy-standard-fl",
        "difference-standard-fl",
        "languages-standard-fl-seen",
        "clients-standard-fl-seen",
    }
    for name in names:
        assert (folder / "report" / f"{name}.png").read_bytes()[1:4] == b"PNG"
        assert "<svg" in (folder / "report" / f"{name}.svg").read_text(encoding="utf-8")


def test_the_page_says_the_same_each_time(finished, tmp_path):
    for name in ("a", "b"):
        write_report(write_comparison(tmp_path / name / "c"))
    left, right = ((tmp_path / name / "c" / "report.html").read_text() for name in ("a", "b"))
    strip = re.compile(r"\bf\d+-")  # figures are counted over a process
    assert strip.sub("", left) == strip.sub("", right)


def test_one_round_is_no_plural(finished):
    report = read_report(finished.folder)
    s = report.settings
    one = replace(
        s,
        base=replace(s.base, rounds=1),
        federation=replace(s.federation, rounds=1, clients_per_round=1),
    )
    told = dict(facts(replace(report, settings=one)))
    assert told["PSG"] == "1 round of 1 client"
    assert told["base training"].endswith(", 1 round")
    assert dict(facts(report))["PSG"] == "3 rounds of 2 clients"


def test_show_prints_the_essentials(finished, capsys):
    assert main(["show", str(finished.folder)]) == 0
    told = capsys.readouterr().out
    assert "3 rounds of 2 clients" in told
    results = read_json(finished.folder / "results.json")
    gains = {gains["pool"]: gains for gains in results["gains"]}
    assert set(gains) == {"seen", "unseen"}
    for each in gains.values():  # the first lines, before all that was run
        assert each["text"] in " ".join(told.split()).partition("base training")[0]
    row = next(r for r in results["rows"]
               if (r["method"], r["rank"], r["pool"]) == ("lora", 2, "unseen"))  # fmt: skip
    line = next(line for line in told.splitlines() if "│ lora" in line)
    assert f"{100 * row['mean']:.1f}" in line
    assert "Cost of training" in told


def test_the_small_charts_show_the_numbers(tmp_path: Path) -> None:
    """Bars and dots lie where their numbers are; names are text, whatever signs they have."""
    chart = Chart("<a>", (142.0, 100.0), (0.0, 10.0), (0.0, 50.0), ["<b>"], ("x", "y"))
    assert (chart.across(0), chart.across(10)) == (42.0, 138.0)
    assert chart.up(50) == 6.0
    chart.bar(0, 5, 25, "#123456")
    chart.bar(5, 5, float("nan"), "#123456")
    chart.dots([(10, 50)], "#654321")
    svg = ElementTree.fromstring(chart.svg())
    [bar] = svg.iter("rect")
    middle = (6.0 + chart.up(0)) / 2
    assert (float(bar.get("x")), float(bar.get("width"))) == (42.0, 48.0)
    assert float(bar.get("y")) == pytest.approx(middle, abs=0.06)
    assert "M138.0 6.0h0" in str(chart.svg())
    assert {"<b>", "x", "y", "0", "50"} <= {text.text for text in svg.iter("text")}


@pytest.mark.parametrize(
    ("names", "turned"),
    [
        (["de", "ja", "ru"], False),
        (["zh_CN"] * 8, True),
        (["pcm"] * 10, True),
        (["中文名"] * 10, True),
    ],
)
def test_names_under_a_small_chart_have_room(names: list[str], turned: bool) -> None:
    """Names that do not fit side by side are turned, and what is turned ends inside the chart."""
    size = (72 * max(2.6, 1.2 + 0.26 * len(names)), 72 * 1.9)
    chart = Chart("a", size, (-0.6, len(names) - 0.4), (0.0, 1.0), names, ("", "%"))
    under = [part for part in chart.parts if any(f">{name}<" in part for name in names)]
    assert len(under) == len(names)
    assert all(("rotate" in part) == turned for part in under)
    values = Chart("a", size, (0.0, 100.0), (0.0, 1.0), None, ("base model (%)", "%"))
    assert not any("rotate" in part for part in values.parts if ">50<" in part)
    letters = {"pcm": 20.0, "zh_CN": 27.0, "中文名": 27.0}.get(names[0], 0.0)  # in DejaVu Sans
    assert chart.up(0) + 5 + letters <= size[1]
