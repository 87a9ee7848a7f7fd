"""What each base trains, what of it travels, and the model that it ends with."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor, nn

from fedp2eft.adapters.btlora import BTLora
from fedp2eft.adapters.weights import AdapterWeights, LayerWeights
from fedp2eft.bases import BASES, BaseTraining, LocalWork, copy_parameters, rate
from fedp2eft.bases.fedit import lora_layers
from fedp2eft.bases.parts import ROWS, Overlay, Replacement, own_rows
from fedp2eft.client.descent import adamw
from fedp2eft.errors import UserError
from fedp2eft.settings.experiment import AdapterSettings, BaseSettings, LocalSettings, Settings
from fedp2eft.settings.reading import settings_from
from tiny import TASK, tiny, tiny_rows

ROWS_OF_CLIENT = [6, 9, 4, 12, 7, 5, 8]
IDS = torch.arange(1, 13).reshape(2, 6)
LORA = ("fedit", "ffa-lora", "feddpa-t")


def settings(kind: str, **base: object) -> Settings:
    """Settings under which a few steps move something, without dropout."""
    options = {"lr": 1e-2, "batch_size": 4, "epochs": 1, "lora_rank": 4, "lora_alpha": 6.0}
    return Settings(
        base=BaseSettings(kind=kind, **options | base),  # type: ignore[arg-type]
        local=LocalSettings(dropout=False),
        adapter=AdapterSettings(r_max=16),
    )


def work(s: Settings, client: str = "c0", seed: int = 0) -> LocalWork:
    return LocalWork(client, TASK, tiny_rows(ROWS_OF_CLIENT, seed), s, torch.float32, 5)


def wrapped(s: Settings, model: str = "bert") -> tuple[BaseTraining, nn.Module]:
    base = BASES[s.base.kind]
    return base, base.wrap(tiny(model, dropout=0.0).eval(), s)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS).logits.double()


def disturb(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in lora_layers(model):
            layer.B.add_(torch.randn(layer.B.shape, generator=generator) * 0.3)


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


# ── FedDPA-T's local LoRA ───────────────────────────────────────────────────────────────────────


def local_part(client: str, seed: int) -> tuple[BaseTraining, nn.Module, dict[str, Tensor]]:
    s = settings("feddpa-t")
    base, model = wrapped(s)
    part = base.own_part(lambda: model, work(s, client, seed))
    return base, model, part


def test_a_local_lora_is_the_clients_own_and_the_same_bits_each_time() -> None:
    base, model, part = local_part("c0", 0)
    again = base.own_part(lambda: model, work(settings("feddpa-t"), "c0", 0))  # after another run
    other = base.own_part(lambda: model, work(settings("feddpa-t"), "c1", 0))  # on the same rows
    assert set(part) == {f"{x.name}.lora_{ab}" for x in lora_layers(model) for ab in "AB"}
    assert all(torch.equal(part[key], again[key]) for key in part)
    assert not any(torch.equal(part[key], other[key]) for key in part)


@pytest.mark.parametrize("model_kind", ["bert", "gpt2"])
def test_the_merged_local_lora_gives_the_adapted_models_logits(model_kind: str) -> None:
    s = settings("feddpa-t")
    base, model = wrapped(s, model_kind)
    disturb(model)
    adapted = logits(model)
    scale = s.base.lora_alpha / s.base.lora_rank
    part = {
        key: value
        for x in lora_layers(model)
        for key, value in (
            (f"{x.name}.lora_A", x.A.detach().clone()),
            (f"{x.name}.lora_B", x.B.detach() * scale),
        )
    }
    plain = tiny(model_kind, dropout=0.0)
    overlay = Overlay(dict(plain.named_parameters()))
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    overlay.put(base.replacements(lambda: model, part))
    assert torch.allclose(logits(plain), adapted, atol=1e-5, rtol=0)
    overlay.restore()
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())


def test_a_bf16_base_gets_the_fp32_sum_rounded_once() -> None:
    """From weights that are rounded already, changes below half a step would be lost."""
    base, model, _ = local_part("c0", 0)
    name = "bert.encoder.layer.0.intermediate.dense"
    layer = next(x for x in lora_layers(model) if x.name == name)
    W = layer.module.get_base_layer().weight.detach()
    part = {f"{x.name}.lora_{ab}": torch.zeros(()) for x in lora_layers(model) for ab in "AB"}
    for x in lora_layers(model):
        part[f"{x.name}.lora_A"] = torch.ones_like(x.A)
        part[f"{x.name}.lora_B"] = torch.full_like(x.B, 5e-6)
    frozen = tiny("bert").bfloat16()
    parameters = dict(frozen.named_parameters())
    Overlay(parameters).put(base.replacements(lambda: model, part))
    got = parameters[f"{name}.weight"]
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, (W + 4 * 5e-6).bfloat16())
    assert not torch.equal(got, (W.bfloat16() + 4 * 5e-6).bfloat16())


def some_weights(model: nn.Module, rank: int) -> AdapterWeights:
    generator = torch.Generator().manual_seed(3)
    layers = []
    for number, x in enumerate(lora_layers(model)):
        k = number % (rank + 1)
        A = torch.randn((k, x.A.shape[1]), generator=generator)
        B = torch.randn((x.B.shape[0], k), generator=generator)
        layers.append(LayerWeights(x.name, A, B, torch.rand(k, generator=generator)))
    return AdapterWeights(tuple(layers), 2.0)


def test_an_exported_adapter_is_the_sum_of_both_and_names_layers_that_only_one_has() -> None:
    base, model, part = local_part("c0", 0)
    weights = some_weights(model, 3)
    fewer = replace(weights, layers=weights.layers[2:])  # adapter.target_modules left two out
    carried = base.carried(fewer, part)
    by_name = {layer.name: layer for layer in fewer.layers}
    assert carried.scaling == 1.0
    assert {layer.name for layer in carried.layers} == {layer.name for layer in weights.layers}
    for layer in carried.layers:
        wanted = part[f"{layer.name}.lora_B"] @ part[f"{layer.name}.lora_A"]
        if own := by_name.get(layer.name):
            wanted = wanted + 2.0 * own.B @ torch.diag(own.lam) @ own.A
        assert torch.allclose(layer.B @ torch.diag(layer.lam) @ layer.A, wanted, atol=1e-5)


# ── DEPT-SPEC's rows ────────────────────────────────────────────────────────────────────────────


def dept_round(
    s: Settings, model: nn.Module, part: dict[str, Tensor], seed: int
) -> dict[str, Tensor]:
    base = BASES["dept-spec"]
    with own_rows(base.staying(model), part) as rows:
        work(s, seed=seed).fine_tune(model, base.trained(model, s.base).values(), s.base.lr)
    return rows


def test_rows_that_the_text_never_touches_are_not_kept() -> None:
    s = settings("dept-spec")
    _, model = wrapped(s)
    words = "bert.embeddings.word_embeddings.weight"
    common = {name: p.detach().clone() for name, p in BASES["dept-spec"].staying(model).items()}
    first, second = dept_round(s, model, {}, 0), dept_round(s, model, {}, 1)
    for part, seed in ((first, 0), (second, 1)):
        used = set(work(s, seed=seed).data.tokens.tolist())
        assert set(part[words + ROWS].tolist()) == used
        assert len(part[words]) == len(used) < len(common[words])
        assert part["bert.embeddings.position_embeddings.weight" + ROWS].tolist() == list(range(12))
        assert part["bert.embeddings.token_type_embeddings.weight" + ROWS].tolist() == [0]
        for name, value in common.items():
            assert not torch.equal(part[name], value[part[name + ROWS]])
    assert not torch.equal(first[words][0], second[words][0])
    # the shared model has nobody's rows
    for name, p in BASES["dept-spec"].staying(model).items():
        assert torch.equal(p, common[name])


def test_a_clients_next_round_starts_from_its_own_rows() -> None:
    s = settings("dept-spec")
    _, model = wrapped(s)
    first = dept_round(s, model, {}, 0)
    before = {name: p.detach().clone() for name, p in BASES["dept-spec"].staying(model).items()}
    with own_rows(BASES["dept-spec"].staying(model), first) as rows:
        for name, p in BASES["dept-spec"].staying(model).items():
            wanted = before[name].clone()
            wanted[first[name + ROWS]] = first[name]
            assert torch.equal(p, wanted)
    assert all(torch.equal(rows[key], first[key]) for key in first)
    assert set(rows) == set(first)


def test_an_error_leaves_the_common_rows_and_keeps_none() -> None:
    matrix = nn.Parameter(torch.arange(6.0).reshape(3, 2))
    kept = []

    def stopped() -> None:
        with own_rows({"m": matrix}, {}) as rows:
            kept.append(rows)
            matrix.data.add_(1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert kept == [{}]
    assert torch.equal(matrix, torch.arange(6.0).reshape(3, 2))


def test_lora_on_an_embedding_cannot_be_exported_with_rows_of_it() -> None:
    rows = {"wte.weight": torch.ones(1, 2), "wte.weight" + ROWS: torch.tensor([1])}
    layer = LayerWeights("wte", torch.ones(1, 3), torch.ones(2, 1), torch.ones(1), embedding=True)
    with pytest.raises(UserError, match="leave it out of adapter"):
        BASES["dept-spec"].carried(AdapterWeights((layer,), 2.0), rows)


# ── the overlay ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clients_take_turns_without_drift(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    parameters = {n: nn.Parameter(torch.randn(5, 3, generator=generator).to(dtype)) for n in "ab"}
    pristine = {name: p.detach().clone() for name, p in parameters.items()}
    overlay = Overlay(parameters)
    for turn in range(20):
        values = torch.randn(5, 3, generator=generator) * 100
        rows = torch.tensor([0, 3])
        changes = {
            "a": Replacement(values),
            "b": Replacement(values[:2], rows),
        }
        chosen = {name: changes[name] for name in ("ab", "a", "b", "")[turn % 4]}
        overlay.put(iter(chosen.items()))
        for name, p in parameters.items():
            wanted = pristine[name].clone()
            if name in chosen and name == "a":
                wanted = values.to(dtype)
            elif name in chosen:
                wanted[rows] = values[:2].to(dtype)
            assert torch.equal(p, wanted)
    overlay.restore()
    assert all(torch.equal(p, pristine[name]) for name, p in parameters.items())


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
