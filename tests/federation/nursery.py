"""Flower's processes by fork from one that has imported everything: none takes seconds to start.

Each is a process of its own with its command's words, environment and output, and so is each that
it starts: a process forks those from a twin that it makes of itself before it does anything.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import psutil

IMPORTED = (
    "flwr.superlink.main", "flwr.supernode.main", "transformers.models.bert.modeling_bert",
    "fedp2eft.federation.client_app", "fedp2eft.federation.server_app",
)  # fmt: skip
NAME_PROCESS = 15  # PR_SET_NAME


class Started:
    """A process that another one than this has forked, and takes note of when it ends."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def poll(self) -> int | None:
        return None if psutil.pid_exists(self.pid) else 0

    def terminate(self, number: int = signal.SIGTERM) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.terminate(signal.SIGKILL)

    def wait(self, timeout: float = 60.0) -> None:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.02)


class Twin:
    """The other end of a process that forks: `start` is Popen's."""

    def __init__(self, connection: Connection) -> None:
        self.connection, self.lock = connection, threading.Lock()

    def start(
        self, words: list[str], *, env: dict[str, str] | None = None, cwd: Path | None = None,
        output: Path | str = "", start_new_session: bool = False,
    ) -> Started:  # fmt: skip
        asked = {
            "words": words, "env": env or dict(os.environ), "cwd": str(cwd or Path.cwd()),
            "output": str(output), "session": start_new_session,
        }  # fmt: skip
        with self.lock:
            self.connection.send_bytes(json.dumps(asked).encode())
            return Started(int(self.connection.recv_bytes()))


@cache
def nursery() -> Twin:
    """The process that has imported everything; it ends when this one does."""
    ours, theirs = Pipe()
    subprocess.Popen(
        [sys.executable, __file__, str(theirs.fileno())],
        pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
    )  # fmt: skip
    theirs.close()
    return Twin(ours)


def serve(connection: Connection) -> NoReturn:
    """Fork a process for each request, until whoever asks has ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # takes note of every end at once
    with contextlib.suppress(EOFError, ConnectionResetError):
        while True:
            asked = json.loads(connection.recv_bytes())
            pid = os.fork()
            if not pid:
                connection.close()
                finish(partial(become, **asked))
            connection.send_bytes(str(pid).encode())
    os._exit(0)


def finish(work: Callable[[], object]) -> NoReturn:
    """Do something and end this process, never returning to what it was forked from."""
    status = 1
    try:
        work()
        status = 0
    except SystemExit as done:
        status = done.code if isinstance(done.code, int) else int(bool(done.code))
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def become(words: list[str], env: dict[str, str], cwd: str, output: str, session: bool) -> None:
    """Be the process of a command."""
    if session:
        os.setsid()
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    if output:
        log = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        for standard in (1, 2):
            os.dup2(log, standard)
        os.close(log)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    ctypes.CDLL(None).prctl(NAME_PROCESS, words[0].encode(), 0, 0, 0)
    sys.argv = list(words)
    if words[0].startswith("flwr-"):  # the twin that forked it ends when its process does
        sys.argv[words.index("--parent-pid") + 1] = str(os.getppid())
    else:
        ours, theirs = Pipe()
        if not os.fork():
            ours.close()
            serve(theirs)
        theirs.close()
        subprocess.Popen = starting(Twin(ours))  # type: ignore[assignment, misc]
    commands()[words[0]].load()()


def starting(twin: Twin) -> Callable[..., Any]:
    """`subprocess.Popen` that has a twin fork Flower's own commands."""
    popen = subprocess.Popen

    def start(words: Any, **options: Any) -> Any:
        if isinstance(words, list) and words[0] in commands():
            quiet = options.get("stdout") == subprocess.DEVNULL
            session = options.get("start_new_session", False)
            return twin.start(words, output="/dev/null" * quiet, start_new_session=session)
        return popen(words, **options)

    return start


@cache
def commands() -> dict[str, EntryPoint]:
    found = entry_points(group="console_scripts")
    return {command.name: command for command in found if command.value.startswith("flwr.")}


def main() -> None:
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]  # nothing is quantized
    for command in commands().values():
        command.load()
    for name in IMPORTED:
        import_module(name)
    # A SuperNode looks for a message every 3 s; there is no setting for that.
    node: Any = import_module("flwr.supernode.start_client_internal")
    node.time = SimpleNamespace(**{**vars(time), "sleep": lambda s: time.sleep(min(s, 0.3))})
    serve(Connection(int(sys.argv[1])))


if __name__ == "__main__":
    main()
