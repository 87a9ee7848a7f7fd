"""A tiny experiment on disk: a random BERT encoder, a word-level tokenizer, six clients, a YAML."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from fedp2eft.settings.experiment import Settings
from fedp2eft.settings.reading import settings_from

LABELS = ("animal", "plant", "stone")
WORDS = {
    "fr": {"animal": "chat chien cheval", "plant": "rose chêne herbe", "stone": "roc sable mur"},
    "de": {"animal": "katze hund pferd", "plant": "rosen eiche gras", "stone": "fels sand wand"},
}
FILLERS = {"fr": "le la un une très petit grand", "de": "der die das sehr klein groß"}
SEEN = ("de-seen-00", "de-seen-01", "fr-seen-00", "fr-seen-01")
UNSEEN = ("de-unseen-00", "fr-unseen-00")
CLIENTS = (*SEEN, *UNSEEN)
R_MAX, BASE_ROUNDS, ROUNDS, RANKS, LENGTH = 4, 2, 3, (1, 2), 12

Row = dict[str, Any]


@dataclass(frozen=True)
class World:
    """A folder with `encoder/`, `rows.jsonl` and `tiny.yaml`."""

    folder: Path

    @property
    def encoder(self) -> Path:
        return self.folder / "encoder"

    @property
    def rows(self) -> Path:
        return self.folder / "rows.jsonl"

    @property
    def config(self) -> Path:
        return self.folder / "tiny.yaml"

    def raw(self, **changes: Any) -> dict[str, Any]:
        """The settings as a mapping; `local__lr=1` changes one of a section."""
        raw: dict[str, Any] = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        for key, value in changes.items():
            section, _, name = key.partition("__")
            if name:
                raw.setdefault(section, {})[name] = value
            else:
                raw[section] = value
        return raw

    def settings(self, **changes: Any) -> Settings:
        return settings_from(self.raw(**changes))

    def yaml(self, path: Path, **changes: Any) -> Path:
        """The experiment with changes, as another YAML file."""
        path.write_text(yaml.safe_dump(self.raw(**changes), allow_unicode=True), encoding="utf-8")
        return path

    def client_rows(self, client: str, split: str) -> list[Row]:
        """The rows of one client and split, with text and label only."""
        rows = [json.loads(line) for line in self.rows.read_text(encoding="utf-8").splitlines()]
        return [
            {"text": row["text"], "label": row["label"]}
            for row in rows
            if row["client"] == client and row["split"] == split
        ]


def make_world(folder: Path) -> World:
    """Write the tiny experiment into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    world = World(folder)
    write_jsonl(world.rows, all_rows())
    save_encoder(world.encoder)
    world.config.write_text(
        yaml.safe_dump(
            {
                "seed": 3,
                "data": {"dataset": "files", "path": str(world.rows)},
                "model": {"name": str(world.encoder), "precision": "fp32", "device": "cpu"},
                "base": {
                    "rounds": BASE_ROUNDS,
                    "clients_per_round": 2,
                    "epochs": 1,
                    "batch_size": 6,
                    "lr": 5e-3,
                },
                "adapter": {"r_max": R_MAX},
                "generator": {"init_lambda": 0.5, "lr": 1e-2, "steps": 3},
                "local": {
                    "epochs": 1,
                    "batch_size": 6,
                    "lr": 1e-2,
                    "lambda_lr": 0.1,
                    "personalize_lr": 1e-2,
                    "max_length": LENGTH,
                },
                "federation": {"rounds": ROUNDS, "clients_per_round": 2},
                "evaluation": {"ranks": list(RANKS)},
            },
            sort_keys=False,
        ),
        encoding="utf-8",
    )
    return world


def all_rows(train: int = 12, test: int = 6) -> list[Row]:
    """Rows of all six clients; each client favours one class."""
    rng = np.random.default_rng(11)
    rows = []
    for number, client in enumerate(CLIENTS):
        language, pool, _ = client.split("-")
        weights = np.full(3, 0.2)
        weights[number % 3] = 0.6
        for i in range(train + test):
            label = str(rng.choice(LABELS, p=weights))
            rows.append(
                {
                    "client": client,
                    "language": language,
                    "pool": pool,
                    "split": "train" if i < train else "test",
                    "text": sentence(rng, language, label),
                    "label": label,
                }
            )
    # Every class must be known to all: the classes are those that the file holds.
    for row, label in zip(rows, LABELS, strict=False):
        row["label"] = label
        row["text"] = sentence(rng, "de", label)
    return rows


def sentence(rng: np.random.Generator, language: str, label: str) -> str:
    fillers, words = FILLERS[language].split(), WORDS[language][label].split()
    chosen = [str(rng.choice(fillers)) for _ in range(rng.integers(1, 6))]
    return " ".join([*chosen, str(rng.choice(words))])


def vocabulary() -> list[str]:
    """Every word that a client may write."""
    said = [*FILLERS.values(), *(text for each in WORDS.values() for text in each.values())]
    return sorted({word for text in said for word in text.split()})


def write_jsonl(path: Path, rows: list[Row]) -> Path:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(lines, encoding="utf-8")
    return path


def save_encoder(folder: Path, seed: int = 5, width: int = 16) -> Path:
    """A random BERT encoder without a head, and its tokenizer."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *vocabulary()]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]",
        cls_token="[CLS]", sep_token="[SEP]", model_max_length=2 * LENGTH,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BertModel(
            BertConfig(
                vocab_size=len(words), hidden_size=width, num_hidden_layers=2,
                num_attention_heads=2, intermediate_size=3 * width // 2, initializer_range=0.3,
                max_position_embeddings=2 * LENGTH,
            )
        )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# ── what a run leaves ───────────────────────────────────────────────────────────────────────────


UNLIKE = ("timings.jsonl", "faults.jsonl", "machine.json")


def outcome(run: Path) -> dict[str, Any]:
    """All of a run folder that must be the same bits each time: no timings, faults, machine."""
    found: dict[str, Any] = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if not path.is_file() or name in (*UNLIKE, ".lock", "settings.yaml"):
            continue
        if name.startswith("cells/"):
            cell = json.loads(path.read_text(encoding="utf-8"))
            cell.pop("seconds")
            found[name] = cell
        elif name.startswith("adapters/") and path.name == "adapter_config.json":
            config = json.loads(path.read_text(encoding="utf-8"))
            found[name] = {k: v for k, v in config.items() if k != "base_model_name_or_path"}
        elif path.name == "README.md":
            found[name] = None
        else:
            found[name] = path.read_bytes()
    return found


def assert_same(left: dict[str, Any], right: dict[str, Any]) -> None:
    """Two outcomes are the same, naming the files that are not."""
    assert sorted(left) == sorted(right)
    differ = [name for name in left if left[name] != right[name]]
    assert not differ, f"other bits in {differ}"


def environment(**extra: str) -> dict[str, str]:
    """What a subprocess gets: one thread, no hub."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "200",
        **extra,
    }


def command(*arguments: object) -> list[str]:
    """A command line of the package in a process of its own."""
    code = "import sys; from fedp2eft.cli import main; sys.exit(main())"
    return [sys.executable, "-c", code, *[str(a) for a in arguments]]


def in_process(*arguments: object, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own and wait for it."""
    return subprocess.run(
        command(*arguments), env=environment(**extra), capture_output=True, text=True, timeout=600,
        check=False,
    )  # fmt: skip


def plain_python(code: str, *arguments: object) -> str:
    """What a Python process that never imports fedp2eft prints."""
    # bitsandbytes is a quarter of a start, and nothing is quantized
    guard = "import sys\nsys.modules['fedp2eft'] = sys.modules['bitsandbytes'] = None\n"
    done = subprocess.run(
        [sys.executable, "-c", guard + code, *[str(a) for a in arguments]],
        env=environment(), capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def train_in_process(config: str, run: str) -> None:
    """The target of a process that may be killed."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from fedp2eft.cli import main

    with open(os.devnull, "w") as nowhere:
        sys.stdout = sys.stderr = nowhere
        sys.exit(main(["train", config, "--run", run]))
