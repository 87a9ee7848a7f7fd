"""A Flower process whose parent was killed ends, also where nobody reaps the parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial

import psutil
import pytest
from deployed import ended
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedp2eft.federation import client_app
from fedp2eft.federation.client import mods as client_mods
from fedp2eft.federation.local import LocalGrid
from tiny_run import environment

CHILD = (
    "import signal, sys, time; from fedp2eft.federation.hooks import end_with_parent; "
    "{early}end_with_parent(); print('watching', flush=True); time.sleep(100)"
)
PARENT = (
    "import os, subprocess, sys, time; "
    "child = subprocess.Popen([sys.executable, '-c', sys.argv[1], '--parent-pid', "
    "str(os.getpid())], stdout=subprocess.PIPE, text=True); print(child.pid, flush=True); "
    "print(child.stdout.readline(), flush=True); time.sleep(100)"
)
WAIT_SECONDS = 60


@pytest.mark.parametrize("early", [False, True], ids=["watching", "before it watches"])
def test_a_process_ends_with_a_parent_that_nobody_reaps(early: bool) -> None:
    sleep = "sys.stdin.readline(); " if early else ""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD.format(early=sleep)],
        env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        # a shell's background jobs ignore SIGINT, and so would this one
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert parent.stdout is not None
    assert parent.stdin is not None
    child = psutil.Process(int(parent.stdout.readline()))
    try:
        if not early:
            assert parent.stdout.readline() == "watching\n"
        assert not ended(child)
        parent.kill()  # and not waited for: its number stays in use
        until_zombie = time.monotonic() + WAIT_SECONDS
        while psutil.Process(parent.pid).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < until_zombie
            time.sleep(0.01)
        os.kill(parent.pid, 0)  # what Flower looks at: it is still there
        parent.stdin.close()  # one that has not looked yet goes on now
        end = time.monotonic() + WAIT_SECONDS
        while not ended(child):
            assert time.monotonic() < end, "It outlives its parent."
            time.sleep(0.05)
    finally:
        if not ended(child):
            child.kill()
        parent.kill()
        parent.wait()


def test_a_client_s_process_watches_its_supernode(monkeypatch: pytest.MonkeyPatch) -> None:
    watched: list[None] = []
    monkeypatch.setattr(client_mods, "end_with_parent", lambda: watched.append(None))
    monkeypatch.setattr(client_app, "open_state", lambda _: 1 // 0)
    LocalGrid(ClientApp(), [], {})  # an engine gives messages their sender
    context = Context(1, 2, {}, RecordDict(), {})
    message = Message(RecordDict({"config": ConfigRecord()}), 2, "query.describe")
    assert client_app.app(message, context).has_error()
    assert watched == [None]
