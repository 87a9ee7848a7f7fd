"""What the server does: train the base, train the PSG, have every client personalized."""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedp2eft.bases.standard_fl import set_parameters, trained_parameters
from fedp2eft.data.federation import SEEN
from fedp2eft.errors import UserError
from fedp2eft.federation.messages import (
    ARRAYS,
    CONFIG,
    EXAMPLES,
    PERSONALIZE,
    TRAIN_BASE,
    TRAIN_PSG,
    scalars,
    to_arrays,
)
from fedp2eft.federation.reporting import Reporter
from fedp2eft.federation.rounds import Member, SeededFedAvg, exchange, roster, run_rounds
from fedp2eft.federation.run_folder import RunFolder
from fedp2eft.federation.workspace import Workspace
from fedp2eft.generator import PSG
from fedp2eft.methods import WITHOUT_RANK, method_named

logging.getLogger("flwr").setLevel(logging.WARNING)  # its INFO repeats what our reporter says


def serve(grid: Grid, run: RunFolder, workspace: Workspace, reporter: Reporter) -> None:
    """The whole experiment, from wherever the run folder stands.

    Args:
        grid: The engine.
        run: Where everything is kept.
        workspace: The base model (on the local engine the clients' own).
        reporter: Hears of progress.
    """
    for method in run.settings.evaluation.methods:
        method_named(method)
    members = roster(grid, run.settings.federation.timeout)
    train_base(grid, run, workspace, members, reporter)
    psg = train_psg(grid, run, workspace, members, reporter)
    personalize_all(grid, run, psg, members, reporter)


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
    _save_base(run.base, model, workspace.tokenizer)
    run.drop_checkpoints("base")


def _save_base(folder: Path, model: Any, tokenizer: Any) -> None:
    """Write the model beside `folder`, then put it in place whole."""
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".base-"))
    try:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        scratch.chmod(0o755)
        scratch.rename(folder)
    except OSError as error:
        raise UserError(f"Could not save the base model in {folder}: {error.strerror}.") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


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
        phi = run_rounds(grid, run, strategy, "psg", s.federation.rounds, phi, reporter)
    psg.set_numbers(phi)
    psg.save_pretrained(run.psg)
    return psg


def personalize_all(
    grid: Grid, run: RunFolder, psg: PSG, members: list[Member], reporter: Reporter
) -> None:
    """Every client of the chosen pools, with every method and budget; missing cells only."""
    evaluation = run.settings.evaluation
    phi = to_arrays(psg.numbers())
    chosen = [member for member in members if member.pool in evaluation.pools]
    wanted = [
        (member, method, rank)
        for member in chosen
        for method in evaluation.methods
        for rank in ([0] if method in WITHOUT_RANK else evaluation.ranks)
    ]
    missing = [
        (member, method, rank)
        for member, method, rank in wanted
        if run.cell(method, rank, member.client) is None
    ]
    reporter.start("personalize", len(wanted), len(wanted) - len(missing))
    messages = [
        Message(
            RecordDict(
                {
                    ARRAYS: phi if method == "fedp2eft" else ArrayRecord(),
                    CONFIG: ConfigRecord({"method": method, "rank": rank}),
                }
            ),
            member.node,
            PERSONALIZE,
            group_id=f"{method}-r{rank}",
        )
        for member, method, rank in missing
    ]
    by_node = {member.node: member for member in members}
    timeout = run.settings.federation.timeout * max(1, len(missing))
    for member, reply in exchange(grid, messages, by_node, timeout, "personalization"):
        method, _, rank = reply.metadata.group_id.rpartition("-r")
        metrics = scalars(reply)
        metrics["examples"] = metrics.pop(EXAMPLES)
        about = {"client": member.client, "language": member.language, "pool": member.pool}
        run.write_cell(method, int(rank), member.client, {**about, **metrics})
        accuracy = metrics["correct"] / metrics["examples"]
        reporter.advance("personalize", f"{method} {member.client} {accuracy:.0%}")
