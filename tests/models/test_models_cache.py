"""The cache: whole or absent, under damage and under haste."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedp2eft.errors import UserError
from fedp2eft.models import cache


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDP2EFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


class Builder:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, folder: Path) -> None:
        self.calls += 1
        (folder / "config.json").write_text('{"a": 1}')
        (folder / "weights").write_bytes(bytes(1000))


def test_cache_dir_follows_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDP2EFT_CACHE", "~/elsewhere")
    assert cache.cache_dir() == Path.home() / "elsewhere"
    monkeypatch.delenv("FEDP2EFT_CACHE")
    assert cache.cache_dir() == Path.home() / ".cache" / "fedp2eft"


def test_built_once(own_cache: Path) -> None:
    build = Builder()
    folder = cache.cached_folder("part", build)
    assert cache.cached_folder("part", build) == folder == own_cache / "part"
    assert build.calls == 1
    assert kept(own_cache) == ["part"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: os.truncate(folder / "weights", 999),
        lambda folder: (folder / "weights").unlink(),
        lambda folder: (folder / "config.json").write_text('{"a": 2}'),
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: os.truncate(folder / "manifest.json", 20),
        lambda folder: (folder / "manifest.json").write_text("[]"),
        lambda folder: (folder / "manifest.json").write_text('{"files": {}}'),
        lambda folder: (folder / "manifest.json").write_text('{"files": {"weights": 3}}'),
    ],
)
def test_damaged_copy_is_rebuilt(own_cache: Path, damage) -> None:
    build = Builder()
    folder = cache.cached_folder("part", build)
    damage(folder)
    assert not cache.is_whole(folder)
    assert cache.is_whole(cache.cached_folder("part", build))
    assert build.calls == 2
    assert kept(own_cache) == ["part"]


def test_size_alone_is_checked_of_large_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_HASHED_UP_TO", 500)
    folder = cache.cached_folder("part", Builder())
    (folder / "weights").write_bytes(b"\1" * 1000)
    assert cache.is_whole(folder)
    os.truncate(folder / "weights", 999)
    assert not cache.is_whole(folder)


def test_failed_build_leaves_nothing(own_cache: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "half").touch()
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        cache.cached_folder("part", build)
    assert kept(own_cache) == []


def test_unwritable_cache_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FEDP2EFT_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="FEDP2EFT_CACHE"):
        cache.cached_folder("part", Builder())


def test_what_a_killed_builder_left_is_swept_away(own_cache: Path) -> None:
    """It was killed while it built: its lock went with it, its draft is removed."""
    code = (
        "import os, signal; from fedp2eft.models.cache import cached_folder\n"
        "cached_folder('part', lambda folder: os.kill(os.getpid(), signal.SIGKILL))"
    )
    killed = subprocess.run([sys.executable, "-c", code], check=False, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert len(kept(own_cache)) == 1
    cache.cached_folder("part", Builder())
    assert kept(own_cache) == ["part"]


RACER = """
import sys, time
from pathlib import Path
from fedp2eft.models.cache import cached_folder, is_whole

def build(folder):
    with Path(sys.argv[2]).open("a") as builders:
        builders.write("one\\n")
    for part in range(5):
        with (folder / "weights").open("ab") as stream:
            stream.write(bytes(100_000))
        time.sleep(0.05)

while time.time() < float(sys.argv[1]):
    pass
assert is_whole(cached_folder("part", build))
"""


@pytest.mark.parametrize("damaged", [False, True])
def test_one_of_several_processes_builds(own_cache: Path, tmp_path: Path, damaged: bool) -> None:
    if damaged:
        (own_cache / "part").mkdir(parents=True)
    start, builders = str(time.time() + 0.5), tmp_path / "builders"
    racers = [
        subprocess.Popen([sys.executable, "-c", RACER, start, str(builders)]) for _ in range(3)
    ]
    assert [racer.wait(timeout=60) for racer in racers] == [0, 0, 0]
    assert kept(own_cache) == ["part"]
    assert (own_cache / "part" / "weights").stat().st_size == 500_000
    assert builders.read_text() == "one\n"
