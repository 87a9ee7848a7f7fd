"""A tiny experiment with prompts and responses: a random Llama, a word-level chat tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tiny_run import CLIENTS, R_MAX, RANKS, Row, World, write_jsonl

WORDS = {"fr": "un chat noir dort ici sur le mur", "de": "eine katze schläft hier auf dem dach"}
LENGTH = 24
TEMPLATE = (
    "{% for turn in messages %}<|{{ turn['role'] }}|> {{ turn['content'] }} <|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]


def chat_tokenizer(
    chat: bool = True, leave_out: tuple[str, ...] = (), **roles: str | None
) -> PreTrainedTokenizerFast:
    """Words split at white space; by default with a chat template whose turns end with <|end|>."""
    special = [token for token in SPECIAL if token not in leave_out]
    words = [*special, *sorted({word for text in WORDS.values() for word in text.split()})]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens([AddedToken(token, special=True) for token in special])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **(names | roles))
    if chat:
        tokenizer.chat_template = TEMPLATE
    return tokenizer


def chat_rows(train: int = 6, test: int = 3) -> list[Row]:
    """Rows of all six clients: the response says the prompt's words once more, backwards."""
    rng = np.random.default_rng(13)
    rows: list[Row] = []
    for client in CLIENTS:
        language, pool, _ = client.split("-")
        words = WORDS[language].split()
        for i in range(train + test):
            said = [str(word) for word in rng.choice(words, size=rng.integers(1, 6))]
            rows.append(
                {
                    "client": client,
                    "language": language,
                    "pool": pool,
                    "split": "train" if i < train else "test",
                    "prompt": " ".join(said),
                    "response": " ".join(reversed(said)),
                }
            )
    return rows


def save_llama(folder: Path, seed: int = 5, width: int = 16, tied: bool = True) -> Path:
    """A random Llama and its chat tokenizer."""
    tokenizer = chat_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width // 2,
                num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                max_position_embeddings=4 * LENGTH, initializer_range=0.3,
                tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2,
            )
        )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_chat_world(folder: Path, **changes: Any) -> World:
    """Write the tiny experiment into a folder; `section__name=value` changes a setting."""
    folder.mkdir(parents=True, exist_ok=True)
    world = World(folder)
    write_jsonl(world.rows, chat_rows())
    save_llama(world.encoder)
    raw = {
        "seed": 3,
        "data": {
            "dataset": "files",
            "path": str(world.rows),
            "text_columns": ["prompt"],
            "target_column": "response",
            "label_column": None,
        },
        "model": {
            "name": str(world.encoder),
            "task": "causal_lm",
            "precision": "fp32",
            "device": "cpu",
        },
        "base": {"kind": "none"},
        "adapter": {"r_max": R_MAX},
        "generator": {"init_lambda": 0.5, "lr": 1e-2, "steps": 3},
        "local": {
            "epochs": 1,
            "batch_size": 2,
            "accumulate": 2,
            "lr": 1e-2,
            "lambda_lr": 0.1,
            "personalize_lr": 1e-2,
            "max_length": LENGTH,
            "eval_batch_size": 2,
        },
        "federation": {"rounds": 2, "clients_per_round": 2},
        "evaluation": {"ranks": list(RANKS)},
    }
    world.config.write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    return world
