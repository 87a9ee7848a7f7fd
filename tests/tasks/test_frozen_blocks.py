"""States kept below the lowest trained block: same numbers, and never those of another base."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from fedp2eft.adapters.btlora import BTLora
from fedp2eft.client.descent import rows_loss
from fedp2eft.client.training import features
from fedp2eft.settings.experiment import AdapterSettings, LocalSettings
from fedp2eft.settings.profiles import PAPER
from fedp2eft.tasks import frozen_blocks
from fedp2eft.tasks.causal_lm import CausalLM
from fedp2eft.tasks.encoded import Encoded
from fedp2eft.tasks.frozen_blocks import _KEPT, first_trained, may_keep, run
from fedp2eft.tasks.task import Task
from tiny import CLASSES, ENCODERS, LONGEST, TASK, VOCABULARY, disturb, tiny_rows

DECODERS = ["llama", "mistral", "qwen2", "qwen3"]
UPPER = r".*layers?\.[23]\..*(query|value|dense|q_proj|down_proj)"
DATA = tiny_rows([5, 14, 3, 5, 14, 6, 13, 2])
ROWS = np.array([6, 1, 0, 2, 3, 7, 5])


def model_of(kind: str, attention: str = "eager") -> nn.Module:
    """Four blocks in float64, without dropout."""
    torch.manual_seed(5)
    encoder = kind in ENCODERS
    config = AutoConfig.for_model(
        kind, vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=4, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=LONGEST + 2, pad_token_id=0,
        initializer_range=0.3,
        **({"num_labels": CLASSES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
           if encoder else {"num_key_value_heads": 1, "head_dim": 8}),
    )  # fmt: skip
    auto = AutoModelForSequenceClassification if encoder else AutoModelForCausalLM
    model = auto.from_config(config)
    model.set_attn_implementation(attention)
    return model.double().eval()


def adapted(kind: str = "bert", targets: str = UPPER, attention: str = "eager") -> BTLora:
    bt = BTLora(model_of(kind, attention), AdapterSettings(r_max=4, target_modules=targets))
    bt.lam.data = bt.lam.data.double()
    bt.reset(0.5)
    disturb(bt)
    return bt


def task_and_rows(kind: str, mib: int = 1) -> tuple[Task, Encoded]:
    if kind in ENCODERS:
        return replace(TASK, states_mib=mib), DATA
    task = CausalLM(pad_id=0, max_length=LONGEST, vocabulary=VOCABULARY, states_mib=mib)
    return task, replace(DATA, starts=np.maximum(DATA.lengths // 2, 1))


@contextmanager
def blocks_run(model: nn.Module) -> Iterator[list[int]]:
    """Numbers of the blocks that a model runs, in order."""
    ran: list[int] = []
    body = frozen_blocks._Body.of(model)
    assert body is not None
    handles = [
        block.register_forward_hook(lambda *_a, number=number: ran.append(number))
        for number, block in enumerate(getattr(body.holder, body.blocks))
    ]
    yield ran
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("kind", [*ENCODERS, *DECODERS])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])  # packed rows, and padded ones
def test_loss_gradients_and_scores_are_those_of_a_whole_pass(kind: str, attention: str) -> None:
    bt, found, ran = adapted(kind, attention=attention), [], []
    assert first_trained(bt.model) == 2
    for mib in (0, 1):
        task, data = task_and_rows(kind, mib)
        loss_of, _parts = rows_loss(task, bt.model, data)
        for _ in range(2):  # computed, then kept
            with blocks_run(bt.model) as seen:
                loss = loss_of(ROWS)
                gradients = torch.autograd.grad(loss, [*bt.A, *bt.B, bt.lam])
                score = task.score(bt.model, data, 3)
        found.append([loss.detach(), *gradients, torch.tensor(score.loss)])
        ran.append(set(seen))
    assert ran == [{0, 1, 2, 3}, {2, 3}]
    for whole, kept in zip(*found, strict=True):
        # Losses are float32, and so are a decoder's norms and softmax, which are packed in the one
        # pass and padded in the other.
        rtol, atol = (1e-5, 1e-7) if kind in DECODERS else (1e-6, 1e-9)
        torch.testing.assert_close(kept, whole, rtol=rtol, atol=atol)
    assert max(float(gradient.abs().max()) for gradient in found[1][1:-1]) > 1e-2


def lower_weight(model: nn.Module) -> nn.Parameter:
    return model.get_base_model().bert.encoder.layer[1].output.dense.weight


@torch.no_grad()
def add_in_place(model: nn.Module) -> None:
    lower_weight(model).mul_(2)


def add_to_data(model: nn.Module) -> None:
    lower_weight(model).data += torch.eye(
        16, 24
    )  # as PEFT merges adapters; autograd counts no change


def negate_data(model: nn.Module) -> None:
    lower_weight(model).data.neg_()


def replace_data(model: nn.Module) -> None:
    lower_weight(model).data = lower_weight(model).data * 2


def new_parameter(model: nn.Module) -> None:
    dense = model.get_base_model().bert.encoder.layer[0].attention.self.key
    dense.weight = nn.Parameter(dense.weight.detach() * 2, requires_grad=False)


def new_layer_norm(model: nn.Module) -> None:
    model.get_base_model().bert.embeddings.LayerNorm.bias.data[3] = 1.0


def one_embedding(model: nn.Module) -> None:
    model.get_base_model().get_input_embeddings().weight.data[int(DATA.tokens[0])] = 1.0


def swapped_rows(model: nn.Module) -> None:
    weight = lower_weight(model)
    with torch.no_grad():  # the sum of the values stays the same
        weight.copy_(weight.flip(0))


CHANGES: list[Callable[[nn.Module], None]] = [
    add_in_place, add_to_data, negate_data, replace_data, new_parameter, new_layer_norm,
    one_embedding, swapped_rows,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_base_is_never_given_the_states_of_the_old_one(change) -> None:
    bt, (task, data) = adapted(), task_and_rows("bert")
    before = task.logits(bt.model, data, 8)
    change(bt.model)
    after = task.logits(bt.model, data, 8)
    whole = replace(task, states_mib=0).logits(bt.model, data, 8)
    torch.testing.assert_close(after, whole, rtol=1e-6, atol=1e-7)
    assert float((after - before).abs().max()) > 1e-4


def test_another_text_has_its_own_states() -> None:
    bt, (task, data) = adapted(), task_and_rows("bert")
    first = task.logits(bt.model, data, 8)
    tokens = data.tokens.copy()
    tokens[2] = tokens[2] % (VOCABULARY - 1) + 1
    offsets = data.offsets.copy()
    offsets[1] += 1  # the same tokens, another end of the first row
    typed = np.zeros_like(data.tokens)
    for other in (
        replace(data, tokens=tokens),
        replace(data, offsets=offsets),
        replace(data, types=typed),
        replace(data, types=typed + 1),
    ):
        whole = replace(task, states_mib=0).logits(bt.model, other, 8)
        found = task.logits(bt.model, other, 8)
        torch.testing.assert_close(found, whole, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(task.logits(bt.model, data, 8), first, rtol=0, atol=0)


def test_another_model_starts_without_states_and_an_old_one_leaves_none() -> None:
    task, data = task_and_rows("bert")
    gc.collect()
    before, models = len(_KEPT), [adapted(), adapted("roberta")]
    for bt in models:
        task.logits(bt.model, data, 8)
    assert len(_KEPT) == before + 2
    del models, bt
    gc.collect()
    assert len(_KEPT) == before


@pytest.mark.parametrize(
    ("targets", "first"),
    [
        (r".*layer\.[01]\..*dense", 0),
        (r".*layer\.1\..*dense", 1),
        (r".*layer\.[13]\..*dense", 1),
        (UPPER + "|.*word_embeddings", 0),
        (r".*pooler.dense|classifier", 3),  # the last block is cut by first_position
        ("all-linear", 0),
    ],
)
def test_where_the_lowest_adapted_block_is(targets: str, first: int) -> None:
    bt = adapted(targets=targets)
    assert first_trained(bt.model) == first
    with bt.off():  # an adapter that is switched off counts too
        assert first_trained(bt.model) == first


def test_what_is_trained_without_an_adapter_counts() -> None:
    model = model_of("bert").requires_grad_(False)
    model.bert.encoder.layer[2].output.dense.bias.requires_grad_(True)
    assert first_trained(model) == 2
    model.bert.embeddings.LayerNorm.bias.requires_grad_(True)
    assert first_trained(model) == 0


def test_a_head_tied_to_the_embeddings_is_below_everything() -> None:
    model = model_of("llama").requires_grad_(False)
    assert first_trained(model) == 3
    model.lm_head.weight = model.model.embed_tokens.weight
    model.lm_head.weight.requires_grad_(True)
    assert first_trained(model) == 0


def test_other_architectures_are_computed_whole() -> None:
    config = AutoConfig.for_model("gpt2", vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2)
    assert first_trained(AutoModelForCausalLM.from_config(config).requires_grad_(False)) == 0


def test_rotary_embeddings_that_grow_are_computed_whole() -> None:
    model = model_of("llama").requires_grad_(False)
    model.model.rotary_emb.rope_type = "dynamic"
    assert first_trained(model) == 0


def test_no_states_while_dropout_is_drawn_or_blocks_are_computed_again() -> None:
    bt, (task, data) = adapted(), task_and_rows("bert")
    base = bt.model.get_base_model()
    bt.model.train()
    assert task.with_states(bt.model, data).states is not None  # training mode, no dropout
    base.bert.encoder.layer[0].output.dropout.p = 0.1
    assert task.with_states(bt.model, data).states is None
    bt.model.eval()
    assert task.with_states(bt.model, data).states is not None
    base.bert.encoder.layer[0].output.dropout.p = 0.0
    base.activation_checkpointing_enable({"use_reentrant": False})
    assert not may_keep(bt.model)


def test_states_are_refused_in_a_mode_with_dropout() -> None:
    bt, (task, data) = adapted(), task_and_rows("bert")
    batch = task.batch(task.with_states(bt.model, data), ROWS)
    batch.pop("labels")
    run(bt.model, batch)
    bt.model.get_base_model().bert.encoder.layer[0].output.dropout.p = 0.1
    bt.model.train()
    with pytest.raises(RuntimeError, match="another mode"):
        run(bt.model, batch)


def test_a_run_with_dropout_is_looked_up_in_its_own_mode() -> None:
    """`rows_loss` is made before the model is put into training mode."""
    bt, (task, data) = adapted(), task_and_rows("bert")
    bt.model.get_base_model().bert.encoder.layer[0].output.dropout.p = 0.5
    loss_of, _ = rows_loss(task, bt.model, data)
    bt.model.train()
    losses = {float(loss_of(ROWS)) for _ in range(4)}
    assert len(losses) > 1


def test_products_in_bf16_have_states_of_their_own() -> None:
    bt, (task, data) = adapted(), task_and_rows("bert")
    bt.model.float()
    mixed = [nullcontext(), torch.autocast("cpu", torch.bfloat16)]
    found: list[Tensor] = []
    for mib in (0, 1):
        for context in mixed:
            with context:
                found.append(replace(task, states_mib=mib).logits(bt.model, data, 8))
    whole, rounded, kept, kept_rounded = found
    torch.testing.assert_close(kept, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(kept_rounded, rounded, rtol=2e-2, atol=2e-2)
    assert float((whole - rounded).abs().max()) > 10 * float((kept - whole).abs().max())


def test_memory_is_bounded_and_states_computed_again_are_the_same_bits() -> None:
    bt, (task, data) = adapted(), task_and_rows("bert")
    width, size = 16, 8
    texts = [tiny_rows([9, 9, 9], seed) for seed in range(3)]
    limit = 2 * 27 * width * size  # of two texts
    batch_of = task.batch

    def states(text: Encoded) -> Tensor:
        found = frozen_blocks.with_states(bt.model, text, batch_of, limit).states
        assert found is not None
        return found

    first = states(texts[0])
    assert states(texts[0]) is first
    states(texts[1])
    states(texts[0])
    states(texts[2])  # texts[1] was not used for longest
    assert states(texts[0]) is first
    kept = _KEPT[bt.model.get_base_model()]
    assert kept._bytes == sum(s.nbytes for s in kept._states.values()) <= limit
    states(texts[1])
    states(texts[2])
    again = states(texts[0])
    assert again is not first
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    assert frozen_blocks.with_states(bt.model, data, batch_of, 100).states is None
    assert frozen_blocks.with_states(bt.model, data, batch_of, 0).states is None


PLAIN = LocalSettings(dropout=False)


@pytest.mark.parametrize("kind", [*ENCODERS, *DECODERS])
def test_fine_tuning_starts_from_the_states_that_xi_has_computed(kind: str) -> None:
    bt, (task, data) = adapted(kind), task_and_rows(kind)
    whole = features(bt, replace(task, states_mib=0), data, PLAIN, PAPER)
    alone = task.with_states(bt.model, data).states
    assert alone is not None
    _KEPT.clear()
    xi = features(bt, task, data, PLAIN, PAPER)
    torch.testing.assert_close(xi, whole, rtol=1e-6, atol=1e-7)
    with blocks_run(bt.model) as seen:
        loss_of, _parts = rows_loss(task, bt.model, data)
        loss_of(ROWS).backward()
        kept = task.with_states(bt.model, data).states
    assert set(seen) == {2, 3}
    assert kept is not None
    assert not kept.is_inference()
    torch.testing.assert_close(kept, alone, rtol=0, atol=0)


def test_states_that_are_kept_already_are_not_kept_twice() -> None:
    bt, (task, data) = adapted(), task_and_rows("bert")
    before = task.with_states(bt.model, data).states
    first = features(bt, task, data, PLAIN, PAPER)
    assert task.with_states(bt.model, data).states is before
    kept = _KEPT[bt.model.get_base_model()]
    assert before is not None
    assert kept._bytes == before.nbytes
    _KEPT.clear()  # ξ has the same bits whoever came first
    torch.testing.assert_close(features(bt, task, data, PLAIN, PAPER), first, rtol=0, atol=0)


def test_xi_keeps_no_states_for_a_fine_tuning_with_dropout() -> None:
    bt, (task, data) = adapted(), task_and_rows("bert")
    bt.model.get_base_model().bert.encoder.layer[0].output.dropout.p = 0.1
    features(bt, task, data, LocalSettings(dropout=True), PAPER)
    assert bt.model.get_base_model() not in _KEPT
    features(bt, task, data, PLAIN, PAPER)
    assert bt.model.get_base_model() in _KEPT


def test_a_pass_that_fails_keeps_nothing() -> None:
    bt, (task, data) = adapted(), task_and_rows("bert")
    block = bt.model.get_base_model().bert.encoder.layer[2]
    with pytest.raises(ZeroDivisionError), task.keeping_states(bt.model, data):
        raise ZeroDivisionError
    assert not block._forward_pre_hooks
    with blocks_run(bt.model) as seen:
        task.with_states(bt.model, data)
    assert set(seen) == {0, 1}
