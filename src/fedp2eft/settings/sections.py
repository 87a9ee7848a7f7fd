"""Sections of the settings that methods bring: `fedl2p.rank`, `--adalora.lr`, or those of a plugin.

A section is a frozen dataclass whose values all have defaults. It may have `check(settings)`, which
raises `UserError` where other settings do not go with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import field, fields, make_dataclass
from functools import lru_cache
from importlib import import_module
from inspect import cleandoc

from fedp2eft.errors import UserError
from fedp2eft.settings.experiment import Settings

_SECTIONS: dict[str, type] = {}


def add_section(name: str, kind: type) -> None:
    """Make a dataclass a section of every experiment's settings.

    Raises:
        UserError: Another section has the name.
    """
    taken = _SECTIONS.get(name) or {f.name: f.type for f in fields(Settings)}.get(name)
    if taken not in (None, kind):
        raise UserError(f"The settings have a section {name!r} already: choose another name.")
    _SECTIONS[name] = kind


def settings_class() -> type[Settings]:
    """`Settings` with the sections of all methods, built in or installed, as further fields."""
    import_module("fedp2eft.methods").load()  # by name: methods are above settings, and fill them
    return _extended(tuple(_SECTIONS.items()))


def with_sections(settings: Settings) -> Settings:
    """Return the same settings with the sections of all methods, which plain `Settings` lack."""
    kind = settings_class()
    if isinstance(settings, kind):
        return settings
    return kind(**{f.name: getattr(settings, f.name) for f in fields(settings)})


@lru_cache(maxsize=4)
def _extended(sections: Iterable[tuple[str, type]]) -> type[Settings]:
    """A subclass: everything that reads the fields of `Settings` finds the sections among them."""
    sections = list(sections)
    made = make_dataclass(
        "Settings",
        [(name, kind, field(default_factory=kind)) for name, kind in sections],
        bases=(Settings,),
        frozen=True,
        namespace={"__module__": __name__, "__post_init__": _check},
    )
    lines = [f"    {name}: {_first_line(kind)}" for name, kind in sections]
    made.__doc__ = "\n".join([cleandoc(Settings.__doc__ or ""), *lines])  # what `--help` shows
    return made


def _check(settings: Settings) -> None:
    Settings.__post_init__(settings)
    for name in _SECTIONS:
        if check := getattr(getattr(settings, name, None), "check", None):
            check(settings)


def _first_line(kind: type) -> str:
    return (kind.__doc__ or "").strip().splitlines()[0]
