"""A SuperLink and SuperNodes as processes on loopback, always ended again."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import subprocess
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from nursery import Started, nursery

from tiny_run import environment

START_SECONDS, RUN_SECONDS = 120, 300
START_AGAIN_SECONDS = 30
"""Enough on a machine that has ten times as much to do; a quiet one takes a tenth."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ended(process: psutil.Process) -> bool:
    """Whether a process is over; its parent, a SuperExec, does not always take note of that."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@dataclass
class Deployment:
    """Processes in a folder, their logs beside them.

    Attributes:
        folder: Holds `<name>.log` of each, `server/`, where the SuperLink runs, and Flower's home.
        simulation: Whether the SuperLink simulates the SuperNodes.
        extra: More of the processes' environment.
    """

    folder: Path
    simulation: bool = False
    extra: dict[str, str] = field(default_factory=dict)
    port: int = field(default_factory=free_port)
    processes: dict[str, Started] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        return environment(
            PATH=os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]]),
            FLWR_HOME=str(self.folder / "flwr"),
            FLWR_TELEMETRY_ENABLED="0",
            FLWR_DISABLE_UPDATE_CHECK="1",
            FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION="1",
            FLWR_SUPEREXEC_TASK_POLL_INTERVAL="0.2",
            **self.extra,
        )

    def start_superlink(self) -> None:
        """Again after it was killed: with its database, on its port."""
        home, server = self.folder / "flwr", self.folder / "server"
        for folder in (home, server):
            folder.mkdir(parents=True, exist_ok=True)
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "ours"\n[superlink.ours]\naddress = "127.0.0.1:{self.port}"\n'
            "insecure = true\n",
            encoding="utf-8",
        )
        self.start(
            "superlink", "flower-superlink", "--insecure", "--host", "127.0.0.1",
            "--port", self.port, "--database", self.folder / "superlink.db",
            *["--simulation"] * self.simulation, cwd=server,
        )  # fmt: skip
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self.processes["superlink"].poll() is None:
            with contextlib.suppress(urllib.error.URLError, TimeoutError, ConnectionError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=1).close()
                return
            time.sleep(0.2)
        pytest.fail(f"The SuperLink did not start: {self.logs()}")

    def start_supernode(self, name: str, **config: str) -> None:
        """One SuperNode; `text_columns="a"` of its node config."""
        text = " ".join(f"{key.replace('_', '-')}='{value}'" for key, value in config.items())
        self.start(
            name, "flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{self.port}",
            "--host", "127.0.0.1", "--port", free_port(), "--node-config", text,
        )  # fmt: skip

    def start(self, name: str, *words: object, cwd: Path | None = None) -> None:
        self.processes[name] = nursery().start(
            [str(word) for word in words], env=self.environment, cwd=cwd or self.folder,
            output=self.folder / f"{name}.log", start_new_session=True,
        )  # fmt: skip

    def flwr(self, *words: object) -> str:
        """What a `flwr` command prints."""
        done = subprocess.run(
            ["flwr", *[str(word) for word in words]], env=self.environment, cwd=self.folder,
            timeout=RUN_SECONDS, check=False, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        return done.stdout

    def child(self, name: str, command: str) -> psutil.Process | None:
        """A process that `name` started, by its command."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.processes[name].pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                    if process.name() == command:
                        return process
        return None

    def wait_for(self, what: Callable[[], bool], seconds: float = RUN_SECONDS) -> None:
        end = time.monotonic() + seconds
        while not what():
            if time.monotonic() > end:
                pytest.fail(f"It did not happen in {seconds} s. {self.logs()}")
            time.sleep(0.2)

    def run_until(self, start: Callable[[], object], done: Callable[[], bool]) -> None:
        """Start a run, and again should its ServerApp end before it is done.

        Flower gives up a task whose process does not come to say that it is alive, as happens on a
        machine that has far too much to do.
        """
        start()
        gone = time.monotonic()

        def check() -> bool:
            nonlocal gone
            if done():
                return True
            if self.child("superlink", "flwr-serverapp"):
                gone = time.monotonic()
            elif time.monotonic() > gone + START_AGAIN_SECONDS:
                start()
                gone = time.monotonic()
            return False

        self.wait_for(check)

    def logs(self) -> str:
        logs = sorted(self.folder.glob("*.log"))
        return "\n".join(f"== {p.name}\n{p.read_text(errors='replace')[-6000:]}" for p in logs)

    def kill(self, name: str) -> None:
        """SIGKILL to a process; what it started ends by itself or at the end of the test."""
        self.processes[name].kill()
        self.processes[name].wait()

    def stop(self) -> None:
        """End all processes and all that they started."""
        family = []
        for process in self.processes.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                leader = psutil.Process(process.pid)
                family += [leader, *leader.children(recursive=True)]
        for each in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(family, timeout=10)
        for process in self.processes.values():
            process.wait(10)


@contextmanager
def careless_first_process() -> Iterator[None]:
    """Orphans become this process's children, and it takes no note when they end (Linux).

    So it is in many containers: what has ended stays in the list of processes.
    """
    prctl, subreaper = ctypes.CDLL(None).prctl, 36
    assert prctl(subreaper, 1, 0, 0, 0) == 0
    try:
        yield
    finally:
        prctl(subreaper, 0, 0, 0, 0)


@contextmanager
def deployment(folder: Path, simulation: bool = False, **extra: str) -> Iterator[Deployment]:
    """A SuperLink of our own, and whatever is started beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    made = Deployment(folder, simulation=simulation, extra=extra)
    try:
        made.start_superlink()
        yield made
    finally:
        made.stop()
