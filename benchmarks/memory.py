"""Memory of a federation: bytes a client, and whether rounds leave any behind.

    python benchmarks/memory.py [--clients 600] [--rounds 3] [--rows 4]

Trains a tiny encoder with every client in every round, on the local engine, by the same `train` as
the command line. Resident memory is read after each phase and round; what the 600 clients add is
the difference to a federation of 6 in a process of its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import psutil
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from fedp2eft.experiment.train import train
from fedp2eft.settings.reading import settings_from

WORDS = [f"w{i}" for i in range(60)]
LABELS = ("a", "b", "c")


def resident() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def save_encoder(folder: Path) -> None:
    """A random BERT of two layers of width 32, and a tokenizer of whole words."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]",
    ).save_pretrained(folder)  # fmt: skip


def save_rows(path: Path, clients: int, rows: int) -> None:
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for client in range(clients):
            for i in range(rows + 1):
                row = {
                    "client": f"c{client:04d}",
                    "language": "xx",
                    "pool": "seen",
                    "split": "train" if i < rows else "test",
                    "text": " ".join(rng.choice(WORDS, size=10)),
                    "label": LABELS[i % 3],
                }
                file.write(json.dumps(row) + "\n")


class Watch:
    """Reads the resident memory whenever a unit of a phase is finished."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.seen: list[tuple[str, int, int]] = []
        self._done = 0

    def start(self, phase: str, total: int, done: int) -> None:
        self._done = 0
        self.seen.append((phase, 0, resident()))

    def advance(self, phase: str, text: str) -> None:
        self._done += 1
        if phase != "personalize" or self._done % self.every == 0:
            self.seen.append((phase, self._done, resident()))

    def part(self, phase: str, fraction: float, text: str) -> None: ...

    def note(self, text: str) -> None: ...


def measure(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save_encoder(folder / "encoder")
        save_rows(folder / "rows.jsonl", options.clients, options.rows)
        settings = settings_from(
            {
                "data": {"dataset": "files", "path": str(folder / "rows.jsonl")},
                "model": {"name": str(folder / "encoder"), "precision": "fp32", "device": "cpu"},
                "base": {"kind": "standard-fl", "rounds": 1, "clients_per_round": 2, "epochs": 1},
                "adapter": {"r_max": 4},
                "generator": {"init_lambda": 0.5},
                "local": {"epochs": 1, "batch_size": 4, "max_length": 16},
                "federation": {
                    "rounds": options.rounds,
                    "clients_per_round": options.clients,
                    "cohort": 1,
                },
                "evaluation": {"ranks": [2], "methods": ["fedp2eft"], "save_adapters": False},
            }
        )
        watch = Watch(max(1, options.clients // 4))
        train(settings, folder / "run", watch)
    print(json.dumps(watch.seen))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clients", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--measure", action="store_true", help="one federation, as JSON")
    options = parser.parse_args()
    if options.measure:
        return measure(options)
    from common import machine

    found = {}
    for clients in (6, options.clients):
        command = [
            sys.executable, __file__, "--measure", "--clients", str(clients),
            "--rounds", str(options.rounds), "--rows", str(options.rows),
        ]  # fmt: skip
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found[clients] = json.loads(printed.splitlines()[-1])
    print(machine())
    for clients, seen in found.items():
        print(f"{clients} clients, {options.rows} training rows each:")
        for phase, done, size in seen:
            print(f"  {phase:>12} {done:>4}: {size / 1e6:.1f} MB")
    few, many = (max(size for _, _, size in seen) for seen in found.values())
    print(f"a client more: {(many - few) / (options.clients - 6) / 1000:.1f} kB, at the most")


if __name__ == "__main__":
    main()
