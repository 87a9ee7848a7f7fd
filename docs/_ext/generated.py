"""The references, made from the commands, the settings and the modules themselves.

A page says where with `<!-- generated: commands -->`, `… settings -->` or `… modules -->`.
"""

from __future__ import annotations

import re
from argparse import SUPPRESS
from dataclasses import MISSING, Field, fields, is_dataclass
from inspect import cleandoc
from pkgutil import walk_packages
from typing import Any, Literal, get_args, get_origin, get_type_hints

from docstring_parser import parse
from sphinx.application import Sphinx

SETTINGS_NOTE = (
    "And every [setting](settings.md), on top of the YAML file's: `--SECTION.NAME VALUE`, for "
    "example `--local.lr 1e-3` or `--evaluation.ranks [2,4]`."
)
PLACE = re.compile(r"<!-- generated: (\w+) -->")


def command_reference() -> str:
    """Markdown: a section for each command, with a table of its options."""
    from fedp2eft.commands.catalogue import COMMANDS

    return "\n\n".join(_command(name) for name in COMMANDS)


def _command(name: str) -> str:
    from fedp2eft.commands.catalogue import parser_of
    from fedp2eft.settings.experiment import Settings

    parser = parser_of(name)
    title = f"## `fedp2eft {name}`"
    description = cleandoc(parser.description or "").replace("<", "\\<")
    named = {
        next((o for o in action.option_strings if o.startswith("--")), action.dest): action
        for action in parser._actions
        if action.help != SUPPRESS
    }
    sections = {option[2:].partition(".")[0]: None for option in named if "." in option}
    skipped = {"--help", "--print_config", "--config", *(f"--{name}" for name in sections)}
    if "local" in sections:  # all settings are options, those without a section too
        skipped |= {f"--{field.name}" for field in fields(Settings)}
    rows = [
        (
            f"`{option}`",
            "required" if action.required else _value(action.default),
            _cell(action.help or ""),
        )
        for option, action in named.items()
        if option not in skipped and "." not in option
    ]
    words = [
        f"[{action.metavar}]" if action.nargs == "?" else action.dest.upper()
        for action in named.values()
        if not action.option_strings
    ]
    usage = " ".join([parser.prog, *words, "[OPTIONS]"])
    parts = [title, f"```text\n{usage}\n```", description]
    if rows:
        parts.append(_table(("option", "default", "what"), rows))
    if sections:
        parts.append(SETTINGS_NOTE)
    return "\n\n".join(parts)


def settings_reference() -> str:
    """Markdown: a section for each section of the settings, with a table of its keys."""
    from fedp2eft.settings.experiment import Settings

    hints, said = get_type_hints(Settings), _said(Settings)
    plain = [f for f in fields(Settings) if not is_dataclass(hints[f.name])]
    parts = [_keys(plain, hints, said)]
    for field in fields(Settings):
        kind = hints[field.name]
        if is_dataclass(kind):
            summary = parse(kind.__doc__ or "").short_description or ""
            parts += [f"## `{field.name}`", summary]
            parts.append(_keys(list(fields(kind)), get_type_hints(kind), _said(kind)))
    return "\n\n".join(parts)


def _said(kind: Any) -> dict[str, str]:
    return {each.arg_name: each.description or "" for each in parse(kind.__doc__ or "").params}


def _keys(items: list[Field[Any]], hints: dict[str, Any], said: dict[str, str]) -> str:
    rows = []
    for item in items:
        made = item.default_factory
        default = item.default if made is MISSING else made()
        about = f"{_cell(said.get(item.name, ''))}<br>*{_kind(hints[item.name])}*"
        rows.append((f"`{item.name}`", _value(default), about))
    return _table(("key", "default", "what"), rows)


def _kind(hint: Any) -> str:
    """A type as a reader of YAML would say it."""
    names = {str: "text", int: "whole number", float: "number", bool: "true or false"}
    if hint in names:
        return names[hint]
    if hint is type(None):
        return "null"
    inner = get_args(hint)
    if get_origin(hint) is Literal:
        return " or ".join(f"`{value}`" for value in inner)
    if get_origin(hint) is list:
        return f"list of {_kind(inner[0])}"
    if get_origin(hint) is dict:
        return f"mapping of {_kind(inner[0])} to {_kind(inner[1])}"
    if inner:
        return " or ".join(_kind(each) for each in inner)
    return "`" + getattr(hint, "__name__", str(hint)) + "`"


def _value(value: Any) -> str:
    if value is None or value == {}:
        return "–"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, list):
        return "`[" + ", ".join(str(each) for each in value) + "]`"
    return f"`{value}`"


def _cell(text: str) -> str:
    return " ".join(text.replace("(required)", "").split()).replace("|", "\\|").replace("<", "\\<")


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


PACKAGES = {  # in the order of the data's way
    "data": "Data",
    "models": "Models",
    "tasks": "Tasks",
    "adapters": "Adapters",
    "": "Client, features, generator and settings",
    "methods": "Methods",
    "bases": "Bases",
    "federation": "Federation",
    "experiment": "Experiments",
    "report": "Report",
}


def module_reference() -> str:
    """Markdown: a section for each package, with what the docstrings of its modules say."""
    import fedp2eft

    groups: dict[str, list[str]] = {name: [] for name in PACKAGES}
    for found in walk_packages(fedp2eft.__path__, "fedp2eft."):
        name = found.name.removeprefix("fedp2eft.")
        top = name.partition(".")[0] if "." in name or found.ispkg else ""
        if top not in ("cli", "commands") and name not in ("cli", "__main__"):
            groups.setdefault(top, []).append(name)
    parts = []
    for top, names in groups.items():
        if names:
            parts.append(f"## {PACKAGES.get(top, top.capitalize())}")
            parts += [_module(name, fedp2eft._HOME) for name in names]
    return "\n\n".join(parts)


def _module(name: str, public: dict[str, str]) -> str:
    full = f"fedp2eft.{name}"
    elsewhere = ", ".join(key for key, home in public.items() if home == full)
    options = f"\n   :exclude-members: {elsewhere}" if elsewhere else ""
    directive = f".. automodule:: {full}\n   :members:{options}"
    return f"### `{name}`\n\n```{{eval-rst}}\n{directive}\n```"


def _fill(app: Sphinx, name: str, content: list[str]) -> None:
    made = {"commands": command_reference, "settings": settings_reference}
    made["modules"] = module_reference
    content[0] = PLACE.sub(lambda match: made[match[1]](), content[0])


def setup(app: Sphinx) -> dict[str, bool]:
    """Fill the places in as pages are read."""
    app.connect("source-read", _fill, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
