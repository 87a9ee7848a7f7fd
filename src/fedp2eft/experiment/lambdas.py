"""λ̂ of every client and how alike they are, kept in the run folder of the local engine.

Only where all clients are in this process: λ never leaves a client of a real federation.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedp2eft.data.nodes import NODES
from fedp2eft.experiment.engine import local_engine
from fedp2eft.experiment.structure import structures
from fedp2eft.files import write_json, write_whole
from fedp2eft.generator import PSG
from fedp2eft.methods import METHODS
from fedp2eft.runtime.workspace import Workspace
from fedp2eft.settings.experiment import Settings
from fedp2eft.settings.reading import settings_of_folder

FILE, HEADER = "lambda.safetensors", "fedp2eft"


@dataclass(frozen=True)
class Lambdas:
    """What a trained PSG predicts for the clients of a run.

    Args:
        lam: λ̂ by client, L × r_max each.
        languages: Language by client.
        pools: Pool by client.
        layers: Names of the L layers.
        ranks: Rank budgets that structure.json beside it is about.
        psg: Digest of the PSG that predicted it.
        costs: Parameters of a rank of each layer; empty in files of earlier versions.
    """

    lam: dict[str, Tensor]
    languages: dict[str, str]
    pools: dict[str, str]
    layers: tuple[str, ...]
    ranks: tuple[int, ...]
    psg: str
    costs: tuple[int, ...] = ()


def keep_lambdas(
    workspace: Workspace, run: Path, clients: Sequence[str], ranks: Sequence[int]
) -> None:
    """Write lambda.safetensors and structure.json, unless those there are of this PSG.

    Args:
        workspace: Has the clients' rows and the base model.
        run: The run folder, with the trained PSG.
        clients: Whose λ̂.
        ranks: Rank budgets for structure.json.
    """
    digest, old = _digest(run), read_lambdas(run)
    if old and old.lam.keys() >= set(clients) and set(old.ranks) >= set(ranks):
        return
    psg = PSG.from_pretrained(str(run / "psg"))
    with torch.no_grad():
        lam = {name: psg(workspace.features(name)) for name in sorted(clients)}
    members = {name: workspace.client(name) for name in lam}
    found = structures(workspace, run, clients, ranks)
    if found:
        write_json(run / "structure.json", found)
    about = Lambdas(
        {},
        {name: member.language for name, member in members.items()},
        {name: member.pool for name, member in members.items()},
        tuple(workspace.bt.names),
        tuple(ranks),
        digest,
        tuple(workspace.bt.costs),
    )
    metadata = {HEADER: json.dumps(asdict(about), ensure_ascii=False)}
    tensors = {name: value.detach().float().cpu().contiguous() for name, value in lam.items()}
    write_whole(run / FILE, partial(save_file, tensors, metadata=metadata))


def read_lambdas(run: Path) -> Lambdas | None:
    """Return the λ̂ kept in a run folder; None if absent, damaged, or of another PSG."""
    try:
        with safe_open(run / FILE, framework="pt") as file:
            about = json.loads((file.metadata() or {})[HEADER])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about |= {key: tuple(about.get(key, ())) for key in ("layers", "ranks", "costs")}
        found = Lambdas(**(about | {"lam": tensors}))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        return None
    alike = tensors.keys() == found.languages.keys() == found.pools.keys()
    shapes = {tuple(value.shape) for value in tensors.values()}
    if not alike or len(shapes) != 1 or next(iter(shapes))[0] != len(found.layers):
        return None
    return found if found.psg in (_digest(run), "") or not (run / "psg").exists() else None


def keep_lambdas_of(settings: Settings, run: Path, workspace: Workspace) -> None:
    """Run `keep_lambdas` for the pools that a run scores, if a method has a PSG."""
    chosen = settings.evaluation
    if not any(METHODS[name].shared == "psg" for name in chosen.methods):
        return
    clients = [name for name, c in workspace.clients.items() if c.pool in chosen.pools]
    if clients:
        keep_lambdas(workspace, run, clients, chosen.ranks)


def ask_again(run: Path) -> Lambdas | None:
    """Return λ̂ of a finished run of the local engine; ask its PSG again if it was not kept.

    Raises:
        UserError: The run's data or model cannot be read.
    """
    if found := read_lambdas(run):
        return found
    settings = settings_of_folder(run)
    ready = all((run / name / "config.json").exists() for name in ("psg", "base"))
    if not ready or settings.data.dataset == NODES:
        return None
    with local_engine(settings, run) as engine:
        keep_lambdas_of(settings, run, engine.workspace)
    return read_lambdas(run)


def _digest(run: Path) -> str:
    path = run / "psg" / "model.safetensors"
    return sha256(path.read_bytes()).hexdigest() if path.exists() else ""
