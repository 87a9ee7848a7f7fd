"""`flwr run` in Flower's simulation gives what the local engine gives."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from flwr.app import Context, RecordDict
from safetensors.torch import load_file

from fedp2eft.errors import UserError
from fedp2eft.federation.client_app import client_name
from fedp2eft.federation.workspace import Workspace
from fedp2eft.reading import app_file
from tiny_run import CLIENTS, World, environment
from watching import FinishedRun

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
START_SECONDS, RUN_SECONDS = 60, 300


@dataclass(frozen=True)
class SuperLink:
    """A SuperLink of our own: its working directory, and the environment to reach it with."""

    folder: Path
    environment: dict[str, str]

    def run(self, project: Path, run_config: str, federation: str) -> str:
        """What `flwr run` prints."""
        done = subprocess.run(
            [
                *("flwr", "run", str(project), "--stream"),
                *("--run-config", run_config, "--federation-config", federation),
            ],
            env=self.environment, cwd=project.parent, timeout=RUN_SECONDS, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        return done.stdout


@pytest.fixture
def superlink(tmp_path: Path) -> Iterator[SuperLink]:
    pytest.importorskip("ray")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home, folder = tmp_path / "flwr", tmp_path / "server"
    home.mkdir()
    folder.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "ours"\n[superlink.ours]\naddress = "127.0.0.1:{port}"\n'
        "insecure = true\n",
        encoding="utf-8",
    )
    # A socket's path may have about 100 characters, too few for one below tmp_path.
    ray = tempfile.mkdtemp(prefix="ray", dir="/tmp" if Path("/tmp").is_dir() else None)
    with_flower = environment(
        PATH=os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]]),
        FLWR_HOME=str(home),
        FLWR_TELEMETRY_ENABLED="0",
        FLWR_DISABLE_UPDATE_CHECK="1",
        FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION="1",
        RAY_USAGE_STATS_ENABLED="0",
        RAY_TMPDIR=ray,
    )
    log = tmp_path / "superlink.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["flower-superlink", "--insecure", "--simulation", "--host", "127.0.0.1",
             "--port", str(port)],
            env=with_flower, cwd=folder, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    try:
        wait_until_up(port, process, log)
        yield SuperLink(folder, with_flower)
    finally:
        if process.poll() is None:
            stop(process.pid)
            process.wait(10)
        shutil.rmtree(ray, ignore_errors=True)


def stop(pid: int) -> None:
    """End a process and all that it started, Ray's daemons among them."""
    leader = psutil.Process(pid)
    family = [leader, *leader.children(recursive=True)]
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, left = psutil.wait_procs(family, timeout=5)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=5)


def wait_until_up(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.3)
    pytest.fail(f"The SuperLink did not start: {log.read_text(encoding='utf-8')}")


def test_simulation_gives_the_local_engines_numbers(
    superlink: SuperLink, world: World, finished: FinishedRun, tmp_path: Path
) -> None:
    project = tmp_path / "project"
    (project / "configs").mkdir(parents=True)
    shutil.copy(PYPROJECT, project)
    shutil.copy(world.config, project / "configs" / "tiny.yaml")
    said = superlink.run(
        project,
        "config='configs/tiny.yaml' run='runs/simulated'",
        f"num-supernodes={len(CLIENTS)} client-resources-num-cpus=1 init-args-num-cpus=2",
    )
    run = superlink.folder / "runs" / "simulated"
    assert (run / "results.json").exists(), said
    assert str(run) in said
    assert "psg 3/3 loss" in said
    for part in ("base", "psg"):
        there = load_file(run / part / "model.safetensors")
        here = load_file(finished.folder / part / "model.safetensors")
        assert there.keys() == here.keys()
        for name, value in here.items():
            torch.testing.assert_close(there[name], value, rtol=0, atol=1e-6)
    there_cells, here_cells = cells(run), cells(finished.folder)
    assert there_cells.keys() == here_cells.keys()
    for name, cell in here_cells.items():
        assert there_cells[name] == {**cell, "loss": pytest.approx(cell["loss"], abs=1e-5)}, name


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
