"""The cache: whole or absent, under damage and under haste."""

import os
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
    assert [path.name for path in own_cache.iterdir()] == ["part"]


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
    assert [path.name for path in own_cache.iterdir()] == ["part"]


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
    assert list(own_cache.iterdir()) == []


def test_unwritable_cache_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FEDP2EFT_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="FEDP2EFT_CACHE"):
        cache.cached_folder("part", Builder())


def test_old_drafts_are_swept_and_new_ones_kept(own_cache: Path) -> None:
    for name, age in ((".part.old", 2 * 24 * 3600), (".part.new", 60)):
        (own_cache / name).mkdir(parents=True)
        os.utime(own_cache / name, (time.time() - age,) * 2)
    cache.cached_folder("part", Builder())
    assert sorted(path.name for path in own_cache.iterdir()) == [".part.new", "part"]


def test_repair_by_another_process_is_kept(own_cache: Path) -> None:
    """Between our finding a damaged copy and our draft being ready, another repaired it."""
    theirs = Builder()

    def build(folder: Path) -> None:
        cache.cached_folder("part", theirs)
        Builder()(folder)

    damaged = own_cache / "part"
    damaged.mkdir(parents=True)
    assert cache.cached_folder("part", build) == damaged
    assert theirs.calls == 1
    assert [path.name for path in own_cache.iterdir()] == ["part"]


def test_copy_repaired_at_the_last_moment_is_put_back(own_cache: Path) -> None:
    folder = cache.cached_folder("part", Builder())
    cache._set_aside(folder)
    assert cache.is_whole(folder)
    cache._set_aside(own_cache / "absent")
    assert [path.name for path in own_cache.iterdir()] == ["part"]


RACER = """
import sys, time
from pathlib import Path
from fedp2eft.models.cache import cached_folder, is_whole

def build(folder):
    for part in range(5):
        with (folder / "weights").open("ab") as stream:
            stream.write(bytes(100_000))
        time.sleep(0.05)

while time.time() < float(sys.argv[1]):
    pass
assert is_whole(cached_folder("part", build))
"""


@pytest.mark.parametrize("damaged", [False, True])
def test_processes_at_once(own_cache: Path, damaged: bool) -> None:
    if damaged:
        (own_cache / "part").mkdir(parents=True)
    start = str(time.time() + 0.5)
    racers = [subprocess.Popen([sys.executable, "-c", RACER, start]) for _ in range(3)]
    assert [racer.wait(timeout=60) for racer in racers] == [0, 0, 0]
    assert [path.name for path in own_cache.iterdir()] == ["part"]
    assert (own_cache / "part" / "weights").stat().st_size == 500_000
