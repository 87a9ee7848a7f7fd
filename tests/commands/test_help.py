"""Help mentions every option; nothing heavy is loaded to print the first page."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import get_type_hints

import pytest

from fedp2eft.cli import main
from fedp2eft.commands.catalogue import COMMANDS, function_of
from fedp2eft.settings.data import DataSettings
from fedp2eft.settings.experiment import Settings


def options_of(kind: type, prefix: str = "") -> Iterator[str]:
    hints = get_type_hints(kind)
    for field in fields(kind):
        name = f"{prefix}{field.name}"
        if is_dataclass(hints[field.name]):
            yield from options_of(hints[field.name], f"{name}.")  # type: ignore[arg-type]
        else:
            yield name


def help_of(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--help"])
    assert end.value.code == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_first_page(capsys, arguments):
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    for command in {name.split()[0] for name in COMMANDS}:
        assert f"\n  {command} " in out
    assert "Start with: fedp2eft quickstart" in out
    assert err == ""


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("fedp2eft 0.")


@pytest.mark.parametrize("name", ["personalize", "evaluate", "export"])
def test_commands_on_adapters(capsys, name):
    out = help_of(capsys, name)
    for option in inspect.signature(function_of(name)).parameters:
        assert f"--{option} " in out
    assert out.startswith(f"usage: fedp2eft {name}")


@pytest.mark.parametrize("name", ["train", "quickstart"])
def test_commands_that_run(capsys, name):
    out = help_of(capsys, name)
    assert "--run DIR" in out
    missing = [option for option in options_of(Settings) if f"--{option}" not in out]
    assert missing == []


@pytest.mark.parametrize("name", ["describe", "partition"])
def test_commands_on_data(capsys, name):
    out = help_of(capsys, "data", name)
    missing = [option for option in options_of(DataSettings, "data.") if f"--{option}" not in out]
    assert missing == []
    assert ("--out" in out) == ("out" in inspect.signature(function_of(f"data {name}")).parameters)


def test_data_alone(capsys):
    assert main(["data"]) == 0
    assert "describe" in capsys.readouterr().out


def test_no_help_loads_torch():
    code = """
import contextlib, sys
from fedp2eft.cli import main
from fedp2eft.commands.catalogue import COMMANDS
main([])
for command in COMMANDS:
    with contextlib.suppress(SystemExit):
        main([*command.split(), "--help"])
sys.exit(", ".join({"torch", "transformers", "flwr", "datasets"} & set(sys.modules)) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
