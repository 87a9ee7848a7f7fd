"""Files that are either the old one or the new one, never half of one."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from fedp2eft.errors import UserError


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a file beside `path`, flush it to disk, then put it in place of `path`.

    Args:
        path: Final name.
        write: Called with a temporary name in the same folder.

    Raises:
        UserError: The disk is full or cannot be written; `path` is as it was.
    """
    scratch = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        os.close(handle)
        scratch = Path(name)
        write(scratch)
        with scratch.open("rb") as written:
            os.fsync(written.fileno())
        scratch.chmod(0o644)
        scratch.replace(path)
    except Exception as error:
        _check_disk(path, error)
        raise
    finally:
        if scratch is not None:
            scratch.unlink(missing_ok=True)


def write_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a folder beside `path`, flush it to disk, then put it in place of `path`.

    Args:
        path: Final name; a folder that is there already goes only when the new one is whole.
        write: Called with an empty folder on the same disk.

    Raises:
        UserError: The disk is full or cannot be written; `path` is as it was.
    """
    scratch = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
        new = scratch / "new"
        new.mkdir()
        write(new)
        for file in new.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
            file.chmod(0o644)
        old = scratch / "old"
        try:
            if path.exists():
                path.rename(old)
            new.rename(path)
        except BaseException:
            if old.exists() and not path.exists():
                old.rename(path)
            raise
    except Exception as error:
        _check_disk(path, error)
        raise
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def sweep(folder: Path, name: str = "*") -> None:
    """Remove what a killed process left of its writing of `name` in a folder."""
    for scratch in folder.glob(f".{name}-????????"):
        if scratch.is_dir():
            shutil.rmtree(scratch, ignore_errors=True)
        else:
            scratch.unlink(missing_ok=True)


def _check_disk(path: Path, error: Exception) -> None:
    """Raise the error as a line for the user where the operating system is its cause."""
    # safetensors wraps the operating system's error in one of its own
    if not isinstance(error, OSError) and "os error" not in str(error).lower():
        return
    reason = getattr(error, "strerror", None) or str(error)
    raise UserError(
        f"Could not write {path}: {reason}. Free some space or name another folder; "
        "what was there before is whole."
    ) from error


def write_json(path: Path, value: Any) -> None:
    """`write_whole` for JSON, readable by people."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_whole(path, lambda scratch: _write_text(scratch, text))


def write_text(path: Path, text: str) -> None:
    """`write_whole` for text."""
    write_whole(path, lambda scratch: _write_text(scratch, text))


def read_json(path: Path) -> Any:
    """The JSON value in a file, or None where it is missing or damaged."""
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
    """Every line of a file of JSON lines, and its value: None where half of one was left."""
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


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
