"""What the files of a comparison's cells hold."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedp2eft.files import read_json, read_lines
from fedp2eft.methods import METHODS
from fedp2eft.results.at_budget import AtBudget
from fedp2eft.results.metrics import metric_of

MACHINE_FILE = "machine.json"
"""In a run folder of the local engine: the last columns of `cell_record`."""
CellRecord = Mapping[str, Any]
"""The content of a cell's file, or of one client in it."""

_CELL = {
    "method": str,
    "base": str,
    "rank": int,
    "seed": int,
    "pool": str,
    "clients": list,
    "seconds": (int, float),
    "bytes_up": int,
    "bytes_down": int,
    "peak_memory": int,
    "versions": dict,
    "machine": str,
}
_CLIENT = {
    "client": str,
    "language": str,
    "examples": int,
    "loss": (int, float),
    "parameters": (int, float),
    "seconds": (int, float),
}
_log = logging.getLogger(__name__)


def read_cells(folder: Path) -> list[CellRecord]:
    """Return all cells of a comparison folder; warn of any other file, and leave it out."""
    cells = []
    for path in sorted((folder / "cells").glob("**/*.json")):
        record = read_json(path)
        if not _is_cell(record) or path != folder / "cells" / f"{name_of(record)}.json":
            _log.warning("%s is not a cell of this comparison: it is left out.", path)
            continue
        cells.append(record)
    return cells


def cell_record(
    run: Path,
    at: AtBudget,
    base: str,
    seed: int,
    pool: str,
    clients: Sequence[CellRecord],
    seconds: float,
    more: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what a cell's file holds.

    Args:
        run: Folder of the run that trained what the method starts from.
        at: The method, and at which budget.
        base: Value of base.kind.
        seed: The run's.
        pool: The clients' pool.
        clients: Scores of each client.
        seconds: What the cell took.
        more: `peak_memory`, `versions` and `machine`, and what else is known.
    """
    shared = METHODS[at.method].shared if at.method in METHODS else None
    up, down = traffic(run, shared) if shared else (0, 0)
    return {
        "method": at.method,
        "base": base,
        "rank": at.rank,
        "seed": seed,
        "pool": pool,
        "clients": clients,
        "seconds": seconds,
        "bytes_up": up,
        "bytes_down": down,
        **more,
    }


def scored(record: CellRecord) -> Sequence[CellRecord]:
    """Return the clients that have test rows; the others have no score."""
    return [client for client in record["clients"] if client[metric_of(client).unit]]


def values(record: CellRecord | None) -> dict[str, float]:
    """Return the metric by client; empty where there is no cell."""
    return {c["client"]: metric_of(c).value([c]) for c in scored(record)} if record else {}


def name_of(record: CellRecord) -> str:
    """Return the name that `fedp2eft.results.plan.Cell` gives to a cell of this content."""
    at = AtBudget(record["method"], record["rank"], record.get("budget", "ranks"))
    return "{base}/s{seed}/{pool}/".format(**record) + str(at)


def traffic(run: Path, phase: str) -> tuple[int, int]:
    """Return the mean bytes that a client sent and received per round of a phase."""
    lines = [line for _, line in read_lines(run / "metrics.jsonl") if line is not None]
    rounds = [line for line in lines if line.get("phase") == phase]
    clients = max(1, sum(line.get("clients", 0) for line in rounds))
    up, down = (sum(line.get(f"bytes-{way}", 0) for line in rounds) for way in ("up", "down"))
    return round(up / clients), round(down / clients)


def _is_cell(record: object) -> bool:
    return _has(record, _CELL) and all(map(is_client, record["clients"]))  # type: ignore[index]


def is_client(record: object) -> bool:
    """Return whether it is what one client's scores are."""
    count = {"tokens": int} if isinstance(record, dict) and "tokens" in record else {"correct": int}
    return _has(record, _CLIENT | count)


def _has(record: object, kinds: Mapping[str, Any]) -> bool:
    return isinstance(record, dict) and all(
        isinstance(record.get(name), kind) for name, kind in kinds.items()
    )
