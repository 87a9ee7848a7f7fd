"""The cache of converted models: folders that are made once, with atomic writes."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from fedp2eft.errors import UserError
from fedp2eft.files import sweep, write_folder

MANIFEST = "manifest.json"
# Bytes. Larger files are the weights: hashing them at every start would cost more than it shows.
_HASHED_UP_TO = 64 * 2**20


def cache_dir() -> Path:
    """Return where converted models are kept: `$FEDP2EFT_CACHE`, or `~/.cache/fedp2eft`."""
    return Path(os.environ.get("FEDP2EFT_CACHE") or "~/.cache/fedp2eft").expanduser()


def cached_folder(name: str, build: Callable[[Path], None]) -> Path:
    """Return the folder `name` of the cache, built now unless a whole copy is there already.

    Of several processes that call it at once one builds, and the others wait for it. A copy that is
    damaged (a file is missing, has another size or, if small, another hash) is replaced.

    Args:
        name: Plain folder name that says what is in it and in which version.
        build: Writes the files into the empty folder that it is given.

    Raises:
        UserError: The cache cannot be written; also whatever `build` raises.
    """
    final = cache_dir() / name
    if is_whole(final):
        return final

    def write(folder: Path) -> None:
        build(folder)
        files = sorted(path for path in folder.iterdir() if path.is_file())
        manifest = {"files": {file.name: _entry(file) for file in files}}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")

    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(final.with_name(f".{name}.lock")):
            if not is_whole(final):  # or another process built it meanwhile
                sweep(final.parent, name)
                write_folder(final, write, "set FEDP2EFT_CACHE to another folder")
    except OSError as error:
        raise UserError(
            f"The cache folder {final.parent} cannot be written ({error.strerror or error}): make "
            "room there, or set FEDP2EFT_CACHE to another folder."
        ) from error
    return final


def is_whole(folder: Path) -> bool:
    """Return whether every file of a cached folder is there as it was written."""
    try:
        entries: dict[str, dict[str, Any]] = json.loads((folder / MANIFEST).read_bytes())["files"]
        return bool(entries) and all(
            _entry(folder / name) == entry for name, entry in entries.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _entry(file: Path) -> dict[str, Any]:
    size = file.stat().st_size
    if size > _HASHED_UP_TO:
        return {"size": size}
    return {"size": size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
