"""Rounds, label counts and surveys in secure sums: the plain numbers, and no client's own."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from safetensors.torch import load_file
from scipy.stats import chisquare
from summing import Fate, Fated, gone
from test_dp import clipped, exact_epsilon
from toy import CLIENTS, FIRST, Notes, apart, honest, lines, rounds_on, settings
from toy import train as train_plain

from fedp2eft.errors import UserError
from fedp2eft.federation.client.sums import give_masked, serve_sums
from fedp2eft.federation.wire.keys import KEYS, SECURE, SHARES, UNMASK
from fedp2eft.federation.wire.layouts import noise_key, phase_layout, phase_part
from fedp2eft.federation.wire.messages import ARRAYS, CONFIG, DESCRIBE, PERSONALIZE, SURVEY
from fedp2eft.federation.wire.messages import LABELS as ASK_LABELS
from fedp2eft.federation.wire.sums import CUT, Noise, discrete_gaussian, rho_of
from fedp2eft.runtime.phases import PSG_PHASE
from fedp2eft.settings.reading import settings_text
from tiny_run import World
from turns import TRAIN_BASE, TRAIN_PSG
from watching import FinishedRun, watched

ON: dict[str, Any] = {
    "privacy__secure_sums": "on", "peers__max_norm": 0.0, "peers__max_examples": 0.0,
}  # fmt: skip
NOISY: dict[str, Any] = {
    **ON, "privacy__clipping": "fixed", "privacy__clip_on": "client", "privacy__noise": "client",
    "privacy__clip_norm": 0.5, "privacy__test_seed": 7,
}  # fmt: skip
Rows = Callable[[str], int]


def app(s: Any, rows: Rows, change: float) -> ClientApp:
    """The toy's clients, in secure sums."""
    made = ClientApp()
    serve_sums(made)

    @made.train("psg")
    def train(message: Message, context: Context) -> Message:
        client = str(context.node_config["client"])
        round_ = int(message.content.config_records[CONFIG]["server-round"])  # type: ignore[arg-type]
        sent = {n: a.numpy() for n, a in message.content.array_records[ARRAYS].items()}
        new = {n: sent[n] + change * (v - sent[n]) for n, v in honest(client, sent).items()}
        before, after = ({n: torch.tensor(v) for n, v in each.items()} for each in (sent, new))
        part = phase_part(
            PSG_PHASE, before, after, dict.fromkeys(PSG_PHASE.metrics, 0.5), rows(client),
            s.privacy, noise_key(s.privacy, "psg", round_, client),
        )  # fmt: skip
        return give_masked(
            message, context, s.privacy, part,
            lambda clients: phase_layout(PSG_PHASE, before, s.privacy, clients),
        )  # fmt: skip

    return made


def train(
    folder: Path, fate: Fate | None = None, rounds: int = 2, size: int = 5,
    rows: Rows = lambda _: 10, change: float = 1.0, reporter: Notes | None = None, **changes: Any,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """φ after the rounds; a folder that is there is resumed."""
    s = settings(**{**ON, **changes}, federation__rounds=rounds, federation__clients_per_round=size)
    names = CLIENTS[:6]
    grid = Fated(
        app(s, rows, change), [{"client": n} for n in names], {"settings": settings_text(s)}
    )
    grid.fate = fate
    return rounds_on(grid, folder, s, names, reporter)


def few_rows(client: str) -> int:
    return 3 + 7 * int(client[1:])


# ── the average ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["fedavg", "fedadam"])
@pytest.mark.parametrize("bits", [32, 64])
def test_the_average_is_the_plain_one(tmp_path: Path, kind: str, bits: int) -> None:
    """Weighted by N, and metrics with it, to the quantization step."""
    from toy import reply_of

    options = {"aggregation__kind": kind}
    here = train(tmp_path / "here", rows=few_rows, change=0.5, **options, privacy__secure_bits=bits)

    def half(client: str, _r: int, sent: Any, good: Any) -> Any:
        return reply_of(
            {n: (sent[n] + 0.5 * (v - sent[n])).astype(np.float32) for n, v in good.items()},
            examples=few_rows(client),
        )

    there = train_plain(
        tmp_path / "there", half, 2, 5, CLIENTS[:6], peers__max_norm=0.0, peers__max_examples=0.0,
        **options,
    )  # fmt: skip
    # 32 bits, 5 clients of up to 10,000 examples: steps of 2⁻¹⁵ of N·change, and N is 17 on average
    step = 2.0**-15 / 2 / 10 if bits == 32 else 0.0
    for name in FIRST:
        torch.testing.assert_close(here[name], there[name], rtol=0, atol=4 * step + 2e-7)
    assert apart(here, FIRST) > 1e-3
    for one, other in zip(lines(tmp_path / "here"), lines(tmp_path / "there"), strict=True):
        for metric in PSG_PHASE.metrics:
            assert one[metric] == pytest.approx(other[metric], abs=1e-5)
        assert one["clients"] == other["clients"] == 5
        assert one["bytes-up"] > other["bytes-up"] / 2
        assert one["bytes-down"] > other["bytes-down"]


def test_changes_and_weights_are_cut_and_counted(tmp_path: Path) -> None:
    limits = {"privacy__secure_clip": 0.2, "privacy__secure_max_examples": 20}
    found = train(tmp_path, rounds=1, size=6, rows=few_rows, **limits)
    [line] = lines(tmp_path)
    assert line["examples-cut"] == 3  # of 3, 10, 17, 24, 31 and 38 rows
    assert line["entries-cut"] == 6 * 17  # every change is about 0.3
    assert all(float(value.max()) == pytest.approx(0.2, abs=1e-5) for value in found.values())


def test_who_drops_out_is_not_in_the_average(tmp_path: Path) -> None:
    def fate(client: str, message: Message, reply: Message) -> Message:
        kind = message.metadata.message_type
        left = (client, kind) in (("c00", TRAIN_PSG), ("c01", UNMASK))
        return gone(message) if left else reply

    notes = Notes()
    found = train(tmp_path / "six", fate, 1, 6, reporter=notes)
    mean = {n: np.mean([honest(c, zeros())[n] for c in CLIENTS[1:6]], axis=0) for n in FIRST}
    for name in FIRST:
        np.testing.assert_allclose(found[name].numpy(), mean[name], atol=1e-4)
    [line] = lines(tmp_path / "six")
    assert line["clients"] == 5
    assert list(line["left-out"]) == ["c00"]  # what c01 sent is in the sum
    assert [text for text in notes.lines if text.startswith("Fault: Client c01")]


def zeros() -> dict[str, np.ndarray]:
    return {n: np.zeros(tuple(v.shape), np.float32) for n, v in FIRST.items()}


@pytest.mark.parametrize("stage", [KEYS, SHARES, TRAIN_PSG, UNMASK])
def test_a_round_below_the_threshold_ends_and_is_resumed(tmp_path: Path, stage: str) -> None:
    whole = train(tmp_path / "whole")
    asked: list[str] = []

    def fate(client: str, message: Message, reply: Message) -> Message:
        asked.append(message.metadata.message_type)
        second = asked.count(KEYS) > 5
        return gone(message) if second and message.metadata.message_type == stage else reply

    with pytest.raises(UserError, match=r"start again to repeat it|clients are usable") as error:
        train(tmp_path / "run", fate)
    assert "\n" not in str(error.value)
    assert len(lines(tmp_path / "run")) == 1
    again = train(tmp_path / "run")
    assert apart(again, whole) == 0  # the same bits, whatever keys and masks were
    assert [line["round"] for line in lines(tmp_path / "run")] == [1, 2]


def test_two_clients_a_round_are_refused_before_anything_is_sent(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a secure sum takes 3 or more"):
        train(tmp_path, lambda *_: pytest.fail("asked"), size=2)


# ── noise of the clients ────────────────────────────────────────────────────────────────────────


def test_noise_is_discrete_gaussian() -> None:
    """By its own probabilities, for a small and a large deviation."""
    found = discrete_gaussian(1.3, 20_000, b"k" * 32)
    values = np.arange(-5, 6)
    p = np.exp(-(values**2) / (2 * 1.3**2))
    p /= np.exp(-(np.arange(-40, 41) ** 2) / (2 * 1.3**2)).sum()
    counts = np.array([(found == value).sum() for value in values])
    rest = len(found) - counts.sum()
    assert chisquare([*counts, rest], np.array([*p, 1 - p.sum()]) * len(found)).pvalue > 1e-4
    large = discrete_gaussian(3e5, 20_000, b"m" * 32) / 3e5
    assert (abs(large.mean()), large.std()) == pytest.approx((0, 1), abs=0.03)
    assert (discrete_gaussian(3e5, 9, b"n" * 32) != discrete_gaussian(3e5, 9, b"o" * 32)).all()


def test_rho_is_that_of_the_noise_that_is_there() -> None:
    """All n take part: as a Gaussian of z; half of them: twice ρ; and what rounding adds."""
    noise = Noise(0.5, 2.0, 100, 64)
    assert noise.rho(100, 10) == pytest.approx(1 / (2 * 2.0**2))
    assert noise.rho(50, 10) == pytest.approx(2 * noise.rho(100, 10))
    coarse = Noise(0.5, 2.0, 100, 32)
    scale = coarse.block(()).scale(100)
    longer = (0.5 * scale + math.sqrt(4e10) / 2) / (0.5 * scale)
    assert coarse.rho(100, 40_000_000_000) == pytest.approx(longer**2 / 8)
    with pytest.raises(UserError, match=r"finer than the steps .* raise privacy.secure_bits"):
        Noise(1.0, 1e-7, 10_000, 32).block((1,))


@pytest.mark.parametrize("sigma", [0.5, 0.7, 1.5])
@pytest.mark.parametrize("order", [2, 8])
def test_rho_bounds_the_divergence_of_sums_of_discrete_gaussians(sigma: float, order: int) -> None:
    """Sums of discrete Gaussians are none; computed for two clients, and one moved by one step."""
    values = np.arange(-12, 13)
    one = np.exp(-(values**2) / (2 * sigma**2))
    both = np.convolve(one / one.sum(), one / one.sum())
    p, q = np.log(both[1:]), np.log(both[:-1])
    divergence = np.log(np.exp(order * p - (order - 1) * q).sum()) / (order - 1)
    assert divergence <= order * rho_of(1.0, sigma, 2, 1) * (1 + 1e-9)
    if sigma > 1:
        assert divergence == pytest.approx(order / (4 * sigma**2), rel=1e-3)


def test_the_noise_of_a_sum_has_the_deviation_that_one_server_would_add(tmp_path: Path) -> None:
    """z·C/n on the mean, though no client adds more than z·C/√n."""
    options = {**NOISY, "privacy__noise_multiplier": 2.0, "privacy__test_seed": None}
    noise = []
    for run in range(8):
        got = train(tmp_path / str(run), rounds=1, size=6, change=0.0, **options)
        noise += [value.flatten() for value in got.values()]
    found = torch.cat(noise)
    assert float(found.std()) == pytest.approx(2.0 * 0.5 / 6, rel=0.22)  # 3.5 standard errors


def test_changes_are_clipped_and_weigh_the_same(tmp_path: Path) -> None:
    quiet = {**NOISY, "privacy__noise_multiplier": 1e-4}
    got = train(tmp_path, rounds=1, size=6, rows=few_rows, **quiet)
    for name in FIRST:
        wanted = np.mean([clipped(client, 0.5)[name] for client in CLIENTS[:6]], axis=0)
        np.testing.assert_allclose(got[name].numpy(), wanted, atol=1e-4)


def test_epsilon_is_of_those_that_took_part(tmp_path: Path) -> None:
    """A client that dropped out spends nothing, and the others more for its missing noise."""
    left = lambda c, m, r: (  # noqa: E731
        gone(m) if (c, m.metadata.message_type) == ("c00", TRAIN_PSG) else r
    )
    options = {**NOISY, "privacy__noise_multiplier": 4.0}
    train(tmp_path / "all", rounds=2, size=6, **options)
    train(tmp_path / "five", left, rounds=2, size=6, **options)
    for rounds, (whole, fewer) in enumerate(
        zip(lines(tmp_path / "all"), lines(tmp_path / "five"), strict=True), 1
    ):
        for line, z in ((whole, 4.0), (fewer, 4.0 * math.sqrt(5 / 6))):
            exact = exact_epsilon(z, rounds, 1e-5)
            assert exact <= line["epsilon"] < 1.2 * exact


def test_training_ends_with_the_budget(tmp_path: Path) -> None:
    notes = Notes()
    options = {**NOISY, "privacy__noise_multiplier": 4.0, "privacy__epsilon": 3.0}
    train(tmp_path, rounds=9, size=6, reporter=notes, **options)
    done = lines(tmp_path)
    assert 0 < len(done) < 9
    assert done[-1]["epsilon"] <= 3.0
    assert "would pass the budget privacy.epsilon = 3" in notes.lines[-1]


def test_a_sum_is_spent_before_it_is_unmasked(tmp_path: Path) -> None:
    """A round that is stopped then, and repeated, counts twice."""
    options = {**NOISY, "privacy__noise_multiplier": 4.0, "privacy__test_seed": None}
    stop = lambda _c, m, r: gone(m) if m.metadata.message_type == UNMASK else r  # noqa: E731
    with pytest.raises(UserError):
        train(tmp_path, stop, rounds=1, size=6, **options)
    train(tmp_path, rounds=1, size=6, **options)
    [line] = lines(tmp_path)
    assert exact_epsilon(4.0, 2, 1e-5) <= line["epsilon"] < 1.2 * exact_epsilon(4.0, 2, 1e-5)


# ── a whole run ─────────────────────────────────────────────────────────────────────────────────

ASKING = ["auto", "gradient-shared", "lora-tuned", "label-prior", "fedp2eft-global"]
SUMMED = {TRAIN_BASE, TRAIN_PSG, ASK_LABELS, SURVEY}


@pytest.fixture(scope="module")
def two_runs(world: World, tmp_path_factory: Any) -> tuple[FinishedRun, FinishedRun]:
    """The same run, plain and with secure sums."""
    runs = []
    for name, changes in (("plain", {}), ("secure", ON)):
        s = world.settings(
            base__rounds=1, base__clients_per_round=4, federation__rounds=2,
            federation__clients_per_round=3, evaluation__methods=[*ASKING, "fedp2eft"],
            evaluation__ranks=[2], evaluation__pools=["unseen"], tuning__lrs=[3e-3, 2e-2],
            tuning__taus=[0.5, 1.0], auto__lrs=[2e-2], auto__epochs=[1], auto__min_rows=4,
            # A last bit of φ turns a rank, and with it what a client finds of an adapter.
            auto__try_adapter=False, privacy__secure_bits=64, **changes,
        )  # fmt: skip
        runs.append(watched(s, tmp_path_factory.mktemp(name) / "run"))
    return runs[0], runs[1]


def test_a_run_with_secure_sums_is_the_plain_one(two_runs) -> None:
    """Base, φ, q, what the surveys gave, and scores."""
    plain, secure = (run.folder for run in two_runs)
    for part in ("base", "psg"):
        ours, theirs = (load_file(f / part / "model.safetensors") for f in (secure, plain))
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-5)
    q, other = (json.loads((folder / "label-prior.json").read_text()) for folder in (plain, secure))
    assert q == other  # counts are exact
    choice, also = (
        json.loads((folder / "surveys" / "auto-r2.json").read_text())["prepared"]
        for folder in (plain, secure)
    )
    assert choice["chosen"] == pytest.approx(also["chosen"])
    # A last bit of φ can turn a rank of what is trained; base and prior train nothing.
    free, same = (np.array(table["table"])[:2, 4] for table in (choice, also))
    np.testing.assert_allclose(free, same, atol=1e-6)
    cells = {path.relative_to(plain) for path in plain.glob("cells/*/*.json")}
    assert {path.relative_to(secure) for path in secure.glob("cells/*/*.json")} == cells
    for path in cells:
        one, two = (json.loads((folder / path).read_text()) for folder in (plain, secure))
        assert one["loss"] == pytest.approx(two["loss"], abs=0.05), path


def test_parameters_counts_and_answers_leave_masked_alone(two_runs) -> None:
    """Every record of every reply; scores of personalization are the clients' own."""
    _, secure = two_runs
    kinds = {message.metadata.message_type for message, _ in secure.messages}
    assert kinds == SUMMED | {KEYS, SHARES, UNMASK, DESCRIBE, PERSONALIZE}
    for message, reply in secure.messages:
        kind, content = message.metadata.message_type, reply.content
        if kind in SUMMED:
            assert set(content) == {ARRAYS, SECURE}
            arrays = content.array_records[ARRAYS]
            assert CUT in arrays
            assert {array.numpy().dtype.kind for array in arrays.values()} == {"u"}
            assert set(content.config_records[SECURE]) == {"session", "unreadable"}
        elif kind in (KEYS, SHARES, UNMASK):
            assert set(content) == {SECURE}
        elif kind == DESCRIBE:
            assert content.metric_records["metrics"]["num-examples"] == 0
        else:
            assert not content.array_records


def test_every_masked_byte_of_a_run_is_uniform(two_runs) -> None:
    """Of each kind of message by itself; those of the plain run are not."""

    def p(run: FinishedRun, kind: str) -> float:
        raw = b"".join(
            array.numpy().tobytes()
            for message, reply in run.messages
            if message.metadata.message_type == kind
            for array in reply.content.array_records[ARRAYS].values()
        )
        return float(chisquare(np.bincount(np.frombuffer(raw, np.uint8), minlength=256)).pvalue)

    plain, secure = two_runs
    for kind in SUMMED:
        assert p(secure, kind) > 1e-5, kind
        assert p(plain, kind) < 1e-9, kind


def test_what_is_asked_outside_of_a_sum_is_refused(world: World) -> None:
    """A server that leaves the protocol out gets nothing."""
    from fedp2eft.federation.client_app import app as client_app

    config = {"settings": settings_text(world.settings(**ON))}
    grid = Fated(client_app, [{"client": "de-seen-00"}], config)
    question = Message(RecordDict({CONFIG: ConfigRecord({"source": "counts"})}), 2, ASK_LABELS)
    [reply] = grid.pull_messages(grid.push_messages([question]))
    assert "only leaves in a sum" in reply.error.reason
