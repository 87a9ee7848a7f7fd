"""SuperLink and SuperNodes in processes of their own, each SuperNode with a file of its own."""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from deployed import deployment
from flwr.cli.supernode.register import try_load_public_key
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from safetensors.torch import load_file
from test_simulation import PYPROJECT, cells

from fedp2eft.data.debian import load_debian
from fedp2eft.data.registry import load_clients
from fedp2eft.experiment.train import train
from fedp2eft.federation.server.faults import Faults
from fedp2eft.federation.wire.keys import threshold
from fedp2eft.settings.experiment import Settings
from fedp2eft.settings.reading import read_settings, settings_from
from tiny_run import LABELS, World, all_rows, write_jsonl

EXAMPLE = Path(__file__).parents[2] / "examples" / "deployment"
THREE = ("de-seen-00", "fr-seen-00", "de-unseen-00")
OTHER_NAMES = "fr-seen-00"


def own_files(folder: Path) -> dict[str, Path]:
    """Each client's rows in a file of its own; one of them calls its columns otherwise."""
    files = {}
    for client in THREE:
        rows = [
            {"text": row["text"], "label": row["label"], "split": row["split"]}
            for row in all_rows()
            if row["client"] == client
        ]
        if client == OTHER_NAMES:
            rows = [{"titre": r["text"], "genre": r["label"], "split": r["split"]} for r in rows]
        (folder / client).mkdir(parents=True)
        files[client] = write_jsonl(folder / client / "rows.jsonl", rows)
    return files


def small(world: World, **data: object) -> dict[str, object]:
    return world.raw(
        data=data, base__rounds=1, base__clients_per_round=1, federation__rounds=2,
        federation__timeout=1500.0, federation__min_clients=3, federation__wait=600.0,
        evaluation__methods=["fedp2eft"], evaluation__ranks=[2], peers__failures="stop",
    )  # fmt: skip


def test_three_supernodes_give_the_local_engines_numbers(world: World, tmp_path: Path) -> None:
    project, nodes = tmp_path / "project", tmp_path / "nodes"
    files = own_files(nodes)
    (project / "configs").mkdir(parents=True)
    shutil.copy(PYPROJECT, project)
    raw = small(world, dataset="nodes", labels=list(LABELS))
    (project / "configs" / "tiny.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    with deployment(tmp_path / "deployed") as there:
        for client, path in files.items():
            language, pool, _ = client.split("-")
            other = {"text_columns": "titre", "label_column": "genre"}
            there.start_supernode(
                client, client=client, path=str(path), language=language, pool=pool,
                keep=str(nodes / client / "keep"), **(other if client == OTHER_NAMES else {}),
            )  # fmt: skip
        run = there.folder / "server" / "runs" / "deployed"
        words = ("--run-config", "config='configs/tiny.yaml' run='runs/deployed'")
        there.run_until(lambda: there.flwr("run", project, *words), (run / "results.json").exists)
        there.wait_for(lambda: not there.child("superlink", "flwr-serverapp"))
        number = there.flwr("ls", "--format", "json")
        log = there.flwr("log", json.loads(number)["runs"][0]["run-id"], "--show")
    here = tmp_path / "here"
    train(world_settings(world, tmp_path / "reference"), here)

    for part in ("base", "psg"):
        ours, theirs = (load_file(r / part / "model.safetensors") for r in (here, run))
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            torch.testing.assert_close(theirs[name], value, rtol=0, atol=1e-6)
    ours_cells, their_cells = cells(here), cells(run)
    assert len(their_cells) == len(THREE)
    assert their_cells.keys() == ours_cells.keys()
    for name, cell in ours_cells.items():
        assert their_cells[name] == {**cell, "loss": pytest.approx(cell["loss"], abs=1e-5)}, name
    assert set(Faults(run, 0).summarise()["counts"]) <= {"started-again"}
    assert not (run / "adapters").exists()
    for client in THREE:
        (kept,) = (nodes / client / "keep" / client).iterdir()
        adapter = f"adapters/{client}/fedp2eft-r2/adapter_model.safetensors"
        ours, theirs = load_file(here / adapter), load_file(kept / adapter)
        for name, value in ours.items():
            torch.testing.assert_close(theirs[name], value, rtol=0, atol=1e-5)
        assert (
            load_file(kept / "base" / "model.safetensors").keys()
            == load_file(run / "base" / "model.safetensors").keys()
        )
    assert "psg 2/2 loss" in log
    assert "deliver 3/3" in log


def world_settings(world: World, folder: Path) -> Settings:
    """The same experiment with all files in one process."""
    files = {}
    for client in THREE:
        language, pool, _ = client.split("-")
        rows = [
            {"text": row["text"], "label": row["label"], "split": row["split"]}
            for row in all_rows()
            if row["client"] == client
        ]
        (folder / client).mkdir(parents=True)
        path = write_jsonl(folder / client / "rows.jsonl", rows)
        files[client] = {"path": str(path), "language": language, "pool": pool}
    return settings_from(small(world, dataset="files", files=files, labels=list(LABELS)))


# ── examples/deployment ─────────────────────────────────────────────────────────────────────────


def test_the_examples_experiment_is_one_of_its_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    s = read_settings(EXAMPLE / "experiment.yaml")
    assert load_clients(s.data).labels == load_debian().labels
    clients = runpy.run_path(str(EXAMPLE / "run.py"))["CLIENTS"]
    assert len(clients) == s.federation.min_clients
    seen = [pool for _, pool in clients.values()].count("seen")
    assert seen == s.federation.clients_per_round == s.base.clients_per_round


def test_the_example_with_secure_sums_bears_two_dropouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    s = read_settings(EXAMPLE / "secure.yaml")
    names = runpy.run_path(str(EXAMPLE / "run.py"))
    clients = names["CLIENTS"] | names["MORE"]
    seen = [pool for _, pool in clients.values()].count("seen")
    assert s.privacy.secure
    assert seen == s.federation.clients_per_round == s.base.clients_per_round
    assert seen - threshold(s.privacy, seen) == 2
    assert (seen - 2) / seen >= s.peers.min_share
    assert load_clients(s.data).labels == load_debian().labels


STAND_IN = """
import sys, time
import run

class Sleeper(run.Processes):
    def start(self, name, *words, cwd=None):
        super().start(name, sys.executable, "-c", "import time; time.sleep(60)")

def wait(address, authority, processes):
    print(processes.started[0].pid, flush=True)
    time.sleep(60)

run.Processes, run.wait_until_up = Sleeper, wait
run.server = run.write_files = lambda *_, **__: {}
run.main()
"""


def test_the_example_ends_what_it_started_when_it_is_terminated(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STAND_IN, "--work", str(tmp_path)], stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(EXAMPLE)},
    )  # fmt: skip
    assert process.stdout is not None
    with process:
        started = psutil.Process(int(process.stdout.readline()))
        process.terminate()
        status = process.wait()
    left = started.is_running()
    if left:
        started.kill()
    assert (status, left) == (128 + signal.SIGTERM, False)


def test_a_supernode_of_the_example_is_started_until_it_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    restarted = runpy.run_path(str(EXAMPLE / "run.py"))["RESTARTED"].replace("sleep 5", "sleep 0")
    starts, third = tmp_path / "starts", 'echo >> "$0"; test $(wc -l < "$0") = 3'
    subprocess.run(["sh", "-c", restarted, "node", "sh", "-c", third, starts], check=True)
    assert len(starts.read_text().splitlines()) == 3


def test_the_examples_certificate_is_the_servers_and_nobody_elses(tmp_path: Path) -> None:
    made = runpy.run_path(str(EXAMPLE / "certificates.py"))
    for folder in ("ours", "theirs"):
        made["server"](tmp_path / folder, ["localhost", "127.0.0.1"])
    assert greeting(tmp_path / "ours", tmp_path / "ours" / "ca.pem", "127.0.0.1") == b"hello"
    assert greeting(tmp_path / "ours", tmp_path / "ours" / "ca.pem", "localhost") == b"hello"
    with pytest.raises(ssl.SSLCertVerificationError):
        greeting(tmp_path / "ours", tmp_path / "theirs" / "ca.pem", "localhost")
    with pytest.raises(ssl.SSLCertVerificationError):
        greeting(tmp_path / "ours", tmp_path / "ours" / "ca.pem", "fl.example.org")
    before = {path: path.read_bytes() for path in (tmp_path / "ours").iterdir()}
    made["server"](tmp_path / "ours", ["localhost"])
    assert {path: path.read_bytes() for path in before} == before


def test_the_examples_keys_are_what_flower_takes_and_secret(tmp_path: Path) -> None:
    made = runpy.run_path(str(EXAMPLE / "certificates.py"))
    made["node"](tmp_path, "fr-00")
    made["server"](tmp_path, ["localhost"])
    private = tmp_path / "keys" / "fr-00"
    key = load_ssh_private_key(private.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert try_load_public_key(private.with_suffix(".pub")) == public_key_to_bytes(key.public_key())
    for path in (private, tmp_path / "ca.key", tmp_path / "server.key"):
        assert path.stat().st_mode & 0o077 == 0


def greeting(server: Path, authority: Path, name: str) -> bytes:
    """What a TLS server with these files says to a client that trusts this authority."""
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    theirs.load_cert_chain(server / "server.pem", server / "server.key")
    ours = ssl.create_default_context(cafile=str(authority))
    left, right = socket.socketpair()

    def serve() -> None:
        with contextlib.suppress(ssl.SSLError, OSError), theirs.wrap_socket(left, True) as said:
            said.sendall(b"hello")

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with ours.wrap_socket(right, server_hostname=name) as heard:
            return heard.recv(5)
    finally:
        right.close()
        thread.join()
        left.close()
