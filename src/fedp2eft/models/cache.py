"""Folders that are costly to make and are therefore made once: whole, or not there at all."""

import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedp2eft.errors import UserError

MANIFEST = "manifest.json"
# Bytes. Larger files are the weights: hashing them at every start would cost more than it tells.
_HASHED_UP_TO = 64 * 2**20
_STALE_SECONDS = 24 * 3600


def cache_dir() -> Path:
    """Where fedp2eft keeps converted models: `$FEDP2EFT_CACHE`, or else `~/.cache/fedp2eft`."""
    return Path(os.environ.get("FEDP2EFT_CACHE") or "~/.cache/fedp2eft").expanduser()


def cached_folder(name: str, build: Callable[[Path], None]) -> Path:
    """The folder `name` in the cache, built now unless a whole copy is there already.

    Safe when several processes call it at once: each builds in a folder of its own, the first to
    finish gives it the final name, and the others use that one. A copy that is damaged (a file
    is missing, has another size or, if small, another hash) is replaced.

    Args:
        name: plain folder name that says what is in it and in which version.
        build: writes the files into the empty folder that it is given.

    Raises:
        UserError: the cache cannot be written; also whatever `build` raises.
    """
    final = cache_dir() / name
    if is_whole(final):
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _sweep(final)
        draft = _new_folder(final)
        try:
            build(draft)
            _seal(draft)
            _publish(draft, final)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"The cache folder {final.parent} cannot be written ({error.strerror or error}): make "
            "room there, or set FEDP2EFT_CACHE to another folder."
        ) from error
    return final


def is_whole(folder: Path) -> bool:
    """Whether every file of a cached folder is there as it was written."""
    try:
        entries: dict[str, dict[str, Any]] = json.loads((folder / MANIFEST).read_bytes())["files"]
        return bool(entries) and all(
            _entry(folder / name) == entry for name, entry in entries.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _new_folder(final: Path) -> Path:
    """An empty folder beside `final`, of a name that no other process has, readable as usual."""
    folder = final.with_name(f".{final.name}.{secrets.token_hex(8)}")
    folder.mkdir()
    return folder


def _entry(file: Path) -> dict[str, Any]:
    size = file.stat().st_size
    if size > _HASHED_UP_TO:
        return {"size": size}
    return {"size": size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


def _seal(folder: Path) -> None:
    """Writes the manifest, last, once the other files are on the disk."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for file in files:
        with file.open("rb+") as stream:
            os.fsync(stream.fileno())
    manifest = {"files": {file.name: _entry(file) for file in files}}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _publish(draft: Path, final: Path) -> None:
    """Gives the draft its final name; leaves a whole copy of another process in place."""
    while True:
        try:
            draft.rename(final)
            return
        except OSError:
            if is_whole(final):
                return
            if not final.exists():
                raise
            _set_aside(final)


def _set_aside(damaged: Path) -> None:
    grave = _new_folder(damaged)
    moved = grave / "damaged"
    try:
        damaged.rename(moved)
        if is_whole(moved):  # another process repaired it between our look and our move
            moved.rename(damaged)
    except (FileNotFoundError, FileExistsError):
        pass  # another process was quicker; the caller looks again
    finally:
        shutil.rmtree(grave, ignore_errors=True)


def _sweep(final: Path) -> None:
    """Removes drafts that a killed process left behind."""
    for draft in final.parent.glob(f".{final.name}.*"):
        try:
            if time.time() - draft.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(draft, ignore_errors=True)
        except FileNotFoundError:
            continue
