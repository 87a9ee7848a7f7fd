"""A report that is rewritten during a run."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedp2eft.errors import UserError
from fedp2eft.files import write_text
from fedp2eft.progress import Reporter
from fedp2eft.report.page import page
from fedp2eft.report.source import read_report
from fedp2eft.report.write import PAGE

EVERY_SECONDS = 5.0
SHARE = 0.05
"""Most of a run's time that its page may take."""
_log = logging.getLogger(__name__)


class WatchReporter:
    """Receives progress, passes it to another reporter, and rewrites report.html now and then.

    Args:
        inner: Receives the progress, too.
        folder: The run or comparison folder.
    """

    def __init__(self, inner: Reporter, folder: Path) -> None:
        self._inner, self._folder = inner, folder
        self._next = 0.0

    def start(self, phase: str, total: int, done: int) -> None:
        """Show that a phase begins."""
        self._inner.start(phase, total, done)
        self._write_now_and_then()

    def advance(self, phase: str, text: str) -> None:
        """Show one unit more."""
        self._inner.advance(phase, text)
        self._write_now_and_then()

    def part(self, phase: str, fraction: float, text: str) -> None:
        """Show nothing: a part of a unit changes no page."""
        self._inner.part(phase, fraction, text)

    def note(self, text: str) -> None:
        """Pass a line on."""
        self._inner.note(text)

    def _write_now_and_then(self) -> None:
        if time.monotonic() < self._next:
            return
        start = time.monotonic()
        self.write(running=True)
        now = time.monotonic()
        self._next = now + max(EVERY_SECONDS, (now - start) / SHARE)

    def write(self, *, running: bool) -> None:
        """Write the page of what is there; nothing that goes wrong with it stops the run."""
        try:
            report = read_report(self._folder, ask=False)
            text = page(report, refresh=int(EVERY_SECONDS) if running else 0)
            write_text(self._folder / PAGE, text)
        except UserError as error:
            _log.debug("%s", error)  # the folder has no settings yet
        except Exception:
            _log.warning("The live page could not be written.", exc_info=_log.isEnabledFor(10))


@contextmanager
def watched(inner: Reporter, folder: Path) -> Iterator[Reporter]:
    """Yield a reporter that keeps a live page; the final page no longer reloads itself."""
    reporter = WatchReporter(inner, folder)
    try:
        yield reporter
    finally:
        reporter.write(running=False)
