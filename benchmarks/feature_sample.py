"""How far λ moves if ξ comes from a sample of a client's rows (`generator.feature_tokens`).

    python benchmarks/feature_sample.py RUN [--languages de ja ru es] [--rows 200]
        [--max-length 128] [--tokens 128 256 512 1024 2048 4096] [--draws 5] [--ranks 2 8]

RUN is a finished run on the Debian descriptions. Its PSG meets unseen clients that have more text
than the run's. λ from a sample is compared with λ from all rows of the same client, and, for scale,
λ of a client with λ of another.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from common import machine, median
from torch import Tensor

from fedp2eft.adapters.btlora import BTLora
from fedp2eft.client.training import features, structure
from fedp2eft.data.debian import load_debian
from fedp2eft.generator import PSG
from fedp2eft.models.loading import load_base, load_tokenizer
from fedp2eft.models.precision import resolve_precision
from fedp2eft.models.sources import resolve_model
from fedp2eft.settings.profiles import PROFILES
from fedp2eft.tasks.classification import Classification
from fedp2eft.tasks.encoded import Encoded


def apart(lam: Tensor, other: Tensor) -> float:
    """Mean absolute difference, as a share of the mean of the second."""
    return float((lam - other).abs().mean() / other.mean())


def same(psg: PSG, xi: Tensor, other: Tensor, rank: int) -> float:
    """The share of kept ranks that two clients have in common."""
    kept, others = structure(psg, xi, rank)[1], structure(psg, other, rank)[1]
    return float((kept & others).sum() / kept.sum())


def clients(languages: list[str], rows: int, task: Classification, tokenizer: Any) -> list[Encoded]:
    """Two unseen clients per language, as tokens."""
    data = load_debian(
        languages=tuple(languages), clients_per_language=2, max_train=rows, max_test=8
    )
    encoded = []
    for client in data.pool("unseen"):
        texts = [list(data.rows(client.train)["text"])]
        encoded.append(task.encode(tokenizer, texts, data.label_ids(client.train)))
    return encoded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--languages", nargs="+", default=["de", "ja", "ru", "es"])
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 256, 512, 1024, 2048, 4096])
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8])
    options = parser.parse_args()
    psg = PSG.from_pretrained(options.run / "psg")
    source = resolve_model(str(options.run / "base"))
    tokenizer = load_tokenizer(source)
    task = Classification(tokenizer.pad_token_id or 0, options.max_length)
    dtype = resolve_precision("auto", "cpu")
    base = load_base(source, "classification", dtype=dtype, max_length=options.max_length)
    bt = BTLora(base, psg.config.adapter)
    local = replace(psg.config.local, max_length=options.max_length)
    data = clients(options.languages, options.rows, task, tokenizer)

    def xi_of(rows: Encoded) -> Tensor:
        return features(bt, task, rows, local, PROFILES[psg.config.profile])

    whole = [xi_of(rows) for rows in data]
    with torch.no_grad():
        lam = [psg(xi) for xi in whole]
    print(machine())
    print(
        f"{len(data)} clients, {min(map(len, data))} to {max(map(len, data))} rows, "
        f"{min(len(d.tokens) for d in data)} to {max(len(d.tokens) for d in data)} tokens; {dtype}"
    )

    def line(name: str, moved: list[float], shared: dict[int, list[float]]) -> None:
        ranks = ", ".join(
            f"r = {rank}: {median(values):.1%} (least {min(values):.1%})"
            for rank, values in shared.items()
        )
        print(f"{name}: λ by {median(moved):.2%} (most {max(moved):.2%}); same ranks {ranks}")

    for tokens in options.tokens:
        moved: list[float] = []
        shared: dict[int, list[float]] = {rank: [] for rank in options.ranks}
        for rows, xi, all_of in zip(data, whole, lam, strict=True):
            for draw in range(options.draws):
                sampled = xi_of(rows.sample(tokens, draw))
                with torch.no_grad():
                    moved.append(apart(psg(sampled), all_of))
                for rank, values in shared.items():
                    values.append(same(psg, sampled, xi, rank))
        line(f"{tokens} tokens", moved, shared)
    pairs = list(combinations(range(len(data)), 2))
    moved = [apart(lam[i], lam[j]) for i, j in pairs]
    shared = {r: [same(psg, whole[i], whole[j], r) for i, j in pairs] for r in options.ranks}
    line("another client", moved, shared)


if __name__ == "__main__":
    main()
