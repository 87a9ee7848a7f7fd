"""`flwr run` in Flower's simulation gives what the local engine gives."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from deployed import Deployment, deployment
from flwr.app import Context, RecordDict
from safetensors.torch import load_file

from fedp2eft.errors import UserError
from fedp2eft.experiment.train import train
from fedp2eft.federation.client_app import client_name
from fedp2eft.runtime.workspace import Workspace
from fedp2eft.settings.reading import app_file
from tiny_run import CLIENTS, World
from watching import FinishedRun

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


@pytest.fixture(scope="module")
def simulation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A SuperLink that simulates SuperNodes."""
    pytest.importorskip("ray")
    folder = tmp_path_factory.mktemp("simulation") / "deployed"
    # A socket's path may have about 100 characters, too few for one below pytest's folders.
    ray = tempfile.mkdtemp(prefix="ray", dir="/tmp" if Path("/tmp").is_dir() else None)
    try:
        with deployment(
            folder, simulation=True, RAY_USAGE_STATS_ENABLED="0", RAY_TMPDIR=ray
        ) as there:
            yield there
    finally:
        shutil.rmtree(ray, ignore_errors=True)


def simulate(simulation: Deployment, config: Path, project: Path) -> tuple[Path, str]:
    """Run a config in Flower's simulation; the run folder, and what was printed."""
    (project / "configs").mkdir(parents=True)
    shutil.copy(PYPROJECT, project)
    shutil.copy(config, project / "configs" / "tiny.yaml")
    said = simulation.flwr(
        "run", project, "--stream",
        "--run-config", f"config='configs/tiny.yaml' run='runs/{config.stem}'",
        "--federation-config",
        f"num-supernodes={len(CLIENTS)} client-resources-num-cpus=1 init-args-num-cpus=2",
    )  # fmt: skip
    run = simulation.folder / "server" / "runs" / config.stem
    assert (run / "results.json").exists(), said
    assert str(run) in said
    return run, said


def check_same(run: Path, other: Path, atol: float) -> None:
    """Base, PSG and cells of two runs are the same."""
    for part in ("base", "psg"):
        there, here = (load_file(r / part / "model.safetensors") for r in (run, other))
        assert there.keys() == here.keys()
        for name, value in here.items():
            torch.testing.assert_close(there[name], value, rtol=0, atol=atol)
    there_cells, here_cells = cells(run), cells(other)
    assert there_cells.keys() == here_cells.keys()
    for name, cell in here_cells.items():
        assert there_cells[name] == {**cell, "loss": pytest.approx(cell["loss"], abs=1e-5)}, name


def test_simulation_gives_the_local_engines_numbers(
    simulation: Deployment, world: World, finished: FinishedRun, tmp_path: Path
) -> None:
    run, said = simulate(simulation, world.config, tmp_path / "project")
    assert "psg 3/3 loss" in said
    check_same(run, finished.folder, 1e-6)


def test_simulation_with_secure_sums_gives_the_local_engines_plain_numbers(
    simulation: Deployment, world: World, tmp_path: Path
) -> None:
    small = {
        "base__rounds": 1, "base__clients_per_round": 3, "federation__rounds": 1,
        "federation__clients_per_round": 4, "evaluation__methods": ["base", "prior"],
        "evaluation__ranks": [2],
    }  # fmt: skip
    on = {
        "privacy__secure_sums": "on", "privacy__secure_bits": 64,
        "peers__max_norm": 0, "peers__max_examples": 0,
    }  # fmt: skip
    config = world.yaml(tmp_path / "secure.yaml", **small, **on)
    run, _ = simulate(simulation, config, tmp_path / "project")
    train(world.settings(**small), tmp_path / "plain")
    check_same(run, tmp_path / "plain", 1e-5)
    sent, plain = (
        json.loads((r / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])["bytes-up"]
        for r in (run, tmp_path / "plain")
    )
    assert sent > 2 * plain  # it was a secure sum: 64 bits per entry, and keys


def cells(run: Path) -> dict[str, dict[str, object]]:
    """All cells of a run, without what may differ: the time, and the digest of φ's last bits."""
    found = {}
    for path in sorted(run.glob("cells/*/*.json")):
        cell = json.loads(path.read_text(encoding="utf-8"))
        found[f"{path.parent.name}/{path.stem}"] = {
            key: value for key, value in cell.items() if key not in ("seconds", "phi")
        }
    return found


# ── which client a SuperNode is, and which file the run config means ────────────────────────────


def node(number: int, nodes: int) -> Context:
    return Context(1, 7, {"partition-id": number, "num-partitions": nodes}, RecordDict(), {})


def test_every_supernode_is_another_client(world: World) -> None:
    workspace = Workspace(world.settings())
    count = len(CLIENTS)
    assert [client_name(node(i, count), workspace) for i in range(count)] == sorted(CLIENTS)


@pytest.mark.parametrize("nodes", [2, len(CLIENTS) + 2])
def test_another_number_of_supernodes_is_an_error(world: World, nodes: int) -> None:
    with pytest.raises(UserError, match=rf"6 clients .* {nodes} SuperNodes: .*num-supernodes=6"):
        client_name(node(0, nodes), Workspace(world.settings()))


def test_a_node_without_a_client_is_an_error(world: World) -> None:
    with pytest.raises(UserError, match="names no client"):
        client_name(Context(1, 7, {}, RecordDict(), {}), Workspace(world.settings()))


def test_a_config_is_looked_for_in_the_app_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app, here = tmp_path / "app", tmp_path / "here"
    for folder in (app, here):
        folder.mkdir()
        (folder / "both.yaml").touch()
    (here / "mine.yaml").touch()
    (app / "pyproject.toml").touch()
    monkeypatch.chdir(here)
    monkeypatch.syspath_prepend(str(app))
    assert app_file("both.yaml") == app / "both.yaml"
    assert app_file("mine.yaml") == Path("mine.yaml")
    assert app_file(str(here / "both.yaml")) == here / "both.yaml"
