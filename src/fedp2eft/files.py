"""Atomic writes, JSON files and locks: a file is the old one or the new one, never half of one."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from filelock import BaseFileLock, FileLock, Timeout

from fedp2eft.errors import UserError


def take_lock(path: Path) -> BaseFileLock | None:
    """Return the lock of a file, or None if another process has it.

    `release()` gives it back; the operating system does so when the process ends, however it ends.

    Raises:
        OSError: The file cannot be made, or its file system knows no locks.
    """
    lock = FileLock(path, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    return lock


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside `path`, flush it to disk, then put it in place of `path`.

    Args:
        path: Final name.
        write: Called with a temporary name on the same disk.

    Raises:
        UserError: The disk is full or cannot be written; `path` is as it was.
    """
    with _scratch_beside(path) as scratch:
        new = scratch / "new"
        write(new)
        _flush(new)
        new.replace(path)
        _flush_names(path.parent)


def write_folder(
    path: Path, write: Callable[[Path], object], remedy: str = "name another folder"
) -> None:
    """Let `write` fill a folder beside `path`, flush it to disk, then put it in place of `path`.

    Args:
        path: Final name; a folder that is there already goes only when the new one is whole.
        write: Called with an empty folder on the same disk.
        remedy: What a user can do when the disk is full.

    Raises:
        UserError: The disk is full or cannot be written; `path` is as it was.
    """
    with _scratch_beside(path, remedy) as scratch:
        new, old = scratch / "new", scratch / "old"
        new.mkdir()
        write(new)
        for file in new.iterdir():
            _flush(file)
        _flush_names(new)
        try:
            if path.exists():
                path.rename(old)
            new.rename(path)
        except BaseException:
            if old.exists() and not path.exists():
                old.rename(path)
            raise
        _flush_names(path.parent)


@contextmanager
def _scratch_beside(path: Path, remedy: str = "name another folder") -> Iterator[Path]:
    """A folder beside `path` that is removed at the end; a full disk is the user's to know."""
    scratch = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
        yield scratch
    except Exception as error:
        _check_disk(path, error, remedy)
        raise
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def _flush(file: Path) -> None:
    """Wait until a new file is on the disk, where everybody may read it."""
    with file.open("rb+") as written:  # Windows flushes only what it may write
        os.fsync(written.fileno())
    file.chmod(0o644)  # safetensors writes files that only their owner reads


def _flush_names(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    with suppress(OSError):  # Windows and some network file systems flush no folders
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def sweep(folder: Path, name: str = "*") -> None:
    """Remove what a killed process left of its writing of `name` in a folder."""
    for scratch in folder.glob(f".{name}-????????"):
        if scratch.is_dir():
            shutil.rmtree(scratch, ignore_errors=True)
        else:
            scratch.unlink(missing_ok=True)


def _check_disk(path: Path, error: Exception, remedy: str) -> None:
    """Raise the error as a line for the user where the operating system is its cause."""
    # safetensors wraps the operating system's error in one of its own
    if not isinstance(error, OSError) and "os error" not in str(error).lower():
        return
    reason = getattr(error, "strerror", None) or str(error)
    raise UserError(
        f"Could not write {path}: {reason}. Free some space or {remedy}; "
        "the previous version is intact."
    ) from error


def write_json(path: Path, value: Any) -> None:
    """Write JSON, readable by people, through `write_whole`."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text through `write_whole`."""
    write_whole(path, lambda scratch: scratch.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> Any:
    """Return the JSON value in a file, or None if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def append_line(path: Path, value: dict[str, Any]) -> None:
    """Add a JSON value as a line to a file, flushed to disk; half a line before it stays alone.

    Raises:
        UserError: The disk is full or cannot be written.
    """
    line = json.dumps(value, ensure_ascii=False) + "\n"
    try:
        with path.open("ab+") as file:
            if file.tell() and not _ends_line(file):
                line = "\n" + line  # a killed process left half a line
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(
            f"Could not write {path}: {error.strerror}. Free some space and start again; the "
            "finished rounds are kept."
        ) from error


def read_lines(path: Path) -> list[tuple[bytes, dict[str, Any] | None]]:
    """Yield every line of a file of JSON lines, and its value: None for half a line."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [(line, _value_of(line)) for line in lines]


def _value_of(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _ends_line(file: IO[bytes]) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
