"""Aggregation by name: what each computes, hostile clients, and stopping at any round."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy import CLIENTS, FIRST, Numbers, apart, honest, lines, members, train

from fedp2eft.errors import UserError
from fedp2eft.federation.server.aggregation import Averaging, strategy
from fedp2eft.federation.server.run_folder import RunFolder
from fedp2eft.runtime.phases import PSG_PHASE
from fedp2eft.settings.experiment import Settings
from fedp2eft.settings.peers import AggregationSettings

HOSTILE = CLIENTS[::5]  # 20 %
KINDS = ["fedavg", "fedmedian", "trimmed-mean", "krum", "multi-krum", "fedavgm", "fedadagrad",
         "fedadam", "fedyogi"]  # fmt: skip
ROBUST = ["fedmedian", "trimmed-mean", "krum", "multi-krum"]


def moved(name: str) -> Numbers:
    return honest(name, {n: np.zeros(tuple(v.shape), np.float32) for n, v in FIRST.items()})


def stacked(name: str) -> np.ndarray:
    """What all clients send in round 1."""
    return np.stack([moved(client)[name].astype(np.float64) for client in CLIENTS])


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_computes_what_it_is_named_for(tmp_path: Path, kind: str) -> None:
    options = {"aggregation__kind": kind, "aggregation__hostile": 0.1, "peers__max_norm": 0}
    got = train(tmp_path, None, 1, 20, **options)
    flat = np.stack([np.concatenate([moved(c)[n].ravel() for n in FIRST]) for c in CLIENTS])
    gaps = ((flat[:, None] - flat[None]).astype(np.float64) ** 2).sum(-1)
    near = np.sort(gaps, axis=1)[:, 1 : 20 - 2 - 2 + 1].sum(1)  # the n - f - 2 nearest
    order = np.argsort(near)
    for name in FIRST:
        sent = stacked(name)
        mean, rate, tau = sent.mean(0), 1e-3, 1e-3
        rise = mean**2  # v after one round, before its decay
        wanted = {
            "fedavg": mean,
            "fedmedian": np.median(sent, axis=0),
            "trimmed-mean": np.sort(sent, axis=0)[2:-2].mean(0),
            "krum": sent[order[0]],
            "multi-krum": sent[order[:18]].mean(0),
            "fedavgm": mean,
            "fedadagrad": rate * mean / (np.sqrt(rise) + tau),
            # bias correction of Flower: rounds count from 1, the exponent is one more
            "fedadam": rate * np.sqrt(1 - 0.99**2) / (1 - 0.9**2)
            * 0.1 * mean / (np.sqrt(0.01 * rise) + tau),
            "fedyogi": rate * 0.1 * mean / (np.sqrt(0.01 * rise) + tau),
        }[kind]  # fmt: skip
        np.testing.assert_allclose(got[name].numpy(), wanted, rtol=2e-5, atol=1e-7)
        assert got[name].dtype == torch.float32


def test_momentum_counts_from_the_second_round_on(tmp_path: Path) -> None:
    one = train(tmp_path / "one", None, 1, 20, aggregation__kind="fedavgm")
    two = train(tmp_path / "two", None, 2, 20, aggregation__kind="fedavgm")
    plain = {n: np.mean([honest(c, {n: v.numpy() for n, v in one.items()})[n] for c in CLIENTS], 0)
             for n in FIRST}  # fmt: skip
    for name in FIRST:
        wanted = plain[name] + 0.9 * one[name].numpy()
        np.testing.assert_allclose(two[name].numpy(), wanted, rtol=1e-5)


# ── hostile clients ─────────────────────────────────────────────────────────────────────────────


def attack(kind: str) -> Any:
    """A fifth of the clients send something else than what they trained."""

    def spoil(client: str, round_: int, sent: Numbers, good: Numbers) -> Numbers | None:
        if client not in HOSTILE:
            return None
        rng = np.random.default_rng([round_, int(client[1:])])
        return {
            name: {
                "scaled": sent[name] + 100 * (good[name] - sent[name]),
                "flipped": sent[name] - (good[name] - sent[name]),
                "random": 10 * rng.normal(size=good[name].shape),
                "negated": -good[name],
            }[kind].astype(np.float32)
            for name in good
        }

    return spoil


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return train(tmp_path_factory.mktemp("clean"), None, 10, 20)


@pytest.mark.parametrize("kind", [*ROBUST, "fedavg"])
@pytest.mark.parametrize("how", ["scaled", "flipped", "random", "negated"])
def test_hostile_clients_hardly_move_the_end(tmp_path: Path, clean, kind: str, how: str) -> None:
    """A fifth of the clients is hostile; the end stays within 15 % of the way that φ went."""
    way = apart(clean, FIRST)
    assert way > 3
    checked = kind == "fedavg"
    options: dict[str, Any] = {"aggregation__kind": kind, "peers__max_norm": 10.0 if checked else 0}
    got = train(tmp_path / "got", attack(how), 10, 20, **options)
    if checked and how == "negated":  # no larger than honest changes, and all in one direction:
        assert apart(got, clean) > 0.4 * way  # what the norm cannot show takes a robust kind
        return
    assert apart(got, clean) < 0.15 * way
    if checked:
        left_out = {name for line in lines(tmp_path / "got") for name in line.get("left-out", {})}
        assert left_out == (set() if how == "flipped" else set(HOSTILE))


@pytest.mark.parametrize("how", ["scaled", "random", "negated"])
def test_the_plain_mean_does_not_withstand_them(tmp_path: Path, clean, how: str) -> None:
    got = train(tmp_path, attack(how), 10, 20, peers__max_norm=0)
    assert apart(got, clean) > 0.4 * apart(clean, FIRST)


def test_krum_sees_small_changes_of_large_numbers(tmp_path: Path) -> None:
    """In float32 the distances of these clients are lost in rounding, and hostile ones win."""
    from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp

    from fedp2eft.federation.local import LocalGrid

    LocalGrid(ClientApp(), [], {})
    rng = np.random.default_rng(0)
    start = 100 * rng.normal(size=1000)
    replies = []
    for i in range(10):
        change = 1e-4 * rng.normal(size=1000) + (3e-4 if i < 2 else 0)
        arrays = ArrayRecord({"w": Array((start + change).astype(np.float32))})
        content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})})
        replies.append(Message(content, 2, "train"))
    made = strategy(AggregationSettings("multi-krum"))
    arrays, _ = made.aggregate_train(1, replies)
    assert arrays is not None
    assert abs(float((arrays["w"].numpy() - start).mean())) < 3e-5


# ── stopping ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_ends_with_the_same_bits(tmp_path: Path, monkeypatch, kind) -> None:
    options = {"aggregation__kind": kind}
    whole = train(tmp_path / "whole", None, 5, **options)
    finish = RunFolder.finish_round

    def stop(self, checkpoint, *rest):
        finish(self, checkpoint, *rest)
        if checkpoint.round == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "finish_round", stop)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "run", None, 5, **options)
    got = train(tmp_path / "run", None, 5, **options)
    assert all(torch.equal(got[name], whole[name]) for name in FIRST)
    texts = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("run", "whole")]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("kind", ["fedavgm", "fedadagrad", "fedadam", "fedyogi"])
def test_what_a_server_optimiser_remembers_matters(tmp_path: Path, kind: str) -> None:
    """Without its memory the run would go on otherwise: the test above can fail."""
    from safetensors.torch import load_file, save_file

    from fedp2eft.federation.server import checkpoints

    whole = train(tmp_path / "whole", None, 5, aggregation__kind=kind)
    train(tmp_path / "run", None, 3, aggregation__kind=kind)
    path = max((tmp_path / "run" / "checkpoints").iterdir())
    tensors = load_file(path)
    assert any(name.startswith(checkpoints.STATE) for name in tensors)
    kept = {name: value for name, value in tensors.items() if not name.startswith("#")}
    progress = {"progress": {"phase": "psg", "round": 3}, "sha256": checkpoints._digest(kept)}
    save_file(kept, path, metadata={checkpoints.HEADER: json.dumps(progress)})
    assert apart(train(tmp_path / "run", None, 5, aggregation__kind=kind), whole) > 1e-6


def test_the_mean_remembers_nothing_and_checkpoints_hold_numbers_only(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    train(tmp_path, None, 2)
    assert set(load_file(max((tmp_path / "checkpoints").iterdir()))) == set(FIRST)
    assert Averaging(Settings(), PSG_PHASE, members()).memory() == {}


def test_server_optimisers_leave_the_base_alone() -> None:
    for kind, name in (("fedadam", "FedAvg"), ("fedmedian", "FedMedian")):
        made = strategy(AggregationSettings(kind), optimize=False)  # type: ignore[arg-type]
        assert type(made).__name__ == name


@pytest.mark.parametrize(
    "wrong",
    [{"hostile": 0.5}, {"hostile": -0.1}, {"server_lr": 0.0}, {"momentum": 1.0}, {"beta2": -1.0},
     {"tau": 0.0}],
)  # fmt: skip
def test_parameters_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"aggregation.{next(iter(wrong))}"):
        AggregationSettings(**wrong)  # type: ignore[arg-type]
