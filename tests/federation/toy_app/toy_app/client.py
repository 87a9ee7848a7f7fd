"""A client that is as fast as its process: no model, no torch."""

from __future__ import annotations

import time
import zlib
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedp2eft.federation.hooks import end_with_parent

app = ClientApp()


@app.query("describe")
def describe(message: Message, context: Context) -> Message:
    about = {"client": context.node_config["client"], "language": "de", "pool": "seen"}
    counts = MetricRecord({"num-examples": 10})
    content = RecordDict({"about": ConfigRecord(about), "metrics": counts})
    return Message(content, reply_to=message)


@app.train("psg")
def train(message: Message, context: Context) -> Message:
    """Marks the round, sleeps for its `sleep` seconds from round `from` on, moves by a third."""
    end_with_parent()  # one that sleeps would outlive the test
    node = context.node_config
    round_ = int(message.content.config_records["config"]["server-round"])  # type: ignore[arg-type]
    if "mark" in node:
        Path(str(node["mark"])).write_text(str(round_))
    if round_ >= int(node.get("from", 1)):
        time.sleep(float(node.get("sleep", 0)))
    wish = zlib.crc32(str(node["client"]).encode()) % 1000 / 1000
    sent = message.content.array_records["arrays"]["w"].numpy()
    moved = (sent + (wish - sent) / 3).astype(np.float32)
    told = {"num-examples": 10, "psg-loss": 0.5}
    told |= {
        f"stage1-{name}": 0.5 for name in ("first", "last", "task", "significance", "sparsity")
    }
    content = RecordDict(
        {"arrays": ArrayRecord({"w": Array(moved)}), "metrics": MetricRecord(told)}
    )
    return Message(content, reply_to=message)
