"""The folder of a run: its results, and everything needed to resume it.

settings.yaml      the resolved settings
inputs.json        digests of every client's rows and of the model (`fedp2eft.runtime.inputs`)
metrics.jsonl      one line per finished round: the same bits whether or not the run was stopped
timings.jsonl      seconds of each round (these differ from run to run)
faults.jsonl       one line for each thing that went wrong, as it happened
checkpoints/       the newest finished rounds
base/              the base model, for `from_pretrained`
psg/               the trained PSG
<phase>/           what a method's own phase trained (`Method.phase`)
surveys/           what the surveys of seen clients gave, for later clients (`Method.kept`)
cells/             one small file per client, method and rank budget
adapters/<client>/ the clients' PEFT adapters
generations/       texts that the clients' models generated (`evaluation.generate`)
                   (`fedp2eft.federation.client.texts`)
clients/<client>/  what stays on a client: its own part of the base (base.kind feddpa-t, dept-spec),
                   and the rounding error of its φ (`wire` other than fp32)
results.json       the tables
tensorboard/       TensorBoard's files, if `trackers` names it
lambda.safetensors, structure.json, machine.json
                   local engine: λ of every client, how alike they are, what computed
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import BaseFileLock

from fedp2eft.data.clients import check_client_name
from fedp2eft.errors import UserError
from fedp2eft.federation.server.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from fedp2eft.federation.server.faults import Faults
from fedp2eft.federation.server.tracking import Trackers
from fedp2eft.files import (
    append_line,
    read_json,
    read_lines,
    sweep,
    take_lock,
    write_json,
    write_text,
)
from fedp2eft.results.at_budget import AtBudget
from fedp2eft.runtime.phases import shared_phases
from fedp2eft.settings.experiment import Settings
from fedp2eft.settings.reading import SETTINGS_FILE, check_same, settings_of_folder, settings_text

# Settings that may change between two starts of one run: they add to it, and change nothing done.
FREE = {
    ("federation", "keep_checkpoints"),
    ("federation", "timeout"),
    ("federation", "min_clients"),
    ("federation", "wait"),
    ("peers", "failures"),
    ("peers", "quarantine"),
    ("peers", "min_share"),
    ("privacy", "epsilon"),
    ("evaluation", "methods"),
    ("evaluation", "ranks"),
    ("evaluation", "pools"),
    ("compare",),
    ("trackers",),
}


def free_settings() -> set[tuple[str, ...]]:
    """Return settings that may change between two starts: `FREE`, and the phases' rounds."""
    rounds = (phase.rounds for phase in shared_phases().values())
    return FREE | {tuple(name.split(".")) for name in rounds}


class RunFolder:
    """Opens or makes a run folder and keeps other processes out of it.

    Args:
        path: The folder.
        settings: The experiment; an existing folder must have been made for the same one.

    Raises:
        UserError: The folder belongs to another experiment, to another process, or is not ours.

    Attributes:
        faults: What goes wrong, since this start.
        trackers: Receive the metrics of every finished round.
        label_prior: q, once it is known.
    """

    def __init__(self, path: str | Path, settings: Settings) -> None:
        self.path = Path(path)
        self.settings = settings
        self.faults = Faults(self.path, settings.peers.quarantine)
        self.trackers: Trackers | None = None
        self.label_prior: list[float] = []
        self._lock: BaseFileLock | None = None
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        settings_file = self.path / SETTINGS_FILE
        try:
            if self.path.exists() and not self.path.is_dir():
                raise UserError(f"{self.path} is a file: name a folder for the run.")
            if self.path.is_dir() and not settings_file.exists() and _is_foreign(self.path):
                raise UserError(f"{self.path} is not empty and holds no run: name another folder.")
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = take_lock(self.path / ".lock")
        except OSError as error:
            raise UserError(f"Cannot use {self.path} for the run: {error.strerror}.") from error
        if self._lock is None:
            raise UserError(
                f"Another process is working on {self.path}: wait for it, or name another folder."
            )
        if settings_file.exists():
            check_same(self.path, settings_of_folder(self.path), self.settings, free_settings())
            self._check_rounds()
        for part in ("checkpoints", "cells/*", "adapters/*", "generations/*", "clients/*"):
            for folder in self.path.glob(part):
                sweep(folder)
        sweep(self.path)
        write_text(settings_file, settings_text(self.settings))

    def _check_rounds(self) -> None:
        """Raise `UserError` if more rounds are finished than the settings ask for."""
        for phase in shared_phases().values():
            found = load_checkpoint(self.path / "checkpoints", phase.name)
            if found is None:
                continue
            done, rounds = found.round, self.settings.value(phase.rounds)
            if done > rounds:
                raise UserError(
                    f"{self.path} has {done} finished rounds, more than {phase.rounds} = {rounds}: "
                    f"give {done} or more, or name another run folder."
                )

    def close(self) -> None:
        """Release the lock on the folder."""
        if self._lock is not None:
            self._lock.release()

    @property
    def base(self) -> Path:
        """Folder of the base model."""
        return self.path / "base"

    @property
    def psg(self) -> Path:
        """Folder of the trained PSG."""
        return self.path / "psg"

    # ── rounds ──────────────────────────────────────────────────────────────────────────────────

    def finish_round(self, checkpoint: Checkpoint, metrics: dict[str, Any], seconds: float) -> None:
        """Keep a finished round: its metrics, then its checkpoint (which makes it count)."""
        phase, round_ = checkpoint.phase, checkpoint.round
        at = {"phase": phase, "round": round_}
        append_line(self.path / "metrics.jsonl", at | metrics)
        append_line(self.path / "timings.jsonl", at | {"seconds": round(seconds, 3)})
        keep = self.settings.federation.keep_checkpoints
        save_checkpoint(self.path / "checkpoints", checkpoint, keep)
        if self.trackers:
            self.trackers.round(phase, round_, metrics, seconds)

    def resume(self, phase: str, rounds: int) -> Checkpoint | None:
        """Return a phase after its last finished round; None at its start.

        Where rounds are left to do, lines of metrics.jsonl behind the last finished round are taken
        out: they belong to a round that was stopped half-way.
        """
        found = load_checkpoint(self.path / "checkpoints", phase)
        done = found.round if found else 0
        if done < rounds:
            self._cut_metrics(phase, done)
        return found

    def metrics(self, phase: str) -> list[dict[str, Any]]:
        """Return the metrics of a phase's rounds, in their order."""
        lines = [read for _, read in read_lines(self.path / "metrics.jsonl") if read is not None]
        return [read for read in lines if read["phase"] == phase]

    def drop_checkpoints(self, phase: str) -> None:
        """Remove the checkpoints of a phase whose result is saved."""
        for path in (self.path / "checkpoints").glob(f"{phase}-*.safetensors"):
            path.unlink()

    def _cut_metrics(self, phase: str, done: int) -> None:
        """Take out half a line, and the lines of a phase behind a round."""
        lines = read_lines(self.path / "metrics.jsonl")
        kept = [
            line
            for line, read in lines
            if read is not None and not (read["phase"] == phase and read["round"] > done)
        ]
        if len(kept) < len(lines):
            write_text(self.path / "metrics.jsonl", b"".join(kept).decode())

    # ── cells ───────────────────────────────────────────────────────────────────────────────────

    def cell_path(self, at: AtBudget, client: str) -> Path:
        """Return the file of one client's scores with one method and budget."""
        check_client_name(client)  # over a network a peer chose it
        return self.path / "cells" / str(at) / f"{client}.json"

    def cell(self, at: AtBudget, client: str) -> dict[str, Any] | None:
        """Return a cell that was computed before, or None."""
        value = read_json(self.cell_path(at, client))
        return value if isinstance(value, dict) else None

    def write_cell(self, at: AtBudget, client: str, value: dict[str, Any]) -> None:
        """Keep a cell."""
        write_json(self.cell_path(at, client), value)

    def drop_cells_of_other_phi(self, digests: Mapping[str, str]) -> None:
        """Remove cells, and their adapters, that came from parameters before the present ones.

        Args:
            digests: Digest of the present parameters, by method.
        """
        for path in self.path.glob("cells/*/*.json"):
            at, cell = AtBudget.parse(path.parent.name), read_json(path)
            if not at or at.method not in digests or not isinstance(cell, dict):
                continue
            if cell.get("phi") != digests[at.method]:
                adapter = self.path / "adapters" / path.stem / path.parent.name
                shutil.rmtree(adapter, ignore_errors=True)
                texts = self.path / "generations" / path.parent.name / path.name
                texts.unlink(missing_ok=True)
                path.unlink()


def _is_foreign(folder: Path) -> bool:
    """Return whether a folder without settings holds more than a killed start leaves."""
    return any(
        path.name != ".lock" and not path.name.startswith(".settings.yaml-")
        for path in folder.iterdir()
    )
