"""Mini-batches cut by length: the same numbers as in one piece, with the least padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch

from fedp2eft.client import descent
from fedp2eft.client import training as client
from fedp2eft.settings.experiment import LocalSettings
from fedp2eft.settings.profiles import PAPER
from fedp2eft.tasks.causal_lm import CausalLM
from fedp2eft.tasks.encoded import Encoded
from tiny import LONGEST, TASK, double_adapter, tiny_rows

LENGTHS = [3, 12, 4, 11, 5, 12, 2, 7]


@pytest.mark.parametrize(("kind", "starts"), [("bert", None), ("llama", [1, 9, 2, 1, 3, 4, 1, 5])])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_stage_1_in_parts_gives_the_numbers_of_stage_1_in_one_piece(
    monkeypatch, kind: str, starts: list[int] | None, accumulate: int
) -> None:
    data = tiny_rows(LENGTHS)
    if starts:
        data = replace(data, starts=np.array(starts))
    task = CausalLM(0, LONGEST) if starts else TASK
    order = [np.array([0, 1, 2, 3]), np.array([7, 6, 5, 4])] * 2
    local = LocalSettings(dropout=False, accumulate=accumulate, lr=1e-2, lambda_lr=1e-2)
    found = []
    for tokens in (0, 1000):
        monkeypatch.setattr(descent, "PASS_TOKENS", tokens)
        bt = double_adapter(kind)
        bt.reset(0.5)
        losses = client.stage1(bt, task, data, order, local, PAPER)
        found.append((losses, [value.detach().clone() for value in (*bt.A, *bt.B, bt.lam)]))
    (losses, values), (want_losses, want) = found
    # The loss itself is float32, whatever the model is.
    assert losses == pytest.approx(want_losses, rel=1e-5)
    assert max(float((a - b).abs().max()) for a, b in zip(values, want, strict=True)) < 1e-5
    assert float((values[-1] - 0.5).abs().max()) > 1e-3


def cost(lengths: Sequence[int], parts: Sequence[Sequence[int]], pass_tokens: int) -> int:
    return sum(len(part) * max(lengths[i] for i in part) + pass_tokens for part in parts)


@pytest.mark.parametrize("pass_tokens", [0, 1, 5, 9, 30, 1000])
def test_no_other_way_to_cut_computes_fewer_positions(pass_tokens: int) -> None:
    data = tiny_rows(LENGTHS)
    rows = np.arange(len(LENGTHS))
    order = sorted(rows, key=lambda i: -LENGTHS[i])
    ways = []
    for cuts in range(len(rows)):
        for inner in combinations(range(1, len(rows)), cuts):
            ways.append([order[a:b] for a, b in pairwise([0, *inner, len(rows)])])
    parts = data.parts(rows, pass_tokens)
    assert sorted(i for part, _ in parts for i in part) == list(rows)
    assert [share for _, share in parts] == [len(part) / len(rows) for part, _ in parts]
    best = min(cost(LENGTHS, way, pass_tokens) for way in ways)
    assert cost(LENGTHS, [part.tolist() for part, _ in parts], pass_tokens) == best


def test_a_response_counts_with_its_tokens_and_a_row_without_one_not_at_all() -> None:
    data = Encoded.from_rows([[1] * 8, [1] * 2, [1]], [0] * 3, starts=[2, 1, 0])
    shares = {tuple(part): share for part, share in data.parts([0, 1, 2], 0)}
    assert shares == {(0,): 6 / 7, (1,): 1 / 7}


def test_one_row_is_one_part() -> None:
    [(part, share)] = tiny_rows([4, 9]).parts([1], 5)
    assert (part.tolist(), share) == ([1], 1.0)


def test_the_gradients_of_dropout_stay_those_of_the_seed() -> None:
    """Parts draw their dropout one after the other: not as in one piece, but alike in each run."""
    data, order = tiny_rows(LENGTHS), [np.arange(8)] * 2
    runs = []
    for _ in range(2):
        bt = double_adapter()
        for module in bt.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.1
        runs.append(client.stage1(bt, TASK, data, order, LocalSettings(), PAPER, seed=5))
    assert runs[0] == runs[1]
