"""The files of a comparison: what stands in them, what is missing, and the figures."""

from __future__ import annotations

import builtins
import csv
import io
import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from test_summary import all_cells, comparison_settings

from fedp2eft.errors import UserError
from fedp2eft.results.cells import read_cells
from fedp2eft.results.figures import write_figures
from fedp2eft.results.layout import MISSING, notes, tables
from fedp2eft.results.summary import Comparison, summarize
from fedp2eft.results.tables import as_csv, escape, latex, markdown, write_tables
from fedp2eft.settings.reading import settings_text


def path_of(facts: dict[str, Any]) -> str:
    return "cells/{base}/s{seed}/{pool}/{method}-r{rank}.json".format(**facts)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A comparison of one pool; two of its cells are not there yet."""
    asked = comparison_settings(pools=["unseen"], bases=["none"])
    (tmp_path / "settings.yaml").write_text(settings_text(asked))
    for facts in all_cells():
        name = (facts["base"], facts["method"], facts["rank"])
        if facts["base"] != "none" or facts["pool"] != "unseen" or name == ("none", "lora", 8):
            continue
        path = tmp_path / path_of(facts)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(facts))
    return tmp_path


@pytest.fixture
def without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name == "fedp2eft.results.figures":
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)


@pytest.mark.usefixtures("without_matplotlib")
def test_tables_need_no_matplotlib(folder: Path, caplog: pytest.LogCaptureFixture):
    made = write_tables(folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        *("cells", "results.json", "settings.yaml", "table.csv", "table.md", "table.tex"),
    ]
    [line] = caplog.messages
    assert "pip install 'fedp2eft[report]'" in line
    results = json.loads((folder / "results.json").read_text())
    assert results["missing"] == made.missing == [f"none/s{s}/unseen/lora-r8" for s in (42, 52, 62)]
    assert results["lines"][0]["mean"]["mean"] == made.lines[0].mean.mean
    assert results["lines"][0]["differences"][0]["to"] == "lora"
    assert (folder / "table.md").read_text() == markdown(made)


def test_seeds_that_are_left_out_are_named():
    settings = comparison_settings(pools=["unseen"], bases=["none"])
    whole = summarize(settings, all_cells())
    assert not [line for line in notes(whole) if "Left out" in line]
    made = summarize(replace(settings, compare=replace(settings.compare, seeds=[52])), all_cells())
    assert (made.seeds, made.other_seeds) == ([52], [42, 62])
    assert [line for line in notes(made) if "cells of other seeds (42, 62)" in line]


@pytest.mark.usefixtures("without_matplotlib")
def test_foreign_files_are_named_and_left_out(folder: Path, caplog: pytest.LogCaptureFixture):
    whole = summarize(comparison_settings(pools=["unseen"], bases=["none"]), all_cells()).lines[0]
    cells = folder / "cells" / "none"
    good = (cells / "s42" / "unseen" / "lora-r2.json").read_text()
    foreign = {
        cells / "s42" / "unseen" / "lora-r8.json": good[:-40],  # damaged
        cells / "s52" / "unseen" / "lora-r2.json": good,  # another cell's
        cells / "s62" / "unseen" / "base-r0.json": json.dumps(
            {**json.loads(good), "clients": [{}]}
        ),
        folder / "cells" / "notes.json": "[1, 2]",
    }
    for path, text in foreign.items():
        path.write_text(text)
    made = write_tables(folder)
    for path in foreign:
        assert [line for line in caplog.messages if str(path) in line]
    assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == len(foreign) + 1
    lora = made.line("none", "unseen", "lora", 2)
    assert lora is not None
    assert list(lora.mean.seeds) == [42, 62]
    assert "none/s62/unseen/base-r0" in made.missing
    mine = made.lines[0]
    assert (mine.method, mine.mean) == (whole.method, whole.mean)


def best_first(made: Comparison, base: str) -> list[str]:
    means = {
        name: fmean(x.mean.mean for x in made.lines if (x.base, x.method) == (base, name))
        for name in made.methods
    }
    return sorted(means, key=lambda name: -means[name])


def test_what_is_missing_is_no_number():
    cells = [c for c in all_cells() if (c["base"], c["method"], c["rank"]) != ("none", "lora", 8)]
    cells = [c for c in cells if (c["base"], c["method"], c["seed"]) != ("none", "fedp2eft", 42)]
    made = summarize(comparison_settings(), cells)
    titles = [table.title for table in tables(made)]
    assert titles[:2] == [
        "Accuracy (%) on the base standard-fl",
        "Accuracy (%), base standard-fl, pool seen",
    ]
    compact = {table.title: table for table in tables(made)}["Accuracy (%) on the base none"]
    assert compact.head[:3] == ["method", "seen r=2", "seen r=8"]
    rows = {row[0]: row[1:] for row in compact.rows}
    assert list(rows) == best_first(made, "none")
    assert compact.head[-3:] == ["seen worse (%)", "unseen worse (%)", "new-language worse (%)"]
    assert rows["lora"][1:6:2] == [MISSING] * 3
    assert all(re.fullmatch(r"\d+\.\d ± \d+\.\d", text) for text in rows["lora"][:6:2])
    assert all(text.endswith("*") for text in rows["fedp2eft"][:6])
    assert compact.head[7] == "parameters"
    cost = [made.line("none", "seen", "fedp2eft", rank).cost.parameters for rank in (2, 8)]
    assert rows["fedp2eft"][6] == " / ".join(f"{number:,.0f}" for number in cost)
    assert len(rows["lora"][6].split(" / ")) == len(rows["base"][6].split(" / ")) == 1
    rows = {name: [*row[:6], *row[7:]] for name, row in rows.items()}
    assert rows["base"][6:] == ["0.0"] * 3
    shares = [made.line("none", "seen", "fedp2eft", rank).worse_than_base for rank in (2, 8)]
    assert rows["fedp2eft"][6] == " / ".join(f"{100 * share.mean:.1f}" for share in shares)
    assert rows["base"][0] == rows["base"][1]
    long = {table.title: table for table in tables(made)}["Accuracy (%), base none, pool seen"]
    mine = {(row[0], row[1]): row[2:] for row in long.rows}
    assert set(mine["8", "lora"]) == {MISSING}
    assert mine["2", "base"][4] != MISSING
    assert mine["8", "base"][4] == MISSING  # there is no LoRA to compare with
    assert mine["2", "lora"][4] == MISSING
    empty = summarize(comparison_settings(), [])
    assert empty.lines == ()
    text = markdown(empty) + latex(empty)
    assert "0.0" not in text
    assert f"{len(empty.missing)} cells of the comparison are not computed yet" in text


def test_csv_holds_the_same_numbers():
    made = summarize(comparison_settings(), [c for c in all_cells() if c["base"] == "none"])
    rows = list(csv.DictReader(io.StringIO(as_csv(made))))
    assert len(rows) == 2 * 3 * 2 * 4
    for row in rows:
        line = made.line(row["base"], row["pool"], row["method"], int(row["rank"]))
        if row["base"] == "standard-fl":
            assert line is None
            assert {v for k, v in row.items() if k not in ("base", "pool", "rank", "method")} == {
                ""
            }
            continue
        assert line is not None
        assert float(row["mean"]) == line.mean.mean
        assert float(row["worst_client"]) == line.worst_client.mean
        assert int(row["peak_memory"]) == 1062
        found = line.difference("lora", int(row["rank"]))
        assert row["to_lora_high"] == ("" if found is None else str(found.high))
        korean = line.languages.get("ko")
        assert row["accuracy_ko"] == ("" if korean is None else str(korean.mean))


def test_markdown_and_latex_are_well_formed():
    made = summarize(comparison_settings(), all_cells())
    widths = [
        [line.count("|") for line in block.splitlines()] for block in markdown(made).split("\n\n")
    ]
    assert all(len(set(width)) == 1 for width in widths)
    text = latex(made)
    assert text.count("\\begin{tabular}") == text.count("\\end{tabular}") == len(tables(made))
    columns = ""
    for line in text.splitlines():
        if found := re.match(r"\\begin\{tabular\}\{([lr]+)\}", line):
            columns = found[1]
        elif line.endswith("\\\\"):
            assert line.count(" & ") == len(columns) - 1
    assert not [line for line in text.splitlines() if line[:1] != "%" and set(line) & set("±–")]
    assert escape("a_b & 50% {x} \\ – ± [") == (
        "a\\_b \\& 50\\% \\{x\\} \\textbackslash{} -- $\\pm$ {[}"
    )
    assert escape("<b>|") == "\\textless{}b\\textgreater{}\\textbar{}"


def test_markdown_shows_names_that_hold_markup():
    cells = all_cells()
    for facts in cells:
        for client in facts["clients"]:
            client["language"] = client["language"].replace("ko", "<b>|ko")
    made = markdown(summarize(comparison_settings(), cells))
    assert "&lt;b&gt;\\|ko" in made
    assert "<b>" not in made


def test_a_loss_is_shown_in_nats_and_more_is_worse(tmp_path: Path):
    cells = [facts for facts in all_cells() if facts["pool"] == "unseen"]
    for facts in cells:
        for client in facts["clients"]:
            client["tokens"] = 7 * client["examples"]
            client["loss"] = 1 - client.pop("correct") / client["examples"]
    settings = comparison_settings(pools=["unseen"], bases=["none"], methods=["base", "lora"])
    made = summarize(settings, cells)
    right = summarize(settings, all_cells())
    for line, other in zip(made.lines, right.lines, strict=True):
        assert line.mean.mean == pytest.approx(1 - other.mean.mean)
        assert line.worst_client.mean == pytest.approx(1 - other.worst_client.mean)
        assert line.worse_than_base is not None
        assert other.worse_than_base is not None
        assert line.worse_than_base.mean == pytest.approx(other.worse_than_base.mean)
    found, same = (c.lines[0].difference("lora", 8) for c in (made, right))
    assert found is not None
    assert same is not None
    assert found.value == pytest.approx(-same.value)
    first = tables(made)[0]
    assert first.title == "Response loss (nats per token) on the base none"
    assert re.fullmatch(r"\d\.\d{3} ± \d\.\d{3}", first.rows[0][1])
    assert "response_loss_de" in as_csv(made)
    assert "Accuracy" not in markdown(made)
    for facts in cells:
        if facts["base"] == "none":
            path = tmp_path / path_of(facts)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(facts))
    assert len(read_cells(tmp_path)) == 18


def test_figures_are_the_same_every_time(folder: Path, tmp_path: Path):
    made = write_tables(folder)
    written = {path.name: path.read_bytes() for path in (folder / "figures").iterdir()}
    names = [
        f"{kind}-none{pool}.{end}"
        for kind, pool in (
            *(("gain", ""), ("accuracy", "")),
            *(("difference", ""), ("languages", "-unseen")),
        )
        for end in ("png", "svg")
    ]
    assert sorted(written) == sorted(names)
    again = write_figures(made, tmp_path / "again")
    assert {path.name: path.read_bytes() for path in again} == written
    assert all(written[n].startswith(b"\x89PNG") for n in names if n.endswith("png"))
    assert all(b"<svg" in written[n] for n in names if n.endswith("svg"))


def test_figures_show_the_numbers():
    from fedp2eft.results.figures import (
        accuracy_figure,
        difference_figure,
        gain_figure,
        language_figure,
    )

    made = summarize(comparison_settings(), all_cells())
    line = made.line("none", "unseen", "fedp2eft", 8)
    assert line is not None
    found = line.difference("lora", 8)
    assert found is not None
    assert found.low is not None
    ax = accuracy_figure(made, "none").axes[1]
    drawn = ax.containers[0]
    assert drawn.lines[0].get_ydata()[1] == pytest.approx(100 * line.mean.mean)
    low = drawn.lines[2][0].get_segments()[1][0][1]
    assert low == pytest.approx(100 * (line.mean.mean - (line.mean.half_width or 0)))
    first, ax, _ = difference_figure(made, "none").axes
    names = [label.get_text() for label in first.get_yticklabels()]
    assert names == [name for name in best_first(made, "none") if name != "lora"]
    drawn = [bar for bar in ax.containers if len(bar.lines[0].get_xdata())]  # not the legend's
    bars = {bar.lines[0].get_xdata()[0]: bar for bar in drawn}
    bar = bars[min(bars, key=lambda x: abs(x - 100 * found.value))]
    assert bar.lines[0].get_xdata()[0] == pytest.approx(100 * found.value)
    assert bar.lines[2][0].get_segments()[0][0][0] == pytest.approx(100 * found.low)
    ax = language_figure(made, "none", "unseen").axes[0]
    heights = [bar.get_height() for bar in ax.containers[1]]
    assert heights == pytest.approx([100 * line.languages[name].mean for name in ("de", "fr")])
    gains = next(x for x in made.gains if (x.base, x.pool) == ("none", "unseen"))
    ax = gain_figure(made, "none").axes[1]
    for bar, step in zip(ax.containers, (*gains.steps, gains.total), strict=True):
        assert bar.lines[0].get_xdata()[0] == pytest.approx(100 * step.gain)
        assert bar.lines[2][0].get_segments()[0][1][0] == pytest.approx(100 * step.high)


def test_a_comparison_of_the_base_alone_has_fewer_figures(tmp_path: Path):
    made = summarize(comparison_settings(methods=["base"], bases=["none"]), all_cells())
    assert {path.stem for path in write_figures(made, tmp_path)} == {"accuracy-none"}
    assert write_figures(summarize(comparison_settings(), []), tmp_path) == []


def test_a_folder_without_comparison_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"settings\.yaml"):
        write_tables(tmp_path)
