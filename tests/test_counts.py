"""What a client's work costs, counted: calls, positions, bytes and tensor operations, not seconds.

Every bound is what the code does today, with little room: a step that does more fails here. How
often a run loads the base, and computes ξ and tokens, is counted in federation/test_privacy.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch.utils._python_dispatch import TorchDispatchMode

from fedp2eft.adapters.btlora import BTLora
from fedp2eft.adapters.budget import keep_largest
from fedp2eft.client import descent
from fedp2eft.client import training as client
from fedp2eft.federation.wire.messages import PERSONALIZE, nbytes
from fedp2eft.settings.experiment import AdapterSettings, GeneratorSettings, LocalSettings
from fedp2eft.settings.profiles import PAPER
from tiny import TASK, random_lambda, tiny, tiny_psg, tiny_rows
from tiny_run import CLIENTS, RANKS, ROUNDS
from turns import TRAIN_PSG

LENGTHS = [16, 3, 4, 15, 3, 4, 16, 3]  # of 16 positions at most: padding would be half of all
DATA = tiny_rows(LENGTHS)
LOCAL = LocalSettings(dropout=False, batch_size=8, epochs=2)
STEPS, LAYERS = 2, 14  # mini-batches of a round, adapted layers


class Operations(TorchDispatchMode):
    """Counts every tensor operation, those of the backward pass too."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def inputs_of(bt: BTLora) -> Iterator[list[tuple[int, int]]]:
    """(positions, real ones) of every forward pass."""
    seen: list[tuple[int, int]] = []

    def hook(_module: Any, _args: Any, inputs: dict[str, torch.Tensor]) -> None:
        # Packed rows come without a mask: every position is real.
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
        seen.append((mask.numel(), int(mask.sum())))

    handle = bt.model.get_base_model().register_forward_pre_hook(hook, with_kwargs=True)
    yield seen
    handle.remove()


def adapted(dtype: torch.dtype = torch.float32, attention: str = "eager") -> BTLora:
    """With plain attention, as rows of up to 256 tokens have it on a CPU: they are packed."""
    model = tiny("bert").to(dtype)
    model.set_attn_implementation(attention)
    return BTLora(model.eval(), AdapterSettings(r_max=4))


def order(local: LocalSettings = LOCAL) -> list[np.ndarray]:
    return list(descent.local_order(len(DATA), local.epochs, local.batch_size, 0))


def one_round(bt: BTLora, local: LocalSettings = LOCAL) -> client.Round:
    psg = tiny_psg(bt, GeneratorSettings(init_lambda=0.5))
    xi = torch.randn(psg.config.n_features, generator=torch.Generator().manual_seed(0))
    return client.train_round(
        bt, TASK, DATA, xi, psg, order(local), local, GeneratorSettings(steps=3), PAPER
    )


# ── a run ───────────────────────────────────────────────────────────────────────────────────────


def test_bytes_of_every_message_of_phi_are_those_of_its_numbers(finished) -> None:
    told = [pair for pair in finished.messages if pair[0].metadata.message_type == TRAIN_PSG]
    assert len(told) == ROUNDS * 2
    for message, reply in told:
        sizes = []
        for record in (message.content, reply.content):
            [arrays] = record.array_records.values()
            numbers = sum(int(np.prod(array.shape)) for array in arrays.values())
            assert 4 * numbers <= nbytes(arrays) <= 4 * numbers + 128 * len(arrays)
            sizes.append(nbytes(arrays))
        assert sizes[0] == sizes[1]


def test_personalization_sends_nothing_but_scores_up(finished) -> None:
    told = [pair for pair in finished.messages if pair[0].metadata.message_type == PERSONALIZE]
    assert len(told) >= len(CLIENTS) * len(RANKS)
    for _, reply in told:
        assert sum(nbytes(arrays) for arrays in reply.content.array_records.values()) == 0


# ── a round of one client ───────────────────────────────────────────────────────────────────────


def test_a_round_computes_no_padding_and_each_row_once_an_epoch() -> None:
    with inputs_of(bt := adapted()) as seen:
        one_round(bt)
    assert seen == [(sum(LENGTHS), sum(LENGTHS))] * STEPS


def test_without_packing_a_round_computes_little_padding(monkeypatch) -> None:
    monkeypatch.setattr(descent, "PASS_TOKENS", 4)
    with inputs_of(bt := adapted(attention="sdpa")) as seen:
        one_round(bt)
    positions, real = (sum(values) for values in zip(*seen, strict=True))
    assert real == LOCAL.epochs * sum(LENGTHS)
    assert len(seen) == 2 * STEPS  # the long rows and the short ones
    assert positions <= 1.1 * real  # twice as many where a mini-batch is padded to its longest


def test_rows_of_one_length_go_through_the_model_together() -> None:
    with inputs_of(bt := adapted(attention="sdpa")) as seen:
        client.stage1(bt, TASK, tiny_rows([7] * 8), order(), LOCAL, PAPER)
    assert seen == [(56, 56)] * STEPS


def test_on_another_device_a_mini_batch_is_not_cut() -> None:
    assert descent.length_parts(TASK, DATA) is not None
    assert descent.length_parts(replace(TASK, device="cuda"), DATA) is None


def test_features_read_each_row_once_with_little_padding() -> None:
    local = replace(LOCAL, eval_batch_size=5)
    with inputs_of(bt := adapted()) as seen:
        client.features(bt, TASK, DATA, local, PAPER)
    assert [sum(values) for values in zip(*seen, strict=True)] == [5 * 16 + 3 * 3, sum(LENGTHS)]


def test_scores_read_each_row_once_with_little_padding() -> None:
    with inputs_of(bt := adapted()) as seen:
        TASK.score(bt.model, DATA, 5)
    assert [sum(values) for values in zip(*seen, strict=True)] == [5 * 16 + 3 * 3, sum(LENGTHS)]


def test_one_backward_pass_for_each_forward_and_one_step_for_each_mini_batch(monkeypatch) -> None:
    calls: Counter[str] = Counter()
    backward, step = torch.Tensor.backward, torch.optim.AdamW.step

    def counted_backward(*args: Any, **options: Any) -> None:
        calls["backward"] += 1
        backward(*args, **options)

    def counted_step(*args: Any, **options: Any) -> None:
        calls["step"] += 1
        step(*args, **options)

    monkeypatch.setattr(torch.Tensor, "backward", counted_backward)
    monkeypatch.setattr(torch.optim.AdamW, "step", counted_step)
    monkeypatch.setattr(descent, "PASS_TOKENS", 4)
    for attention, passes in (("eager", STEPS), ("sdpa", 2 * STEPS)):
        calls.clear()
        client.stage1(adapted(attention=attention), TASK, DATA, order(), LOCAL, PAPER)
        assert calls == {"backward": passes, "step": STEPS}


# ── operations ──────────────────────────────────────────────────────────────────────────────────


def operations(bt: BTLora, steps: int) -> Counter[str]:
    """Of stage 1 over so many steps of one pass each."""
    data, rows = tiny_rows([7] * 8), [np.arange(8)] * steps
    with Operations() as seen:
        client.stage1(bt, TASK, data, rows, LOCAL, PAPER)
    return seen.counts


@pytest.mark.parametrize(
    ("dtype", "copies", "most"), [(torch.float32, 9, 900), (torch.bfloat16, 67, 960)]
)
def test_operations_of_a_step(dtype: torch.dtype, copies: int, most: int) -> None:
    bt = adapted(dtype)
    # What the second step adds: the optimizer's own tensors are made at the first.
    counts = operations(bt, 2)
    bt.reset(0.5)
    counts.subtract(operations(bt, 1))
    assert counts["_fused_adamw_"] == 2  # A and B, and λ
    assert counts["_foreach_norm"] == 1
    assert counts["_local_scalar_dense"] <= 2  # the loss; each one waits for a GPU
    # Attention's output and three gradients of a block; of bf16 also A, B, each way, and their λ.
    assert counts["_to_copy"] + counts["copy_"] <= copies
    # Of the last block, which asks for the first position of each row alone.
    assert counts["zeros"] + counts["zeros_like"] == 2
    assert counts.total() <= most


def test_the_gate_is_computed_once_a_pass(monkeypatch) -> None:
    from fedp2eft.adapters.gates import RankGate

    calls: Counter[int] = Counter()
    forward = RankGate.forward

    def counted(gate: RankGate, A: torch.Tensor) -> torch.Tensor:
        calls[gate.row] += 1
        return forward(gate, A)

    monkeypatch.setattr(RankGate, "forward", counted)
    bt = adapted()
    calls.clear()
    client.stage1(bt, TASK, DATA, [np.arange(8)], LOCAL, PAPER)
    assert calls == Counter(dict.fromkeys(range(LAYERS), 1))


# ── personalization ─────────────────────────────────────────────────────────────────────────────


def test_personalization_adds_no_adapter_and_no_module(monkeypatch) -> None:
    def refuse(*_args: Any, **_options: Any) -> None:
        raise AssertionError("PEFT adds an adapter")

    bt = adapted()
    modules = [id(module) for module in bt.model.modules()]
    lam = random_lambda(bt)
    keep = keep_largest(lam, 2)
    monkeypatch.setattr(PeftModel, "add_adapter", refuse)
    monkeypatch.setattr(torch.nn.Module, "register_forward_hook", refuse)
    with inputs_of(bt) as seen:
        fitted = client.personalize(bt, TASK, DATA, lam, keep, order(), LOCAL)
    assert sum(real for _, real in seen) == LOCAL.epochs * sum(LENGTHS)
    assert fitted.weights.parameters() == sum(
        int(ranks) * (A.shape[1] + B.shape[0])
        for ranks, A, B in zip(keep.sum(dim=1), bt.A, bt.B, strict=True)
    )
    assert [id(module) for module in bt.model.modules()] == modules
