"""Settings from YAML and the command line; an unknown key names the nearest known one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import asdict, fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace

from fedp2eft.errors import UserError, nearest, require
from fedp2eft.settings.experiment import Settings
from fedp2eft.settings.sections import settings_class


class Parser(ArgumentParser):
    """jsonargparse's parser; a mistake is a `UserError` of one line instead of a usage page."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the mistake, with the nearest known option where one is unknown."""
        line = " ".join(str(message).split())
        hint = ""
        if "unrecognized arguments" in line.lower():
            words = [word.split("=")[0] for word in line.split() if word.startswith("--")]
            hint = nearest(words[0], self._known_options()) if words else ""
        raise UserError(f"{line}.{hint} See --help.") from ex

    def add_function(self, function: Callable[..., None], positional: bool = False) -> None:
        """Add a function's arguments as options; a switch may be named without a value.

        Args:
            function: Its signature and docstring say what there is.
            positional: Whether those without a default are words in their order, not options.
        """
        self.add_function_arguments(function, as_group=False, as_positional=positional)
        for action in self._actions:
            if action.default is False:
                action.nargs, action.const = "?", True

    def _known_options(self) -> list[str]:
        return [option for action in self._actions for option in action.option_strings]


def settings_parser(parser: Parser | None = None) -> Parser:
    """A parser that has every setting as an option, e.g. `--local.lr`."""
    parser = parser or Parser(exit_on_error=True)
    parser.add_class_arguments(settings_class(), as_group=False)
    return parser


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML mapping from a file.

    Raises:
        UserError: Missing, unreadable, not UTF-8, not YAML, or not a mapping.
    """
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"There is no file {path}: give an experiment's YAML file.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}).") from error
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise UserError(f"{path} is not valid YAML{where}.") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} holds no settings: it must be a mapping of section to values.")
    return raw


def check_keys(raw: Mapping[str, Any], kind: type, where: str = "") -> None:
    """Raise `UserError` for the first key that no setting has, naming the nearest one."""
    known = {f.name for f in fields(kind)}
    hints = get_type_hints(kind)
    for key, value in raw.items():
        name = f"{where}{key}"
        if key not in known:
            options = ", ".join(sorted(known))
            hint = nearest(str(key), sorted(known))
            raise UserError(f"Unknown setting {name!r}.{hint} Known here: {options}.")
        if is_dataclass(hints[key]):
            _check_section(value, hints[key], name)
        elif get_origin(hints[key]) is dict and is_dataclass(inner := get_args(hints[key])[1]):
            for each, section in (value if isinstance(value, Mapping) else {}).items():
                _check_section(section, inner, f"{name}.{each}")


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
        f"local.prior: {local['prior']} is gone, fedp2eft 0.1.0 was the last version that had it: "
        "leave it out, or use that version.",
    )
    # `alpha` was the weight of the normalized prior alone.
    return {**raw, "local": {k: v for k, v in local.items() if k not in ("prior", "alpha")}}


def _check_section(value: Any, kind: Any, name: str) -> None:
    # jsonargparse would take a word here for the name of a class, and import its module.
    if not isinstance(value, Mapping):
        options = ", ".join(f.name for f in fields(kind))
        raise UserError(
            f"Setting {name!r} must be a mapping, not {value!r}. Known here: {options}."
        )
    check_keys(value, kind, f"{name}.")


def settings_from(raw: Mapping[str, Any], options: list[str] | None = None) -> Settings:
    """Typed settings from a mapping, with command-line options (`--local.lr 1e-3`) on top.

    Raises:
        UserError: An unknown key, or a value of the wrong type or out of range.
    """
    kind, raw = settings_class(), without_retired(raw)
    check_keys(raw, kind)
    parser = settings_parser()
    parsed: Namespace = parser.parse_object(deepcopy(dict(raw)))  # it would put its own values in
    if options:
        parser.set_defaults(parsed.as_flat().__dict__)
        parsed = parser.parse_args(options)
    made = parser.instantiate(parsed)
    return kind(**{f.name: getattr(made, f.name) for f in fields(kind)})


@lru_cache(maxsize=4)
def settings_of_json(text: str) -> Settings:
    """`settings_from` of JSON; kept, for reading takes half a second and a run's parts all do."""
    return settings_from(json.loads(text))


def as_dict(settings: Settings) -> dict[str, Any]:
    """The settings as plain JSON values."""
    value: dict[str, Any] = json.loads(json.dumps(asdict(settings)))
    return value


def settings_of_run(config: Mapping[str, Any]) -> dict[str, Any]:
    """The resolved settings that a Flower run config names, as plain values.

    Args:
        config: Has `settings` (JSON) or `config` (path of a YAML file; see `app_file`).
    """
    if text := config.get("settings"):
        return _resolved(str(text))
    if path := config.get("config"):
        return _resolved(json.dumps(read_yaml(app_file(str(path))), default=str))
    raise UserError("The run config names no experiment: add config='configs/….yaml'.")


@lru_cache(maxsize=4)
def _resolved(text: str) -> dict[str, Any]:
    """The whole of settings given as JSON; kept, for every message of a run asks for the same."""
    return as_dict(settings_of_json(text))


def app_file(path: str) -> Path:
    """A file that a Flower run config names.

    A relative path means a file of the Flower app: `flwr run FOLDER` bundles the YAML files of
    the folder, and Flower unpacks the bundle wherever the app runs and puts it on `sys.path`. Where
    the app has no such file, the path is relative to the working directory.
    """
    for folder in map(Path, sys.path):
        if (folder / "pyproject.toml").is_file() and (folder / path).is_file():
            return folder / path
    return Path(path)


def read_settings(path: Path) -> dict[str, Any]:
    """The settings that a folder was made for, those that came later at their defaults.

    Raises:
        UserError: Damaged, or no settings.
    """
    try:
        return as_dict(settings_from(yaml.safe_load(path.read_text(encoding="utf-8"))))
    except UserError as error:
        raise UserError(f"{path} is not a run's: {error}") from error
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"{path} is damaged or not a run's: name another run folder.") from error


def check_same(
    folder: Path, old: Any, new: Any, free: set[tuple[str, ...]], where: tuple[str, ...] = ()
) -> None:
    """Raise `UserError` for the first setting outside `free` that is another in the folder."""
    if where in free or old == new:
        return
    if isinstance(old, dict) and isinstance(new, dict) and where != ("data", "files"):
        for key in new:
            check_same(folder, old.get(key), new[key], free, (*where, key))
        return
    raise UserError(
        f"{folder} holds another experiment: {'.'.join(where)} is {old!r} there and {new!r} here. "
        "Name another run folder."
    )
