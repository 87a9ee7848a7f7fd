"""What a folder of a run or comparison holds, read for a report; what is missing is reported."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedp2eft.errors import UserError, first_line
from fedp2eft.files import read_json, read_lines
from fedp2eft.results.at_budget import AtBudget
from fedp2eft.results.cells import MACHINE_FILE, CellRecord, cell_record, is_client, read_cells
from fedp2eft.results.choices import prepared_of
from fedp2eft.results.summary import Comparison, summarize
from fedp2eft.settings.experiment import CompareSettings, Settings
from fedp2eft.settings.reading import settings_of_folder

if TYPE_CHECKING:
    from fedp2eft.experiment.lambdas import Lambdas

_log = logging.getLogger(__name__)
PLANNED = {"base": "base.rounds", "psg": "federation.rounds"}
"""The setting of each phase's rounds."""


@dataclass(frozen=True)
class TrainingLog:
    """The rounds of one run folder.

    Args:
        name: "" for the run itself; in a comparison the folder under runs/ or bases/.
        rounds: The metrics of each round (metrics.jsonl), with its `seconds`, by phase.
        structure: The content of structure.json, by finished round.
        lambdas: λ̂ of the clients.
    """

    name: str
    rounds: dict[str, list[dict[str, Any]]]
    structure: list[dict[str, Any]]
    lambdas: Lambdas | None


@dataclass(frozen=True)
class ReportData:
    """All that a page shows.

    Args:
        folder: What was read.
        single: Whether it is a run; else a comparison.
        settings: The experiment.
        comparison: Scores; of a run as those of a comparison with one base and seed.
        cells: The clients' scores that `comparison` sums up.
        trainings: One or more.
        generations: By training ("" for the run itself) and client: what
            `generations/<method>-r<rank>/<client>.json` hold.
        faults: The lines of faults.jsonl.
        notes: What is missing or damaged, a sentence each.
    """

    folder: Path
    single: bool
    settings: Settings
    comparison: Comparison
    cells: list[CellRecord]
    trainings: list[TrainingLog]
    generations: dict[str, dict[str, list[dict[str, Any]]]] = field(default_factory=dict)
    faults: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_report(folder: str | Path, *, ask: bool = True) -> ReportData:
    """Read a run or comparison folder, finished or not.

    Args:
        folder: The folder.
        ask: Ask the PSG of a finished run for λ̂ where that was not kept (loads the base model).

    Raises:
        UserError: There is no such folder, or it holds neither.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}: name a run or comparison folder.")
    if not (folder / "settings.yaml").exists():
        raise UserError(f"{folder} holds no run or comparison: it has no settings.yaml.")
    settings = settings_of_folder(folder)
    single = not _is_comparison(folder)
    notes: list[str] = []
    if single:
        compared = CompareSettings(bases=[settings.base.kind], seeds=[settings.seed])
        settings = replace(settings, compare=compared)
        cells = list(_cells_of_run(folder, settings, notes))
        trainings = [_training(folder, "", notes, ask)]
    else:
        cells = _cells_of_comparison(folder, notes)
        trainings = _trainings(folder, notes, ask)
    comparison = summarize(settings, cells)
    report = ReportData(
        folder.resolve(), single, settings, comparison, cells, trainings,
        _generations(folder, notes), _faults(folder), notes,
    )  # fmt: skip
    notes += _missing(report)
    return report


def _is_comparison(folder: Path) -> bool:
    parts = ("bases", "runs", "locks", "structure")
    return any((folder / part).is_dir() for part in parts) or any(folder.glob("cells/*/s*/*/"))


def _cells_of_run(folder: Path, settings: Settings, notes: list[str]) -> Iterator[CellRecord]:
    """Yield a run's cells, one file per client, as those of a comparison."""
    groups: dict[tuple[AtBudget, str], list[CellRecord]] = defaultdict(list)
    for path in sorted(folder.glob("cells/*/*.json")):
        at, cell = AtBudget.parse(path.parent.name), read_json(path)
        pool = cell.get("pool") if isinstance(cell, dict) else None
        if not at or not is_client(cell) or not isinstance(pool, str):
            notes.append(
                f"{path.relative_to(folder)} is damaged and left out: start the run again."
            )
            continue
        groups[at, pool].append(cell)
    about = read_json(folder / MACHINE_FILE)
    about = about if isinstance(about, dict) else {}
    machine = {
        "peak_memory": int(about.get("peak_memory", 0)),
        "versions": dict(about.get("versions", {})),
        "machine": str(about.get("machine", "")),
    }
    for (at, pool), clients in groups.items():
        seconds = sum(float(client["seconds"]) for client in clients)
        record = cell_record(
            folder, at, settings.base.kind, settings.seed, pool, clients, seconds, machine
        )
        yield record | prepared_of(folder, at)


def _cells_of_comparison(folder: Path, notes: list[str]) -> list[CellRecord]:
    cells = read_cells(folder)
    files = sum(1 for _ in folder.glob("cells/**/*.json"))
    if files > len(cells):
        notes.append(f"{files - len(cells)} files under cells/ are damaged and left out.")
    return cells


def _trainings(folder: Path, notes: list[str], ask: bool) -> list[TrainingLog]:
    found = [
        _training(path.parent, path.parent.name, notes, ask)
        for part in ("bases", "runs")
        for path in sorted(folder.glob(f"{part}/*/settings.yaml"))
    ]
    known = {training.name for training in found if training.structure}
    for path in sorted(folder.glob("structure/*.json")):  # as published, without the run folders
        if path.stem not in known:
            found.append(TrainingLog(path.stem, {}, _structure(path), None))
    return found


def _training(run: Path, name: str, notes: list[str], ask: bool) -> TrainingLog:
    rounds: dict[str, list[dict[str, Any]]] = defaultdict(list)
    seconds = {
        (line.get("phase"), line.get("round")): line.get("seconds")
        for _, line in read_lines(run / "timings.jsonl")
        if line
    }
    for _, line in read_lines(run / "metrics.jsonl"):
        if line and isinstance(line.get("round"), int):
            at = (line.get("phase"), line["round"])
            rounds[str(line.get("phase"))].append(line | {"seconds": seconds.get(at)})
    where = f"runs/{name}" if name else "The run"
    lambdas = None
    try:
        if (run / "psg").is_dir() or (run / "lambda.safetensors").is_file():
            from fedp2eft.experiment.lambdas import ask_again, read_lambdas  # loads all of PEFT

            lambdas = ask_again(run) if ask else read_lambdas(run)
    except Exception as error:  # data, hub or model may be out of reach now: the rest is shown
        _log.debug("λ of %s", run, exc_info=True)
        notes.append(f"{where}: its PSG could not be asked for λ again ({first_line(error)}).")
    return TrainingLog(name, dict(rounds), _structure(run / "structure.json"), lambdas)


def _structure(path: Path) -> list[dict[str, Any]]:
    found = read_json(path)
    keys = {"round", "level", "spread", "personal", "overlap"}
    if not isinstance(found, list):
        return []
    return [entry for entry in found if isinstance(entry, dict) and entry.keys() >= keys]


def _generations(folder: Path, notes: list[str]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Return the texts of a run, or of the runs in a comparison."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    files = (*folder.glob("generations/*/*.json"), *folder.glob("runs/*/generations/*/*.json"))
    for path in sorted(files):
        run = path.parents[2]
        read = read_json(path)
        rows = read.get("rows") if isinstance(read, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            notes.append(f"{path.relative_to(folder)} is damaged and left out.")
            continue
        clients = found.setdefault("" if run == folder else run.name, {})
        clients.setdefault(str(read.get("client", path.stem)), []).append(read)
    return found


def _faults(folder: Path) -> list[dict[str, Any]]:
    return [line for _, line in read_lines(folder / "faults.jsonl") if line and "kind" in line]


def _missing(report: ReportData) -> Iterator[str]:
    """Yield what a finished run or comparison would have."""
    folder, settings, comparison = report.folder, report.settings, report.comparison
    results = folder / "results.json"
    if not results.exists():
        yield "There is no results.json yet: what is shown is what is finished so far."
    elif not isinstance(read_json(results), dict | list):  # a list: a run of fedp2eft 0.1.0
        yield "results.json is damaged: the scores here come from the cells, whose sum it is."
    if report.single:
        rounds = report.trainings[0].rounds
        begun = [phase for phase in PLANNED if rounds.get(phase)]
        for phase, setting in PLANNED.items():
            done, whole = len(rounds.get(phase, [])), settings.value(setting)
            stopped = settings.privacy.on and phase == "psg"  # a spent ε ends it sooner
            if done < whole and (phase in begun or not begun) and not stopped:
                yield f"{done} of {whole} rounds of {phase} are done."
        yield from _partly(report)
    elif comparison.missing:
        count = len(comparison.missing)
        named = ", ".join(comparison.missing[:4]) + (", …" if count > 4 else ".")
        yield f"{count} cells of the comparison are not computed yet: {named}"
    if not comparison.lines:
        yield "No client is scored yet."


def _partly(report: ReportData) -> Iterator[str]:
    """Yield methods of a run that have scored fewer clients than others."""
    counts: Mapping[str, int] = defaultdict(int)
    for cell in report.cells:
        counts[cell["pool"]] = max(counts[cell["pool"]], len(cell["clients"]))  # type: ignore[index]
    for cell in report.cells:
        done, whole = len(cell["clients"]), counts[cell["pool"]]
        if done < whole:
            yield (
                "{method} r={rank}: ".format(**cell) + f"{done} of {whole} {cell['pool']} clients."
            )
    missing = [name.split("/", 2)[2] for name in report.comparison.missing]
    if report.cells and missing:
        yield f"Not computed: {', '.join(missing)}."
