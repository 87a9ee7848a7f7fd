"""Profile `reference` repeats every number of the reference implementation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedp2eft.adapters.weights import AdapterWeights
from fedp2eft.client.training import features, personalize, stage1, stage2
from fedp2eft.settings.profiles import REFERENCE
from golden_case import GoldenCase, case_folders, plain

TOLERANCE = {"features": 1e-5, "loss": 1e-4, "lambda": 1e-5, "weights": 1e-5, "logits": 1e-4}
worst: dict[str, float] = {}


def close(kind: str, got: Tensor, want: Tensor, where: str) -> None:
    difference = (got - want).abs()
    if kind == "loss":
        difference = difference / want.abs()
    worst[kind] = max(worst.get(kind, 0.0), float(difference.max()))
    assert got.shape == want.shape, where
    assert float(difference.max()) <= TOLERANCE[kind], f"{kind} of {where}"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])  # padded rows, and packed ones
@pytest.mark.parametrize("folder", case_folders(), ids=lambda p: p.name)
def test_every_number_of_the_reference(folder, attention: str) -> None:
    case = GoldenCase.load(folder)
    t, facts = case.tensors, case.facts
    bt, task = case.adapter(attention=attention), case.task()
    local = case.local_settings()
    worst.clear()
    assert (task.packed_loss(bt.model, case.data(case.clients[0], "train")) is None) == (
        attention == "sdpa"
    )
    assert list(bt.names) == [plain(n) for n in facts["lora_module_names"]]
    assert [n for n, _ in bt.linears] == [plain(n) for n in facts["feature_linear_names"]]
    psg = case.psg(bt)
    assert [n for n, _ in psg.named_parameters()] == facts["psg_param_names"]
    phi = psg.phi()
    train = [case.data(k, "train") for k in case.clients]
    for round_ in case.rounds:
        replies = []
        for k in case.clients:
            key = f"round{round_}.client{k}"
            xi = features(bt, task, train[k], local, REFERENCE)
            close("features", xi, t[f"{key}.features"], key)
            psg.set_phi(phi)
            bt.reset(psg(xi).detach())
            losses = stage1(bt, task, train[k], case.order(key), local, REFERENCE)
            close("loss", torch.tensor(losses), torch.tensor(facts["stage1_losses"][key]), key)
            close("lambda", bt.lam.detach(), t[f"{key}.lambda_after_stage1"], key)
            for name, A, B in zip(facts["lora_module_names"], bt.A, bt.B, strict=True):
                for weight, value in (("lora_A", A), ("lora_B", B)):
                    golden = t.get(f"{key}.lora_after_stage1.{name}.{weight}.weight")
                    if golden is not None:
                        close("weights", value.detach(), golden, f"{key} {name} {weight}")
            psg_loss = stage2(psg, xi, bt.lam.detach().clone(), case.generator_settings()).item()
            close("loss", torch.tensor(psg_loss), t[f"{key}.mean_psg_loss"], key)
            after = psg.phi()
            for name, value in case.starting(f"{key}.psg_after_stage2.").items():
                close("weights", after[name], value, f"{key} φ {name}")
            replies.append((after, len(train[k])))
        total = sum(n for _, n in replies)
        phi = {name: sum(p[name] * (n / total) for p, n in replies) for name in phi}
        for name, value in case.starting(f"round{round_}.psg_aggregated.").items():
            close("weights", phi[name], value, f"round {round_} φ {name}")
    for rank in facts["eval_ranks"]:
        for k in case.clients:
            key = f"personalize.rank{rank}.client{k}"
            lam = t[f"{key}.lambda_kept"]
            assert int((lam > 0).sum()) == rank * len(bt.names)
            logits = []
            fitted = personalize(
                bt, task, train[k], lam, lam > 0, case.order(key), local,
                measure=lambda model, k=k, into=logits: into.append(
                    task.logits(model, case.data(k, "test"), 16)
                ),
            )  # fmt: skip
            assert isinstance(fitted.weights, AdapterWeights)
            close("logits", logits[0], t[f"{key}.test_logits"], key)
            right = logits[0].argmax(1) == t[f"client{k}.test.labels"]
            assert float(right.float().mean()) == pytest.approx(float(t[f"{key}.accuracy"]))
    print("largest deviations:", {kind: f"{value:.1e}" for kind, value in worst.items()})
