"""`fedp2eft completion`: a script for the shell, made from the parsers that the commands have."""

from __future__ import annotations

from typing import Literal

from shtab import DIRECTORY, FILE, glob

from fedp2eft.commands.catalogue import ABOUT, COMMANDS, GROUPS, parser_of
from fedp2eft.settings.options import FOLDERS, Parser


def completion(shell: Literal["bash", "zsh", "fish"]) -> None:
    """Print a script that completes commands, options and the keys of settings.

    For bash put `eval "$(fedp2eft completion bash)"` into ~/.bashrc, or better the script itself
    into ~/.local/share/bash-completion/completions/fedp2eft; for zsh into _fedp2eft in a folder of
    $fpath; for fish into ~/.config/fish/completions/fedp2eft.fish.

    Args:
        shell: "bash", "zsh" or "fish".
    """
    print(tree().get_completion_script(f"shtab-{shell}"))


def tree() -> Parser:
    """Return all commands with all their options as one parser."""
    root = Parser(prog="fedp2eft", description=ABOUT)
    root.add_argument("--version", action="store_true", help="print the version")
    commands = root.add_subcommands(required=False)
    groups = {}
    for name, about in GROUPS.items():
        group = Parser()
        commands.add_subcommand(name, group, help=about)
        groups[name] = group.add_subcommands(required=False)
    for command, (_, _, about) in COMMANDS.items():
        first, _, second = command.partition(" ")
        parser = parser_of(command)
        for action in parser._actions:
            if action.dest == "config":
                action.complete = glob("*.yaml", "*.yml")  # type: ignore[attr-defined]
            elif action.dest in FOLDERS:
                action.complete = DIRECTORY  # type: ignore[attr-defined]
            elif getattr(action, "_typehint", None) in (str, str | None):
                action.complete = FILE  # type: ignore[attr-defined]
        (groups[first] if second else commands).add_subcommand(second or first, parser, help=about)
    return root
