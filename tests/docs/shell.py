"""What a page's shell commands must be: done on the tiny run, or understood by the real parsers."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedp2eft import cli
from fedp2eft.settings.reading import read_settings

ROOT = Path(__file__).parents[2]
PRESET = ROOT / "src" / "fedp2eft" / "presets" / "quickstart.yaml"
LONG = ("quickstart", "train", "compare")
ELSEWHERE = {
    ".": "enters the virtual environment",
    "git": "fetches the project",
    "hf": "uploads to the hub",
    "export": "sets a variable",
    "cd": "goes to a folder",
    "ssh-keygen": "makes a key on another host",
    "pkill": "ends a SuperLink",
}
"""Commands of others that are not looked at, and why."""


def check(words: list[str]) -> None:
    """Do or check one command in the present folder; an AssertionError says what is wrong."""
    known: dict[str, Callable[[list[str]], None]] = {
        "fedp2eft": _fedp2eft, "python": _script, "make": _make, "pip": _pip, "flwr": _flwr,
        "flower-superlink": _flower, "flower-supernode": _flower,
    }  # fmt: skip
    if words[0] in ELSEWHERE:
        return
    assert words[0] in known, f"say in tests/docs/shell.py how to check {words[0]!r}"
    known[words[0]](words)


def _fedp2eft(words: list[str]) -> None:
    if set(LONG) & set(words[1:3]):
        understood(words[1:])
        return
    assert cli.main(words[1:]) == 0, " ".join(words)


def understood(words: list[str]) -> None:
    """Parse a command line with the command's own parser, files it names included."""

    _, arguments = cli.parsed(words)
    if "options" in arguments:
        config = arguments.get("config", "CONFIG")
        read_settings(PRESET if config == "CONFIG" else config, arguments["options"])


def _script(words: list[str]) -> None:
    script = words[1]
    assert (ROOT / script).is_file(), f"there is no {script}"
    source = (ROOT / script).read_text(encoding="utf-8")
    for option in (word for word in words if word.startswith("--")):
        assert f'"{option}"' in source, f"{script} has no {option}"


def _make(words: list[str]) -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    for word in words[1:]:
        assert "=" in word or word in targets, f"the Makefile has no {word}"


def _pip(words: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extras in re.findall(r"(?:fedp2eft|\.)\[([\w,-]+)\]", " ".join(words)):
        for extra in extras.split(","):
            assert extra in project["optional-dependencies"], f"there is no extra {extra}"


def _flower(words: list[str]) -> None:
    from flwr.superlink.cli.flower_superlink import _parse_args_run_superlink
    from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode

    superlink = words[0] == "flower-superlink"
    parser = (_parse_args_run_superlink if superlink else _parse_args_run_supernode)()
    parser.parse_args([word for word in words[1:] if word != "\n"])


def _flwr(words: list[str]) -> None:
    import click
    from flwr.cli.app import app
    from typer.main import get_command

    command: Any = get_command(app)
    rest = words[1:]
    while isinstance(command, click.Group) or hasattr(command, "commands"):
        assert {*rest[:1]} & {*command.commands}, f"flwr has no {' '.join(words[1:])}"
        command, rest = command.commands[rest[0]], rest[1:]
    options = {option for parameter in command.params for option in parameter.opts}
    for word in rest:
        assert not word.startswith("--") or word in options, f"flwr has no {word}"
    for config in re.findall(r"config='([^']+)'", " ".join(rest)):
        assert Path(config).is_file(), f"there is no {config}"
        read_settings(config)
