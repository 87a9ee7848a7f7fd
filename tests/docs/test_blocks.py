"""Every code block of the documentation and of the README does what it says."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
import torch
from blocks import Block, blocks_of, commands_of
from shell import check

import fedp2eft.settings.experiment
from fedp2eft.bases import BASES
from fedp2eft.methods import METHODS
from fedp2eft.settings.reading import settings_from
from fedp2eft.settings.words import load_words

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("docs/**/*.md"), ROOT / "README.md"])
SHELL = ("fedp2eft", "make", "pip", "python", "flwr", "FEDP2EFT_")


def run(block: Block, namespace: dict[str, Any]) -> None:
    language, text = block.language, block.text
    if language == "" and text.lstrip().startswith(SHELL):
        language = "bash"
    if language == "python":
        # The file starts with as many empty lines, so that a traceback names the page's own.
        name, _, line = block.where.partition(":")
        exec(compile("\n" * int(line) + text, name, "exec"), namespace)
    elif language == "bash":
        for command in commands_of(text):
            check(command)
    elif language == "yaml":
        settings_from(load_words(text))
    elif language == "toml":
        tomllib.loads(text)
    elif language == "json":
        json.loads(text)
    else:
        assert language in ("", "text"), f"no way to check {language!r}"


@pytest.fixture(autouse=True)
def registries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A page may register a method or base of its own, for itself alone."""
    methods, bases = dict(METHODS), dict(BASES)
    kinds = (*get_args(fedp2eft.settings.experiment.BaseKind), "bitfit")  # docs/own-base.md
    monkeypatch.setattr(fedp2eft.settings.experiment, "BaseKind", Literal[kinds])  # type: ignore[valid-type]
    yield
    for registry, before in ((METHODS, methods), (BASES, bases)):
        registry.clear()
        registry.update(before)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_of_a_page_works(
    page: Path, desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(desk)
    namespace: dict[str, Any] = {}
    for block in blocks_of(page):
        if block.reason:
            with capsys.disabled():
                print(f"\n{block.where} not run: {block.reason}")
            continue
        try:
            run(block, namespace)
        except BaseException as error:
            said = capsys.readouterr()
            raise AssertionError(f"{block.where}: {error}\n{said.out[-800:]}{said.err}") from error


def test_a_new_client_of_the_tutorial_gets_an_adapter(desk: Path) -> None:
    """The page's commands and its Python leave what they say, and the same."""
    made = [desk / "adapters" / name / "adapter_model.safetensors" for name in ("es", "es-again")]
    assert made[0].read_bytes() == made[1].read_bytes()
    assert (desk / "models" / "es" / "config.json").is_file()


def test_the_bitfit_of_the_page_trains_biases_and_head_alone(
    desk: Path, world, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (block,) = (b for b in blocks_of(ROOT / "docs" / "own-base.md") if b.language == "python")
    namespace: dict[str, Any] = {}
    exec(block.text, namespace)
    BASES["bitfit"] = namespace["BitFit"]()
    settings = world.settings(
        base__kind="bitfit", base__rounds=1, federation__rounds=0, evaluation__methods=["base"]
    )
    fedp2eft.train(settings, tmp_path / "run")
    from safetensors.torch import load_file

    before = load_file(world.encoder / "model.safetensors")
    after = load_file(tmp_path / "run" / "base" / "model.safetensors")
    moved = {
        name for name, value in before.items()
        if not torch.equal(value, after.get(f"bert.{name}", after.get(name, value)))
    }  # fmt: skip
    assert moved
    assert all(name.endswith("bias") for name in moved)


def test_blocks_are_found_with_their_marker(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A\n\n<!-- not run: needs a\nsecond host -->\n\n```bash\nls\n```\n\n```yaml\na: 1\n```\n"
        "\ntext\n\n    fedp2eft quickstart\n",
        encoding="utf-8",
    )
    found = [(b.language, b.text.strip(), b.reason) for b in blocks_of(page)]
    assert found == [
        ("bash", "ls", "needs a second host"),
        ("yaml", "a: 1", ""),
        ("", "fedp2eft quickstart", ""),
    ]


def test_commands_are_words() -> None:
    script = "A=1 B=2 run 'x y' \\\n  --z  # why\n\nfirst && second; third\n"
    assert list(commands_of(script)) == [["run", "x y", "--z"], ["first"], ["second"], ["third"]]


@pytest.mark.parametrize(
    "words",
    [
        ["fedp2eft", "train", "configs/debian-descriptions/fedp2eft.yaml", "--local.lrr", "1"],
        ["fedp2eft", "train", "configs/nowhere.yaml"],
        ["fedp2eft", "trane", "configs/debian-descriptions/fedp2eft.yaml"],
        ["fedp2eft", "quickstart", "--base.rounds", "few"],
        ["python", "examples/nothing.py"],
        ["make", "cake"],
        ["pip", "install", "fedp2eft[cake]"],
        ["flwr", "run", "--nothing"],
        ["rm", "-r", "runs"],
    ],
)
def test_a_wrong_command_is_found(desk: Path, monkeypatch, words: list[str]) -> None:
    from fedp2eft.errors import UserError

    monkeypatch.chdir(desk)
    with pytest.raises((AssertionError, UserError)):
        check(words)
