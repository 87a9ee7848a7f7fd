"""Bytes and seconds of one secure sum against a plain one, all clients in this process.

    python benchmarks/secure_sums.py [--clients 10 100] [--entries 400000] [--save]

The clients run one after the other, as does the server, so seconds are CPU time of one core; what a
client takes is that divided by their number. Messages go through the local engine without a
network. A plain sum sends the same vector in fp32 and adds it up. One line of JSON per size.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.app.user_config import UserConfig
from flwr.clientapp import ClientApp

from fedp2eft.federation.client.sums import give_masked, serve_sums
from fedp2eft.federation.local import LocalGrid
from fedp2eft.federation.server.admission import FIRST_ENDS
from fedp2eft.federation.server.exchange import Member
from fedp2eft.federation.server.sums import SecureSum, fixed
from fedp2eft.federation.wire.layouts import Part
from fedp2eft.federation.wire.messages import ARRAYS, content_bytes, read_array, the_arrays
from fedp2eft.federation.wire.sums import Block, Layout
from fedp2eft.settings.experiment import Settings
from fedp2eft.settings.peers import PeerSettings, PrivacySettings
from fedp2eft.settings.reading import settings_text

RESULTS = Path(__file__).parent / "results" / "secure_sums.jsonl"
PEERS = PeerSettings(max_norm=0, max_examples=0)


class Timed(LocalGrid):
    """Counts the seconds that clients take."""

    seconds = 0.0

    def _run_client(self, message: Message) -> Message:
        start = time.process_time()
        try:
            return super()._run_client(message)
        finally:
            self.seconds += time.process_time() - start


def app(value: np.ndarray, layout: Layout, privacy: PrivacySettings) -> ClientApp:
    """Clients that all have the same vector."""
    made = ClientApp()
    serve_sums(made)

    @made.query("masked")
    def masked(message: Message, context: Context) -> Message:
        return give_masked(message, context, privacy, Part({"w": value}), lambda _: layout)

    @made.query("plain")
    def plain(message: Message, context: Context) -> Message:
        content = RecordDict({ARRAYS: ArrayRecord({"w": Array(value)})})
        return Message(content, reply_to=message)

    return made


def measure(clients: int, entries: int) -> dict[str, Any]:
    """One sum of each kind."""
    privacy = PrivacySettings(secure_sums="on")
    layout = {"w": Block((entries,), 1.0, 32)}
    value = np.random.default_rng(0).uniform(-1, 1, entries).astype(np.float32)
    settings = Settings(privacy=privacy, peers=PEERS)
    nodes: list[UserConfig] = [{"client": f"c{i}"} for i in range(clients)]
    grid = Timed(app(value, layout, privacy), nodes, {"settings": settings_text(settings)})
    members = [Member(2 + i, f"c{i}", "", "seen", 0) for i in range(clients)]
    found: dict[str, Any] = {"clients": clients, "entries": entries}

    start, total, size = time.process_time(), np.zeros(entries), 0
    ids = grid.push_messages([Message(RecordDict(), m.node, "query.plain") for m in members])
    for id_ in ids:
        [reply] = grid.pull_messages([id_])
        size += content_bytes(reply.content)
        total += read_array(the_arrays(reply)["w"], np.float32, (entries,), "a reply")
    found["plain_up"], found["plain_seconds"] = size, round(time.process_time() - start, 3)

    grid.seconds, start = 0.0, time.process_time()
    asked = SecureSum(grid, members, privacy, 1e6, "the benchmark", FIRST_ENDS)
    questions = [Message(RecordDict(), member.node, "query.masked") for member in members]
    summed = asked.run(questions, fixed(layout))
    seconds = time.process_time() - start
    error = float(np.abs(summed.values["w"] - total).max())
    assert error <= clients / layout["w"].scale(clients) / 2 + 1e-9 * clients
    return found | {
        "secure_up": summed.bytes_up,
        "secure_down": summed.bytes_down,
        "client_seconds": round(grid.seconds / clients, 3),
        "server_seconds": round(seconds - grid.seconds, 3),
        "largest_error": error,
    }


def main() -> None:
    """Measure every size."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--entries", type=int, nargs="+", default=[400_000])
    parser.add_argument("--save", action="store_true", help=f"append to {RESULTS.name}")
    options = parser.parse_args()
    for clients in options.clients:
        for entries in options.entries:
            line = json.dumps(measure(clients, entries))
            print(line, flush=True)
            if options.save:
                with RESULTS.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    main()
