"""The script that completes commands, options and values; run in each shell that is installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from fedp2eft.cli import main
from fedp2eft.commands.catalogue import COMMANDS
from fedp2eft.settings.experiment import Settings
from test_help import options_of

WORDS = {name.split()[0] for name in COMMANDS}
CASES = [
    (["data", ""], {"list", "describe", "partition"}),
    (["train", "x.yaml", "--local.dropout", ""], {"true", "false"}),
    (["t"], {"train"}),
    (["data", "d"], {"describe"}),
    (["train", "x.yaml", "--federation.profile", ""], {"paper", "reference"}),
    (["train", "x.yaml", "--local.lr", "1", "--federation.wi"], {"--federation.wire"}),
    (["personalize", "--layout", ""], {"portable", "compact"}),
    (["completion", ""], {"bash", "zsh", "fish"}),
]
BASH = """
source "$1"; shift
COMP_WORDS=(fedp2eft "$@"); COMP_CWORD=$#
_shtab_fedp2eft fedp2eft "${COMP_WORDS[COMP_CWORD]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""
FISH = "source $argv[1]; complete -C $argv[2] | string split -f1 \\t"


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The three scripts on disk."""
    folder = tmp_path_factory.mktemp("completion")
    written = {}
    for shell in ("bash", "zsh", "fish"):
        with pytest.MonkeyPatch.context() as patch, (folder / shell).open("w") as out:
            patch.setattr("sys.stdout", out)
            assert main(["completion", shell]) == 0
        written[shell] = folder / shell
    return written


def output(*command: object) -> set[str]:
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=60, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(("words", "wanted"), CASES)
def test_bash(scripts, words: list[str], wanted: set[str]):
    assert output("bash", "-c", BASH, "-", scripts["bash"], *words) == wanted


def test_bash_knows_every_command_and_every_setting(scripts):
    assert output("bash", "-c", BASH, "-", scripts["bash"], "") == WORDS
    found = output("bash", "-c", BASH, "-", scripts["bash"], "train", "x.yaml", "--")
    assert found >= {"--run", *(f"--{option}" for option in options_of(Settings))}


@pytest.mark.skipif(not shutil.which("fish"), reason="fish is not installed")
@pytest.mark.parametrize(("words", "wanted"), CASES)
def test_fish(scripts, words: list[str], wanted: set[str]):
    line = " ".join(["fedp2eft", *words])
    assert output("fish", "--no-config", "-c", FISH, scripts["fish"], line) == wanted


@pytest.mark.skipif(not shutil.which("zsh"), reason="zsh is not installed")
def test_zsh_reads_its_script(scripts):
    output("zsh", "-f", "-c", f"autoload -Uz compinit && compinit -D; source {scripts['zsh']}")
    text = scripts["zsh"].read_text(encoding="utf-8")
    assert text.startswith("#compdef fedp2eft")
    missing = [option for option in options_of(Settings) if f"--{option}" not in text]
    assert missing == []


def test_an_unknown_shell(capsys):
    assert main(["completion", "ksh"]) == 2
    assert "'bash', 'zsh', 'fish'" in capsys.readouterr().err
