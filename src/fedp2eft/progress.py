"""Where a run reports its progress: a log line by default, progress bars in a terminal."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

logger = logging.getLogger(__name__)


class Reporter(Protocol):
    """Receives the progress of a run."""

    def start(self, phase: str, total: int, done: int) -> None:
        """Begin a phase of `total` units, of which `done` were finished before."""

    def advance(self, phase: str, text: str) -> None:
        """Count one finished unit; `text` is its most telling metric."""

    def part(self, phase: str, fraction: float, text: str) -> None:
        """Report a finished share of the present unit."""

    def note(self, text: str) -> None:
        """Report something worth a line."""


class LogReporter:
    """Writes a log line per finished unit."""

    def __init__(self) -> None:
        self._at: dict[str, tuple[int, int]] = {}

    def start(self, phase: str, total: int, done: int) -> None:
        """Begin a phase of `total` units, of which `done` were finished before."""
        self._at[phase] = (done, total)

    def advance(self, phase: str, text: str) -> None:
        """Count one finished unit; `text` is its most telling metric."""
        done, total = self._at.get(phase, (0, 0))
        self._at[phase] = (done + 1, total)
        logger.info("%s %d/%d %s", phase, done + 1, total, text)

    def part(self, phase: str, fraction: float, text: str) -> None:
        """Report a finished share of the present unit."""

    def note(self, text: str) -> None:
        """Report something worth a line."""
        logger.info("%s", text)


_current: list[Reporter] = [LogReporter()]


def current() -> Reporter:
    """Return the reporter that runs in this process report to."""
    return _current[-1]


@contextmanager
def report_to(reporter: Reporter) -> Iterator[None]:
    """Make `reporter` the one that runs report to, until the end of the block."""
    _current.append(reporter)
    try:
        yield
    finally:
        _current.pop()


def each_of(steps: int, report: Callable[[float], None] | None) -> Callable[[float], None]:
    """Return a callback for each of so many steps (it gets the loss); `report` gets their share."""
    done = 0

    def on_step(_loss: float) -> None:
        nonlocal done
        done += 1
        if report:
            report(done / max(1, steps))

    return on_step
