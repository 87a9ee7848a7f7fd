"""Seconds and memory by number of clients, on the local engine with a tiny model.

    python benchmarks/scale.py [--clients 10 100 1000 10000] [--rounds 3] [--out FILE]

Each number in a process of its own: the roster (every client tells who it is), rounds of 30
clients, and one personalization of 100 of them. A few minutes on one core. `--out` gets a JSON
line for each. What a real model adds is in docs/performance.md; docs/deployment.md puts both
together.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

from common import clock, machine, median
from many_clients import Silent, experiment, resident

from fedp2eft.experiment.engine import local_engine
from fedp2eft.federation.server.evaluation import personalize, prepare
from fedp2eft.federation.server.exchange import roster
from fedp2eft.federation.server.phases import train_base, train_shared
from fedp2eft.federation.server.run_folder import RunFolder
from fedp2eft.federation.server.session import Session
from fedp2eft.results.at_budget import AtBudget

A_ROUND, PERSONALIZED = 30, 100


class Watching(Silent):
    """Keeps when each round ended."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[float] = []

    def advance(self, phase: str, text: str) -> None:
        if phase == "psg":
            self.ends.append(clock())

    def between(self) -> list[float]:
        return [later - end for end, later in pairwise(self.ends)]


def measure(folder: Path, clients: int, rounds: int) -> dict[str, object]:
    settings = experiment(folder, clients, rounds, A_ROUND)
    run = RunFolder(folder / "run", settings)
    reporter = Watching()
    with local_engine(settings, folder / "run", reporter) as engine:
        _ = engine.workspace.tokenizer
        before, start = resident(), clock()
        members = roster(engine.grid, 3600.0)
        asked, listed = clock() - start, resident()
        session = Session(engine.grid, run, engine.workspace, members, reporter)
        train_base(session)
        shared = train_shared(session)
        trained = resident()
        start = clock()
        some = members[:PERSONALIZED]
        instruction = prepare(engine.grid, shared, AtBudget("fedp2eft", 2), some, 3600.0)
        scores = list(personalize(engine.grid, instruction, some, 3600.0))
        personal = (clock() - start) / len(scores)
    run.close()
    down = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    return {
        "clients": clients,
        "seconds-roster": round(asked, 3),
        "ms-roster-a-client": round(1000 * asked / clients, 3),
        "seconds-a-round": round(median(reporter.between()), 3),
        "clients-a-round": down["clients"],
        "kB-φ": round(down["bytes-down"] / down["clients"] / 1000, 1),
        "ms-personalization-a-client": round(1000 * personal, 1),
        "MB-before": round(before, 1),
        "MB-with-roster": round(listed, 1),
        "MB-trained": round(trained, 1),
        "machine": machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100, 1000, 10000])
    parser.add_argument("--rounds", type=int, default=3, help="2 or more")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds must be 2 or more: the time from one round to the next is measured")
    if len(options.clients) > 1:
        for clients in options.clients:
            words = ["--clients", str(clients), "--rounds", str(options.rounds)]
            words += ["--out", str(options.out)] if options.out else []
            subprocess.run([sys.executable, __file__, *words], check=True)
        return
    with tempfile.TemporaryDirectory() as name:
        line = measure(Path(name), options.clients[0], options.rounds)
    print(json.dumps(line, ensure_ascii=False), flush=True)
    if options.out:
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
