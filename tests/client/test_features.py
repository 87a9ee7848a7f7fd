"""ξ equals the mean and deviation of all inputs of every linear layer, taken at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedp2eft.adapters.btlora import BTLora
from fedp2eft.client.features import client_features
from fedp2eft.client.training import features
from fedp2eft.errors import UserError
from fedp2eft.settings.experiment import AdapterSettings, LocalSettings
from fedp2eft.settings.profiles import PAPER, REFERENCE
from fedp2eft.tasks.encoded import Encoded
from tiny import LONGEST, TASK, disturb, random_lambda, tiny, tiny_rows

RAGGED = [5, 3, 9, 1, 16, 7, 2]


def by_brute_force(model: nn.Module, data: Encoded, *, masked: bool) -> Tensor:
    """Keep every input of every linear layer, row by row, and take its moments at the end."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    heard: list[list[Tensor]] = [[] for _ in linears]
    handles = [
        module.register_forward_pre_hook(
            lambda _module, inputs, kept=kept: kept.append(inputs[0].reshape(-1).double())
        )
        for module, kept in zip(linears, heard, strict=True)
    ]
    with torch.no_grad():
        for row in range(len(data)):
            batch = data.batch([row], pad_id=0, length=None if masked else LONGEST)
            batch.pop("labels")
            model(**batch)
    for handle in handles:
        handle.remove()
    pairs = []
    for kept in heard:
        values = torch.cat(kept)
        pairs += [torch.mean(values), torch.sqrt(torch.var(values, correction=1) + 1e-5)]
    return torch.stack(pairs)


def linears_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]


@pytest.mark.parametrize("kind", ["bert", "llama"])
@given(batch_size=st.integers(1, 8), lengths=st.permutations(RAGGED))
@settings(max_examples=8, deadline=None)
def test_masked_features_equal_brute_force_for_any_batches(kind, batch_size, lengths) -> None:
    model, data = tiny(kind).eval(), tiny_rows(lengths)
    got = client_features(model, linears_of(model), TASK.feature_batches(data, batch_size))
    want = by_brute_force(model, data, masked=True)
    assert got.shape == (2 * len(linears_of(model)),)
    assert got.dtype == torch.float32
    assert (got.double() - want).abs().max() < 1e-6


@given(batch_size=st.integers(1, 8), lengths=st.permutations(RAGGED))
@settings(max_examples=8, deadline=None)
def test_padded_features_equal_brute_force_for_any_batches(batch_size, lengths) -> None:
    model, data = tiny("bert").eval(), tiny_rows(lengths)
    batches = TASK.padded_batches(data, batch_size)
    got = client_features(model, linears_of(model), batches, masked=False)
    assert (got.double() - by_brute_force(model, data, masked=False)).abs().max() < 1e-6


def test_masked_and_padded_features_differ_where_rows_are_ragged() -> None:
    model, data = tiny("bert").eval(), tiny_rows(RAGGED)
    masked = by_brute_force(model, data, masked=True)
    padded = by_brute_force(model, data, masked=False)
    assert (masked - padded).abs().max() > 1e-3


@pytest.mark.parametrize("lengths", [[6], [1], [1, 1]], ids=["one row", "one token", "two tokens"])
def test_the_smallest_clients_have_features(lengths) -> None:
    model, data = tiny("bert").eval(), tiny_rows(lengths)
    got = client_features(model, linears_of(model), TASK.feature_batches(data, 4))
    assert (got.double() - by_brute_force(model, data, masked=True)).abs().max() < 1e-6


def test_a_layer_that_is_never_called_or_sees_nothing_has_mean_zero() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.empty, self.unused = (nn.Linear(3, 3) for _ in range(3))

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            self.empty(torch.empty(0, 3))
            return self.used(input_ids.float().unsqueeze(-1).expand(-1, -1, 3))

    model = Experts()
    got = client_features(model, linears_of(model), TASK.feature_batches(tiny_rows([2, 3]), 1))
    names = [name for name, _ in linears_of(model)]
    for name in ("empty", "unused"):
        at = 2 * names.index(name)
        assert got[at : at + 2].tolist() == pytest.approx([0.0, 1e-5**0.5])
    assert got[2 * names.index("used")] > 1


def test_constant_inputs_have_deviation_root_epsilon() -> None:
    model = nn.Module()
    model.linear = nn.Linear(3, 3)
    model.forward = lambda input_ids, attention_mask: model.linear(
        torch.full((*input_ids.shape, 3), 7.5)
    )
    got = client_features(model, linears_of(model), TASK.feature_batches(tiny_rows(RAGGED), 3))
    assert got.tolist() == pytest.approx([7.5, 1e-5**0.5])


@pytest.mark.parametrize("profile", [PAPER, REFERENCE], ids=lambda p: p.name)
def test_a_trained_adapter_does_not_change_the_features(profile) -> None:
    data, local = tiny_rows(RAGGED), LocalSettings()
    bt = BTLora(tiny("bert").eval(), AdapterSettings(r_max=4))
    before = features(bt, TASK, data, local, profile)
    disturb(bt)
    bt.set_lambda(random_lambda(bt))
    flags = [p.requires_grad for p in bt.model.parameters()]
    assert torch.equal(features(bt, TASK, data, local, profile), before)
    assert [p.requires_grad for p in bt.model.parameters()] == flags
    plain = tiny("bert").eval()
    want = by_brute_force(plain, data, masked=profile is PAPER)
    assert (before.double() - want).abs().max() < 1e-6


@pytest.mark.parametrize("training", [True, False])
def test_features_are_taken_without_dropout_and_the_mode_comes_back(training) -> None:
    model, data = tiny("bert").train(training), tiny_rows(RAGGED)
    one, two = (
        client_features(model, linears_of(model), TASK.feature_batches(data, 4)) for _ in range(2)
    )
    assert torch.equal(one, two)
    assert {module.training for module in model.modules()} == {training}


def test_a_failing_batch_leaves_mode_and_hooks_as_they_were() -> None:
    model = tiny("bert").train()
    bad = {"input_ids": torch.tensor([[99]]), "attention_mask": torch.tensor([[1]])}
    with pytest.raises(IndexError):
        client_features(model, linears_of(model), [bad])
    assert model.training
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_no_rows_is_an_error() -> None:
    bt = BTLora(tiny("bert"), AdapterSettings(r_max=2))
    with pytest.raises(UserError, match="no training rows"):
        features(bt, TASK, Encoded.from_rows([], []), LocalSettings(), PAPER)


def test_a_broken_base_model_is_an_error() -> None:
    bt = BTLora(tiny("bert"), AdapterSettings(r_max=2))
    with torch.no_grad():
        bt.layers[2].module.base_layer.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="ξ holds NaN"):
        features(bt, TASK, tiny_rows([3, 4]), LocalSettings(), PAPER)
