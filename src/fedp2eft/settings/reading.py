"""Settings from YAML and the command line, once; and back into a file.

YAML text becomes `Settings` here and nowhere else. What comes in:

* `read_settings(file, options)`   an experiment's YAML file, with command-line options on top
* `settings_of_run(run_config)`    what a Flower run config names; cached by its text
* `settings_of_folder(folder)`     the settings.yaml of a run or comparison folder
* `settings_from(mapping)`         a mapping of Python values

and `settings_text` writes what the last three read.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, field, fields, is_dataclass, make_dataclass
from functools import lru_cache
from importlib import import_module
from inspect import cleandoc
from pathlib import Path
from typing import Any

import yaml

from fedp2eft.errors import UserError, nearest, require
from fedp2eft.settings.experiment import Settings
from fedp2eft.settings.words import load_words, parsed, typed, types_of

SETTINGS_FILE = "settings.yaml"


def read_settings(path: str | Path, options: Sequence[str] | None = None) -> Settings:
    """Return the settings in an experiment's YAML file, with command-line options on top.

    Raises:
        UserError: The file cannot be read, or a setting is wrong: the line names file and key.
    """
    source = f"{path} with the options given" if options else str(path)
    return _settings(read_yaml(path), options, source)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return a YAML file's mapping; its scalars are words (see `settings.words`).

    Raises:
        UserError: Missing, unreadable, not UTF-8, not YAML, or not a mapping.
    """
    return _mapping(_text_of(Path(path).expanduser()), str(path))


def settings_from(raw: Mapping[str, Any], options: Sequence[str] | None = None) -> Settings:
    """Return typed settings from a mapping, with command-line options (`--local.lr 1e-3`) on top.

    Raises:
        UserError: An unknown key, or a value of the wrong type or out of range.
    """
    merged = _merged(raw, options_tree(options)) if options else raw
    made: Settings = typed(settings_class(), without_retired(merged), "")
    return made


def without_retired(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings without keys of earlier versions that can only mean what is done now.

    Raises:
        UserError: Such a key has a value that is no longer possible.
    """
    local = raw.get("local")
    if not isinstance(local, Mapping) or "prior" not in local:
        return dict(raw)
    require(
        local["prior"] == "gamma",
        f"local.prior: {local['prior']} was removed; fedp2eft 0.1.0 was the last version with it: "
        "leave it out, or use that version.",
    )
    # `alpha` was the weight of the normalized prior alone.
    return {**raw, "local": {k: v for k, v in local.items() if k not in ("prior", "alpha")}}


def settings_of_run(config: Mapping[str, Any]) -> Settings:
    """Return the settings that a Flower run config names.

    Args:
        config: Has `settings` (YAML or JSON) or `config` (path of a YAML file; see `app_file`).
    """
    if text := config.get("settings"):
        return _settings_of_text(str(text), "The run config's settings")
    if path := config.get("config"):
        file = app_file(str(path))
        return _settings_of_text(_text_of(file), str(file))
    raise UserError("The run config names no experiment: add config='configs/….yaml'.")


def settings_of_folder(folder: str | Path) -> Settings:
    """Return what a run or comparison folder was made for; later settings have their defaults.

    Raises:
        UserError: settings.yaml is missing, damaged or another program's.
    """
    path = Path(folder).expanduser() / SETTINGS_FILE
    try:
        return settings_from(read_yaml(path))
    except UserError as error:
        raise UserError(f"{path} is damaged, or not the settings of a run: {error}") from error


def settings_text(settings: Settings) -> str:
    """Return all settings as YAML, for a file or a message; whatever reads settings reads it."""
    return yaml.safe_dump(asdict(settings), sort_keys=False, allow_unicode=True)


def check_same(
    folder: Path, old: Any, new: Any, free: set[tuple[str, ...]], where: tuple[str, ...] = ()
) -> None:
    """Raise `UserError` for the first setting outside `free` that has another value in a folder.

    Args:
        folder: Whose settings `old` are.
        old: Settings, or a section of them.
        new: The same, as asked for now.
        free: Settings that may change between two starts.
        where: Name of the section.
    """
    if where in free or old == new:
        return
    if is_dataclass(new):
        for field in fields(new):
            pair = getattr(old, field.name), getattr(new, field.name)
            check_same(folder, *pair, free, (*where, field.name))
        return
    raise UserError(
        f"{folder} holds another experiment: {'.'.join(where)} is {old!r} there and {new!r} here. "
        "Name another run folder."
    )


def app_file(path: str) -> Path:
    """Return a file that a Flower run config names.

    A relative path means a file of the Flower app: `flwr run FOLDER` bundles the YAML files of
    the folder, and Flower unpacks the bundle wherever the app runs and puts it on `sys.path`. Where
    the app has no such file, the path is relative to the working directory.
    """
    for folder in map(Path, sys.path):
        if (folder / "pyproject.toml").is_file() and (folder / path).is_file():
            return folder / path
    return Path(path)


def options_tree(options: Sequence[str]) -> dict[str, Any]:
    """Return command-line options as a mapping: `--local.lr 1e-3` is {"local": {"lr": "1e-3"}}.

    Raises:
        UserError: An unknown option, or one without a value.
    """
    tree: dict[str, Any] = {}
    words = iter(options)
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        section, key = _place(word, name)
        if not equals:
            value = next(words, "")
            if not value or value.startswith("--"):
                raise UserError(f"--{name} has no value: write --{name}=VALUE.")
        given = None if value == "null" else value
        if key:
            tree.setdefault(section, {})[key] = given
        else:
            whole = parsed(given)
            if is_dataclass(types_of(settings_class())[section]) and not isinstance(whole, Mapping):
                raise UserError(f"--{section} is {given!r}; give a mapping, or --{section}.KEY.")
            tree[section] = _merged(tree.get(section), whole)
    return tree


def _place(word: str, name: str) -> tuple[str, str]:
    """Return section and key that an option names."""
    known = {f"--{each}" for each in option_names()}
    if f"--{name}" not in known or not word.startswith("--"):
        hint = nearest(word.split("=")[0], sorted(known)) if word.startswith("--") else ""
        raise UserError(f"Unknown option {word.split('=')[0]!r}.{hint} See --help.")
    section, _, key = name.partition(".")
    return section, key


def option_names() -> list[str]:
    """Return every setting as the command line names it: seed, local, local.lr, …"""
    names = []
    for section, kind in types_of(settings_class()).items():
        names.append(section)
        names += [f"{section}.{key}" for key in types_of(kind)] if is_dataclass(kind) else []
    return names


def _merged(below: Any, above: Any) -> Any:
    """Return one mapping of two; the second wins."""
    if not isinstance(below, Mapping) or not isinstance(above, Mapping):
        return above
    both = {key: _merged(below[key], above[key]) for key in above if key in below}
    return {**below, **above, **both}


@lru_cache(maxsize=4)
def _settings_of_text(text: str, source: str) -> Settings:
    """Return settings, cached until a method adds a section: every message asks for them."""
    return _settings(_mapping(text, source), None, source)


def _settings(raw: Mapping[str, Any], options: Sequence[str] | None, source: str) -> Settings:
    try:
        return settings_from(raw, options)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def _mapping(text: str, source: str) -> dict[str, Any]:
    try:
        raw = load_words(text)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise UserError(f"{source} is not valid YAML{where}.") from error
    if not isinstance(raw, dict):
        raise UserError(f"{source} holds no settings: it must be a mapping of section to values.")
    return raw


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"There is no file {path}: give an experiment's YAML file.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}).") from error
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error


# ── sections that methods bring ─────────────────────────────────────────────────────────────────

_SECTIONS: dict[str, type] = {}


def add_section(name: str, kind: type) -> None:
    """Make a dataclass a section of every experiment's settings, and of the options.

    Args:
        name: The section's.
        kind: A frozen dataclass whose values all have defaults. It may have `check(settings)`,
            which raises `UserError` if other settings are incompatible with it.

    Raises:
        UserError: Another section has the name.
    """
    taken = _SECTIONS.get(name) or {f.name: f.type for f in fields(Settings)}.get(name)
    if taken not in (None, kind):
        raise UserError(f"The settings have a section {name!r} already: choose another name.")
    _SECTIONS[name] = kind
    _settings_of_text.cache_clear()


def settings_class() -> type[Settings]:
    """Return `Settings` with the sections of all methods, built in or installed, as fields."""
    # By name: methods are above settings, and bring sections.
    import_module("fedp2eft.methods").METHODS.load()
    return _extended(tuple(_SECTIONS.items()))


def with_sections(settings: Settings) -> Settings:
    """Return the same settings with the sections of all methods, which plain `Settings` lack."""
    kind = settings_class()
    if isinstance(settings, kind):
        return settings
    return kind(**{f.name: getattr(settings, f.name) for f in fields(settings)})


@lru_cache(maxsize=4)
def _extended(sections: Iterable[tuple[str, type]]) -> type[Settings]:
    """Return a subclass: what reads the fields of `Settings` finds the sections among them."""
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
        check = getattr(getattr(settings, name, None), "check", None)
        if callable(check):  # and no setting of that name
            check(settings)


def _first_line(kind: type) -> str:
    return (kind.__doc__ or "").strip().splitlines()[0]
