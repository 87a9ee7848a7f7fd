"""LoRA's three products in one function: PEFT's own numbers, and its own forward pass elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from torch import Tensor, nn

from fedp2eft.adapters import low_rank
from fedp2eft.adapters.low_rank import FusedLinear, _Products, fuse
from tiny import double_adapter, tiny

WIDE, NARROW, RANK = 5, 4, 3


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDE, NARROW)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def layer(**options: Any) -> Any:
    """A lora.Linear whose B is not 0."""
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=7, target_modules=["layer"], **options)
    found: Any = get_peft_model(Model().double(), config).base_model.model.layer
    nn.init.normal_(found.lora_B["default"].weight)
    return found.double()


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """One entry a call of the fused function."""
    seen: list[int] = []
    apply = _Products.apply
    monkeypatch.setattr(
        low_rank._Products, "apply", lambda *args: seen.append(1) or apply(*args), raising=False
    )
    return seen


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6, WIDE), (2, 3, WIDE)])
def test_output_and_gradients_are_pefts(shape: tuple[int, ...], bias: bool, calls) -> None:
    module = layer()
    if not bias:
        module.base_layer.bias = None
    x = inputs(*shape)
    leaves = [x, module.lora_A["default"].weight, module.lora_B["default"].weight]
    found = []
    for turn in range(2):
        if turn:
            fuse(module)
        out = module(x)
        found.append([out, *torch.autograd.grad((out**3).sum(), leaves)])
    assert len(calls) == 1
    for plain, fused in zip(*found, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-12)


def test_first_and_second_derivatives() -> None:
    """FedL2P differentiates a gradient."""
    given = inputs(6, WIDE), inputs(RANK, WIDE), inputs(NARROW, RANK)
    weight, bias = inputs(NARROW, WIDE).detach(), inputs(NARROW).detach()

    def products(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return _Products.apply(x, weight, bias, A, B, 2.5)

    assert torch.autograd.gradcheck(products, given)
    assert torch.autograd.gradgradcheck(products, given)


def test_the_gradient_of_a_frozen_input_is_not_computed() -> None:
    module = layer()
    fuse(module)
    x = inputs(6, WIDE).detach()
    module(x).sum().backward()
    assert x.grad is None
    assert module.lora_A["default"].weight.grad is not None


def off(module: Any) -> None:
    module.enable_adapters(False)


def none_active(module: Any) -> None:
    module.set_adapter([])


def merged(module: Any) -> None:
    module.merge()


def other_dtype(module: Any) -> None:
    module.lora_B["default"].weight.data = module.lora_B["default"].weight.data.float()
    module.lora_A["default"].weight.data = module.lora_A["default"].weight.data.float()


def trained_base(module: Any) -> None:
    module.base_layer.weight.requires_grad_(True)


@pytest.mark.parametrize("change", [off, none_active, merged, other_dtype, trained_base])
def test_pefts_own_pass_serves_what_the_function_does_not(change: Any, calls) -> None:
    module = layer()
    change(module)
    x = inputs(6, WIDE)
    want = module(x)
    fuse(module)
    assert torch.equal(module(x), want)
    assert calls == []


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
def test_variants_of_lora_keep_pefts_pass(options: dict[str, bool], calls) -> None:
    module = layer(**options)
    x = inputs(6, WIDE)
    want = module(x)
    fuse(module)
    torch.testing.assert_close(module(x), want)
    assert calls == []


def test_dropout_of_the_input_keeps_pefts_pass_while_it_is_on(calls) -> None:
    module = layer(lora_dropout=0.5)
    fuse(module)
    module.train()(inputs(6, WIDE))
    assert calls == []
    module.eval()(inputs(6, WIDE))
    assert len(calls) == 1


def test_autocast_keeps_pefts_pass(calls) -> None:
    module = layer().float()
    x = inputs(6, WIDE).detach().float()
    fuse(module)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
    assert calls == []


def test_every_nn_linear_of_an_adapted_model_is_fused_and_no_other_layer() -> None:
    assert all(type(layer.module) is FusedLinear for layer in double_adapter("bert").layers)
    kinds = {type(layer.module.get_base_layer()).__name__: type(layer.module)
             for layer in double_adapter("gpt2").layers}  # fmt: skip
    assert kinds["Conv1D"] is lora.Linear
    embedding = nn.Embedding(3, 4)
    fuse(embedding)
    assert type(embedding) is nn.Embedding


def test_a_fused_model_can_be_adapted_by_peft_again() -> None:
    bt = double_adapter("llama")
    again = get_peft_model(bt.model.get_base_model(), LoraConfig(target_modules="all-linear"))
    names = [name for name, module in again.named_modules() if type(module) is FusedLinear]
    assert len(names) == len(double_adapter("llama").names)
    assert tiny("llama").config.num_hidden_layers == 2
