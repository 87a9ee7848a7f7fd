"""What stays on a client from round to round: one safetensors file per client and round.

A round that was stopped half-way is repeated, and the server may resume from an older checkpoint:
every round therefore starts from what the client had before it, and files that the server can
still come back to are kept.
"""

from __future__ import annotations

import re
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedp2eft.errors import UserError
from fedp2eft.files import write_whole


class ClientFiles:
    """Tensors by name of every client, as they were after each of its last rounds.

    Args:
        folder: Holds `<client>/<name>-<round>.safetensors`; None for one that is
            removed with this object.
        name: What they are.
        keep: Rounds that the server may go back by (`federation.keep_checkpoints`).
    """

    def __init__(self, folder: Path | None, name: str, keep: int = 2) -> None:
        if folder is None:
            self._scratch = TemporaryDirectory(prefix="fedp2eft-")
            folder = Path(self._scratch.name)
        self._folder = folder
        self._name = name
        self._keep = keep

    def before(self, client: str, round_: int | None = None) -> dict[str, Tensor] | None:
        """Return what a client had before a round (default: the newest), or None.

        Raises:
            UserError: The file is damaged.
        """
        rounds = [r for r in self._rounds(client) if round_ is None or r < round_]
        if not rounds:
            return None
        path = self._path(client, max(rounds))
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"A file of client {client} is damaged: {path} ({error}). Restore a copy of it, or "
                "name another run folder."
            ) from error

    def write(self, client: str, round_: int, tensors: dict[str, Tensor]) -> None:
        """Keep what a client has after a round, and drop what no round will start from again."""
        write_whole(self._path(client, round_), lambda scratch: save_file(tensors, scratch))
        rounds = self._rounds(client)
        # From the oldest checkpoint on, and what the client had at that time.
        oldest = max((r for r in rounds if r <= round_ - self._keep), default=0)
        for other in rounds:
            if other < oldest:
                self._path(client, other).unlink()

    def _path(self, client: str, round_: int) -> Path:
        return self._folder / client / f"{self._name}-{round_:06d}.safetensors"

    def _rounds(self, client: str) -> list[int]:
        pattern = re.compile(rf"{re.escape(self._name)}-(\d+)\.safetensors")
        names = (path.name for path in (self._folder / client).glob(f"{self._name}-*"))
        return [int(match[1]) for match in map(pattern.fullmatch, names) if match]
