"""200 rounds with 300 clients on the local engine: memory must stay flat.

    python benchmarks/soak.py [--rounds 200] [--clients 300] [--a-round 5] [--out FILE]

A tiny random encoder; about two minutes on one quiet core. Every client's tokens and ξ are kept
once it was sampled, so memory is compared from half of the rounds on, when nearly all were. Exits
with 1 where it grew by more than 5 MB from there. `--out` gets one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from common import clock, machine
from many_clients import Silent, experiment, resident

from fedp2eft.experiment.train import train

GROWTH = 5.0


class Watching(Silent):
    """Keeps the memory after every round."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: list[float] = []

    def advance(self, phase: str, text: str) -> None:
        if phase == "psg":
            self.memory.append(resident())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--clients", type=int, default=300)
    parser.add_argument("--a-round", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    watching = Watching()
    with tempfile.TemporaryDirectory() as name:
        settings = experiment(Path(name), options.clients, options.rounds, options.a_round)
        start = clock()
        train(settings, Path(name) / "run", watching)
        seconds = clock() - start
        written = sum(p.stat().st_size for p in (Path(name) / "run").rglob("*") if p.is_file())
    memory = watching.memory
    half = len(memory) // 2
    growth = max(memory[half:]) - memory[half]
    line = {
        "rounds": len(memory),
        "clients": options.clients,
        "clients-a-round": options.a_round,
        "seconds": round(seconds, 1),
        "MB-after-round-1": round(memory[0], 1),
        "MB-after-half": round(memory[half], 1),
        "MB-at-the-end": round(memory[-1], 1),
        "MB-most-growth-after-half": round(growth, 1),
        "MB-run-folder": round(written / 1e6, 2),
        "machine": machine(),
    }
    print(json.dumps(line))
    if options.out:
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    return int(growth > GROWTH)


if __name__ == "__main__":
    sys.exit(main())
