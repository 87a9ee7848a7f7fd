"""The terms of stage 1's last loss: task, significance and sparsity."""

from __future__ import annotations

import math
from dataclasses import astuple

import numpy as np
import pytest
import torch

from fedp2eft.adapters.btlora import BTLora
from fedp2eft.client.training import LossTerms, stage1
from fedp2eft.settings.experiment import AdapterSettings, LocalSettings
from fedp2eft.settings.profiles import PAPER
from tiny import TASK, tiny, tiny_rows

DATA = tiny_rows([5, 3, 7, 4, 6, 2])


def terms_by_loops(bt: BTLora, rows: list[np.ndarray], local: LocalSettings) -> LossTerms:
    """The terms of L of one step from the adapter as it stands."""
    with torch.no_grad():
        fits = [float(TASK.loss(bt.model, TASK.batch(DATA, some))) for some in rows]
    significance = sparsity = 0.0
    for B, lam in zip(bt.B, bt.rank_lambda().tolist(), strict=True):
        for column, size in zip(B.detach().T, lam, strict=True):
            significance += local.alpha_s * float(column.abs().sum()) / size
            sparsity += local.alpha_p * (100 * size + math.log(size))
    n = len(DATA)
    return LossTerms(local.alpha_task * sum(fits) / len(rows), significance / n, sparsity / n)


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_terms_are_those_of_the_last_step(layerwise, accumulate) -> None:
    base = tiny("bert", dropout=0.0).double()
    bt = BTLora(base, AdapterSettings(r_max=3, layerwise=layerwise))
    order = [np.array(some) for some in ([0, 1], [2, 3], [4, 5], [1, 5], [0, 3], [2])]
    local = LocalSettings(
        dropout=False, accumulate=accumulate, alpha_task=1.5, lr=1e-2, lambda_lr=1e-2
    )
    bt.reset(0.5)
    stage1(bt, TASK, DATA, order[:-accumulate], local, PAPER)
    want = terms_by_loops(bt, order[-accumulate:], local)
    assert min(map(abs, astuple(want))) > 1e-3
    bt.reset(0.5)
    told: list[LossTerms] = []
    losses = stage1(bt, TASK, DATA, order, local, PAPER, on_terms=told.append)
    [got] = told
    assert astuple(got) == pytest.approx(astuple(want), rel=1e-6)
    assert sum(astuple(got)) == pytest.approx(losses[-1], rel=1e-6)
    stage1(bt, TASK, DATA, [], local, PAPER, on_terms=told.append)
    assert told == [got]
