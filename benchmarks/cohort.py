"""Clients per second by the size of a cohort: 16 clients' rounds, one at a time up to all at once.

    python benchmarks/cohort.py [--device cuda] [--model FOLDER] [--runs 5] [--json OUT.json]

Needs no download: without --model the encoder is a random one of the given size, and the rows are
random tokens. On a GPU 16 clients at once should give at least 5 times the clients per second.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import alternate, machine, median
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel

from fedp2eft.adapters.btlora import BTLora
from fedp2eft.client.cohort import CohortClient, train_cohort, why_alone
from fedp2eft.client.descent import local_order
from fedp2eft.client.training import Round, train_round
from fedp2eft.data.debian import LABELS
from fedp2eft.generator import PSG, PSGConfig
from fedp2eft.models.loading import load_base
from fedp2eft.models.precision import resolve_precision
from fedp2eft.models.sources import resolve_model
from fedp2eft.settings.experiment import AdapterSettings, GeneratorSettings, LocalSettings
from fedp2eft.settings.profiles import PAPER
from fedp2eft.tasks.classification import Classification
from fedp2eft.tasks.encoded import Encoded


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", help="folder of an encoder; a random one where none is given")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=8000)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--r-max", type=int, default=32)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--rows", type=int, default=100, help="training rows of each client")
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--cohorts", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the numbers to this file too")
    return parser.parse_args()


def encoder(options: argparse.Namespace, dtype: torch.dtype) -> PreTrainedModel:
    if options.model:
        return load_base(
            resolve_model(options.model), "classification", labels=LABELS, dtype=dtype,
            device=options.device, max_length=options.max_length,
        )  # fmt: skip
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=options.vocabulary, hidden_size=options.width,
        intermediate_size=4 * options.width,
        num_hidden_layers=options.layers, num_attention_heads=max(1, options.width // 32),
        max_position_embeddings=max(512, options.max_length), num_labels=len(LABELS),
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    if options.device == "cpu":
        model.set_attn_implementation("eager")
    return model.to(dtype).to(options.device).eval()


def rows_of(client: int, options: argparse.Namespace, vocabulary: int) -> Encoded:
    """Random rows between half and all of the longest length."""
    rng = np.random.default_rng(client)
    lengths = rng.integers(options.max_length // 2, options.max_length + 1, size=options.rows)
    rows = [rng.integers(5, vocabulary, size=length).tolist() for length in lengths]
    return Encoded.from_rows(rows, rng.integers(0, len(LABELS), size=options.rows))


def main() -> None:
    options = parse()
    dtype = resolve_precision(options.precision, options.device)
    base = encoder(options, dtype)
    bt = BTLora(base, AdapterSettings(r_max=options.r_max))
    task = Classification(pad_id=0, max_length=options.max_length, device=options.device)
    local = LocalSettings(dropout=False, epochs=options.epochs, batch_size=options.batch_size)
    generator = GeneratorSettings(init_lambda=0.5)
    if reason := why_alone(bt, local):
        raise SystemExit(f"No cohort: {reason}.")
    psg = PSG(
        PSGConfig(
            adapter=bt.settings, generator=generator, base_model="b", base_revision="r",
            layer_names=bt.names,
            linear_names=tuple(name for name, _ in bt.linears),
        )
    )  # fmt: skip
    phi = psg.phi()
    draw = torch.Generator().manual_seed(0)
    clients = []
    for number in range(options.clients):
        data = rows_of(number, options, base.config.vocab_size)
        order = list(local_order(len(data), local.epochs, local.batch_size, number))
        clients.append(
            CohortClient(data, torch.randn(psg.config.n_features, generator=draw), order)
        )
    lam: dict[str, torch.Tensor] = {}

    def keep(name: str, found: Sequence[Any]) -> None:
        assert all(isinstance(one, Round) for one in found)
        lam[name] = torch.stack([one.lam for one in found])

    def one_at_a_time() -> None:
        found = []
        for client in clients:
            psg.set_phi(phi)
            found.append(
                train_round(
                    bt, task, client.data, client.xi, psg, client.order, local, generator, PAPER
                )
            )
        keep("1", found)

    def together(size: int) -> Callable[[], None]:
        def run() -> None:
            found = []
            psg.set_phi(phi)
            for start in range(0, len(clients), size):
                part = clients[start : start + size]
                found += train_cohort(bt, task, part, psg, local, generator, PAPER)
            keep(str(size), found)

        return run

    modes = {str(n): one_at_a_time if n == 1 else together(n) for n in options.cohorts}
    seconds = alternate(options.runs, **modes)
    what = options.model or f"random BERT, {options.layers} layers of {options.width}"
    print(machine())
    print(
        f"{what}, {dtype}, on {options.device}; {options.clients} clients of {options.rows} rows, "
        f"at most {options.max_length} tokens, {len(clients[0].order)} steps of "
        f"{options.batch_size} rows; r_max {options.r_max}; medians of {options.runs}"
    )
    print(
        f"{'cohort':>6} {'clients/s':>10} {'(lowest to highest)':>22} {'gain':>6}  λ^s differs by"
    )
    first = median(seconds[next(iter(modes))])
    table = []
    for name, values in seconds.items():
        rates = sorted(options.clients / value for value in values)
        gain = first / median(values)
        apart = float((lam[name] - lam[next(iter(modes))]).abs().max())
        between = f"{rates[0]:.3f} to {rates[-1]:.3f}"
        print(f"{name:>6} {median(rates):>10.3f} {between:>22} {gain:>5.2f}×  {apart:.1e}")
        table.append({"cohort": int(name), "clients_per_second": rates, "gain": gain})
    if options.json:
        facts = {"machine": machine(), "settings": vars(options) | {"json": None}, "table": table}
        options.json.write_text(json.dumps(facts, indent=2, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
