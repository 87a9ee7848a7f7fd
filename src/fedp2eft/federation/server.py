"""What the server does: train the base, train the PSG, have every client personalized."""

from __future__ import annotations

import logging

from flwr.serverapp import Grid
from torch import Tensor

from fedp2eft.bases.standard_fl import set_parameters, trained_parameters
from fedp2eft.data.federation import SEEN
from fedp2eft.federation.messages import TRAIN_BASE, TRAIN_PSG
from fedp2eft.federation.personalization import personalize_all
from fedp2eft.federation.reporting import Reporter
from fedp2eft.federation.rounds import Member, SeededFedAvg, roster, run_rounds
from fedp2eft.federation.run_folder import RunFolder
from fedp2eft.federation.workspace import Workspace
from fedp2eft.files import write_folder
from fedp2eft.generator import PSG
from fedp2eft.models.loading import load_tokenizer, save_model

logging.getLogger("flwr").setLevel(logging.WARNING)  # its INFO repeats what our reporter says


def serve(grid: Grid, run: RunFolder, workspace: Workspace, reporter: Reporter) -> None:
    """The whole experiment, from wherever the run folder stands.

    Args:
        grid: The engine.
        run: Where everything is kept.
        workspace: The base model (on the local engine the clients' own).
        reporter: Hears of progress.
    """
    members = roster(grid, run.settings.federation.timeout)
    train_base(grid, run, workspace, members, reporter)
    shared = train_shared(grid, run, workspace, members, reporter)
    personalize_all(grid, run, shared, members, reporter)


def train_base(
    grid: Grid, run: RunFolder, workspace: Workspace, members: list[Member], reporter: Reporter
) -> None:
    """Standard FL on the seen clients; the base model is in `run.base` afterwards."""
    if (run.base / "config.json").exists():
        return
    s = run.settings
    model = workspace.trainable_base
    if s.base.kind == "standard-fl" and s.base.rounds:
        seen = [member for member in members if member.pool == SEEN]
        strategy = SeededFedAvg(seen, s.base.clients_per_round, s.seed, TRAIN_BASE)
        mine = trained_parameters(model, s.base)
        first = {name: value.detach().clone() for name, value in mine.items()}
        numbers = run_rounds(grid, run, strategy, "base", s.base.rounds, first, reporter)
        set_parameters(model, numbers, s.base)
    # A fresh tokenizer: one that has cut rows would carry that into its file.
    save_model(run.base, model, load_tokenizer(workspace.source))
    run.drop_checkpoints("base")


def train_shared(
    grid: Grid, run: RunFolder, workspace: Workspace, members: list[Member], reporter: Reporter
) -> dict[str, dict[str, Tensor]]:
    """Train what the chosen methods start from; the PSG always. Numbers by federation."""
    return {"psg": train_psg(grid, run, workspace, members, reporter).numbers()}


def train_psg(
    grid: Grid, run: RunFolder, workspace: Workspace, members: list[Member], reporter: Reporter
) -> PSG:
    """FedAvg of φ over the seen clients; the PSG is in `run.psg` afterwards."""
    s = run.settings
    psg = PSG(workspace.psg_config)
    seen = [member for member in members if member.pool == SEEN]
    strategy = SeededFedAvg(seen, s.federation.clients_per_round, s.seed, TRAIN_PSG)
    phi = psg.numbers()
    if s.federation.rounds:
        phi = run_rounds(
            grid, run, strategy, "psg", s.federation.rounds, phi, reporter, s.federation.wire
        )
    psg.set_numbers(phi)
    write_folder(run.psg, psg.save_pretrained)
    return psg
