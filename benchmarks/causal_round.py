"""A client's round of a causal LM (ξ aside): rows packed and the head at responses alone, or not.

    python benchmarks/causal_round.py [--language ru] [--rows 16] [--max-length 80]
        [--batch-size 4] [--first 0] [--precision auto] [--runs 3]

"padded" is what a model that cannot be packed gets: parts of similar length, padded, and logits
from the earliest response of each on. "upper" adapts the upper half alone and starts from kept
states. "score" is a pass without gradients.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from unittest.mock import patch

import torch
from common import alternate, machine, median, spread

from fedp2eft.adapters.btlora import BTLora
from fedp2eft.client.descent import local_order
from fedp2eft.client.training import stage1
from fedp2eft.data.registry import load_clients
from fedp2eft.models.loading import load_base, load_config, load_tokenizer
from fedp2eft.models.precision import resolve_precision
from fedp2eft.models.sources import resolve_model
from fedp2eft.settings.data import DataSettings
from fedp2eft.settings.experiment import AdapterSettings, LocalSettings
from fedp2eft.settings.profiles import PAPER
from fedp2eft.tasks.causal_lm import CausalLM
from fedp2eft.tasks.make import make_task

SMOLLM = "HuggingFaceTB/SmolLM2-135M-Instruct"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=SMOLLM)
    parser.add_argument("--language", default="ru")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=80)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--r-max", type=int, default=8)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--runs", type=int, default=3)
    o = parser.parse_args()
    source = resolve_model(o.model)
    tokenizer, config = load_tokenizer(source), load_config(source)
    task = make_task("causal_lm", tokenizer, o.max_length, "cpu", config)
    assert isinstance(task, CausalLM)
    clients = load_clients(
        DataSettings(
            "libreoffice-help", languages=[o.language], clients_per_language=1,
            max_train=o.rows, max_test=4,
        ),
        labels_used=False,
    )  # fmt: skip
    chosen = clients.pool("seen")[0].train
    data = task.encode(tokenizer, *clients.texts_and_answers(chosen, "causal_lm"))
    dtype = resolve_precision(o.precision, "cpu")
    s = LocalSettings(dropout=False, epochs=1, batch_size=o.batch_size)
    order = list(local_order(len(data), s.epochs, s.batch_size, 0))
    losses: dict[str, list[float]] = {}

    def adapted(first: int) -> BTLora:
        base = load_base(source, "causal_lm", dtype=dtype, max_length=o.max_length)
        blocks = "|".join(str(n) for n in range(first, base.config.num_hidden_layers))
        targets = rf".*layers\.({blocks})\..*_proj"
        return BTLora(base, AdapterSettings(r_max=o.r_max, target_modules=targets))

    def training(name: str, bt: BTLora, own: CausalLM, packs: bool) -> Callable[[], None]:
        def run() -> None:
            bt.reset(0.5)
            with patch.object(CausalLM, "_packs", CausalLM._packs if packs else never):
                losses[name] = stage1(bt, own, data, order, s, PAPER)

        return run

    def scoring(bt: BTLora, own: CausalLM, packs: bool) -> Callable[[], None]:
        def run() -> None:
            with patch.object(CausalLM, "_packs", CausalLM._packs if packs else never):
                own.score(bt.model, data, 8)

        return run

    whole, upper = adapted(0), adapted(config.num_hidden_layers // 2)
    keeps = replace(task, states_mib=512)
    seconds = alternate(
        o.runs,
        padded=training("padded", whole, task, False), packed=training("packed", whole, task, True),
        upper_padded=training("upper_padded", upper, task, False),
        upper_packed=training("upper_packed", upper, keeps, True),
        score_padded=scoring(upper, task, False), score_packed=scoring(upper, task, True),
        score_upper=scoring(upper, keeps, True),
    )  # fmt: skip
    print(machine())
    responses = data.weights(range(len(data)))
    print(
        f"{o.language}: {len(data)} rows of {data.lengths.mean():.0f} tokens ({data.lengths.min()} "
        f"to {data.lengths.max()}), {responses.mean():.0f} of the response; {dtype}, {len(order)} "
        f"steps of {s.batch_size}, r_max {o.r_max}"
    )
    before = {"score": "score_padded", "upper": "upper_padded"}
    for name, values in seconds.items():
        against = seconds[before.get(name.split("_")[0], "padded")]
        ratio = median([a / b for a, b in zip(against, values, strict=True)])
        print(f"{name:>13}: {spread(values)}, {ratio:.2f} times as fast")
    for name in ("", "upper_"):
        pairs = zip(losses[f"{name}padded"], losses[f"{name}packed"], strict=True)
        print(f"L of {name}packed differs by {max(abs(a / b - 1) for a, b in pairs):.1e} at most")


def never(*_args: object) -> bool:
    return False


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
