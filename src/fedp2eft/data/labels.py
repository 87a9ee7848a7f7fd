"""Class names: what a label column holds, read the same way in every file of a federation."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

from fedp2eft.data.delimited import clean
from fedp2eft.errors import UserError, nearest

_WHOLE = re.compile(r"[+-]?\d+")


def found_names(values: Iterable[Any]) -> tuple[str, ...]:
    """Return the class names found, sorted: by number where all are whole numbers, else by name."""
    names = {clean(str(value)) for value in values}
    if all(_WHOLE.fullmatch(name) for name in names):
        return tuple(sorted(names, key=int))
    return tuple(sorted(names))


def check_names(names: Sequence[str], what: str = "Class", *, cases: bool = True) -> None:
    """Raise `UserError` for a name that is there twice, or that reads the same as another.

    Args:
        names: the names.
        what: what they are, for the message.
        cases: whether names may differ in upper and lower case alone.
    """
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(_skeleton(name, cases), name)
        if other != name:
            how = "characters that are not seen" + ("" if cases else ", or in upper and lower case")
            raise UserError(
                f"{what} {other!r} and {name!r} read the same: they differ in {how}. Write both "
                "the same way."
            )
    if len(set(names)) < len(names):
        twice = next(name for name in names if list(names).count(name) > 1)
        raise UserError(f"{what} {twice!r} is named twice: remove one.")


def _skeleton(name: str, cases: bool = True) -> str:
    """Return a name as it is seen: without marks of no width, any blank as a blank."""
    if not cases:
        # Turkish has a dotted and a dotless i in both cases: "İT", "IT", "ıt" and "it" are one.
        name = name.casefold().replace("\u0307", "").replace("ı", "i")
    seen = (c for c in name if unicodedata.category(c) != "Cf" and not "\ufe00" <= c <= "\ufe0f")
    return " ".join("".join(seen).split())


def class_name(
    value: Any, classes: Sequence[str], where: str, column: str, values: Sequence[Any] = ()
) -> str:
    """Return the class that a value names, or whose id it is.

    What the values are follows from the class names alone, so that it is the same in all files of
    a federation: where one of them is a whole number ("1", "2", "3") all values are names; else a
    whole number is an id and counts through the names from 0.

    Args:
        value: what the row holds.
        classes: the class names in the order of their ids; empty: any value is a name.
        where: the row's place, for the message.
        column: the column, for the message.
        values: all values of the column, for the message.

    Raises:
        UserError: nothing, no text and no whole number, or neither a class name nor an id.
    """
    is_name = isinstance(value, str | int) and not isinstance(value, bool)
    name = clean(str(value)) if is_name else ""
    if not name:
        empty = is_name or value is None
        found = "nothing" if empty else f"{type(value).__name__} {value!s}"
        remedy = "" if empty else f' Write it as text: "{value}".'
        raise UserError(
            f"{where}: column {column!r} holds {found}, not a class name or a whole number.{remedy}"
        )
    if not classes or name in classes:
        return name
    by_name = any(map(_WHOLE.fullmatch, classes))
    if not by_name and re.fullmatch(r"\d+", name) and int(name) < len(classes):
        return classes[int(name)]
    alike = [known for known in classes if _skeleton(known) == _skeleton(name)]
    hint = nearest(name, list(classes))
    if alike:
        hint = f" It reads as {alike[0]!r} and differs in characters that are not seen."
    elif by_name and _WHOLE.fullmatch(name):
        hint = " Names of classes are whole numbers here, so every value is read as a name, no id."
    raise UserError(
        f"{where}: column {column!r} holds the unknown class {name!r}.{hint} "
        f"The classes are {_listed(classes)}"
        + (
            f"; the file has {_listed(found_names(v for v in values if v is not None))}."
            if values
            else "."
        )
    )


def _listed(names: Sequence[str], most: int = 20) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")
