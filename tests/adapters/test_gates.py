"""Every kind of layer computes W x + s·B·diag(λ)·A·x, and its gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedp2eft.adapters.btlora import FULL, BTLora
from fedp2eft.adapters.gates import adapted_layers
from fedp2eft.settings.experiment import AdapterSettings
from tiny import TASK, disturb, random_lambda, tiny, tiny_rows

KINDS = {
    "linear": ("bert", ["query"], nn.Linear),
    "conv1d": ("gpt2", ["c_attn"], Conv1D),
    "embedding": ("gpt2", ["wte"], nn.Embedding),
}
SCALING = 3.0
QUANTIZED_WIDTH = 128  # 4-bit kernels for the CPU want multiples of 64


def adapted(kind: str, *, clamp_forward: bool = True, layerwise: bool = False) -> BTLora:
    model, targets, expected = KINDS[kind]
    settings = AdapterSettings(
        r_max=4, scaling=SCALING, target_modules=targets, layerwise=layerwise, lambda_max=1.5
    )
    bt = BTLora(tiny(model).eval(), settings, clamp_forward=clamp_forward)
    assert all(isinstance(layer.module.base_layer, expected) for layer in bt.layers)
    disturb(bt)
    lam = random_lambda(bt, low=0.1, high=1.4)
    bt.set_lambda(lam[:, :1] if layerwise else lam)
    return bt


def an_input(kind: str, width: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    if kind == "embedding":
        return torch.randint(0, 40, (2, 5), generator=generator)
    return torch.randn(2, 5, width, generator=generator)


def by_hand(kind: str, base: nn.Module, x: Tensor, A: Tensor, B: Tensor, lam: Tensor) -> Tensor:
    weight = base.weight.detach()
    if kind == "embedding":
        return weight[x] + SCALING * (B @ torch.diag(lam) @ A).T[x]
    W = weight.T if kind == "conv1d" else weight
    return x @ (W + SCALING * B @ torch.diag(lam) @ A).T + base.bias.detach()


@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_gradients_equal_the_formula(kind) -> None:
    bt, x = adapted(kind), an_input(kind)
    layer = bt.layers[1 % len(bt.layers)]
    row = bt.layers.index(layer)
    A, B = (t.detach().clone().requires_grad_() for t in (layer.A, layer.B))
    lam = bt.lam[row].detach().clone().requires_grad_()
    got, want = layer.module(x), by_hand(kind, layer.module.base_layer, x, A, B, lam)
    assert (want - layer.module.base_layer(x)).abs().max() > 0.1
    assert torch.allclose(got, want, atol=1e-5, rtol=0)
    upstream = torch.randn(got.shape, generator=torch.Generator().manual_seed(4))
    got.backward(upstream)
    want.backward(upstream)
    for mine, theirs in ((layer.A.grad, A.grad), (layer.B.grad, B.grad)):
        assert torch.allclose(mine, theirs, atol=1e-5)
    expected = torch.zeros_like(bt.lam)
    expected[row] = lam.grad
    assert torch.allclose(bt.lam.grad, expected, atol=1e-4)
    assert lam.grad.abs().min() > 1e-3


def test_a_layerwise_lambda_scales_every_rank_and_collects_all_their_gradients() -> None:
    bt, x = adapted("linear", layerwise=True), an_input("linear")
    layer = bt.layers[0]
    lam = bt.lam[0].detach().clone().requires_grad_()
    want = by_hand("linear", layer.module.base_layer, x, layer.A, layer.B, lam.expand(4))
    got = layer.module(x)
    assert torch.allclose(got, want, atol=1e-5, rtol=0)
    got.square().sum().backward()
    want.square().sum().backward()
    assert torch.allclose(bt.lam.grad[0], lam.grad, rtol=1e-4)


@pytest.mark.parametrize(("clamp", "seen"), [(True, [1e-4, 0.5, 1.5, 1.5]), (False, None)])
def test_forward_sees_lambda_clamped_or_raw_with_a_gradient_in_both(clamp, seen) -> None:
    bt, x = adapted("linear", clamp_forward=clamp), an_input("linear")
    raw = torch.tensor([-0.7, 0.5, 1.5, 9.0])
    bt.set_lambda(raw)
    layer = bt.layers[0]
    lam = torch.tensor(seen) if seen else raw
    lam = lam.clone().requires_grad_()
    want = by_hand("linear", layer.module.base_layer, x, layer.A, layer.B, lam)
    got = layer.module(x)
    assert torch.allclose(got, want, atol=1e-4, rtol=0)
    got.sum().backward()
    want.sum().backward()
    assert torch.allclose(bt.lam.grad[0], lam.grad, rtol=1e-4)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_logits_equal_those_of_the_base_with_the_product_added_to_its_weights(kind) -> None:
    bt = BTLora(tiny(kind).eval(), AdapterSettings(r_max=3))
    disturb(bt)
    bt.set_lambda(random_lambda(bt))
    plain = tiny(kind).eval()
    ids = torch.arange(1, 13).reshape(2, 6)
    with torch.no_grad():
        before = plain(input_ids=ids).logits
        for layer, lam in zip(bt.layers, bt.lam, strict=True):
            product = 2 * layer.B @ torch.diag(lam) @ layer.A
            weight = plain.get_submodule(layer.name).weight
            weight.add_(product.T if kind == "gpt2" else product)
        want, got = plain(input_ids=ids).logits, bt.model(input_ids=ids).logits
    assert (want - before).abs().max() > 0.05
    assert torch.allclose(got, want, atol=1e-5, rtol=0)


def test_layers_come_in_module_order_with_the_names_of_the_base() -> None:
    plain, bt = tiny("bert"), BTLora(tiny("bert"), AdapterSettings(r_max=2))
    want = [name for name, module in plain.named_modules() if isinstance(module, nn.Linear)]
    assert [layer.name for layer in adapted_layers(bt.model, FULL)] == want


def test_half_precision_base_keeps_the_adapter_in_float32() -> None:
    bt = BTLora(tiny("bert").to(torch.bfloat16), AdapterSettings(r_max=2))
    trained = [*bt.A, *bt.B, bt.lam]
    with bt.trimmed(bt.rank_lambda(), torch.ones(len(bt.names), 2, dtype=torch.bool)) as trimmed:
        trained += trimmed.parameters()
    assert {parameter.dtype for parameter in trained} == {torch.float32}


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_gradient_checkpointing_gives_the_same_gradients(kind) -> None:
    gradients = []
    for checkpointing in (False, True):
        bt = BTLora(tiny(kind, dropout=0.0), AdapterSettings(r_max=2))
        disturb(bt)
        bt.set_lambda(random_lambda(bt))
        if checkpointing:
            bt.model.gradient_checkpointing_enable({"use_reentrant": False})
            assert bt.model.is_activation_checkpointing
        bt.model.train()
        batch = TASK.batch(tiny_rows([5, 3, 6]), [0, 1, 2])
        batch.pop("labels")
        bt.model(**batch, use_cache=False).logits.square().mean().backward()
        gradients.append([p.grad for p in (*bt.A, *bt.B, bt.lam)])
    for without, with_ in zip(*gradients, strict=True):
        assert without.abs().max() > 0
        assert torch.allclose(without, with_, atol=1e-7, rtol=1e-5)


def quantized(bits: int) -> nn.Module:
    """The tiny Bert with its linear layers in 8 or 4 bits."""
    bnb = pytest.importorskip("bitsandbytes")
    model = tiny("bert", dropout=0.0, width=QUANTIZED_WIDTH).eval()
    for name, old in list(model.named_modules()):
        if not isinstance(old, nn.Linear) or name == "classifier":
            continue
        shape = (old.in_features, old.out_features)
        if bits == 4:
            new = bnb.nn.Linear4bit(*shape, compute_dtype=torch.float32, quant_type="nf4")
            new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4")
        else:
            new = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False)
            new.weight = bnb.nn.Int8Params(
                old.weight.data, requires_grad=False, has_fp16_weights=False
            )
        new.bias = old.bias
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new.to("cpu"))
    setattr(model, f"is_loaded_in_{bits}bit", True)
    return model


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_layers_equal_the_formula(bits) -> None:
    bt = BTLora(quantized(bits), AdapterSettings(r_max=3, scaling=SCALING))
    disturb(bt)
    bt.set_lambda(random_lambda(bt))
    layer, x = bt.layers[0], an_input("linear", QUANTIZED_WIDTH)
    assert str(bits) in type(layer.module).__name__
    A, B = (t.detach().clone().requires_grad_() for t in (layer.A, layer.B))
    lam = bt.lam[0].detach().clone().requires_grad_()
    got = layer.module(x)
    want = layer.module.base_layer(x) + SCALING * x @ (B @ torch.diag(lam) @ A).T
    assert torch.allclose(got, want, atol=1e-5, rtol=0)
    got.square().sum().backward()
    want.square().sum().backward()
    assert torch.allclose(bt.lam.grad[0], lam.grad, rtol=1e-3)
    assert torch.allclose(layer.A.grad, A.grad, rtol=1e-3, atol=1e-4)
    assert torch.allclose(layer.B.grad, B.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_models_can_be_trimmed(bits) -> None:
    bt = BTLora(quantized(bits), AdapterSettings(r_max=3))
    ids = torch.arange(1, 13).reshape(2, 6)
    keep = torch.zeros(len(bt.names), 3, dtype=torch.bool)
    keep[1, 2] = keep[4, :2] = True
    with torch.no_grad():
        before = bt.model(input_ids=ids).logits
        with bt.trimmed(random_lambda(bt), keep) as trimmed:
            assert torch.equal(bt.model(input_ids=ids).logits, before)  # B = 0
            for parameter in trimmed.parameters():
                parameter.add_(torch.randn(parameter.shape))
            assert not torch.equal(bt.model(input_ids=ids).logits, before)
        assert torch.equal(bt.model(input_ids=ids).logits, before)
