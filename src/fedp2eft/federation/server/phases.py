"""What the server does: train the base, train the PSG, have every client personalized."""

from __future__ import annotations

import logging
from dataclasses import replace

from flwr.serverapp import Grid
from safetensors.torch import save_file
from torch import Tensor

from fedp2eft.data.federation import SEEN
from fedp2eft.data.nodes import NODES
from fedp2eft.federation.server.admission import Failures
from fedp2eft.federation.server.aggregation import strategy as strategy_of
from fedp2eft.federation.server.delivery import deliver_base
from fedp2eft.federation.server.evaluation import personalize_all
from fedp2eft.federation.server.exchange import Member, roster
from fedp2eft.federation.server.presence import wait_for_nodes
from fedp2eft.federation.server.privacy import Privacy
from fedp2eft.federation.server.rounds import run_rounds
from fedp2eft.federation.server.run_folder import RunFolder
from fedp2eft.federation.wire.messages import TRAIN_BASE, TRAIN_FEDL2P, TRAIN_PSG
from fedp2eft.files import write_folder, write_whole
from fedp2eft.generator import PSG
from fedp2eft.methods import METHODS
from fedp2eft.methods.fedl2p.settings import FedL2PSettings
from fedp2eft.progress import Reporter
from fedp2eft.results.cards import origin_of, psg_card
from fedp2eft.runtime.workspace import Workspace

logging.getLogger("flwr").setLevel(logging.WARNING)  # its INFO repeats what our reporter says


def serve(grid: Grid, run: RunFolder, workspace: Workspace, reporter: Reporter) -> None:
    """The whole experiment, from wherever the run folder stands.

    Args:
        grid: The engine.
        run: Where everything is kept.
        workspace: The base model (on the local engine the clients' own).
        reporter: Hears of progress.
    """
    wait_for_nodes(grid, run.settings.federation, reporter)
    failures = Failures.on(grid, run.settings.peers, reporter, run.faults)
    members = roster(grid, run.settings.federation.timeout, failures)
    train_base(grid, run, workspace, members, reporter)
    shared = train_shared(grid, run, workspace, members, reporter)
    personalize_all(grid, run, shared, members, reporter)


def train_base(
    grid: Grid, run: RunFolder, workspace: Workspace, members: list[Member], reporter: Reporter
) -> None:
    """Train the base on the seen clients; the base model is in `run.base` afterwards.

    Clients with folders of their own have it too; what they are sent is kept for later ones.
    """
    if not (run.base / "config.json").exists():
        workspace.save_base(base_numbers(grid, run, workspace, members, reporter))
    if run.settings.data.dataset == NODES:
        deliver_base(grid, run, workspace, members, reporter)
    else:
        run.drop_checkpoints("base")


def base_numbers(
    grid: Grid, run: RunFolder, workspace: Workspace, members: list[Member], reporter: Reporter
) -> dict[str, Tensor]:
    """What travels of the base, trained; empty where nothing is."""
    s = run.settings
    mine = workspace.base.travelling(workspace.trainable_base, s.base)
    if not mine or not s.base.rounds:
        return {}
    seen = [member for member in members if member.pool == SEEN]
    strategy = strategy_of(
        s.aggregation, seen, s.base.clients_per_round, s.seed, TRAIN_BASE, optimise=False
    )
    first = {name: value.detach().clone() for name, value in mine.items()}
    return run_rounds(grid, run, strategy, "base", s.base.rounds, first, reporter)


def train_shared(
    grid: Grid, run: RunFolder, workspace: Workspace, members: list[Member], reporter: Reporter
) -> dict[str, dict[str, Tensor]]:
    """Train what the chosen methods start from; the PSG always. Numbers by federation."""
    chosen = {METHODS[name].shared for name in run.settings.evaluation.methods} | {"psg"}
    return {
        name: train(grid, run, workspace, members, reporter)
        for name, train in FEDERATIONS.items()
        if name in chosen
    }


def train_psg(
    grid: Grid, run: RunFolder, workspace: Workspace, members: list[Member], reporter: Reporter
) -> dict[str, Tensor]:
    """FedAvg of φ over the seen clients; the PSG is in `run.psg` afterwards."""
    s = run.settings
    seen = [member for member in members if member.pool == SEEN]
    origin = origin_of(s, workspace.source) | {
        "languages": sorted({member.language for member in seen}),
        "clients": len(seen),
        "rounds": s.federation.rounds,
    }
    psg = PSG(replace(workspace.psg_config, origin=origin))
    sampling = (seen, s.federation.clients_per_round, s.seed, TRAIN_PSG)
    privacy = Privacy(s.privacy, *sampling) if s.privacy.on else None
    strategy = privacy.mean if privacy else strategy_of(s.aggregation, *sampling)
    phi = psg.numbers()
    if s.federation.rounds:
        phi = run_rounds(
            grid, run, strategy, "psg", s.federation.rounds, phi, reporter, s.federation.wire,
            privacy=privacy,
        )  # fmt: skip
    psg.set_numbers(phi)
    psg.card = psg_card(psg.config)
    write_folder(run.psg, psg.save_pretrained)
    return phi


def train_fedl2p(
    grid: Grid, run: RunFolder, workspace: Workspace, members: list[Member], reporter: Reporter
) -> dict[str, Tensor]:
    """FedAvg of FedL2P's meta-net over the seen clients; it is in `run.fedl2p` afterwards.

    The last round's numbers are taken: each round's validation loss is that of other clients, so
    the round where it was lowest says more of who was sampled than of the meta-net.
    """
    s = run.settings
    seen = [member for member in members if member.pool == SEEN]
    strategy = strategy_of(
        s.aggregation, seen, s.federation.clients_per_round, s.seed, TRAIN_FEDL2P, optimise=False
    )
    numbers = workspace.new_meta_net().numbers()
    if s.section(FedL2PSettings).rounds:
        numbers = run_rounds(
            grid, run, strategy, "fedl2p", s.section(FedL2PSettings).rounds, numbers, reporter,
            patience=s.section(FedL2PSettings).patience,
        )  # fmt: skip
    tensors = {name: value.contiguous() for name, value in numbers.items()}
    write_whole(run.fedl2p, lambda scratch: save_file(tensors, scratch))
    return numbers


FEDERATIONS = {"psg": train_psg, "fedl2p": train_fedl2p}
"""What trains the numbers that methods start from, by `Method.shared`."""
