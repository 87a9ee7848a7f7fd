"""A federation that sums numbers of its clients, and faults for it; no model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from toy import Notes

from fedp2eft.federation.client.sums import give_masked, serve_sums
from fedp2eft.federation.local import LocalGrid
from fedp2eft.federation.server.admission import Failures
from fedp2eft.federation.server.exchange import Member
from fedp2eft.federation.server.faults import Faults
from fedp2eft.federation.server.sums import SecureSum, Summed, fixed
from fedp2eft.federation.wire.keys import KEYS, SECURE, SHARES, UNMASK
from fedp2eft.federation.wire.layouts import Part
from fedp2eft.federation.wire.sums import Block, Layout
from fedp2eft.settings.experiment import Settings
from fedp2eft.settings.peers import AggregationSettings, PeerSettings, PrivacySettings
from fedp2eft.settings.reading import settings_text

QUESTION = "query.numbers"
STAGES = (KEYS, SHARES, QUESTION, UNMASK)
Fate = Callable[[str, Message, Message], "Message | list[Message]"]
"""Gets the client, the message and its reply; gives what arrives."""


def secure(**changes: Any) -> PrivacySettings:
    return PrivacySettings(secure_sums="on", **changes)


def of(privacy: PrivacySettings, least: float = 0.01) -> Settings:
    peers = PeerSettings(failures="continue", min_share=least, max_norm=0, max_examples=0)
    return Settings(privacy=privacy, peers=peers, aggregation=AggregationSettings())


def gone(message: Message) -> Message:
    return Message(Error(5, "gone"), reply_to=message)


class Fated(LocalGrid):
    """An engine of which `fate` says what becomes of each reply; keeps all that arrives."""

    fate: Fate | None = None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.arrived: list[tuple[str, Message, Message]] = []

    def pull_messages(self, message_ids: Any) -> list[Message]:
        found = []
        for message_id in message_ids:
            message = self._waiting.get(message_id)
            if message is None:
                continue
            client = str(self._nodes[message.metadata.dst_node_id]["client"])
            for reply in super().pull_messages([message_id]):
                fate = self.fate(client, message, reply) if self.fate else reply
                for each in fate if isinstance(fate, list) else [fate]:
                    self.arrived.append((client, message, each))
                    found.append(each)
        return found


class Federation:
    """Clients with numbers, summed as often as wanted.

    Attributes:
        grid: Its `fate` may be set, and `arrived` is what the server received.
        notes: What the reporter heard.
        faults: What was counted.
    """

    def __init__(
        self, folder: Path, values: Sequence[dict[str, Any]], layout: Layout,
        privacy: PrivacySettings | None = None, least: float = 0.01, timeout: float = 60.0,
    ) -> None:  # fmt: skip
        self.settings = of(privacy or secure(), least)
        self.values, self.layout, self.timeout = values, layout, timeout
        self.names = [f"c{i:02d}" for i in range(len(values))]
        config = {"settings": settings_text(self.settings)}
        self.grid = Fated(self._app(), [{"client": name} for name in self.names], config)
        self.notes, self.faults = Notes(), Faults(folder, 3)
        self.failures = Failures(self.settings.peers, False, self.notes, self.faults)
        self.members = [Member(2 + i, name, "de", "seen", 1) for i, name in enumerate(self.names)]

    def _app(self) -> ClientApp:
        app = ClientApp()
        serve_sums(app)

        @app.query("numbers")
        def numbers(message: Message, context: Context) -> Message:
            mine = self.values[self.names.index(str(context.node_config["client"]))]
            part = Part(mine, noise_key=b"\1" * 32)
            return give_masked(message, context, self.settings.privacy, part, lambda _: self.layout)

        return app

    def sum(self, **options: Any) -> Summed:
        asked = SecureSum(
            self.grid, self.members, self.settings.privacy, self.timeout, "a test", self.failures
        )
        questions = [Message(RecordDict(), member.node, QUESTION) for member in self.members]
        return asked.run(questions, fixed(self.layout), **options)

    def plain(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        chosen = [
            value for name, value in zip(self.names, self.values, strict=True) if name in names
        ]
        return {n: sum(np.asarray(v[n], np.float64) for v in chosen) for n in self.layout}

    def record(self, client: str, kind: str) -> Any:
        """What a client last answered to a stage."""
        for name, message, reply in reversed(self.grid.arrived):
            if name == client and message.metadata.message_type == kind:
                return reply.content.config_records[SECURE]
        raise AssertionError(f"{client} answered no {kind}")


def dropping(when: dict[str, str]) -> Fate:
    """Clients that are gone from a stage on."""

    def fate(client: str, message: Message, reply: Message) -> Message:
        stage = STAGES.index(message.metadata.message_type)
        left = client in when and stage >= STAGES.index(when[client])
        return gone(message) if left else reply

    return fate


SMALL = {"w": Block((2, 3), 2.0, 32), "n": Block((1,), 1000.0)}


def numbers(clients: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [
        {"w": rng.uniform(-2, 2, (2, 3)), "n": rng.integers(0, 1000, 1)} for _ in range(clients)
    ]


def few(folder: Path, clients: int = 5, **options: Any) -> Federation:
    return Federation(folder, numbers(clients), SMALL, **options)


def close(federation: Federation, found: Any) -> None:
    """The sum is that of the clients in it, to half a step for each and float64's rounding."""
    plain = federation.plain(found.clients)
    count = len(found.clients)
    for name, block in federation.layout.items():
        step = 1 / block.scale(len(federation.names))
        # Steps of 64 bits can be finer than float64, in which both sums are given.
        most = count * (step / 2 + np.spacing(count * block.limit))
        np.testing.assert_allclose(found.values[name], plain[name], rtol=0, atol=most)
