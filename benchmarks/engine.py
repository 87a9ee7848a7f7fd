"""The local engine without a model: seconds a message, and memory a client.

    python benchmarks/engine.py [--clients 600] [--rounds 3]

A no-op client answers 600 messages a round with a φ of the quickstart's size; then the resident
memory of a federation of as many clients is measured, before and after the rounds.
"""

from __future__ import annotations

import argparse
import gc
import time

import numpy as np
import psutil
from common import machine
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.app.user_config import UserConfig
from flwr.clientapp import ClientApp

from fedp2eft.federation.local import LocalGrid

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    arrays = next(iter(message.content.array_records.values()))
    content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})})
    return Message(content, reply_to=message)


def resident() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clients", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    phi = ArrayRecord({"phi": Array(np.zeros(745_000, np.float32))})
    record = RecordDict({"arrays": phi})
    before = resident()
    nodes: list[UserConfig] = [{"client": f"c{i}"} for i in range(options.clients)]
    grid = LocalGrid(app, nodes, {})
    made = resident()
    print(machine())
    print(f"{(made - before) / options.clients / 1000:.1f} kB a client for the grid")
    for round_ in range(options.rounds):
        start = time.perf_counter()
        messages = [Message(record, node, "train") for node in grid.get_node_ids()]
        ids = grid.push_messages(messages)
        answered = 0
        while ids:
            replies = grid.pull_messages(ids)
            for reply in replies:
                ids.remove(reply.metadata.reply_to_message_id)
            answered += len(replies)
        seconds = time.perf_counter() - start
        print(
            f"round {round_ + 1}: {1000 * seconds / answered:.3f} ms a message, "
            f"{resident() / 1e6:.0f} MB resident"
        )


if __name__ == "__main__":
    main()
