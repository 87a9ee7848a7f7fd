"""What the site is made with: references from the code, formulas, docstrings, checks."""

from __future__ import annotations

import re
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import get_type_hints

import pytest

import fedp2eft
from fedp2eft.commands.catalogue import COMMANDS

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs" / "_ext"))
pytest.importorskip("sphinx", reason="the extra docs is not installed")

import checks  # noqa: E402
import docstrings  # noqa: E402
import generated  # noqa: E402
import mathml  # noqa: E402


def test_the_command_reference_has_every_command_and_option() -> None:
    text = generated.command_reference()
    for name in COMMANDS:
        assert f"## `fedp2eft {name}`" in text
    for option in ("--psg", "--rank", "--layout", "--label_column", "--run", "shell"):
        assert f"| `{option}` |" in text
    personalize = text.split("## `fedp2eft personalize`")[1].split("\n## ")[0]
    assert "| `--model` | required |" in personalize
    assert "settings.md" not in personalize
    describe = text.split("## `fedp2eft data describe`")[1].split("\n## ")[0]
    assert "fedp2eft data describe [CONFIG] [OPTIONS]" in describe
    assert "`--SECTION.NAME VALUE`" in describe


def test_the_settings_reference_has_every_key_and_says_what_it_is() -> None:
    from fedp2eft.settings.experiment import Settings

    text = generated.settings_reference()
    for name, kind in get_type_hints(Settings).items():
        if not is_dataclass(kind):
            assert f"| `{name}` |" in text.split("\n## ")[0]
            continue
        section = text.split(f"\n## `{name}`\n")[1].split("\n## ")[0]
        for field in fields(kind):
            (row,) = re.findall(rf"^\| `{field.name}` \| (.*?) \| (.*?)<br>", section, re.M)
            assert all(row), f"{name}.{field.name} is not described"


def test_the_module_reference_has_every_module_once() -> None:
    text = generated.module_reference()
    package = Path(fedp2eft.__file__).parent
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).with_suffix("").parts
        if parts[0] in ("cli", "commands", "__init__", "__main__") or len(parts) == 0:
            continue
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        assert text.count(f".. automodule:: fedp2eft.{name}\n") == 1, name


def test_the_method_page_names_code_that_is_there() -> None:
    page = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    places = re.findall(r"`(\w+)` in `([\w/]+\.py)`", page)
    assert len(places) > 15
    for name, path in places:
        source = (ROOT / "src" / "fedp2eft" / path).read_text(encoding="utf-8")
        assert re.search(rf"^(def|class) {name}\b", source, re.M), f"{path} has no {name}"


def test_a_formula_becomes_mathml() -> None:
    from docutils import nodes

    body: list[str] = []
    for render, node in ((mathml._inline, nodes.math), (mathml._block, nodes.math_block)):
        with pytest.raises(nodes.SkipNode):
            render(SimpleNamespace(body=body), node(text=r"\frac{a}{b}"))
    assert all("<math" in part and "<mfrac>" in part for part in body)


def test_docstrings_are_read_as_they_were_meant() -> None:
    lines = ["λ = `PSG(ξ)` of |B| * 2.", "", "    L = a * b", "", "* one", "* two", "", "Args:"]
    assert docstrings.to_rst([*lines, "    x: a *number*."]) == [
        r"λ = ``PSG(ξ)`` of \|B\| \* 2.", "", "::", "", "    L = a * b", "", "* one", "* two", "",
        "Args:", r"    x: a \*number\*.",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("page", "said"),
    [
        ('<script src="https://example.org/x.js"></script>', "loads"),
        ('<link rel="stylesheet" href="//example.org/x.css">', "loads"),
        ('<a href="nowhere.html">x</a>', "leads nowhere"),
        ('<a href="#nowhere">x</a>', "no place"),
        ('<a href="index.html#here">x</a><p id="here">', ""),
        ('<a href="https://example.org">x</a>', ""),
    ],
)
def test_what_is_wrong_with_the_site_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: str, said: str
) -> None:
    told: list[str] = []
    monkeypatch.setattr(checks.logger, "warning", lambda text, *a: told.append(text % a))
    (tmp_path / "index.html").write_text(page, encoding="utf-8")
    app = SimpleNamespace(builder=SimpleNamespace(format="html"), outdir=str(tmp_path))
    checks._check_site(app, None)
    assert bool(told) == bool(said)
    assert said in "".join(told)


def test_a_link_to_a_file_of_the_project_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(checks.logger, "warning", lambda text, *a: told.append(text % a))
    app = SimpleNamespace(srcdir=ROOT / "docs")
    content = ["[configs](../configs) and [the licence](../LICENSE), [x](../nothing.md)"]
    checks._name_project_files(app, "index", content)
    assert content[0].startswith("`configs` and the licence (`LICENSE`)")
    assert told == ["index: there is no ../nothing.md"]


def test_no_page_names_a_path_of_a_machine() -> None:
    for page in [*ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.py"), ROOT / "README.md"]:
        text = page.read_text(encoding="utf-8")
        found = re.findall(r"(?<![\w.~])/(?:home|root|work|Users|opt)/\S*", text)
        assert not found, f"{page.name}: {found[0]}"
