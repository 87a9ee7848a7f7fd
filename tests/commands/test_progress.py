"""Progress: bars in a terminal, whole lines anywhere else."""

from __future__ import annotations

import io
from threading import Event

import pytest
from rich.console import Console
from rich.progress import Progress, TextColumn

from fedp2eft.commands.terminal import BarReporter, LineReporter, progress
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


def test_lines_say_the_time_left_every_half_minute(capsys):
    now = [0.0]
    lines = LineReporter(clock=lambda: now[0])

    def said(at: float, act, *words) -> str:
        now[0] = at
        act(*words)
        return capsys.readouterr().out.strip()

    now[0] = -30.0
    lines.note("")
    assert said(-1, lines.remind) == ""
    assert said(0, lines.remind) == "preparing the model and the data"
    assert said(1, lines.start, "base", 10, 4) == "base model: 4 of 10 done"
    lines.part("base", 0.4, "de-seen-00")
    assert said(20, lines.remind) == ""
    assert said(31, lines.remind) == (
        "base model 4/10 at work: de-seen-00 40% (time left not known yet)"
    )
    assert said(41, lines.advance, "base", "loss 2.1") == "base model 5/10 loss 2.1"
    # 40 s per unit: five more, the first of them 30 s old, are 170 s.
    assert said(71, lines.remind).endswith("(about 3 min left in this phase)")
    said(80, lines.advance, "base", "")
    assert said(119, lines.advance, "base", "loss 2") == (
        "base model 7/10 loss 2 (about 2 min left in this phase)"
    )
    assert said(120, lines.note, "A remark.") == "A remark."
    assert said(140, lines.start, "psg", 1, 0) == "PSG: 0 of 1 done"
    assert said(200, lines.advance, "psg", "loss 1") == "PSG 1/1 loss 1"


def test_silence_is_broken_from_outside(capsys, monkeypatch):
    monkeypatch.setattr(LineReporter, "SILENCE", 0.0)
    with progress() as reporter:
        reporter.start("psg", 2, 0)
        spoken = Event()
        monkeypatch.setattr(LineReporter, "_say", lambda *_, **__: spoken.set())
        assert spoken.wait(20)


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


def test_what_a_survey_computes_is_shown_by_the_phase_that_asks():
    with Progress(console=Console(file=io.StringIO(), force_terminal=True)) as bars:
        reporter = BarReporter(bars)
        reporter.part("personalize", 0.5, "de-seen-00")  # before any phase: nothing to show it in
        reporter.start("compare", 3, 0)
        reporter.start("psg", 1, 1)
        reporter.start("compare", 3, 1)
        reporter.part("personalize", 0.5, "de-seen-00")
        assert [task.description for task in bars.tasks] == ["cells", "PSG"]
        assert [task.fields["text"] for task in bars.tasks] == ["de-seen-00 50%", ""]
        assert bars.tasks[0].completed == 1


def test_bars_where_the_output_is_a_terminal(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress() as reporter:
        assert isinstance(reporter, BarReporter)
        report(reporter)
    assert "loss 0.5" in capsys.readouterr().out
