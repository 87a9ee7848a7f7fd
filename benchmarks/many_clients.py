"""A tiny random encoder and any number of clients with a dozen made-up rows each."""

from __future__ import annotations

import gc
import json
import random
from pathlib import Path
from typing import Any

import psutil
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from fedp2eft.progress import LogReporter
from fedp2eft.settings.experiment import Settings
from fedp2eft.settings.reading import settings_from

LABELS, LANGUAGES, WORDS = ("animal", "plant", "stone"), ("de", "fr", "ko"), 64


def write_encoder(folder: Path) -> Path:
    """Two layers of width 16; words w0 … w63."""
    words = ["[PAD]", "[UNK]", *(f"w{i}" for i in range(WORDS))]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=16,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, clients: int, rows: int = 12) -> Path:
    """Rows of all clients, a third of them for testing."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(clients):
            name = f"c{number:07d}"
            for row in range(rows):
                text = " ".join(f"w{draw.randrange(WORDS)}" for _ in range(8))
                split = "test" if row % 3 == 2 else "train"
                line = {"client": name, "language": LANGUAGES[number % 3], "pool": "seen"}
                line |= {"split": split, "text": text, "label": LABELS[(number + row) % 3]}
                file.write(json.dumps(line) + "\n")
    return path


def experiment(folder: Path, clients: int, rounds: int, a_round: int, **more: Any) -> Settings:
    """The experiment, its files written into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return settings_from(
        {
            "data": {
                "dataset": "files",
                "path": str(write_rows(folder / f"rows-{clients}.jsonl", clients)),
                "labels": list(LABELS),
            },
            "model": {"name": str(write_encoder(folder / "encoder")), "device": "cpu"},
            "base": {"kind": "none"},
            "adapter": {"r_max": 4},
            "local": {"epochs": 1, "batch_size": 8, "max_length": 16, "dropout": False},
            "generator": {"steps": 3},
            "federation": {"rounds": rounds, "clients_per_round": a_round},
            "evaluation": {"methods": [], "ranks": [2], "pools": []},
        }
        | more
    )


def resident() -> float:
    """MB of this process in memory."""
    gc.collect()
    return float(psutil.Process().memory_info().rss / 1e6)


class Silent(LogReporter):
    """Says nothing."""

    def advance(self, phase: str, text: str) -> None:
        """A unit is finished."""
