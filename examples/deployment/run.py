"""A whole deployment on this machine: TLS, SuperNode authentication, four clients with own files.

    python examples/deployment/run.py [--work FOLDER]

Makes certificates and keys, starts a SuperLink and four SuperNodes, registers their keys, runs
examples/deployment/experiment.yaml, shows its log and ends all it started. Exits with 0 where the
run was completed; a run that was stopped resumes when this is started again. About five minutes on
a quiet machine with four cores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
from certificates import node, server

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parents[1]
CLIENTS = {  # name: language, pool
    "de-00": ("de", "seen"),
    "fr-00": ("fr", "seen"),
    "ja-00": ("ja", "seen"),
    "ru-00": ("ru", "unseen"),
}
MORE = {"pl-00": ("pl", "seen"), "es-00": ("es", "seen")}
"""With --more: secure sums hide a client among five, and bear that two of them drop out."""
START_SECONDS = 300
RESTARTED = 'while ! "$@"; do sleep 5; done'
"""In place of a service manager. A SuperLink that was killed takes a node for connected until 60 s
after its last heartbeat, and turns a new process of it away."""


def write_files(folder: Path, rows: int, clients: dict[str, tuple[str, str]]) -> dict[str, Path]:
    """One file a client, as its owner would have it: text, label, and what is for testing."""
    from fedp2eft.data.debian import load_debian

    languages = tuple(language for language, _ in clients.values())
    federation = load_debian(
        languages=languages, clients_per_language=1, max_train=rows, max_test=rows
    )
    files = {}
    for name, (language, pool) in clients.items():
        (client,) = (c for c in federation.pool(pool) if c.language == language)
        files[name] = folder / name / "rows.jsonl"
        files[name].parent.mkdir(parents=True, exist_ok=True)
        with files[name].open("w", encoding="utf-8") as file:
            for split, numbers in (("train", client.train), ("test", client.test)):
                found = federation.rows(numbers)
                for text, label in zip(found["text"], found["label"], strict=True):
                    row = {"text": text, "label": label, "split": split}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return files


class Processes:
    """Starts processes with logs of their own, and ends them with all that they started."""

    def __init__(self, logs: Path, environment: dict[str, str]) -> None:
        self.logs = logs
        self.environment = environment
        self.started: list[subprocess.Popen[bytes]] = []
        logs.mkdir(parents=True, exist_ok=True)

    def start(self, name: str, *words: object, cwd: Path | None = None) -> None:
        with (self.logs / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [str(word) for word in words], env=self.environment, cwd=cwd, stdout=log,
                stderr=log, start_new_session=True,
            )  # fmt: skip
        self.started.append(process)

    def flwr(self, *words: object, show: bool = False) -> str:
        done = subprocess.run(
            ["flwr", *[str(word) for word in words]], env=self.environment, cwd=PROJECT,
            check=False, text=True, stdout=None if show else subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"flwr {words[0]} failed: {done.stdout}")
        return done.stdout or ""

    def end(self) -> None:
        family: list[psutil.Process] = []
        for process in self.started:
            with contextlib.suppress(psutil.NoSuchProcess):
                leader = psutil.Process(process.pid)
                family += [leader, *leader.children(recursive=True)]
        for ask in (psutil.Process.terminate, psutil.Process.kill):
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    ask(process)
            _, family = psutil.wait_procs(family, timeout=10)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_up(address: str, authority: Path, processes: Processes) -> None:
    context = ssl.create_default_context(cafile=str(authority))
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and processes.started[0].poll() is None:
        with contextlib.suppress(urllib.error.URLError, TimeoutError, ConnectionError):
            urllib.request.urlopen(f"https://{address}/health", timeout=2, context=context).close()
            return
        time.sleep(0.5)
    raise SystemExit(f"The SuperLink did not start: see {processes.logs}/superlink.log")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("runs/deployment"))
    parser.add_argument("--rows", type=int, default=24, help="train rows a client, as many to test")
    parser.add_argument("--config", default="examples/deployment/experiment.yaml")
    parser.add_argument("--more", action="store_true", help="two seen clients more: six in all")
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 4) // 4))
    options = parser.parse_args()
    work = options.work.resolve()
    secrets, address = work / "secrets", f"127.0.0.1:{free_port()}"
    server(secrets, ["localhost", "127.0.0.1", "::1"])
    clients = CLIENTS | MORE if options.more else CLIENTS
    files = write_files(work / "clients", options.rows, clients)

    home = work / "flwr"  # Flower's own settings of this deployment, not yours
    home.mkdir(parents=True, exist_ok=True)
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "loopback"\n[superlink.loopback]\naddress = "{address}"\n'
        f'root-certificates = "{secrets / "ca.pem"}"\n',
        encoding="utf-8",
    )
    processes = Processes(
        work / "logs",
        {
            **os.environ,
            "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]]),
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "OMP_NUM_THREADS": str(options.threads),
        },
    )
    # A plain `kill` ends what was started too: SystemExit comes by `finally`.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        processes.start(
            "superlink", "flower-superlink", "--host", "127.0.0.1",
            "--port", address.split(":")[1], "--ssl-ca-certfile", secrets / "ca.pem",
            "--ssl-certfile", secrets / "server.pem", "--ssl-keyfile", secrets / "server.key",
            "--enable-supernode-auth", "--database", work / "superlink.db", cwd=work,
        )  # fmt: skip
        wait_until_up(address, secrets / "ca.pem", processes)
        for name, (language, pool) in clients.items():
            node(secrets, name)
            registered = secrets / "keys" / f"{name}.registered"  # in the SuperLink's database
            if not registered.exists():
                key = secrets / "keys" / f"{name}.pub"
                processes.flwr("supernode", "register", key, "--name", name)
                registered.touch()
            config = (
                f"client='{name}' path='{files[name]}' language='{language}' pool='{pool}' "
                f"keep='{files[name].parent / 'keep'}'"
            )
            processes.start(
                name, "sh", "-c", RESTARTED, name,
                "flower-supernode", "--superlink", address, "--root-certificates",
                secrets / "ca.pem", "--auth-supernode-private-key", secrets / "keys" / name,
                "--host", "127.0.0.1", "--port", free_port(), "--node-config", config,
            )  # fmt: skip
        run = work / "run"
        run_config = f"config='{options.config}' run='{run}'"
        started = processes.flwr("run", PROJECT, "--run-config", run_config, "--format", "json")
        number = json.loads(started)["run-id"]
        processes.flwr("log", number, "--stream", show=True)
        status = "running"
        while not status.startswith("finished"):
            time.sleep(1)
            listed = processes.flwr("ls", "--run-id", number, "--format", "json")
            status = json.loads(listed)["runs"][0]["status"]
    finally:
        processes.end()
    print(f"Status: {status}. Run folder: {run}. Adapters: {work}/clients/*/keep.")
    return 0 if status == "finished:completed" and (run / "results.json").exists() else 1


if __name__ == "__main__":
    sys.exit(main())
