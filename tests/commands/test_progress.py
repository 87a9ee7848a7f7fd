"""Progress: bars in a terminal, whole lines anywhere else."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.progress import Progress, TextColumn

from fedp2eft.commands.terminal import BarReporter, progress
from fedp2eft.progress import current


def report(reporter) -> None:
    reporter.start("psg", 3, 1)
    reporter.part("psg", 0.5, "de-seen-00")
    reporter.advance("psg", "loss 0.5")
    reporter.note("Half of it is done.")
    reporter.start("personalize", 1, 0)
    reporter.advance("personalize", "lora de-seen-00 50%")


def test_lines(capsys):
    with progress() as reporter:
        assert current() is reporter
        report(reporter)
    assert current() is not reporter
    assert capsys.readouterr().out.splitlines() == [
        "PSG: 1 of 3 done",
        "PSG 2/3 loss 0.5",
        "Half of it is done.",
        "clients: 0 of 1 done",
        "clients 1/1 lora de-seen-00 50%",
    ]


def test_bars():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100)
    columns = TextColumn("{task.description} {task.completed}/{task.total} {task.fields[text]}")
    with Progress(columns, console=console) as bars:
        report(BarReporter(bars))
    shown = out.getvalue()
    for text in ("PSG 2/3 loss 0.5", "clients 1/1 lora de-seen-00 50%", "Half of it is done."):
        assert text in shown


@pytest.mark.parametrize("phase", ["psg", "personalize"])  # a client may write texts for minutes
def test_a_bar_says_who_is_at_work(phase):
    with Progress(console=Console(file=io.StringIO(), force_terminal=True)) as bars:
        reporter = BarReporter(bars)
        reporter.start(phase, 3, 1)
        reporter.part(phase, 0.5, "de-seen-00")
        assert bars.tasks[0].fields["text"] == "de-seen-00 50%"


def test_bars_where_the_output_is_a_terminal(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress() as reporter:
        assert isinstance(reporter, BarReporter)
        report(reporter)
    assert "loss 0.5" in capsys.readouterr().out
