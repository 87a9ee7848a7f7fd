"""The phases that every run has: the base model's training, and the PSG's (paper section 4)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fedp2eft.bases import copy_parameters, rate
from fedp2eft.bases.parts import own_rows
from fedp2eft.client.descent import local_order
from fedp2eft.client.phase import Phase, Trained, Turn
from fedp2eft.client.training import Round, train_round
from fedp2eft.files import write_folder
from fedp2eft.generator import PSG
from fedp2eft.methods import phases
from fedp2eft.runtime.workspace import Workspace


def _base_first(workspace: Workspace) -> Mapping[str, Tensor]:
    return workspace.base.travelling(workspace.trainable_base, workspace.settings.base)


def _train_base(turn: Turn) -> Trained:
    """Train what travels of the base, and what stays, on the client's rows."""
    workspace, name = turn.workspace, turn.client
    s, base, model = workspace.settings, workspace.base, workspace.trainable_base
    mine, staying = base.travelling(model, s.base), base.staying(model)
    copy_parameters(mine, turn.parameters)
    work = workspace.local_work(name, turn.seed)
    work = replace(work, on_step=turn.each_of(-(-len(work.order()) // s.local.accumulate)))
    files = workspace.private.files
    with own_rows(staying, files.before(name, turn.round) or {} if staying else {}) as rows:
        trained = base.trained(model, s.base).values()
        loss = work.fine_tune(model, trained, rate(s.base, turn.round))
    if staying:
        files.write(name, turn.round, rows)
    return Trained(mine, {"loss": loss})


def _write_base(
    workspace: Workspace, folder: Path, parameters: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    workspace.save_base(parameters)


BASE = Phase(
    "base",
    "base model",
    rounds="base.rounds",
    clients="base.clients_per_round",
    metrics=("loss",),
    first=_base_first,
    train=_train_base,
    write=_write_base,
)


def _psg_first(workspace: Workspace) -> Mapping[str, Tensor]:
    return PSG(workspace.psg_config).phi()


def psg_order(turn: Turn) -> list[Any]:
    """Return mini-batches of row indices of stage 1."""
    local = turn.workspace.settings.local
    rows = len(turn.workspace.encoded(turn.client, "train"))
    return list(local_order(rows, local.epochs, local.batch_size, turn.seed))


def _train_psg(turn: Turn) -> Trained:
    """Run stage 1, then stage 2. Neither text, ξ, λ nor an adapter leaves the client."""
    workspace, name, order = turn.workspace, turn.client, psg_order(turn)
    s = workspace.settings
    workspace.for_client(name)
    workspace.psg.set_phi(turn.parameters)
    result = train_round(
        workspace.bt, workspace.task_of(name), workspace.encoded(name, "train"),
        workspace.features(name),
        workspace.psg, order, s.local, s.generator, workspace.profile, seed=turn.seed,
        on_step=turn.each_of(-(-len(order) // s.local.accumulate)),
    )  # fmt: skip
    return psg_trained(result)


def psg_trained(result: Round) -> Trained:
    """Return what leaves the client of a round."""
    losses = result.stage1_losses or [0.0]
    terms = {f"stage1-{name}": value for name, value in asdict(result.stage1_terms).items()}
    metrics = {"psg-loss": result.psg_loss, "stage1-first": losses[0], "stage1-last": losses[-1]}
    return Trained(result.phi, metrics | terms)


def _write_psg(
    workspace: Workspace, folder: Path, parameters: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    q = () if workspace.label_prior is None else tuple(workspace.label_prior.tolist())
    psg = PSG(replace(workspace.psg_config, origin=dict(facts), label_prior=q))
    psg.set_phi(parameters)
    write_folder(folder, psg.save_pretrained)


PSG_PHASE = Phase(
    "psg",
    "PSG",
    rounds="federation.rounds",
    clients="federation.clients_per_round",
    metrics=(
        "psg-loss",
        "stage1-first",
        "stage1-last",  # the sum of these three
        "stage1-task",
        "stage1-significance",
        "stage1-sparsity",
    ),
    first=_psg_first,
    train=_train_psg,
    write=_write_psg,
    wire="federation.wire",
    private=True,
    optimize=True,
)


def shared_phases(methods: Iterable[str] | None = None) -> dict[str, Phase]:
    """Return the PSG's phase and those of the named methods (default: all), by name."""
    return {PSG_PHASE.name: PSG_PHASE} | phases(methods)
