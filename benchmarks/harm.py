"""Is a client that scores below the base model really worse off, or is it chance?

    python benchmarks/harm.py runs/sib-200-auto [--methods prior lora auto] [--seeds 42 52 62]

Repeats the personalization of a finished comparison (its base models, PSG and surveys) and scores
every client twice: on the even and on the odd ones of its test rows. A method that harms a client
does so on both. So the table gives the share of clients that a method leaves worse on one half, on
both, and on both if the halves had nothing to do with each other; and of the clients worse on one
half the mean gain on the other half, beside the gain of all. Intervals: 95 %, bootstrap over
clients.

One file per seed, pool and method goes to RUN/harm; files that are there are not computed again.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import common  # noqa: F401 - sets the environment before torch is imported
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import nn

from fedp2eft.client.side import ClientSide
from fedp2eft.data.clients import POOLS
from fedp2eft.files import read_json, write_json
from fedp2eft.methods import METHODS
from fedp2eft.results.at_budget import AtBudget
from fedp2eft.results.plan import SharedTraining, settings_of
from fedp2eft.results.surveys import read_survey
from fedp2eft.runtime.workspace import Workspace
from fedp2eft.settings.experiment import Settings
from fedp2eft.settings.reading import settings_of_folder
from fedp2eft.tasks.task import Scores

DRAWS = 2000
HEADER = """\
| pool | method | worse | on one half | on both | by chance | other half's gain | gain of all |
|---|---|--:|--:|--:|--:|--:|--:|"""


class Halved(ClientSide):
    """A client that keeps how many rows of each half of its test rows a model got right."""

    seen: ClassVar[list[list[int]]] = []

    def score(self, model: nn.Module) -> Scores:
        """Return the scores on all test rows."""
        parts = [self.test.select(np.arange(start, len(self.test), 2)) for start in (0, 1)]
        size = self.settings.eval_batch_size
        scores = [self.task.score(model, part, size) for part in parts]
        self.seen.append([int(s.correct or 0) for s in scores])
        rows = sum(s.examples for s in scores)
        loss = sum(s.loss * s.examples for s in scores) / rows
        return Scores(rows, sum(int(s.correct or 0) for s in scores), loss)


def right(client: ClientSide, at: AtBudget) -> list[int]:
    """Return what a method gets right of each half of a client's test rows."""
    fields = {name: getattr(client, name) for name in client.__dataclass_fields__}
    METHODS[at.method].fit(Halved(**fields), at.rank)
    return Halved.seen[-1]


def base_scores(workspace: Workspace, pool: str) -> dict[str, list[int]]:
    """Return what the base model gets right of each half of every client's test rows."""
    names = [member.name for member in workspace.data.pool(pool)]
    return {name: right(workspace.side(name), AtBudget("base", 0)) for name in names}


def measure(
    workspace: Workspace, run: Path, pool: str, at: AtBudget, base: dict[str, list[int]]
) -> list[dict[str, Any]]:
    """Return each client's rows and right answers, by half: the base model's and the method's."""
    method, found = METHODS[at.method], []
    kept = read_survey(run, at) if method.surveys else {}
    if kept is None:
        raise SystemExit(f"{run} has no survey of {at.method}: finish the comparison first.")
    prepared = {name: torch.tensor(values) for name, values in kept.items()}
    for member in workspace.data.pool(pool):
        client = replace(workspace.side(member.name, method=method), prepared=prepared)
        rows = len(client.test)
        found.append({
            "client": member.name,
            "rows": [-(-rows // 2), rows // 2],
            "base": base[member.name],
            "method": right(client, at),
        })  # fmt: skip
    return found


def summary(clients: list[dict[str, Any]]) -> str:
    """Return a table row; columns as in `HEADER`."""
    rows, base, method = (
        np.array([client[key] for client in clients], dtype=float)
        for key in ("rows", "base", "method")
    )
    gains = 100 * (method - base) / rows
    worse = gains < 0
    shares = [
        (method.sum(axis=1) < base.sum(axis=1)).mean(),
        worse.mean(),
        worse.all(axis=1).mean(),
        worse.mean(axis=0).prod(),
    ]
    cells = [f"{100 * share:.1f} %" for share in shares]
    return " | ".join([*cells, interval(gains, others_gain), interval(gains, mean)])


def others_gain(gains: NDArray[np.float64]) -> float:
    """Return the mean gain on one half of the clients that are worse on the other half."""
    other = np.concatenate([gains[gains[:, 0] < 0, 1], gains[gains[:, 1] < 0, 0]])
    return float(other.mean()) if len(other) else math.nan


def mean(gains: NDArray[np.float64]) -> float:
    """Return the mean gain."""
    return float(gains.mean())


def interval(gains: NDArray[np.float64], value: Callable[[NDArray[np.float64]], float]) -> str:
    """Return a value of all clients and its bootstrap interval; a dash if none has it."""
    if math.isnan(value(gains)):
        return "–"
    rng = np.random.default_rng(0)
    drawn = [value(gains[rng.integers(len(gains), size=len(gains))]) for _ in range(DRAWS)]
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return f"{value(gains):.1f} [{low:.1f}, {high:.1f}]"


def open_run(folder: Path, comparison: Settings, seed: int) -> tuple[Workspace, Path]:
    """Return a training's workspace with the PSG that it ended with, and its folder."""
    [base] = comparison.compare.bases or [comparison.base.kind]
    training = SharedTraining(base, seed)
    run = folder / "runs" / training.name
    workspace = Workspace(settings_of(comparison, training), run)
    phi = run / "shared" / "psg.safetensors"
    if phi.exists():
        workspace.psg.set_phi(load_file(phi))
    return workspace, run


def main() -> None:
    """Compute what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--methods", nargs="+", default=["prior", "lora", "lora-tuned", "auto"])
    parser.add_argument("--pools", nargs="+", default=list(POOLS))
    parser.add_argument("--seeds", type=int, nargs="+")
    o = parser.parse_args()
    comparison = settings_of_folder(o.run)
    rank = comparison.evaluation.ranks[0]
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for seed in o.seeds or comparison.compare.seeds:
        opened = None
        for pool in o.pools:
            base = None
            for method in o.methods:
                at = AtBudget(method, rank if METHODS[method].ranked else 0)
                path = o.run / "harm" / f"s{seed}-{pool}-{at}.json"
                if not path.exists():
                    opened = opened or open_run(o.run, comparison, seed)
                    base = base or base_scores(opened[0], pool)
                    write_json(path, measure(*opened, pool, at, base))
                found.setdefault((pool, method), []).extend(read_json(path))
    print(HEADER)
    for (pool, method), clients in found.items():
        print(f"| {pool} | `{method}` | {summary(clients)} |")


if __name__ == "__main__":
    main()
