"""A budget in parameters: what each method makes of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from one_client import Chosen, adapted, asked, one_client

from fedp2eft.adapters.budget import keep_largest
from fedp2eft.client.side import ClientSide, check_size
from fedp2eft.errors import UserError
from fedp2eft.methods.adalora import NAME, ParameterAllocator, Schedule, adalora, wrap
from fedp2eft.methods.auto.candidates import Candidate, fit
from fedp2eft.methods.settings import AdaLoraSettings, TuningSettings

CHOSEN = (
    "fedp2eft", "fedp2eft-structure", "fedp2eft-random", "fedp2eft-global", "fedp2eft-tuned",
    "bt-lora", "gradient", "gradient-shared",
)  # fmt: skip
UNIFORM = ("lora", "fedp2eft-scale")


COSTS = [(2, 9, 4)[number % 3] for number in range(14)]
"""Of a model whose layers differ more than the tiny one's."""


@pytest.fixture(scope="module")
def client() -> ClientSide:
    q = torch.full((3,), 1 / 3)
    return one_client(bt=adapted(), costs=COSTS, label_prior=q, seed=7)


def spent(ranks: Iterable[int]) -> int:
    return sum(k * cost for k, cost in zip(ranks, COSTS, strict=True))


def test_costs_are_the_parameters_of_a_rank(client: ClientSide) -> None:
    bt = client.bt
    rank_1 = bt.weights_of(torch.ones(14, 4), torch.arange(4).expand(14, -1) < 1)
    assert bt.costs == [x.A.numel() + x.B.numel() for x in rank_1.layers]
    assert sum(bt.costs) == rank_1.parameters()


@pytest.mark.parametrize("method", [*CHOSEN, *UNIFORM])
def test_every_method_spends_the_parameters_of_uniform_ranks(client, monkeypatch, method) -> None:
    tuned = method == "fedp2eft-tuned"
    client = replace(client, own=TuningSettings(lrs=[1e-2]) if tuned else None)
    told = {"best": torch.zeros(1)} if tuned else asked(method, [client], 2)
    lam, keep = Chosen(monkeypatch).of(replace(client, prepared=told), method, 2)
    left = 2 * sum(COSTS) - spent(keep.sum(dim=1).tolist())
    if method in UNIFORM:
        assert left == 0
    else:
        assert 0 <= left < min(c for c, row in zip(COSTS, keep, strict=True) if not row.all())
        _, ranked = Chosen(monkeypatch).of(replace(client, costs=None, prepared=told), method, 2)
        assert int(ranked.sum()) == 2 * len(COSTS)
        assert not torch.equal(ranked, keep)
    assert torch.isfinite(lam[keep]).all()


def test_fedp2eft_keeps_the_largest_lambda(client, monkeypatch) -> None:
    lam, keep = Chosen(monkeypatch).of(client, "fedp2eft", 1)
    assert torch.equal(keep, keep_largest(lam, 1, COSTS))


def test_random_structure_deals_the_kept_values_evenly(client, monkeypatch) -> None:
    chosen = Chosen(monkeypatch)
    full, mask = chosen.of(client, "fedp2eft", 1)
    values = full[mask].tolist()
    sizes = set()
    for seed in range(12):
        lam, keep = chosen.of(replace(client, seed=seed), "fedp2eft-random", 1)
        dealt = lam[keep].tolist()
        counts = [dealt.count(value) for value in values]
        assert sum(counts) == len(dealt)  # nothing but kept values
        assert max(counts) - min(counts) <= 1
        sizes.add(len(dealt))
    assert len(sizes) > 1  # narrow ranks: more of them


@pytest.mark.parametrize("rank", [1, 2])
def test_adalora_ends_with_the_parameters(client, rank) -> None:
    side = replace(client, own=AdaLoraSettings())
    weights = adalora(side, rank).weights
    assert weights is not None
    left = rank * sum(COSTS) - spent(weights.ranks.values())
    most = Schedule.of(rank, 8, side.own).init_r
    pairs = zip(COSTS, weights.ranks.values(), strict=True)
    assert 0 <= left < min(cost for cost, k in pairs if k < most)


def test_adalora_ranks_by_pefts_own_importance() -> None:
    """With layers of one cost the allocator keeps what PEFT's keeps, at every budget."""
    bt = adapted()
    kept = []
    for costs in (None, [1] * len(bt.names)):
        with bt.bare() as base:
            model = wrap(base, bt, Schedule(3, 2, 6, 0, 1), 0.1)
            values = dict(model.base_model.model.named_parameters())
            for number, (name, p) in enumerate(values.items()):
                if "lora_" in name:
                    torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(number))
            allocator = model.base_model.rankallocator
            if costs:
                allocator = ParameterAllocator(model, costs)
            for step in range(3):
                for number, p in enumerate(values.values()):
                    generator = torch.Generator().manual_seed(1000 * step + number)
                    p.grad = torch.randn(p.shape, generator=generator) if p.requires_grad else None
                allocator.update_ipt(model.base_model.model)
            pattern = allocator.mask_to_budget(model.base_model.model, 29)
            for name, mask in pattern.items():
                assert (values[name][:, 0] != 0).tolist() == mask
            assert all(f"lora_E.{NAME}" in name for name in pattern)
            kept.append(pattern)
    assert kept[0] == kept[1]
    assert sum(map(sum, kept[1].values())) == 29


def test_an_adapter_above_the_budget_is_refused(client) -> None:
    ones, keep = torch.ones(14, 4), torch.zeros(14, 4, dtype=torch.bool)
    keep[torch.tensor(client.bt.costs).topk(3).indices, :] = True
    weights = client.bt.weights_of(ones, keep)
    exact = replace(client, costs=client.bt.costs)
    check_size(exact, weights, 2)
    with pytest.raises(UserError, match=r"480 parameters; r = 1 allows 467 under"):
        check_size(exact, weights, 1)
    check_size(exact, replace(weights, offset=torch.zeros(10**4)), 2)  # the prior is beside it
    check_size(replace(exact, costs=None), weights, 1)


def test_auto_tries_structures_of_the_budget(client) -> None:
    found = fit(client, Candidate("structure", 1e-3, 1, 2)).weights
    assert found is not None
    assert 0 <= 2 * sum(COSTS) - spent(found.ranks.values()) < max(COSTS)
    ranked = fit(replace(client, costs=None), Candidate("structure", 1e-3, 1, 2)).weights
    assert ranked is not None
    assert ranked.ranks != found.ranks
