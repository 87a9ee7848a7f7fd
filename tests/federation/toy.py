"""A federation of clients that each pull two arrays towards numbers of their own; no model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod

from fedp2eft.federation.local import LocalGrid
from fedp2eft.federation.server.exchange import Member
from fedp2eft.federation.server.phases import aggregator_of
from fedp2eft.federation.server.rounds import run_rounds
from fedp2eft.federation.server.run_folder import RunFolder
from fedp2eft.federation.wire.messages import ABOUT, ARRAYS, CONFIG, EXAMPLES, METRICS
from fedp2eft.progress import LogReporter
from fedp2eft.runtime.phases import PSG_PHASE
from fedp2eft.settings.experiment import Settings
from fedp2eft.settings.peers import PeerSettings
from fedp2eft.settings.reading import settings_text

CLIENTS = [f"c{i:02d}" for i in range(20)]
FIRST = {"w": torch.zeros(3, 4), "v": torch.zeros(5)}
Numbers = dict[str, np.ndarray]
Spoil = Callable[[str, int, Numbers, Numbers], "Numbers | RecordDict | None"]
"""Gets client, round, what it was sent and what it would send; gives what it sends."""


def members(names: Sequence[str] = CLIENTS) -> list[Member]:
    return [Member(2 + i, name, "de", "seen", 10) for i, name in enumerate(names)]


def target(client: str) -> Numbers:
    """What a client wants: near 1 everywhere."""
    rng = np.random.default_rng(int(client[1:]))
    return {n: 1 + 0.1 * rng.normal(size=tuple(v.shape)) for n, v in FIRST.items()}


def honest(client: str, sent: Numbers) -> Numbers:
    wish = target(client)
    return {n: (x + 0.3 * (wish[n] - x)).astype(np.float32) for n, x in sent.items()}


def reply_of(numbers: Numbers, examples: Any = 10, **metrics: Any) -> RecordDict:
    """What a client sends."""
    told = {EXAMPLES: examples, **dict.fromkeys(PSG_PHASE.metrics, 0.5), **metrics}
    return RecordDict(
        {
            ARRAYS: ArrayRecord({n: Array(value) for n, value in numbers.items()}),
            METRICS: MetricRecord(told),
            ABOUT: ConfigRecord({"client": "?"}),
        }
    )


def app(spoil: Spoil | None = None, mods: Sequence[Mod] = ()) -> ClientApp:
    """The clients; `spoil` says what some of them send instead."""
    made = ClientApp()

    @made.train("psg", mods=list(mods))
    def train(message: Message, context: Context) -> Message:
        client = str(context.node_config["client"])
        round_ = int(message.content.config_records[CONFIG]["server-round"])  # type: ignore[arg-type]
        arrays = message.content.array_records[ARRAYS]
        sent = {name: array.numpy() for name, array in arrays.items()}
        good = honest(client, sent)
        bad = spoil(client, round_, sent, good) if spoil else None
        content = bad if isinstance(bad, RecordDict) else reply_of(good if bad is None else bad)
        return Message(content, reply_to=message)

    return made


class Notes(LogReporter):
    """Keeps what it hears."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.advanced: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)

    def advance(self, phase: str, text: str) -> None:
        self.advanced.append(text)


def settings(**changes: Any) -> Settings:
    """Failures do not stop a run; `peers__max_norm=0` changes one setting."""
    made = Settings(peers=PeerSettings(failures="continue"))
    sections: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        sections.setdefault(section, {})[name] = value
    return replace(made, **{s: replace(getattr(made, s), **new) for s, new in sections.items()})


def train(
    folder: Path,
    spoil: Spoil | None = None,
    rounds: int = 4,
    clients_per_round: int = 10,
    names: Sequence[str] = CLIENTS,
    mods: Sequence[Mod] = (),
    reporter: Notes | None = None,
    **changes: Any,
) -> dict[str, torch.Tensor]:
    """φ after the rounds; a folder that is there is resumed."""
    s = settings(
        federation__rounds=rounds, federation__clients_per_round=clients_per_round, **changes
    )
    config = {"settings": settings_text(s)}
    grid = LocalGrid(app(spoil, mods), [{"client": name} for name in names], config)
    return rounds_on(grid, folder, s, names, reporter)


def rounds_on(
    grid: LocalGrid, folder: Path, s: Settings, names: Sequence[str], reporter: Notes | None
) -> dict[str, torch.Tensor]:
    """φ after the rounds on an engine; a folder that is there is resumed."""
    run = RunFolder(folder, s)
    try:
        aggregator = aggregator_of(run, PSG_PHASE, members(names))
        return run_rounds(grid, run, PSG_PHASE, aggregator, FIRST, reporter or Notes())
    finally:
        run.close()


def lines(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl."""
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Distance of two φ."""
    return float(torch.cat([(one[n] - other[n]).flatten() for n in FIRST]).norm())
