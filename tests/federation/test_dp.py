"""Client-level differential privacy of φ: clipping, noise, the account and its budget."""

from __future__ import annotations

import math
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.serverapp.strategy import DifferentialPrivacyServerSideAdaptiveClipping, FedAvg
from scipy.optimize import brentq
from scipy.stats import norm
from toy import CLIENTS, FIRST, Notes, Numbers, apart, honest, lines, members, train

from fedp2eft.errors import UserError
from fedp2eft.federation.client.mods import keep_private
from fedp2eft.federation.hooks import ServerQuantile
from fedp2eft.federation.local import LocalGrid
from fedp2eft.federation.server.checkpoints import all_checkpoints
from fedp2eft.federation.server.privacy import Private
from fedp2eft.federation.server.run_folder import RunFolder
from fedp2eft.federation.wire.messages import ARRAYS
from fedp2eft.runtime.phases import PSG_PHASE
from fedp2eft.settings.experiment import AdapterSettings, FederationSettings, Settings
from fedp2eft.settings.peers import AggregationSettings, PeerSettings, PrivacySettings

QUIET = 1e-9  # a noise multiplier that leaves what is under the noise to be seen
FIXED: dict[str, Any] = {
    "privacy__clipping": "fixed", "privacy__clip_norm": 0.5, "privacy__test_seed": 7,
}  # fmt: skip
ON_CLIENT: dict[str, Any] = {**FIXED, "privacy__clip_on": "client", "mods": [keep_private]}


def private(settings: PrivacySettings, folder: Path, size: int = 5) -> Private:
    federation = FederationSettings(clients_per_round=size)
    s = Settings(federation=federation, privacy=settings)
    return Private(s, PSG_PHASE, members(), folder)


def norm_of(numbers: Numbers) -> float:
    return math.sqrt(
        sum(float((value.astype(np.float64) ** 2).sum()) for value in numbers.values())
    )


def clipped(client: str, most: float) -> Numbers:
    change = honest(client, {n: np.zeros(tuple(v.shape), np.float32) for n, v in FIRST.items()})
    return {name: value * min(1, most / norm_of(change)) for name, value in change.items()}


def exact_epsilon(z: float, times: int, delta: float) -> float:
    """ε of a Gaussian mechanism composed with itself (Balle and Wang 2018)."""
    mu = math.sqrt(times) / z

    def excess(eps: float) -> float:
        return float(norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * norm.cdf(-mu / 2 - eps / mu))

    return float(brentq(lambda eps: excess(eps) - delta, 0, 500))


# ── what a round computes ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("where", ["server", "client"])
def test_every_change_is_cut_to_the_norm_and_counts_the_same(tmp_path: Path, where: str) -> None:
    options = {**(FIXED if where == "server" else ON_CLIENT), "privacy__noise_multiplier": QUIET}
    got = train(tmp_path, None, 1, 20, **options)
    assert norm_of(clipped("c00", 9.0)) > 1.0
    for name in FIRST:
        wanted = np.mean([clipped(client, 0.5)[name] for client in CLIENTS], axis=0)
        np.testing.assert_allclose(got[name].numpy(), wanted, rtol=1e-5)
    # ‖φ‖ of twenty changes in nearly one direction is nearly the norm itself
    assert 0.48 < apart(got, FIRST) < 0.5 * 1.001


def test_examples_do_not_weigh(tmp_path: Path) -> None:
    from toy import reply_of

    def boast(client: str, _round: int, _sent: Numbers, good: Numbers) -> Any:
        return reply_of(good, examples=90) if client == "c03" else None

    options = {**FIXED, "privacy__noise_multiplier": QUIET}
    one = train(tmp_path / "one", boast, 1, 20, **options)
    other = train(tmp_path / "other", None, 1, 20, **options)
    assert all(torch.equal(one[n], other[n]) for n in FIRST)


def test_who_fails_counts_as_unchanged(tmp_path: Path) -> None:
    """Otherwise the shares of the rest would be larger than the noise was made for."""

    def spoil(client: str, _round: int, _sent: Numbers, good: Numbers) -> Any:
        return {"w": good["w"]} if client in CLIENTS[:5] else None

    got = train(tmp_path, spoil, 1, 20, **{**FIXED, "privacy__noise_multiplier": QUIET})
    for name in FIRST:
        wanted = sum(clipped(client, 0.5)[name] for client in CLIENTS[5:]) / 20
        np.testing.assert_allclose(got[name].numpy(), wanted, rtol=1e-5)
    assert lines(tmp_path)[0]["clients"] == 15


def test_a_client_that_changed_nothing_is_left_out(tmp_path: Path) -> None:
    same = lambda c, _r, sent, _g: sent if c == "c03" else None  # noqa: E731
    train(tmp_path, same, 1, 20, **FIXED)
    assert "changed nothing" in lines(tmp_path)[0]["left-out"]["c03"]


@pytest.mark.parametrize("where", ["server", "client"])
def test_the_noise_has_the_deviation_that_it_should(tmp_path: Path, where: str) -> None:
    """z·C/n on the mean where the server adds it, z·C/√n where every client does."""
    options = {**(FIXED if where == "server" else ON_CLIENT), "privacy__noise": where}
    changes = {"privacy__noise_multiplier": 2.0, "federation__keep_checkpoints": 100}
    step = lambda _c, _r, sent, _g: {n: v + np.float32(0.01) for n, v in sent.items()}  # noqa: E731
    train(tmp_path, step, 25, 4, **{**options, **changes})
    phis = [FIRST, *(c.parameters for c in all_checkpoints(tmp_path / "checkpoints", "psg"))]
    noise = torch.cat([(b[n] - a[n] - 0.01).flatten() for a, b in pairwise(phis) for n in FIRST])
    wanted = 2.0 * 0.5 / (4 if where == "server" else 2)
    assert len(noise) == 25 * 17
    assert float(noise.std()) == pytest.approx(wanted, rel=0.12)  # 3.5 standard errors
    assert abs(float(noise.mean())) < 4 * wanted / math.sqrt(len(noise))


def test_noise_is_new_each_time_unless_a_test_asks_for_a_seed(tmp_path: Path) -> None:
    np.random.seed(0)
    free = {**FIXED, "privacy__test_seed": None}
    runs = []
    for name in ("a", "b"):
        np.random.seed(0)
        runs.append(train(tmp_path / name, None, 1, **free))
    assert apart(*runs) > 1e-3
    assert np.random.get_state()[1][0] == 0  # and nobody else's generator was touched
    seeded = [train(tmp_path / name, None, 2, **FIXED) for name in ("c", "d")]
    assert apart(*seeded) == 0
    rounds = train(tmp_path / "e", None, 2, **{**FIXED, "privacy__test_seed": 8})
    assert apart(rounds, seeded[0]) > 1e-3


# ── adaptive clipping ───────────────────────────────────────────────────────────────────────────


def adaptive(folder: Path, quantile: float, where: str, rounds: int) -> list[float]:
    """Clip norms over the rounds, of clients that always move by norms 0.05 to 1."""

    def spoil(client: str, _round: int, sent: Numbers, good: Numbers) -> Numbers:
        change = {n: good[n] - sent[n] for n in good}
        factor = 0.05 * (1 + int(client[1:])) / norm_of(change)
        return {n: (sent[n] + factor * change[n]).astype(np.float32) for n in good}

    options: dict[str, Any] = {
        "privacy__clipping": "adaptive", "privacy__quantile": quantile, "privacy__clip_norm": 0.1,
        "privacy__noise_multiplier": 0.05, "privacy__test_seed": 1, "privacy__clip_on": where,
    }  # fmt: skip
    train(folder, spoil, rounds, 20, mods=[keep_private], **options)
    return [line["clip-norm"] for line in lines(folder)]


@pytest.mark.parametrize(("quantile", "where"), [(0.8, "server"), (0.5, "client")])
def test_the_norm_finds_the_quantile(tmp_path: Path, quantile: float, where: str) -> None:
    norms = adaptive(tmp_path, quantile, where, 32)
    assert norms[0] == 0.1
    assert np.mean(norms[-6:]) == pytest.approx(quantile, abs=0.12)


def test_flowers_own_norm_runs_away() -> None:
    """Why `ServerQuantile` exists (docs/flower-adaptive-clipping.md)."""
    Own = DifferentialPrivacyServerSideAdaptiveClipping
    flower, ours = (kind(FedAvg(), 0.1, 20, 0.1, 0.5, 0.2, 1.0) for kind in (Own, ServerQuantile))
    flower._geometric_update(1.0)  # all clients are above the norm
    ours._geometric_update(1.0)
    assert ours._next is not None
    assert ours._next > 0.1
    assert flower.clipping_norm < 0.1, "Flower has fixed it: drop _Quantile of federation/hooks.py"


def test_noise_is_made_for_the_norm_that_clipped(tmp_path: Path) -> None:
    s = PrivacySettings("adaptive", clip_norm=0.2, noise_multiplier=1.0, test_seed=3)
    privacy = private(s, tmp_path, 20)
    strategy = privacy.strategy
    assert isinstance(strategy, ServerQuantile)
    # z is shared between φ and the noised count of clients below the norm
    z, count = strategy.noise_multiplier, strategy.clipped_count_stddev
    assert (z**-2 + (2 * count) ** -2) ** -0.5 == pytest.approx(1.0)
    seen = []
    add = DifferentialPrivacyServerSideAdaptiveClipping._add_noise_to_aggregated_arrays
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            DifferentialPrivacyServerSideAdaptiveClipping, "_add_noise_to_aggregated_arrays",
            lambda self, arrays: (seen.append(self.clipping_norm), add(self, arrays))[1],
        )  # fmt: skip
        train(tmp_path, None, 2, 20, privacy__clipping="adaptive", privacy__clip_norm=0.2,
              privacy__test_seed=3)  # fmt: skip
    assert seen == [line["clip-norm"] for line in lines(tmp_path)]
    assert seen[0] == 0.2
    assert seen[1] > 0.2


# ── what leaves a client ────────────────────────────────────────────────────────────────────────


def sent_norms(monkeypatch: pytest.MonkeyPatch, folder: Path, **options: Any) -> list[float]:
    found: list[float] = []
    run_client = LocalGrid._run_client

    def recording(grid: Any, message: Any) -> Any:
        reply = run_client(grid, message)
        if not reply.has_error():
            here, there = (m.content.array_records[ARRAYS] for m in (message, reply))
            found.append(norm_of({n: there[n].numpy() - here[n].numpy() for n in there}))
        return reply

    monkeypatch.setattr(LocalGrid, "_run_client", recording)
    train(folder, None, 2, 10, **options)
    return found


def test_no_larger_change_leaves_where_clients_clip(monkeypatch, tmp_path: Path) -> None:
    norms = sent_norms(monkeypatch, tmp_path, **ON_CLIENT)
    assert len(norms) == 20
    assert max(norms) < 0.5 * 1.0001
    assert max(norms) > 0.499


def test_what_leaves_is_mostly_noise_where_clients_add_it(monkeypatch, tmp_path: Path) -> None:
    options = {**ON_CLIENT, "privacy__noise": "client", "privacy__noise_multiplier": 20.0}
    norms = sent_norms(monkeypatch, tmp_path, **options)
    assert np.mean(norms) == pytest.approx(20 * 0.5 * math.sqrt(17), rel=0.15)


def test_a_client_that_does_not_clip_is_left_out(tmp_path: Path) -> None:
    def proud(message: Any, context: Any, handle: Any) -> Any:
        mine = context.node_config["client"] != "c03"
        return keep_private(message, context, handle) if mine else handle(message, context)

    train(tmp_path, None, 1, 20, **{**ON_CLIENT, "mods": [proud]})
    assert list(lines(tmp_path)[0]["left-out"]) == ["c03"]
    assert "did not clip" in lines(tmp_path)[0]["left-out"]["c03"]


def test_a_client_does_not_agree_to_another_norm(tmp_path: Path, monkeypatch) -> None:
    from flwr.serverapp.strategy import DifferentialPrivacyClientSideFixedClipping as Fixed

    configure = Fixed.configure_train

    def greedy(self, server_round, arrays, config, grid):
        self.clipping_norm = 1e6
        return configure(self, server_round, arrays, config, grid)

    monkeypatch.setattr(Fixed, "configure_train", greedy)
    with pytest.raises(UserError, match=r"asks for clip norm 1000000.0, not privacy.clip_norm"):
        train(tmp_path, None, 1, 20, **ON_CLIENT)


# ── the account ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("z", [0.7, 1.5, 6.0])
def test_epsilon_is_that_of_the_client_that_took_part_most_often(tmp_path: Path, z: float) -> None:
    train(tmp_path, None, 6, 5, **{**FIXED, "privacy__noise_multiplier": z})
    sampling = private(PrivacySettings("fixed"), tmp_path)
    taken: Counter[str] = Counter()
    for round_, line in enumerate(lines(tmp_path), 1):
        taken.update(member.client for member in sampling.sample(round_))
        exact = exact_epsilon(z, max(taken.values()), 1e-5)
        assert exact <= line["epsilon"] < 1.2 * exact  # Rényi accounting is a bound from above
        assert line["delta"] == 1e-5


def test_a_secret_sample_is_accounted_as_one_without_replacement(tmp_path: Path) -> None:
    from dp_accounting import dp_event
    from dp_accounting.privacy_accountant import NeighboringRelation
    from dp_accounting.rdp import RdpAccountant

    changes = {"privacy__sampling": "secret", "privacy__noise_multiplier": 3.0}
    train(tmp_path, None, 3, 5, **{**FIXED, **changes})
    accountant = RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_ONE)
    # one client in place of another moves the sum by 2C: half the multiplier
    event = dp_event.SampledWithoutReplacementDpEvent(20, 5, dp_event.GaussianDpEvent(1.5))
    for line in lines(tmp_path):
        accountant.compose(event)
        assert line["epsilon"] == pytest.approx(accountant.get_epsilon(1e-5))


def test_a_secret_sample_is_another_each_time(tmp_path: Path) -> None:
    secret = private(PrivacySettings("fixed", sampling="secret"), tmp_path)
    samples = {tuple(member.client for member in secret.sample(1)) for _ in range(20)}
    assert len(samples) > 15
    assert all(len(set(sample)) == 5 for sample in samples)


def test_a_round_with_a_secret_sample_is_counted_before_it_is_allowed(tmp_path: Path) -> None:
    def first_round_within(epsilon: float | None) -> Private:
        settings = PrivacySettings("fixed", sampling="secret", epsilon=epsilon)
        return private(settings, tmp_path)

    spent = first_round_within(None).epsilon({}, 1)
    assert first_round_within(1.001 * spent).spent(1) is None
    assert first_round_within(0.999 * spent).spent(1) is not None


def test_training_ends_with_the_budget(tmp_path: Path) -> None:
    notes = Notes()
    options = {**FIXED, "privacy__epsilon": 6.0, "privacy__noise_multiplier": 2.0}
    short = train(tmp_path / "run", None, 12, 10, reporter=notes, **options)
    done = lines(tmp_path / "run")
    assert 2 < len(done) < 12
    assert done[-1]["epsilon"] <= 6.0
    assert len(notes.lines) == 1
    assert f"stopped after round {len(done)}: ε is" in notes.lines[0]
    assert "privacy.epsilon = 6" in notes.lines[0]
    assert all("ε" in text for text in notes.advanced)
    whole = train(tmp_path / "whole", None, 12, 10, **{**options, "privacy__epsilon": None})
    assert lines(tmp_path / "whole")[len(done)]["epsilon"] > 6.0
    # started again nothing more is spent; with a larger budget it goes on to the same bits
    again = train(tmp_path / "run", None, 12, 10, **options)
    assert apart(again, short) == 0
    assert len(lines(tmp_path / "run")) == len(done)
    more = train(tmp_path / "run", None, 12, 10, **{**options, "privacy__epsilon": None})
    assert apart(more, whole) == 0
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")


@pytest.mark.parametrize("clipping", ["fixed", "adaptive"])
def test_a_stopped_run_keeps_its_account(tmp_path: Path, monkeypatch, clipping: str) -> None:
    options = {**FIXED, "privacy__clipping": clipping, "privacy__noise_multiplier": 2.0}
    whole = train(tmp_path / "whole", None, 5, **options)
    finish = RunFolder.finish_round

    def stop(self, checkpoint, *rest):
        if checkpoint.round == 4:  # in the middle of a round
            raise KeyboardInterrupt
        finish(self, checkpoint, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "finish_round", stop)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "run", None, 5, **options)
    assert apart(train(tmp_path / "run", None, 5, **options), whole) == 0
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")


def test_a_repeated_round_is_spent_twice_where_clients_add_the_noise(
    tmp_path: Path, monkeypatch
) -> None:
    """The noised answers of the round that was stopped are out."""
    changes = {"privacy__noise": "client", "privacy__test_seed": None}
    options = {**ON_CLIENT, **changes, "privacy__noise_multiplier": 5.0}
    finish = RunFolder.finish_round

    def stop(self, checkpoint, *rest):
        if checkpoint.round == 2:
            raise KeyboardInterrupt
        finish(self, checkpoint, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "finish_round", stop)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, None, 2, 20, **options)
    train(tmp_path, None, 2, 20, **options)
    spent = lines(tmp_path)[1]["epsilon"]
    assert exact_epsilon(5.0, 3, 1e-5) <= spent < 1.2 * exact_epsilon(5.0, 3, 1e-5)
    one = lines(tmp_path)[0]["epsilon"]
    assert one < 1.2 * exact_epsilon(5.0, 1, 1e-5)


# ── settings ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"noise_multiplier": 0.0}, "privacy.noise_multiplier must be above 0, not 0.0"),
        ({"clip_norm": -1.0}, "privacy.clip_norm must be above 0, not -1.0"),
        ({"delta": 0.0}, "privacy.delta must be between 0 and 1, not 0.0"),
        ({"epsilon": 0.0}, "privacy.epsilon must be above 0, not 0.0"),
        ({"quantile": 1.0}, "privacy.quantile must be between 0 and 1, not 1.0"),
        ({"noise": "client"}, "needs clipping: fixed and clip_on: client"),
        (
            {"noise": "client", "clip_on": "client", "sampling": "secret"},
            "set privacy.sampling: seeded",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        PrivacySettings(**{"clipping": "fixed", **wrong})


def test_settings_that_do_not_go_together_are_refused() -> None:
    on = PrivacySettings("fixed")
    on.check(AggregationSettings(), PeerSettings(), "int8")
    with pytest.raises(UserError, match=r"needs aggregation.kind: fedavg, not krum"):
        on.check(AggregationSettings("krum"), PeerSettings(), "fp32")
    with pytest.raises(UserError, match=r"needs federation.wire: fp32, not int8"):
        PrivacySettings("fixed", clip_on="client").check(
            AggregationSettings(), PeerSettings(), "int8"
        )
    PrivacySettings().check(AggregationSettings("krum"), PeerSettings(), "int8")


def test_noise_lowers_the_bound_of_lambda() -> None:
    noisy = PrivacySettings(clipping="fixed", lambda_max=4.0)
    assert Settings(privacy=noisy).adapter.lambda_max == 4.0
    low = AdapterSettings(lambda_max=2.0)
    assert Settings(privacy=noisy, adapter=low).adapter.lambda_max == 2.0
    assert Settings(privacy=replace(noisy, clipping="off")).adapter.lambda_max == 1000.0
    with pytest.raises(UserError, match=r"adapter.lambda_min \(5.0\) must be above 0 and below"):
        Settings(privacy=noisy, adapter=AdapterSettings(lambda_min=5.0))


def test_dp_accounting_is_asked_for_by_name(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(UserError, match=r'pip install "fedp2eft\[privacy\]"'):
        private(PrivacySettings("fixed"), tmp_path)
