"""Progress bars and tables in the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from threading import Event, Thread
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from fedp2eft.errors import visible
from fedp2eft.methods import phases
from fedp2eft.progress import LogReporter, Reporter, report_to

if TYPE_CHECKING:
    from fedp2eft.results.rows import Results, Row

PHASES = {"base": "base model", "psg": "PSG", "personalize": "clients", "compare": "cells"}


def _title(phase: str) -> str:
    own = phases()
    return own[phase].title if phase in own else PHASES.get(phase, phase)


class BarReporter:
    """One bar per phase: units done, share of the present one, its number, time left."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}
        self._whole: dict[str, int] = {}
        self._latest = ""

    def start(self, phase: str, total: int, done: int) -> None:
        """Show a bar for the phase, or resume the one that it has."""
        self._whole[phase], self._latest = done, phase
        if phase in self._tasks:
            self._progress.update(self._tasks[phase], total=total, completed=done, text="")
        else:
            self._tasks[phase] = self._progress.add_task(
                _title(phase), total=total, completed=done, text="", start=True
            )

    def advance(self, phase: str, text: str) -> None:
        """Advance by one unit."""
        self._whole[phase] += 1
        self._progress.update(self._tasks[phase], completed=self._whole[phase], text=text)

    def part(self, phase: str, fraction: float, text: str) -> None:
        """Say which client is at work."""
        # Fine-tuning for a survey has no bar of its own: it belongs to the phase that asks.
        task = self._tasks.get(phase, self._tasks.get(self._latest))
        if task is not None:
            self._progress.update(task, text=f"{text} {fraction:.0%}")

    def note(self, text: str) -> None:
        """Print a line above the bars."""
        self._progress.console.print(cell(text))  # it may quote a peer


class LineReporter(LogReporter):
    """One line per finished unit, for output that is no terminal; the time left every 30 s.

    Args:
        clock: Seconds that only rise.
    """

    SILENCE = 30.0

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._phase = self._client = ""
        self._units = 0  # finished since the phase began in this process
        self._began = self._finished = self._estimated = self._spoke = clock()

    def start(self, phase: str, total: int, done: int) -> None:
        """Say what begins."""
        super().start(phase, total, done)
        self._phase, self._client, self._units = phase, "", 0
        self._began = self._finished = self._estimated = self._clock()
        self._say(f"{_title(phase)}: {done} of {total} done")

    def advance(self, phase: str, text: str) -> None:
        """Advance by one unit."""
        done, total = self._at.get(phase, (0, 0))
        self._at[phase] = (done + 1, total)
        self._units, self._finished = self._units + 1, self._clock()
        due = self._finished - self._estimated >= self.SILENCE and done + 1 < total
        self._say(f"{_title(phase)} {done + 1}/{total} {text}", estimate=due)

    def part(self, phase: str, fraction: float, text: str) -> None:
        """Remember which client is at work."""
        self._client = f"{text} {fraction:.0%}"

    def note(self, text: str) -> None:
        """Print a line above the bars."""
        self._say(text)

    def remind(self) -> None:
        """Print, after 30 s without a line, that the run is at work."""
        if self._clock() - self._spoke < self.SILENCE:
            return
        if not self._phase:
            self._say("preparing the model and the data")
            return
        done, total = self._at[self._phase]
        name = _title(self._phase)
        self._say(f"{name} {done}/{total} at work: {self._client}".rstrip(": "), estimate=True)

    def _say(self, line: str, estimate: bool = False) -> None:
        self._spoke = self._clock()
        if estimate:
            self._estimated = self._spoke
            line += f" ({self._left()})"
        print(visible(line), flush=True)  # it may quote a peer

    def _left(self) -> str:
        """Return the phase's time left, from the mean of its units so far."""
        if not self._units:
            return "time left not known yet"
        done, total = self._at[self._phase]
        mean = (self._finished - self._began) / self._units
        left = max(0.0, mean * (total - done) - (self._clock() - self._finished))
        shown = f"{left:.0f} s" if left < 100 else f"{left / 60:.0f} min"
        return f"about {shown} left in this phase"


@contextmanager
def _reminded(lines: LineReporter) -> Iterator[None]:
    """Let a thread look once a second whether a line is due."""
    ended = Event()

    def look() -> None:
        while not ended.wait(1.0):
            lines.remind()

    thread = Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def cell(text: str) -> Text:
    """Return text for a table or a line as it is, whatever rich would read into it."""
    return Text(visible(text), overflow="fold")


@contextmanager
def progress() -> Iterator[Reporter]:
    """Show progress bars in a terminal, else a line per finished unit."""
    console = Console()
    if not console.is_terminal:
        lines = LineReporter()
        with report_to(lines), _reminded(lines):
            yield lines
        return
    with Progress(
        TextColumn("{task.description:>10}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}", markup=False),  # it may quote a client's data
        console=console,
    ) as bars:
        reporter = BarReporter(bars)
        with report_to(reporter):
            yield reporter


def console() -> Console:
    """Return the terminal, or, where output is no terminal, 120 columns of plain text."""
    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)


LEFT = ("method", "training", "phase")


def table(
    title: str, head: Sequence[str], rows: Iterable[Sequence[str]], bold: Sequence[str] = ()
) -> Table:
    """Return a table of text: names on the left, values on the right."""
    made = Table(title=cell(title), title_justify="left")
    for name in head:
        side: Literal["left", "right"] = "left" if name in LEFT else "right"
        made.add_column(cell(name), justify=side, style="bold" if name in bold else "")
    for row in rows:
        made.add_row(*map(cell, row))
    return made


def show_results(results: Results) -> None:
    """Print the tables of a run.

    Methods × languages, worst, mean, clients worse than the base, parameters of an adapter.
    """
    from fedp2eft.results.layout import MISSING, PARAMETERS, WORSE, unit
    from fedp2eft.results.metrics import METRICS

    def line(row: Row, cells: Iterable[str]) -> list[str]:
        rank = str(row.rank) if row.rank else MISSING
        return [row.method, rank, *cells, f"{row.parameters:,.0f}"]

    for pool in dict.fromkeys(row.pool for row in results.rows):
        rows = [row for row in results.rows if row.pool == pool]
        metric = METRICS[rows[0].metric]
        title = f"{metric.name.capitalize()} ({unit(metric)}), {pool} clients ({rows[0].clients})"
        rank = "rank" if results.budget == "ranks" else "parameters of rank"
        head = ["method", rank, *rows[0].languages, "worst", "mean", WORSE, PARAMETERS]
        lines = []
        for row in rows:
            values = (*row.languages.values(), row.worst_language, row.mean)
            worse = MISSING if row.worse_than_base is None else f"{row.worse_than_base:.0%}"
            lines.append(line(row, [*map(metric.shown, values), worse]))
        console().print(table(title, head, lines, bold=("worst", "mean")))
        # The other metrics of a causal LM.
        names = [name for name in METRICS if any(name in row.further_means for row in rows)]
        if not names:
            continue
        title = f"Perplexity, {pool} clients"
        if len(names) > 1:
            title = (
                f"Perplexity, scores of generated texts (%), {pool} clients, mean over languages"
            )
        lines = []
        for row in rows:
            known = row.further_means
            shown = (METRICS[n].shown(known[n]) if n in known else MISSING for n in names)
            lines.append(line(row, shown))
        console().print(table(title, ["method", rank, *names, PARAMETERS], lines))


def show_gains(results: Results) -> None:
    """Print what was gained and from what: on clients that no training saw, where there are any."""
    apart = [gains for gains in results.gains if gains.pool != "seen"]
    for gains in apart or results.gains:
        print(f"\n{visible(gains.text)}")


LOAD = """from transformers import {auto}
from peft import PeftModel
model = PeftModel.from_pretrained({auto}.from_pretrained("{base}"), "{adapter}")"""


def show_loading(base: str, adapter: str, task: str = "classification") -> None:
    """The three lines of Python that load an adapter with plain PEFT."""
    auto = {"causal_lm": "AutoModelForCausalLM"}.get(task, "AutoModelForSequenceClassification")
    text = LOAD.format(auto=auto, base=base, adapter=adapter)
    print(f"\nOne client's adapter, with plain PEFT:\n\n{text}\n")
