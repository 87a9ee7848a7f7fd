"""Which commands there are, and the parser of each.

`parser_of` makes the one parser of a command that reads its words, prints its help, completes it in
a shell (`commands.completion`) and is its page in the docs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedp2eft.settings.options import Parser

ABOUT = """\
Federated personalization of language models: clients train a network together that predicts the
LoRA ranks each of them needs, and every client gets its own PEFT adapter.
"""
GROUPS = {"data": "list, describe and partition data sets"}
COMMANDS: Mapping[str, tuple[str, str, str]] = {
    "quickstart": ("run", "quickstart", "run the whole pipeline on real text in a few minutes"),
    "train": (
        "run",
        "train_run",
        "train base model and PSG, then personalize and score every client",
    ),
    "compare": (
        "run",
        "compare_methods",
        "compute a table of methods, base models, ranks and seeds, also in several processes",
    ),
    "report": ("report", "report", "write an HTML report of a run or comparison"),
    "show": ("report", "show", "print settings, progress and results of a run or comparison"),
    "personalize": (
        "adapters",
        "personalize_client",
        "fit one client's adapter with a trained PSG",
    ),
    "evaluate": ("adapters", "evaluate_model", "score a base model, with or without an adapter"),
    "export": (
        "adapters",
        "export_adapter",
        "change the layout of an adapter: portable, compact or merged",
    ),
    "data list": ("datasets", "list_datasets", "list the data sets"),
    "data describe": ("datasets", "describe", "show clients, rows and labels of a data set"),
    "data partition": ("datasets", "partition", "write which row belongs to which client, as JSON"),
    "doctor": ("doctor", "doctor", "print what this machine has and what a run will use"),
    "completion": ("completion", "completion", "print a completion script for bash, zsh or fish"),
}
"""Command → module of `fedp2eft.commands`, function, line of help.

A function has another name than anything in `fedp2eft`: jsonargparse looks its name up there too,
and would load torch to print a help page.
"""
POSITIONAL = ("compare", "completion", "report", "show", "train")
"""Commands whose required arguments are positional."""


def overview(group: str = "") -> str:
    """Return the help of all commands, or of those of a group."""
    lines = {}
    for command, (_, _, about) in COMMANDS.items():
        first, _, second = command.partition(" ")
        if not group:
            lines[first] = about if not second else GROUPS[first]
        elif first == group:
            lines[second] = about
    listed = "\n".join(f"  {name:<13} {about}" for name, about in lines.items())
    if group:
        return f"usage: fedp2eft {group} {' | '.join(lines)} [OPTIONS]\n\n{listed}\n"
    return (
        f"usage: fedp2eft COMMAND [OPTIONS]\n\n{ABOUT}\n{listed}\n\n"
        "fedp2eft COMMAND --help shows the options. Start with: fedp2eft quickstart\n"
    )


def function_of(command: str) -> Callable[..., None]:
    """Return the function that a command calls."""
    from importlib import import_module

    module, name, _ = COMMANDS[command]
    function: Callable[..., None] = getattr(import_module(f"fedp2eft.commands.{module}"), name)
    return function


def parser_of(command: str) -> Parser:
    """Return the parser of a command."""
    from fedp2eft.settings.options import Parser

    parser = Parser(prog=f"fedp2eft {command}")
    parser.add_function(function_of(command), positional=command in POSITIONAL)
    return parser
