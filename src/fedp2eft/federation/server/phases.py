"""What the server does: train the base, train the PSG, have every client personalized."""

from __future__ import annotations

import logging

from flwr.serverapp import Grid
from torch import Tensor

from fedp2eft.client.phase import Phase
from fedp2eft.data.nodes import NODES
from fedp2eft.federation.server.admission import Failures
from fedp2eft.federation.server.aggregation import Averaging
from fedp2eft.federation.server.delivery import deliver_base
from fedp2eft.federation.server.distributed import Distributed
from fedp2eft.federation.server.evaluation import personalize_all
from fedp2eft.federation.server.exchange import Member
from fedp2eft.federation.server.held_out import members_of, training_base
from fedp2eft.federation.server.labels import learn_label_prior, needs_label_prior
from fedp2eft.federation.server.presence import wait_for_nodes
from fedp2eft.federation.server.privacy import Private
from fedp2eft.federation.server.rounds import run_rounds
from fedp2eft.federation.server.run_folder import RunFolder
from fedp2eft.federation.server.session import Session
from fedp2eft.progress import Reporter
from fedp2eft.results.cards import origin_of
from fedp2eft.runtime.phases import BASE, shared_phases
from fedp2eft.runtime.workspace import Workspace

logging.getLogger("flwr").setLevel(logging.WARNING)  # its INFO repeats what our reporter prints


def serve(grid: Grid, run: RunFolder, workspace: Workspace, reporter: Reporter) -> None:
    """Run the whole experiment, from wherever the run folder stands.

    Args:
        grid: The engine.
        run: Where everything is kept.
        workspace: The base model (on the local engine the clients' own).
        reporter: Receives progress.
    """
    wait_for_nodes(grid, run.settings.federation, reporter)
    failures = Failures.on(grid, run.settings.peers, reporter, run.faults)
    members = members_of(grid, run.settings, failures)
    session = Session(grid, run, workspace, members, reporter)
    train_base(session)
    know_label_prior(session)
    personalize_all(session, train_shared(session))


def know_label_prior(session: Session) -> None:
    """Learn q if something needs it, and send it with every message from here on."""
    if needs_label_prior(session.settings):
        session.run.label_prior = learn_label_prior(session)
        session.workspace.know_label_prior(session.run.label_prior)


def train_base(session: Session) -> None:
    """Train the base on the seen clients; the base model is in `run.base` afterwards.

    Clients with folders of their own have it too; what they are sent is kept for later ones.
    """
    if not (session.run.base / "config.json").exists():
        if session.settings.base.logit_adjustment != "none":
            know_label_prior(session)
        train_phase(BASE, session, training_base(session.members))
    if session.settings.data.dataset == NODES:
        deliver_base(session)
    else:
        session.run.drop_checkpoints(BASE.name)


def train_shared(session: Session) -> dict[str, dict[str, Tensor]]:
    """Train what the chosen methods start from; the PSG always. Parameters by phase."""
    chosen = shared_phases(session.settings.evaluation.methods).values()
    return {phase.name: train_phase(phase, session, session.seen) for phase in chosen}


def train_phase(phase: Phase, session: Session, seen: list[Member]) -> dict[str, Tensor]:
    """Train a phase on some seen clients, and write what it ends with into the run folder.

    Returns:
        Its last parameters; those before round 1 if it has no rounds.
    """
    run, workspace, s = session.run, session.workspace, session.settings
    parameters = {name: value.detach() for name, value in phase.first(workspace).items()}
    if parameters and s.value(phase.rounds):
        aggregator = aggregator_of(run, phase, seen)
        first = {name: value.clone() for name, value in parameters.items()}
        parameters = run_rounds(session.grid, run, phase, aggregator, first, session.reporter)
    facts = origin_of(s, workspace.source) | {
        "languages": sorted({member.language for member in seen}),
        "clients": len(seen),
        "rounds": s.value(phase.rounds),
    }
    phase.write(workspace, run.path / phase.name, parameters, facts)
    return parameters


def aggregator_of(run: RunFolder, phase: Phase, members: list[Member]) -> Averaging:
    """Return a phase's aggregation: private if the settings say so and it is covered."""
    if phase.private and run.settings.privacy.on:
        kind = Distributed if run.settings.privacy.secure else Private
        return kind(run.settings, phase, members, run.path)
    return Averaging(run.settings, phase, members)
