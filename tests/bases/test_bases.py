"""What each base trains, what of it travels, and the model that it ends with."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor, nn

from fedp2eft.adapters.btlora import BTLora
from fedp2eft.bases import BASES, copy_parameters, rate
from fedp2eft.bases.fedit import lora_layers
from fedp2eft.client.descent import adamw
from fedp2eft.errors import UserError
from fedp2eft.settings.experiment import AdapterSettings, BaseSettings, Settings
from fedp2eft.settings.reading import settings_from
from in_memory import disturb, logits, settings, work, wrapped
from tiny import TASK, tiny

LORA = ("fedit", "ffa-lora", "feddpa-t")


# ── what is trained and what travels ────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", BASES)
def test_a_wrapped_model_starts_as_the_plain_one(kind: str) -> None:
    _, model = wrapped(settings(kind))
    assert torch.equal(logits(model), logits(tiny("bert", dropout=0.0)))
    assert not model.training


def test_names_and_shapes_that_travel() -> None:
    plain = {name: tuple(p.shape) for name, p in tiny("bert").named_parameters()}
    linears = {n: m for n, m in tiny("bert").named_modules() if isinstance(m, nn.Linear)}
    A = {f"{name}.lora_A": (4, m.in_features) for name, m in linears.items()}
    B = {f"{name}.lora_B": (m.out_features, 4) for name, m in linears.items()}
    assert {"classifier.lora_A", "bert.pooler.dense.lora_A"} < set(A)
    kinds = ("word", "position", "token_type")
    embeddings = {f"bert.embeddings.{kind}_embeddings.weight" for kind in kinds}
    wanted = {
        "standard-fl": plain,
        "fedit": A | B,
        "ffa-lora": B,
        "feddpa-t": A | B,
        "dept-spec": {n: shape for n, shape in plain.items() if n not in embeddings},
        "none": {},
    }
    assert set(wanted) == set(BASES)
    for kind, names in wanted.items():
        s = settings(kind)
        base, model = wrapped(s)
        got = {name: tuple(p.shape) for name, p in base.travelling(model, s.base).items()}
        assert got == names, kind
        assert set(base.staying(model)) == (embeddings if kind == "dept-spec" else set())


@pytest.mark.parametrize(
    ("targets", "parts"),
    [
        (["layer.1", "classifier"], ("bert.encoder.layer.1.", "classifier.")),
        (r".*layer\.1\..*dense|classifier", ("bert.encoder.layer.1.", "classifier.")),
    ],
)
def test_target_modules_alone_are_trained_and_sent(
    targets: list[str] | str, parts: tuple[str, ...]
) -> None:
    s = settings("standard-fl", target_modules=targets)
    base, model = wrapped(s)
    named = [name for name, _ in model.named_parameters() if name.startswith(parts)]
    if isinstance(targets, str):  # a regular expression names whole modules: no LayerNorm, no query
        named = [name for name in named if name.split(".")[-2] in ("dense", "classifier")]
    assert list(base.trained(model, s.base)) == named
    assert set(base.travelling(model, s.base)) == set(named)
    with pytest.raises(UserError, match=r"base\.target_modules is \['nowhere'\]"):
        base.trained(model, BaseSettings(target_modules=["nowhere"]))


@pytest.mark.parametrize("kind", LORA)
def test_lora_goes_on_target_modules_alone(kind: str) -> None:
    s = settings(kind, target_modules=["query", "classifier"])
    names = [layer.name for layer in lora_layers(wrapped(s)[1])]
    assert names
    assert all(name.endswith(("query", "classifier")) for name in names)
    with pytest.raises(UserError, match=r"base\.target_modules"):
        wrapped(settings(kind, target_modules=["nowhere"]))


@pytest.mark.parametrize("kind", ["standard-fl", *LORA, "dept-spec"])
def test_a_local_run_changes_what_is_trained_and_nothing_else(kind: str) -> None:
    s = settings(kind)
    base, model = wrapped(s)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = base.trained(model, s.base)
    work(s).fine_tune(model, trained.values(), 1e-2)
    ids = {id(p) for p in trained.values()}
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != (id(p) in ids), name


def test_a_causal_lms_tied_output_layer_stays_with_its_embedding() -> None:
    s = settings("dept-spec")
    base, model = wrapped(s, "gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    assert set(base.staying(model)) == {"transformer.wte.weight", "transformer.wpe.weight"}
    assert not {"lm_head.weight", "transformer.wte.weight"} & set(base.travelling(model, s.base))


@pytest.mark.parametrize("kind", LORA)
def test_every_process_starts_from_the_same_A(kind: str) -> None:
    s = settings(kind)
    torch.manual_seed(1)
    one = lora_layers(wrapped(s)[1])
    plain = tiny("bert")
    torch.manual_seed(2)
    state = torch.get_rng_state()
    two = lora_layers(BASES[kind].wrap(plain, s))
    assert torch.equal(torch.get_rng_state(), state)
    other = lora_layers(wrapped(replace(s, adapter=AdapterSettings(r_max=16, seed=1)))[1])
    full = BTLora(tiny("bert"), s.adapter).layers
    for a, b, c, d in zip(one, two, other, full, strict=True):
        assert torch.equal(a.A, b.A)
        assert not torch.equal(a.A, c.A)
        assert not torch.allclose(
            a.A, d.A[:4]
        )  # not the directions that personalization starts from
        assert not a.B.any()


# ── averaging ───────────────────────────────────────────────────────────────────────────────────


def locally(s: Settings, client: int, round_: int, numbers: dict[str, Tensor]) -> dict[str, Tensor]:
    """One client's round, by the package."""
    base, model = wrapped(s)
    mine = base.travelling(model, s.base)
    copy_parameters(mine, numbers)
    trained = base.trained(model, s.base).values()
    work(s, seed=client).fine_tune(model, trained, rate(s.base, round_))
    return {name: p.detach().clone() for name, p in mine.items()}


@pytest.mark.parametrize("kind", ["fedit", "ffa-lora"])
def test_a_local_run_of_lora_is_that_of_plain_matrices(kind: str) -> None:
    """Recomputed without PEFT: W + (alpha/r)·B·A in a functional call, AdamW by hand."""
    s = settings(kind, schedule="cosine", rounds=4)
    base, model = wrapped(s)
    first = {n: p.detach().clone() for n, p in base.travelling(model, s.base).items()}
    got = locally(s, 0, 3, first)

    plain = tiny("bert", dropout=0.0).eval()
    W = {name: p.detach() for name, p in plain.named_parameters()}
    A = {layer.name: layer.A.detach().clone() for layer in lora_layers(model)}
    B = {name: torch.zeros(len(W[f"{name}.weight"]), 4) for name in A}
    leaves = [*A.values(), *B.values()] if kind == "fedit" else list(B.values())
    for leaf in leaves:
        leaf.requires_grad_()
    optimizer = adamw([{"params": leaves, "lr": 1e-2 * 0.5}])  # cos(π·2/4) = 0
    job = work(s)
    for rows in job.order():
        optimizer.zero_grad()
        weights = W | {f"{n}.weight": W[f"{n}.weight"] + 1.5 * B[n] @ A[n] for n in A}
        batch = TASK.batch(job.data, rows)
        labels = batch.pop("labels")
        out = torch.func.functional_call(plain, weights, (), batch).logits
        nn.functional.cross_entropy(out, labels).backward()
        nn.utils.clip_grad_norm_(leaves, 1.0)
        optimizer.step()
    for name in A:
        assert torch.allclose(got[f"{name}.lora_B"], B[name], atol=1e-5), name
        if kind == "fedit":
            assert torch.allclose(got[f"{name}.lora_A"], A[name], atol=1e-5), name
    assert set(got) == set(first)


def test_ffa_loras_A_is_the_same_on_all_clients_and_after_training() -> None:
    s = settings("ffa-lora")
    base, model = wrapped(s)
    start = [layer.A.detach().clone() for layer in lora_layers(model)]
    for client in range(3):
        work(s, seed=client).fine_tune(model, base.trained(model, s.base).values(), 1e-1)
        for layer, A in zip(lora_layers(model), start, strict=True):
            assert torch.equal(layer.A, A)
            assert layer.B.any()


# ── the model at the end ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("model_kind", ["bert", "gpt2", "llama"])
def test_merging_keeps_the_logits(model_kind: str, tmp_path) -> None:
    base, model = wrapped(settings("fedit"), model_kind)
    untouched = logits(model)
    disturb(model)
    adapted = logits(model)
    assert (adapted - untouched).abs().max() > 0.05
    plain = base.merged(model)
    assert torch.allclose(logits(plain), adapted, atol=1e-5, rtol=0)
    reference = tiny(model_kind)
    assert type(plain) is type(reference)
    assert set(plain.state_dict()) == set(reference.state_dict())
    plain.save_pretrained(tmp_path)
    again = type(reference).from_pretrained(tmp_path)
    assert torch.allclose(logits(again), adapted, atol=1e-5, rtol=0)


# ── settings ────────────────────────────────────────────────────────────────────────────────────


def test_off_the_shelf_is_none() -> None:
    made = settings_from({"base": {"kind": "off-the-shelf"}})
    assert made == settings_from({"base": {"kind": "none"}})
    assert made.base.kind == "none"
    assert set(BASES) == {
        "standard-fl", "fedit", "ffa-lora", "feddpa-t", "dept-spec", "none",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kind", "fedavg"), ("steps", 0), ("epochs", -1), ("batch_size", 0), ("lr", 0.0),
        ("schedule", "linear"), ("lora_rank", 0), ("lora_alpha", 0.0), ("lora_dropout", 1.0),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(name: str, value: object) -> None:
    with pytest.raises(UserError, match=name):
        settings_from({"base": {name: value}})


def test_defaults_are_the_papers() -> None:
    s = asdict(BaseSettings())
    assert (s["lora_rank"], s["lora_alpha"], s["lora_dropout"]) == (8, 8.0, 0.05)
    assert (s["rounds"], s["epochs"], s["lr"], s["schedule"]) == (100, 2, 5e-5, "constant")


def test_cosine_over_the_rounds() -> None:
    s = BaseSettings(lr=2e-5, rounds=200, schedule="cosine")
    assert rate(s, 1) == 2e-5
    assert rate(s, 101) == pytest.approx(1e-5)
    assert 0 < rate(s, 200) < 2e-9
    rates = [rate(s, t) for t in range(1, 201)]
    assert rates == sorted(rates, reverse=True)
    assert {rate(replace(s, schedule="constant"), t) for t in range(1, 201)} == {2e-5}


@pytest.mark.parametrize(("steps", "accumulate"), [(1, 1), (3, 4), (10, 4), (2, 1)])
def test_a_limit_on_steps_takes_as_many_passes_as_it_needs(steps: int, accumulate: int) -> None:
    s = settings("fedit", steps=steps)
    s = replace(s, local=replace(s.local, accumulate=accumulate))
    taken: list[float] = []
    base, model = wrapped(s)
    job = replace(work(s), on_step=taken.append)
    mean = job.fine_tune(model, base.trained(model, s.base).values(), 1e-3)
    assert len(taken) == steps
    assert mean == pytest.approx(sum(taken) / steps)
    order = job.order()
    assert len(order) == steps * accumulate
    unlimited = replace(s, base=replace(s.base, steps=None, epochs=20))
    for got, wanted in zip(order, work(unlimited).order(), strict=False):
        assert got.tolist() == wanted.tolist()
