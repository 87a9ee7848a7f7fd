"""A user's words in the terminal, as they are written: no markup, no escapes, any encoding."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

from fedp2eft.cli import main
from fedp2eft.commands.run import _shown
from fedp2eft.commands.terminal import BarReporter, LineReporter, show_results, table
from fedp2eft.errors import UserError, visible
from fedp2eft.results.rows import Results, Row

WORDS = (
    "spam [bulk]",
    "spam [/bulk]",
    "a :smile: b",
    "x\\\\",
    "[red]x",
    "a|b",
    "<b>&amp;",
    "$x_1$",
)


def describe(tmp_path: Path, label: str, language: str = "de") -> list[str]:
    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"t {n}", "label": [label, "ham"][n % 2]} for n in range(8)]
    lines = [json.dumps({**row, "language": language}, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return ["data", "describe", "--data.dataset", "files", "--data.path", str(path)]


@pytest.mark.parametrize("word", WORDS)
def test_describe_shows_words_as_they_are(tmp_path: Path, capsys, word: str) -> None:
    assert main(describe(tmp_path, word, language=word)) == 0
    out = capsys.readouterr().out
    assert f"{word} 4" in out
    assert f"\u2502 {word} " in out


@pytest.mark.parametrize("word", ["a\x1b[31mb", "a\x07b", "a\u202eb", "a\nb"])
def test_marks_that_move_the_cursor_are_escaped(tmp_path: Path, capsys, word: str) -> None:
    assert main(describe(tmp_path, word)) == 0
    out = capsys.readouterr().out
    escaped = word.encode("unicode_escape").decode()
    assert escaped in out
    assert word not in out
    assert str(UserError(f"class {word}")) == f"class {escaped}"
    assert visible("santé 的 ‌x") == "santé 的 ‌x"


@pytest.mark.parametrize("word", WORDS)
def test_result_tables_show_languages_as_they_are(capsys, word: str) -> None:
    row = Row("fedp2eft", 2, "seen", {word: 0.5, "de": 0.25}, 0.375, 0.25, 0.1, None, 3, 8.0)
    show_results(Results(Path("run"), (row,)))
    assert word in capsys.readouterr().out


def test_result_tables_show_parameters_and_the_kind_of_budget(capsys) -> None:
    row = Row("lora", 2, "seen", {"de": 1.5}, 1.5, 1.5, 1.5, None, 3, 61234.4, "response loss")
    row = replace(row, further_means={"perplexity": 4.5})
    show_results(Results(Path("run"), (row,)))
    shown = capsys.readouterr().out
    assert shown.count("61,234") == shown.count("parameters") == 2  # one for each table
    show_results(Results(Path("run"), (row,), budget="parameters"))
    assert capsys.readouterr().out.count("parameters of rank") == 2


def test_other_tables_and_progress(capsys) -> None:
    out = io.StringIO()
    console = Console(file=out, width=120)
    console.print(table("t [/x]", ["method", "zh [/x]"], [["[b]", "1"]]))
    assert "t [/x]" in out.getvalue()
    assert "zh [/x]" in out.getvalue()
    assert "[b]" in out.getvalue()
    LineReporter().note("peer [/x] \x1b[2J")
    assert capsys.readouterr().out == "peer [/x] \\x1b[2J\n"
    with Progress(console=console) as bars:
        reporter = BarReporter(bars)
        reporter.start("psg", 2, 0)
        reporter.advance("psg", "loss [/x]")
        reporter.note("peer [/x] \x1b[2J")
    assert "peer [/x] \\x1b[2J" in out.getvalue()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_terminals_that_know_few_characters(tmp_path: Path, encoding: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from fedp2eft.cli import main; sys.exit(main())",
         *describe(tmp_path, "santé 的")],
        env={**os.environ, "PYTHONIOENCODING": encoding}, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert b"\\u7684 4" in done.stdout
    listed = subprocess.run(
        [sys.executable, "-c",
         "import sys; from fedp2eft.cli import main; main(['--version']); print('a – b … c')"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True,
    )  # fmt: skip
    assert listed.stdout.splitlines()[-1] == b"a - b . c"


def test_the_adapter_that_is_shown_is_an_unseen_clients_of_fedp2eft(tmp_path: Path) -> None:
    assert _shown(tmp_path) is None
    for client, method in [
        ("fr-unseen-00", "prior-r0"),
        ("de-seen-00", "fedp2eft-r8"),
        ("de-unseen-00", "fedp2eft-r2"),
        ("de-unseen-00", "prior-r0"),
    ]:
        (tmp_path / client / method).mkdir(parents=True)
        (tmp_path / client / method / "adapter_config.json").touch()
    assert _shown(tmp_path) == tmp_path / "de-unseen-00" / "fedp2eft-r2"
