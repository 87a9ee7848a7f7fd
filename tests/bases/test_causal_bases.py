"""FedIT and FFA-LoRA under a causal LM: whole tiny runs, checked from their messages and files."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch
from flwr.app import Message
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from fedp2eft.adapters.btlora import common_A
from fedp2eft.results.rows import read_results
from fedp2eft.seeding import derive_seed
from fedp2eft.settings.experiment import Settings
from tiny_chat import make_chat_world
from tiny_run import SEEN, World
from turns import TRAIN_BASE
from watching import FinishedRun, watched

ROUNDS, RANK, ALPHA = 2, 2, 6.0
SCALE = ALPHA / RANK
PARTS = {"fedit": ("lora_A", "lora_B"), "ffa-lora": ("lora_B",)}
PROBE = torch.tensor([[4, 9, 10, 7, 5]])


@dataclass
class Run:
    """A finished run, and what it was asked for."""

    kind: str
    world: World
    settings: Settings
    done: FinishedRun

    def replies(self, round_: int) -> list[Message]:
        """What the clients of a round of the base sent, counted from 0."""
        sent = [r for m, r in self.done.messages if m.metadata.message_type == TRAIN_BASE]
        size = len(sent) // ROUNDS
        return sent[round_ * size : (round_ + 1) * size]

    def weights(self, folder: str) -> dict[str, Tensor]:
        """Weights by name: of "base", the run's own, or of "" the model it started from."""
        path = self.done.folder / folder if folder else self.world.encoder
        model = AutoModelForCausalLM.from_pretrained(path)
        return {name: weight.detach() for name, weight in model.named_parameters()}


@pytest.fixture(scope="module", params=sorted(PARTS))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    kind = request.param
    world = make_chat_world(tmp_path_factory.mktemp(kind))
    settings = world.settings(
        base__kind=kind, base__rounds=ROUNDS, base__clients_per_round=len(SEEN), base__steps=3,
        base__batch_size=2, base__lr=5e-2, base__schedule="cosine", base__lora_rank=RANK,
        base__lora_alpha=ALPHA, federation__rounds=1, evaluation__ranks=[2],
    )  # fmt: skip
    return Run(kind, world, settings, watched(settings, world.folder / "run"))


def arrays(reply: Message) -> dict[str, Tensor]:
    """The arrays of a reply by name."""
    [record] = reply.content.array_records.values()
    return {name: torch.from_numpy(array.numpy()) for name, array in record.items()}


def test_only_lora_travels_and_the_output_head_has_none(run: Run) -> None:
    linear = [n for n, p in run.weights("").items() if p.ndim == 2 and "embed" not in n]
    layers = [name.removesuffix(".weight") for name in linear if "lm_head" not in name]
    expected = {f"{layer}.{part}" for layer in layers for part in PARTS[run.kind]}
    assert len(layers) == 14
    for round_ in range(ROUNDS):
        assert len(run.replies(round_)) == len(SEEN)
        for reply in run.replies(round_):
            assert set(arrays(reply)) == expected


def test_the_base_is_the_first_model_plus_the_mean_of_the_last_replies(run: Run) -> None:
    """W + s·B̄·Ā, recomputed from the messages; A is the common one where it never travels."""
    sent = [arrays(reply) for reply in run.replies(ROUNDS - 1)]
    counts = {r.content["metrics"]["num-examples"] for r in run.replies(ROUNDS - 1)}
    assert counts == {6}  # so that the weighted mean is the plain one
    mean = {name: torch.stack([each[name] for each in sent]).mean(dim=0) for name in sent[0]}
    before, after = run.weights(""), run.weights("base")
    seed = derive_seed("base LoRA", run.settings.adapter.seed)
    changed = set()
    for name, weight in before.items():
        layer = name.removesuffix(".weight")
        B = mean.get(f"{layer}.lora_B")
        if B is None:
            assert torch.equal(after[name], weight), name
            continue
        A = mean.get(f"{layer}.lora_A")
        if A is None:
            A = common_A(layer, torch.empty(RANK, weight.shape[1]), seed)
        torch.testing.assert_close(after[name], weight + SCALE * B @ A, rtol=0, atol=1e-6)
        changed |= {layer} if float((after[name] - weight).abs().max()) > 1e-4 else set()
    assert len(changed) == 14


def test_the_seen_clients_responses_are_learned(run: Run) -> None:
    """The loss that the clients tell falls over the rounds, and methods go on from the base."""
    first, last = (
        sum(reply.content["metrics"]["loss"] for reply in run.replies(round_))
        for round_ in (0, ROUNDS - 1)
    )
    assert last < first
    results = read_results(run.done.folder)
    base = results.row("base", 0, "seen")
    assert base.metric == "response loss"
    assert results.row("fedp2eft", 2, "seen").mean < base.mean
    folder = run.done.folder / "adapters" / "fr-unseen-00" / "fedp2eft-r2"
    plain = AutoModelForCausalLM.from_pretrained(run.done.folder / "base").eval()
    with torch.no_grad():
        bare = plain(input_ids=PROBE).logits
        adapted = PeftModel.from_pretrained(plain, folder).eval()(input_ids=PROBE).logits
    assert float((adapted - bare).abs().max()) > 1e-3
    kept = json.loads((folder / "adapter_config.json").read_text())
    assert kept["task_type"] == "CAUSAL_LM"


@pytest.mark.parametrize("kind", ["fedit", "standard-fl"])
def test_a_base_learns_in_bf16_as_in_fp32(
    kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Its weights are fp32 and its products bf16 (autocast), as in no later phase."""
    losses = {}
    for precision in ("fp32", "bf16"):
        world = make_chat_world(tmp_path_factory.mktemp(precision))
        settings = world.settings(
            model__precision=precision, base__kind=kind, base__rounds=1, base__steps=2,
            base__clients_per_round=len(SEEN), base__batch_size=2, base__lr=5e-2,
            federation__rounds=1, evaluation__methods=["base"],
        )  # fmt: skip
        done = watched(settings, world.folder / "run")
        losses[precision] = read_results(done.folder).row("base", 0, "seen").mean
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
    assert losses["bf16"] != losses["fp32"]
