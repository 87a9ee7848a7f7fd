"""`fedp2eft completion`: a script for the shell, made from the options that the commands have."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args, get_origin

from shtab import DIRECTORY, FILE, complete, glob

from fedp2eft.commands.catalogue import (
    EXPERIMENTS,
    FUNCTIONS,
    HELP,
    POSITIONAL,
    WATCH_HELP,
    function_of,
)
from fedp2eft.settings.options import Parser, settings_parser


def completion(shell: Literal["bash", "zsh", "fish"]) -> None:
    """Print a script that completes commands, options and settings in your shell.

    For bash, add `eval "$(fedp2eft completion bash)"` to ~/.bashrc or, faster, save the script as
    ~/.local/share/bash-completion/completions/fedp2eft. For zsh, save it as _fedp2eft in a folder
    of $fpath; for fish, as ~/.config/fish/completions/fedp2eft.fish.

    Args:
        shell: "bash", "zsh" or "fish".
    """
    print(complete(tree(), shell))


def tree() -> ArgumentParser:
    """All commands with all their options, as plain argparse has them."""
    root = ArgumentParser(prog="fedp2eft", description=HELP.split("\n\n")[1])
    root.add_argument("--version", action="store_true", help="print the version")
    commands = root.add_subparsers()
    groups: dict[str, Any] = {}
    for name in EXPERIMENTS:
        parser = commands.add_parser(name, help=_first_line(function_of(name)))
        if name != "quickstart":
            config = parser.add_argument("config", help="the experiment's YAML file")
            config.complete = glob("*.yaml", "*.yml")  # type: ignore[attr-defined]
        run = parser.add_argument("--run", metavar="DIR", help="the run folder")
        run.complete = DIRECTORY  # type: ignore[attr-defined]
        parser.add_argument("--watch", action="store_true", help=WATCH_HELP)
        _copy(settings_parser(), parser)
    for name in FUNCTIONS:
        first, _, second = name.partition(" ")
        function = function_of(name)
        if second and first not in groups:
            names = [each.split()[1] for each in FUNCTIONS if each.startswith(f"{first} ")]
            groups[first] = commands.add_parser(first, help=", ".join(names)).add_subparsers()
        where = groups[first] if second else commands
        parser = where.add_parser(second or first, help=_first_line(function))
        options = Parser()
        options.add_function(function, positional=name in POSITIONAL)
        _copy(options, parser)
    return root


def _copy(options: Parser, parser: ArgumentParser) -> None:
    for action in options._actions:
        if type(action).__name__ in ("_HelpAction", "_ActionConfigLoad"):
            continue
        names = [name for name in action.option_strings if not name.endswith("+")] or [action.dest]
        text = (action.help or "").split(". ")[0].replace("%", "%%")
        choices = list(_values(getattr(action, "_typehint", None)))
        copied = parser.add_argument(*names, help=text, choices=choices or None)
        if not choices:
            copied.complete = FILE  # type: ignore[attr-defined]


def _values(kind: Any) -> Iterator[str]:
    """The values that a type has, where they are few."""
    if kind is bool:
        yield from ("true", "false")
    elif get_origin(kind) is Literal:
        yield from map(str, get_args(kind))
    elif get_origin(kind) is not list:
        for part in get_args(kind):
            if part is not type(None):
                yield from _values(part)


def _first_line(function: Callable[..., None]) -> str:
    return (function.__doc__ or "").splitlines()[0].replace("%", "%%")
