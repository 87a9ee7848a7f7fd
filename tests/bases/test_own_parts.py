"""What a client has of a base for itself: a LoRA, rows of embeddings, their turn in the model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fedp2eft.adapters.weights import AdapterWeights, LayerWeights
from fedp2eft.bases import BASES, BaseTraining
from fedp2eft.bases.fedit import lora_layers
from fedp2eft.bases.parts import ROWS, Overlay, Replacement, own_rows
from fedp2eft.errors import UserError
from fedp2eft.settings.experiment import Settings
from in_memory import disturb, logits, settings, work, wrapped
from tiny import tiny

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
