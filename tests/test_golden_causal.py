"""Stage 1 on tiny causal LMs against METHOD's section 1 written out in plain PyTorch.

Nothing of the package is used on the other side: W + s·B·diag(λ)·A is put into the plain model by
`functional_call`, and penalties, clip, accumulation and AdamW are written out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedp2eft.client.training import stage1
from fedp2eft.settings.experiment import AdapterSettings, LocalSettings
from fedp2eft.settings.profiles import PROFILES
from fedp2eft.tasks.causal_lm import CausalLM
from fedp2eft.tasks.encoded import Encoded
from tiny import VOCABULARY, double_adapter, random_lambda, tiny

R, S = 3, 2.0
LOW, HIGH = 1e-4, 1000.0
LOCAL = LocalSettings(
    batch_size=2, accumulate=2, lr=3e-3, lambda_lr=2e-2, alpha_s=0.5, alpha_p=0.02, dropout=False
)
# Two epochs of five rows in mini-batches of two: groups of 2, 2, 1 + 1, … mini-batches.
ORDER = [np.array(rows) for rows in ([0, 3], [4, 1], [2], [1, 2], [0, 4], [3])]


def rows() -> tuple[list[list[int]], list[int]]:
    rng = np.random.default_rng(2)
    lengths, starts = (7, 4, 9, 5, 6), (3, 1, 6, 4, 2)
    return [rng.integers(1, VOCABULARY, size=n).tolist() for n in lengths], list(starts)


@dataclass
class Plain:
    """One client's A, B and λ on a plain model, and AdamW's state."""

    model: nn.Module
    names: tuple[str, ...]
    A: list[Tensor]
    B: list[Tensor]
    lam: Tensor

    def __post_init__(self) -> None:
        self.values = [*self.A, *self.B, self.lam]
        self.first = [torch.zeros_like(v) for v in self.values]
        self.second = [torch.zeros_like(v) for v in self.values]

    def task_loss(self, leaves: list[Tensor], chosen: np.ndarray) -> Tensor:
        """Mean of −log p over the response tokens of a mini-batch, row by row, without padding."""
        n = len(self.names)
        lam = leaves[-1]
        lam = lam + (lam.clamp(LOW, HIGH) - lam).detach()  # straight through
        weights = {}
        for name, A, B, row in zip(self.names, leaves[:n], leaves[n:-1], lam, strict=True):
            module = self.model.get_submodule(name)
            change = S * (B @ torch.diag(row) @ A)
            # GPT-2 keeps its matrices the other way round.
            turned = change if isinstance(module, nn.Linear) else change.T
            weights[f"{name}.weight"] = module.weight + turned
        ids, starts = rows()
        nats = []
        for i in chosen:
            logits = functional_call(
                self.model, weights, kwargs={"input_ids": torch.tensor([ids[i]])}
            ).logits[0]
            for at in range(starts[i], len(ids[i])):
                scores = logits[at - 1]
                nats.append(torch.logsumexp(scores, 0) - scores[ids[i][at]])
        return torch.stack(nats).mean()

    def objective(self, leaves: list[Tensor], chosen: np.ndarray, examples: int) -> Tensor:
        n = len(self.names)
        lam = leaves[-1] + (leaves[-1].clamp(LOW, HIGH) - leaves[-1]).detach()
        significance, sparsity = torch.zeros(()), torch.zeros(())
        for row, B in enumerate(leaves[n:-1]):
            for i in range(R):
                significance = significance + B[:, i].abs().sum() / lam[row, i]
                sparsity = sparsity + 100 * lam[row, i] + torch.log(lam[row, i])
        return (
            LOCAL.alpha_task * self.task_loss(leaves, chosen)
            + LOCAL.alpha_s / examples * significance
            + LOCAL.alpha_p / examples * sparsity
        )

    def step(self, number: int, group: list[np.ndarray], examples: int) -> float:
        leaves = [value.clone().requires_grad_() for value in self.values]
        total = sum(self.objective(leaves, chosen, examples) for chosen in group) / len(group)
        gradients = list(torch.autograd.grad(total, leaves))
        norm = torch.sqrt(sum((g**2).sum() for g in gradients[:-1]))  # over A and B, not λ
        if norm > LOCAL.max_grad_norm:
            gradients[:-1] = [g / (norm + 1e-6) * LOCAL.max_grad_norm for g in gradients[:-1]]
        for k, g in enumerate(gradients):
            rate = LOCAL.lambda_lr if k == len(gradients) - 1 else LOCAL.lr
            self.first[k] = 0.9 * self.first[k] + 0.1 * g
            self.second[k] = 0.999 * self.second[k] + 0.001 * g**2
            m, v = self.first[k] / (1 - 0.9**number), self.second[k] / (1 - 0.999**number)
            self.values[k] = self.values[k] - rate * m / (v.sqrt() + 1e-8)
        return float(total)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_stage1_is_section_1_step_by_step(kind: str):
    ids, starts = rows()
    data = Encoded.from_rows(ids, [0] * len(ids), starts=starts)
    task = CausalLM(pad_id=0, max_length=16)
    bt = double_adapter(kind, AdapterSettings(r_max=R))
    first = random_lambda(bt, seed=4).double()
    first[0, 0] = 0.5e-4  # below the range: clamped, with its gradient passed through
    bt.reset(first)
    plain = Plain(
        tiny(kind, dropout=0.0).double().eval().requires_grad_(False),
        bt.names,
        [A.detach().double().clone() for A in bt.A],
        [B.detach().double().clone() for B in bt.B],
        first.clone(),
    )
    expected = [
        plain.step(number, ORDER[at : at + 2], len(data))
        for number, at in enumerate(range(0, len(ORDER), 2), start=1)
    ]
    bt.model.eval()
    losses = stage1(bt, task, data, ORDER, LOCAL, PROFILES["paper"])
    assert losses == pytest.approx(expected, rel=1e-6)
    n = len(bt.names)
    for got, wanted in ((bt.A, plain.values[:n]), (bt.B, plain.values[n:-1])):
        for mine, theirs in zip(got, wanted, strict=True):
            torch.testing.assert_close(mine.detach().double(), theirs, rtol=0, atol=1e-5)
    torch.testing.assert_close(bt.lam.detach().double(), plain.values[-1], rtol=0, atol=1e-5)
    assert max(float(B.abs().max()) for B in plain.values[n:-1]) > 1e-3  # something was learned
