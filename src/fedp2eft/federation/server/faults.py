"""What went wrong in a run, kept as it happens and counted at its end."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, Literal

from fedp2eft.files import append_line, read_lines

Kind = Literal["failed", "refused", "late", "lost", "ignored"]
MEANING: dict[str, str] = {
    "failed": "the client reported that it could not do what it was asked",
    "refused": "its reply was not what it should be, or too far from the others'",
    "late": "no reply before the deadline; one that came later was ignored",
    "lost": "its SuperNode was cut off before it replied",
    "ignored": "a second reply to one question, or one to nothing",
    "quarantined": "it failed peers.quarantine times in a row, and was not asked again",
    "started-again": "the run was resumed",
}


class Faults:
    """Keeps faults.jsonl of a run folder, and which clients are no longer asked.

    Args:
        run: The run folder.
        quarantine: Failures in a row after which a client is left alone; 0 for never.

    Attributes:
        quarantined: Names of those clients. Starting the run again gives them another chance.
    """

    def __init__(self, run: Path, quarantine: int) -> None:
        self._path = run / "faults.jsonl"
        self._limit = quarantine
        self._in_a_row: Counter[str] = Counter()
        self.quarantined: set[str] = set()

    def happened(self, kind: str, client: str = "", reason: str = "") -> bool:
        """Keep a fault; returns whether the client is in quarantine from now on."""
        line = {"kind": kind, "client": client, "reason": reason}
        append_line(self._path, {key: value for key, value in line.items() if value})
        if not client or kind == "ignored" or client in self.quarantined:
            return False
        self._in_a_row[client] += 1
        if not self._limit or self._in_a_row[client] < self._limit:
            return False
        self.quarantined.add(client)
        append_line(self._path, {"kind": "quarantined", "client": client})
        return True

    def answered(self, client: str) -> None:
        """Reset the count of a client that gave a usable reply."""
        self._in_a_row.pop(client, None)

    def summarise(self) -> dict[str, Any]:
        """Count all that was kept, over every start of the run.

        Returns:
            `counts` by kind, and `clients`: counts by kind of each client that had a fault.
        """
        counts: Counter[str] = Counter()
        clients: dict[str, Counter[str]] = defaultdict(Counter)
        for _, line in read_lines(self._path):
            if line is None:
                continue
            counts[str(line["kind"])] += 1
            if "client" in line:
                clients[str(line["client"])][str(line["kind"])] += 1
        return {
            "counts": dict(sorted(counts.items())),
            "clients": {name: dict(sorted(clients[name].items())) for name in sorted(clients)},
        }


def summary_line(summary: dict[str, Any]) -> str:
    """Return a summary in one line."""
    counts = summary["counts"]
    if not counts:
        return "Faults: none."
    text = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    stopped = [name for name, kinds in summary["clients"].items() if "quarantined" in kinds]
    names = ", ".join(stopped[:10]) + (" …" if len(stopped) > 10 else "")
    return f"Faults: {text}" + (f" ({names})" if stopped else "") + "; see faults.jsonl."
