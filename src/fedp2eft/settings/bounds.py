"""Bounds of numbers in the settings, all checked in one place and said in one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedp2eft.errors import require

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
    """Raise `UserError` for the first number outside its bound; null is inside any.

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
