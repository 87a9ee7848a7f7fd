"""Sampling, averaging and what stops a round."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp

from fedp2eft.client.phase import Phase
from fedp2eft.errors import UserError
from fedp2eft.federation.local import LocalGrid
from fedp2eft.federation.server.aggregation import Averaging
from fedp2eft.federation.server.exchange import Member, roster
from fedp2eft.federation.server.rounds import run_rounds
from fedp2eft.federation.server.run_folder import RunFolder
from fedp2eft.federation.wire.messages import ABOUT, ARRAYS, EXAMPLES, METRICS
from fedp2eft.files import read_lines
from fedp2eft.progress import LogReporter
from fedp2eft.runtime.phases import PSG_PHASE
from fedp2eft.settings.experiment import FederationSettings, Settings

NAMES = [f"c{i:02d}" for i in range(8)]
FIRST = {"w": torch.zeros(2, 3), "v": torch.zeros(4)}


def members(first_node: int = 2, turned: bool = False) -> list[Member]:
    names = NAMES[::-1] if turned else NAMES
    return [Member(first_node + i, name, "de", "seen", 10) for i, name in enumerate(names)]


def sampling(
    clients: list[Member], size: int = 3, seed: int = 42, phase: Phase = PSG_PHASE
) -> Averaging:
    federation = FederationSettings(clients_per_round=size)
    return Averaging(Settings(seed=seed, federation=federation), phase, clients)


def sampled(aggregator: Averaging, round_: int) -> list[str]:
    """Names of the clients that get a message."""
    by_node = {member.node: member.client for member in aggregator.members}
    messages = aggregator.configure(round_, FIRST, LocalGrid(ClientApp(), [], {}), ())
    assert all(m.content.config_records["config"]["server-round"] == round_ for m in messages)
    return [by_node[message.metadata.dst_node_id] for message in messages]


def test_sampling_depends_on_seed_phase_and_round_alone() -> None:
    here, there = sampling(members()), sampling(members(first_node=500, turned=True))
    rounds = [sampled(here, r) for r in range(1, 9)]
    # other node ids, another order, and rounds asked for backwards
    assert [sampled(there, r) for r in range(8, 0, -1)][::-1] == rounds
    assert all(len(set(sample)) == 3 and sample == sorted(sample) for sample in rounds)
    assert len({tuple(sample) for sample in rounds}) > 4
    for other in (
        sampling(members(), seed=43),
        sampling(members(), phase=replace(PSG_PHASE, name="base")),
    ):
        assert [sampled(other, r) for r in range(1, 9)] != rounds


def test_a_sample_is_never_larger_than_the_federation() -> None:
    assert sampled(sampling(members(), 30, 0), 1) == NAMES


def numbers_of(name: str, round_: int) -> tuple[dict[str, np.ndarray], int]:
    """What a client of `adding_app` sends, and its N."""
    rng = np.random.default_rng([int(name[1:]), round_])
    arrays = {key: rng.normal(size=tuple(v.shape)).astype(np.float32) for key, v in FIRST.items()}
    return arrays, 3 + 7 * int(name[1:])


def adding_app(spoil: str = "") -> ClientApp:
    """Clients whose replies are known; the one named `spoil` sends a NaN in round 2."""
    app = ClientApp()

    @app.train("psg")
    def train(message: Message, context: Context) -> Message:
        name = str(context.node_config["client"])
        round_ = int(message.content.config_records["config"]["server-round"])  # type: ignore[arg-type]
        arrays, examples = numbers_of(name, round_)
        if name == spoil and round_ == 2:
            arrays["v"][1] = np.nan
        record = ArrayRecord({key: Array(value) for key, value in arrays.items()})
        metrics = MetricRecord(
            {EXAMPLES: examples}
            | dict.fromkeys(PSG_PHASE.metrics, 0.0)
            | {"psg-loss": float(examples), "stage1-task": examples / 2}
        )
        about = ConfigRecord({"client": name})
        content = RecordDict({ARRAYS: record, METRICS: metrics, ABOUT: about})
        return Message(content, reply_to=message)

    return app


def run(folder: Path, app: ClientApp, rounds: int, turned: bool = False) -> dict[str, torch.Tensor]:
    names = NAMES[::-1] if turned else NAMES
    grid = LocalGrid(app, [{"client": name} for name in names], {})
    s = Settings(federation=FederationSettings(rounds=rounds, clients_per_round=3))
    run = RunFolder(folder, s)
    try:
        aggregator = Averaging(s, PSG_PHASE, members(turned=turned))
        return run_rounds(grid, run, PSG_PHASE, aggregator, FIRST, LogReporter())
    finally:
        run.close()


def test_the_average_is_the_mean_weighted_by_examples(tmp_path: Path) -> None:
    got = run(tmp_path / "run", adding_app(), rounds=2)
    sample = sampled(sampling(members()), 2)
    sent = [numbers_of(name, 2) for name in sample]
    total = sum(n for _, n in sent)
    for key in FIRST:
        wanted = sum(arrays[key].astype(np.float64) * n for arrays, n in sent) / total
        assert got[key].dtype == torch.float32
        np.testing.assert_allclose(got[key].numpy(), wanted, rtol=1e-6, atol=1e-7)


def test_the_order_of_replies_changes_no_bit(tmp_path: Path) -> None:
    one = run(tmp_path / "one", adding_app(), rounds=3)
    other = run(tmp_path / "other", adding_app(), rounds=3, turned=True)
    assert all(torch.equal(one[key], other[key]) for key in FIRST)
    metrics = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("one", "other")]
    assert metrics[0] == metrics[1]


def metrics_of(folder: Path) -> list[dict[str, float]]:
    return [line for _, line in read_lines(folder / "metrics.jsonl") if line]


def test_metrics_are_means_weighted_by_examples(tmp_path: Path) -> None:
    run(tmp_path / "run", adding_app(), rounds=2)
    for line in metrics_of(tmp_path / "run"):
        sample = sampled(sampling(members()), int(line["round"]))
        sizes = [numbers_of(name, 1)[1] for name in sample]
        assert line["psg-loss"] == pytest.approx(sum(n * n for n in sizes) / sum(sizes))
        assert line["stage1-task"] == pytest.approx(line["psg-loss"] / 2)
        assert line["stage1-significance"] == 0.0


def test_a_run_without_the_terms_of_stage_1_goes_on(tmp_path: Path) -> None:
    """Earlier versions did not keep them."""
    whole = run(tmp_path / "whole", adding_app(), rounds=3)
    run(tmp_path / "run", adding_app(), rounds=2)
    file = tmp_path / "run" / "metrics.jsonl"
    kept = {"phase", "round", "psg-loss", "stage1-first", "stage1-last", "norm", "clients"}
    old = [{k: v for k, v in line.items() if k in kept} for line in metrics_of(file.parent)]
    file.write_text("".join(json.dumps(line) + "\n" for line in old), encoding="utf-8")
    more = run(tmp_path / "run", adding_app(), rounds=3)
    assert all(torch.equal(whole[key], more[key]) for key in FIRST)
    lines = metrics_of(tmp_path / "run")
    assert lines[:2] == old
    assert lines[2] == metrics_of(tmp_path / "whole")[2]


def test_nan_in_a_reply_stops_the_run_and_names_client_and_round(tmp_path: Path) -> None:
    spoil = sampled(sampling(members()), 2)[1]
    with pytest.raises(UserError) as caught:
        run(tmp_path / "run", adding_app(spoil), rounds=3)
    message = str(caught.value)
    assert f"Client {spoil}, round 2 of psg: its reply: v holds NaN" in message
    assert "\n" not in message
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["psg-000001.safetensors"]
    # with the client mended, the same run goes on
    whole = run(tmp_path / "whole", adding_app(), rounds=3)
    mended = run(tmp_path / "run", adding_app(), rounds=3)
    assert all(torch.equal(whole[key], mended[key]) for key in FIRST)


def test_no_seen_client_is_an_error(tmp_path: Path) -> None:
    grid = LocalGrid(ClientApp(), [], {})
    folder = RunFolder(tmp_path / "run", Settings())
    nobody = Averaging(Settings(), PSG_PHASE, [])
    with pytest.raises(UserError, match="No seen client"):
        run_rounds(grid, folder, PSG_PHASE, nobody, FIRST, LogReporter())
    folder.close()


def test_clients_that_do_not_answer_in_time_are_counted() -> None:
    class Silent(LocalGrid):
        def pull_messages(self, message_ids):  # type: ignore[no-untyped-def]
            return []

    grid = Silent(ClientApp(), [{"client": name} for name in NAMES], {})
    with pytest.raises(UserError, match="8 clients did not reply within 0 s"):
        roster(grid, timeout=0.001)
