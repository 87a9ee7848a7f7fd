"""What a page and the terminal show of a run beside its scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from fedp2eft.report.source import ReportData


def facts(report: ReportData) -> Iterator[tuple[str, str]]:
    """Yield what was run, as name and text."""
    s, c = report.settings, report.comparison
    named = s.data.dataset + (f" ({s.data.path})" if s.data.path else "")
    yield "data", ", ".join([named, *s.data.ablations])
    languages = sorted({name for line in c.lines for name in line.languages})
    if languages:
        yield "languages", f"{len(languages)}: {_words(languages)}"
    pools: dict[str, int] = {}
    for cell in report.cells:
        pools[cell["pool"]] = max(pools.get(cell["pool"], 0), len(cell["clients"]))
    if pools:
        yield "clients", ", ".join(f"{pools[pool]} {pool}" for pool in c.pools if pool in pools)
    yield "base model", f"{s.model.name} ({s.model.task})"
    yield "base training", f"{_words(c.bases)}, {_counted(s.base.rounds, 'round')}"
    yield "adapter", f"{s.adapter.target_modules}, r_max {s.adapter.r_max}"
    yield "budgets", f"r = {_words(c.ranks)}, in {s.evaluation.budget}"
    per_round = _counted(s.federation.clients_per_round, "client")
    yield "PSG", f"{_counted(s.federation.rounds, 'round')} of {per_round}"
    yield "seeds", _words(c.seeds)
    if s.privacy.on:
        p = s.privacy
        yield "privacy", f"{p.clipping} clipping, noise {p.noise_multiplier:g}, δ {p.delta:g}"
    if machines := [name for name in c.machines if name]:
        yield "machine", "; ".join(machines)
    for versions in c.versions:
        if versions:
            yield "versions", ", ".join(f"{name} {number}" for name, number in versions.items())


def _counted(number: int, of: str) -> str:
    return f"{number} {of}" + ("" if number == 1 else "s")


def costs(report: ReportData) -> Iterator[list[str]]:
    """Yield, per training and phase: rounds, seconds, total MB up and down."""
    for training in report.trainings:
        for phase, rounds in training.rounds.items():
            seconds = [line["seconds"] for line in rounds if line.get("seconds") is not None]
            up, down = (sum(line.get(f"bytes-{w}", 0) for line in rounds) for w in ("up", "down"))
            taken = f"{sum(seconds):,.1f}" if seconds else "–"
            sent = (f"{up / 1e6:,.1f}", f"{down / 1e6:,.1f}")
            yield [training.name or "this run", phase, str(len(rounds)), taken, *sent]


def fault_counts(report: ReportData) -> dict[str, int]:
    """Count the lines of faults.jsonl by kind."""
    return Counter(str(line["kind"]) for line in report.faults)


def left_out(report: ReportData) -> Iterator[tuple[str, int, str, str]]:
    """Yield (phase, round, client, reason) of every update that a round left out."""
    for training in report.trainings:
        for phase, rounds in training.rounds.items():
            for line in rounds:
                left = line.get("left-out")
                for client, reason in (left if isinstance(left, dict) else {}).items():
                    yield phase, line["round"], str(client), str(reason)


def _words(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))
