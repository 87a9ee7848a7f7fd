"""A comparison: methods × bases × ranks × seeds × pools, missing cells only.

Several processes may work on one comparison folder. Each takes a training or a cell that nobody
else holds, and waits only for what others are at.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from fedp2eft.errors import UserError
from fedp2eft.experiment.engine import LocalEngine, environment, local_engine
from fedp2eft.experiment.lambdas import keep_lambdas
from fedp2eft.federation.server.evaluation import (
    Instruction,
    Shared,
    as_lists,
    keep_answers,
    kept_answers,
    personalize,
    prepare,
)
from fedp2eft.federation.server.exchange import Member
from fedp2eft.federation.server.held_out import members_of
from fedp2eft.federation.server.labels import needs_label_prior
from fedp2eft.federation.server.phases import know_label_prior, train_base, train_phase
from fedp2eft.federation.server.run_folder import RunFolder
from fedp2eft.federation.server.session import Session
from fedp2eft.federation.wire.messages import array_digest, to_arrays
from fedp2eft.files import read_json, write_json, write_text, write_whole
from fedp2eft.methods import METHODS, check_private, check_task
from fedp2eft.progress import Reporter, current
from fedp2eft.results.cells import cell_record
from fedp2eft.results.plan import Cell, SharedTraining, claim, plan, settings_of
from fedp2eft.runtime.client_rows import LABEL_PRIOR_FILE
from fedp2eft.runtime.inputs import check_inputs
from fedp2eft.runtime.phases import shared_phases
from fedp2eft.settings.experiment import Settings
from fedp2eft.settings.reading import SETTINGS_FILE, check_same, settings_of_folder, settings_text

FREE = {
    ("evaluation", "methods"),
    ("evaluation", "ranks"),
    ("evaluation", "budget"),
    ("evaluation", "pools"),
    ("compare",),
    ("federation", "timeout"),
    ("federation", "keep_checkpoints"),
}
"""Settings that may change between two starts: they add cells and change none."""
LENT = ("base", LABEL_PRIOR_FILE, "clients/*/base-*.safetensors")
"""What a training takes from the run folder of its base."""
WAIT_SECONDS = 1.0


def compare(settings: Settings, folder: str | Path, reporter: Reporter | None = None) -> Path:
    """Compute the missing cells of a comparison.

    Args:
        settings: The experiment; `settings.compare` names bases and seeds, `settings.evaluation`
            methods, ranks and pools.
        folder: The comparison folder, created if absent.
        reporter: Receives progress. Default: log lines.

    Returns:
        The folder, with every cell in it.

    Raises:
        UserError: Bad settings or data, another comparison's folder, or a client that failed.
    """
    folder, reporter = Path(folder).expanduser().resolve(), reporter or current()
    for name in settings.evaluation.methods:
        check_task(name, settings)
        check_private(name, settings)
    cells = plan(settings)
    for training in {cell.training for cell in cells}:
        settings_of(settings, training)  # an unknown base is reported before anything is computed
    _open(folder, settings)
    groups: dict[SharedTraining, list[Cell]] = defaultdict(list)
    for cell in cells:
        groups[cell.training].append(cell)

    def show() -> None:
        reporter.start("compare", len(cells), len(cells) - len(_left(folder, cells)))

    show()
    waited = False
    while missing := _left(folder, cells):
        trainings = dict.fromkeys(cell.training for cell in missing)
        worked = [_work(folder, settings, t, groups[t], reporter, show) for t in trainings]
        if not any(worked):
            if not waited:
                reporter.note("Another process is at work on what is left; waiting for it.")
            waited = True
            time.sleep(WAIT_SECONDS)
    return folder


def _open(folder: Path, settings: Settings) -> None:
    """Make the folder, or check that it was made for the same comparison."""
    file = folder / SETTINGS_FILE
    try:
        # In this order: who starts at the same time writes the settings before anything else.
        if any(folder.glob("[!.]*")) and not file.exists():
            raise UserError(f"{folder} is not empty and holds no comparison: name another folder.")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Cannot use {folder}: {error.strerror}.") from error
    if file.exists():
        check_same(folder, settings_of_folder(folder), settings, FREE)
    write_text(file, settings_text(settings))


def _left(folder: Path, cells: list[Cell]) -> list[Cell]:
    return [cell for cell in cells if not cell.done(folder)]


def _work(
    folder: Path,
    settings: Settings,
    training: SharedTraining,
    cells: list[Cell],
    reporter: Reporter,
    show: Callable[[], None],
) -> bool:
    """Do what no other process holds of one training and its cells; False if there is nothing.

    Args:
        folder: The comparison folder.
        settings: The comparison.
        training: The training.
        cells: Its cells.
        reporter: Receives progress.
        show: Says how many cells are done; called when a training has shown its own phases.
    """
    worked = False
    with ExitStack() as stack:
        site = _Site(stack, folder, settings, training, reporter)
        if not site.trained:
            with claim(folder, f"train-{training.base_name}") as mine:
                if not mine:
                    return False
                if not site.trained:
                    site.train()
                    show()
                    worked = True
        for cell in _left(folder, cells):
            with claim(folder, cell.name) as mine:
                if mine and not cell.done(folder):
                    write_json(cell.path(folder), site.compute(cell))
                    reporter.advance("compare", cell.name)
                    worked = True
    return worked


class _Site:
    """One training's place of work in this process; nothing is loaded before it is needed."""

    def __init__(
        self,
        stack: ExitStack,
        folder: Path,
        comparison: Settings,
        training: SharedTraining,
        reporter: Reporter,
    ) -> None:
        self.folder, self.comparison, self.training = folder, comparison, training
        self.settings = settings_of(comparison, training)
        self.run = folder / "runs" / training.name
        self.reporter = reporter
        self._stack = stack

    @cached_property
    def engine(self) -> LocalEngine:
        engine = self._stack.enter_context(local_engine(self.settings, self.run, self.reporter))
        if self.trained:
            check_inputs(self.run, engine.workspace)  # new cells stand beside old ones
        return engine

    @cached_property
    def members(self) -> list[Member]:
        return members_of(self.engine.grid, self.settings)

    @cached_property
    def shared(self) -> Shared:
        """The parameters that the methods start from, as they were written when training ended."""
        return {name: load_file(self._parameters(name)) for name in self._federations}

    @property
    def _federations(self) -> list[str]:
        kinds = (METHODS[name].shared for name in self.settings.evaluation.methods)
        return sorted({kind for kind in kinds if kind})

    def _parameters(self, federation: str) -> Path:
        return self.run / "shared" / f"{federation}.safetensors"

    @property
    def trained(self) -> bool:
        """Whether base and parameters are there."""
        ready = (self.run / "base" / "config.json").exists()
        known = not needs_label_prior(self.settings) or self._label_prior
        return bool(
            ready and known and all(self._parameters(name).exists() for name in self._federations)
        )

    @property
    def _label_prior(self) -> list[float]:
        """q; empty if it is not known."""
        kept = read_json(self.run / LABEL_PRIOR_FILE) or {}
        return [float(value) for value in kept.get("q", [])]

    def train(self) -> None:
        """Train the base, where no other variant has, and what the methods start from."""
        base = self.folder / "bases" / self.training.base_name
        if not (base / "base" / "config.json").exists():
            settings = settings_of(self.comparison, self.training, base_only=True)
            with local_engine(settings, base, self.reporter) as engine:
                members = members_of(engine.grid, settings)
                with closing(RunFolder(base, settings)) as run:
                    check_inputs(base, engine.workspace)
                    train_base(Session(engine.grid, run, engine.workspace, members, self.reporter))
        with closing(RunFolder(self.run, self.settings)) as run:
            check_inputs(self.run, self.engine.workspace)
            for there in (path for part in LENT for path in sorted(base.glob(part))):
                _lend(there, self.run / there.relative_to(base))
            engine = self.engine
            session = Session(engine.grid, run, engine.workspace, self.members, self.reporter)
            know_label_prior(session)
            for name in self._federations:
                if not self._parameters(name).exists():
                    self._train_federation(name, session)

    def _train_federation(self, name: str, session: Session) -> None:
        parameters = train_phase(shared_phases()[name], session, session.seen)
        if name == "psg":
            clients = [member.client for member in session.members]
            keep_lambdas(session.workspace, self.run, clients, self.settings.evaluation.ranks)
        tensors = {key: value.contiguous() for key, value in parameters.items()}
        write_whole(self._parameters(name), partial(save_file, tensors))

    def instruction(self, cell: Cell) -> Instruction:
        """Return a cell's instruction; surveys are taken once for all pools and kept."""
        kind, s = METHODS[cell.at.method].shared, self.settings
        phi = array_digest(to_arrays(self.shared[kind])) if kind else None
        kept = kept_answers(self.run, self.shared, cell.at, phi, self._label_prior)
        if kept is not None:
            return kept
        made = prepare(
            self.engine.grid, self.shared, cell.at, self.members, s.federation.timeout,
            label_prior=self._label_prior, privacy=s.privacy,
        )  # fmt: skip
        keep_answers(self.run, made, phi)
        return made

    def compute(self, cell: Cell) -> dict[str, Any]:
        """Return the scores of every client of the cell's pool, and what they cost."""
        start, timeout = time.perf_counter(), self.settings.federation.timeout
        grid = self.engine.grid
        members = [member for member in self.members if member.pool == cell.pool]
        if not members:
            raise UserError(
                f"No client is in pool {cell.pool!r}: change evaluation.pools or the data."
            )
        instruction = self.instruction(cell)
        clients = []
        scored = personalize(grid, instruction, members, timeout)
        for done, (member, scores) in enumerate(scored, 1):
            clients.append({"client": member.client, "language": member.language, **scores})
            self.reporter.part("compare", done / len(members), cell.name)
        more: dict[str, Any] = {"budget": cell.at.budget}
        if METHODS[cell.at.method].kept:
            more["prepared"] = as_lists(instruction)
        if ablations := self.settings.data.ablations:
            more["ablations"] = ablations
        return cell_record(
            self.run, cell.at, self.training.base, self.training.seed, cell.pool,
            sorted(clients, key=lambda scores: str(scores["client"])),
            round(time.perf_counter() - start, 3),
            more | environment(self.engine.workspace.device),
        )  # fmt: skip


def _lend(there: Path, here: Path) -> None:
    """Let a run folder use what another one has."""
    if not here.exists():
        here.parent.mkdir(parents=True, exist_ok=True)
        here.symlink_to(os.path.relpath(there, here.parent))
