"""`fedp2eft report` and `fedp2eft show`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fedp2eft.errors import UserError

NEEDED = ("matplotlib", "scipy")


def report(folder: str, out: str | None = None) -> None:
    """Write the report of a run or comparison: report.html, and its figures as PNG and SVG.

    The report is one file that works offline. An unfinished run or comparison gets a report of what
    exists so far.

    Args:
        folder: The run or comparison folder.
        out: Folder for report.html and for report/, which holds the figures. Default: `folder`.
    """
    with extra_needed():
        from fedp2eft.report.write import FIGURES, write_report

    page, made = write_report(folder, out)
    for line in made.notes:
        print(f"Note: {line}")
    print(f"Page: {page} ({page.stat().st_size / 1e3:,.0f} kB)")
    print(f"Figures: {page.parent / FIGURES}")


def show(folder: str) -> None:
    """Print settings, progress and results of a run or comparison.

    Args:
        folder: The run or comparison folder.
    """
    from fedp2eft.report.show import show_report

    show_report(folder)


@contextmanager
def extra_needed() -> Iterator[None]:
    """Turn a missing package into a `UserError` that names the extra `report`."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in NEEDED:
            raise
        raise UserError(
            "The report needs the extra report: pip install 'fedp2eft[report]'."
        ) from error
