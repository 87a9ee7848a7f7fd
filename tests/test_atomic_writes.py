"""Atomic writes reach the disk before they count; locks go with the process that holds them."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fedp2eft.errors import UserError
from fedp2eft.files import append_line, sweep, take_lock, write_folder, write_json, write_whole

HOLDER = """
import sys, time
from pathlib import Path
from fedp2eft.files import take_lock
lock = take_lock(Path(sys.argv[1]))
print(lock is not None, flush=True)
time.sleep(60)
"""


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is flushed to disk and renamed, in order; the suite's os.fsync does nothing."""
    done: list[str] = []
    rename, replace = Path.rename, Path.replace

    def flush(number: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(number).st_mode) else "file")

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(Path, "rename", lambda *to: [done.append("rename"), rename(*to)][1])
    monkeypatch.setattr(Path, "replace", lambda *to: [done.append("rename"), replace(*to)][1])
    return done


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, disk: list[str]) -> None:
    write_json(tmp_path / "a.json", {"é": 1})
    assert disk == ["file", "rename", "folder"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o644


def test_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path: Path, disk: list[str]) -> None:
    def write(folder: Path) -> None:
        for name in ("a", "b"):
            (folder / name).touch(mode=0o600)

    write_folder(tmp_path / "new", write)
    assert disk == ["file", "file", "folder", "rename", "folder"]
    disk.clear()
    write_folder(tmp_path / "new", lambda folder: (folder / "c").touch())
    assert disk == ["file", "folder", "rename", "rename", "folder"]
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "c"]


def test_a_line_is_flushed(tmp_path: Path, disk: list[str]) -> None:
    append_line(tmp_path / "lines.jsonl", {"round": 1})
    assert disk == ["file"]


@pytest.mark.parametrize("write", [write_whole, write_folder])
def test_a_writing_that_fails_changes_nothing(tmp_path: Path, write) -> None:
    path = tmp_path / "kept"
    write(path, lambda new: (new / "a" if new.is_dir() else new).write_text("old"))

    def fail(new: Path) -> None:
        (new / "b" if new.is_dir() else new).write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left on device") as caught:
        write(path, fail)
    assert str(path) in str(caught.value)
    assert [each.name for each in tmp_path.iterdir()] == ["kept"]
    assert (path / "a" if path.is_dir() else path).read_text() == "old"


def test_sweep_removes_only_what_a_killed_process_was_writing(tmp_path: Path) -> None:
    (tmp_path / ".a.json-abcdefgh").mkdir()
    (tmp_path / ".a.json-12345678").touch()
    for name in ("a.json", ".b.json-abcdefgh", ".a.json"):
        (tmp_path / name).touch()
    sweep(tmp_path, "a.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".a.json", ".b.json-abcdefgh", "a.json",
    ]  # fmt: skip


def test_a_lock_goes_with_the_process_that_holds_it(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "True\n"
    assert take_lock(path) is None
    holder.kill()
    holder.wait(timeout=60)
    holder.stdout.close()
    assert path.exists()  # and yet it keeps nobody out
    lock = take_lock(path)
    assert lock is not None
    lock.release()
