"""The ClientApp that Flower starts for a message imports what that message takes."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from flwr.app import Context, Message, RecordDict

from fedp2eft.federation import client_app
from fedp2eft.federation.hooks import begin_run
from fedp2eft.federation.light_app import app
from fedp2eft.federation.wire.messages import DESCRIBE

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
ASKS_FOR_KEYS = """
import json, sys
from flwr.app import ConfigRecord, Context, Message, RecordDict
from fedp2eft.federation.hooks import begin_run
from fedp2eft.federation.light_app import app

begin_run()
settings = "{privacy: {secure_sums: on}, peers: {max_norm: 0, max_examples: 0}}"
asked = ConfigRecord({"session": "s", "clients": 4, "index": 0})
message = Message(RecordDict({"secure-sum": asked}), 2, "query.secure_keys")
reply = app(message, Context(1, 2, {}, RecordDict(), {"settings": settings}))
assert reply.content["secure-sum"]["mask-key"]
heavy = ("torch", "transformers", "peft", "datasets")
print(json.dumps([name for name in heavy if name in sys.modules]))
"""


def test_a_message_of_a_secure_sum_takes_no_model() -> None:
    done = subprocess.run([sys.executable, "-c", ASKS_FOR_KEYS], capture_output=True, check=True)
    assert json.loads(done.stdout) == []


def test_any_other_message_goes_to_the_whole_app(monkeypatch: pytest.MonkeyPatch) -> None:
    begin_run()
    asked = []
    monkeypatch.setattr(client_app, "app", lambda message, context: asked.append(message))
    message = Message(RecordDict(), 2, DESCRIBE)
    app(message, Context(1, 2, {}, RecordDict(), {}))
    assert asked == [message]


def test_flower_starts_the_light_app() -> None:
    components = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["tool"]["flwr"]["app"]
    assert components["components"]["clientapp"] == "fedp2eft.federation.light_app:app"
