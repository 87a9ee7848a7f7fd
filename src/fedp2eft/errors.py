"""The one exception that a user's mistake or broken input raises."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from unicodedata import category


class UserError(Exception):
    """Something that the user can fix: a file, a setting, a peer's reply.

    The message is a single line that says what is wrong and what to do. The command line prints it
    without a traceback and exits with status 2; a library user catches it like any exception. It
    may quote a file or a peer: marks that would move a terminal's cursor are shown as escapes.
    """

    def __str__(self) -> str:
        return visible(super().__str__())


class ShareableError(UserError):
    """A mistake whose text holds nothing of a client's data: it may travel to the server whole."""


class DivergedError(UserError):
    """Training diverged to NaN or infinity; a smaller learning rate may help."""


class InterruptedRunError(UserError):
    """The user stopped the command; the message says how to resume."""


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless the condition holds."""
    if not condition:
        raise UserError(message)


def visible(text: str) -> str:
    """Return text on one line, with control characters and marks of direction as escapes."""
    return "".join(
        c.encode("unicode_escape").decode() if category(c) in _HIDDEN or c in _TURNS else c
        for c in text
    )


_HIDDEN = ("Cc", "Cs", "Zl", "Zp")
_TURNS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def shortened(text: str, most: int = 80) -> str:
    """Return any text quoted, as one short line of plain characters."""
    return repr(text if len(text) <= most else text[:most] + "…")


def first_line(error: BaseException) -> str:
    """Return the first line of another library's message, without its closing full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(". ")


def nearest(word: str, known: list[str]) -> str:
    """Return `" Did you mean 'x'?"` for the known word closest to `word`, or an empty string."""
    from difflib import get_close_matches

    close = get_close_matches(word, known, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


_BOUNDS = {
    "0 or more": lambda value: value >= 0,
    "1 or more": lambda value: value >= 1,
    "2 or more": lambda value: value >= 2,
    "above 0": lambda value: value > 0,
    "at least 0 and below 1": lambda value: 0 <= value < 1,
    "between 0 and 1": lambda value: 0 < value < 1,
    "1 or more, or 0 for no limit": lambda value: value == 0 or value >= 1,
}


def check_bounds(section: str, settings: Any, names: Mapping[str, str]) -> None:
    """Raise `UserError` for the first value outside its bound; null is inside any.

    Args:
        section: Name of the section, for the message.
        settings: The section.
        names: Bound, as the message says it, to the settings that have it, blanks between.
    """
    for bound, those in names.items():
        for name in those.split():
            value = getattr(settings, name)
            require(
                value is None or _BOUNDS[bound](value),
                f"{section}.{name} must be {bound}, not {value}.",
            )
