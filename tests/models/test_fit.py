"""Model, tokenizer and classes fit together on every kind of model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from kinds import BARE, KINDS, LIMIT, save_kind
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fedp2eft.errors import UserError
from fedp2eft.models.fit import longest_input
from fedp2eft.models.loading import load_base, load_tokenizer, save_model
from fedp2eft.models.sources import resolve_model
from fedp2eft.tasks.make import make_task
from tiny_run import LABELS

TEXTS = ["le petit chat", "le grand chien", "le petit chat le roc le mur le sable der die das"]
LEARNED = ("bert", "xlm-roberta", "camembert", "mpnet", "distilbert", "electra", "gpt2")
UNLIMITED = ("deberta", "mt5", "byt5")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("kinds")
    return {kind: save_kind(kind, root / kind) for kind in KINDS}


def parts(folder: Path, length: int = LIMIT):
    """Model, tokenizer and task, as a run loads them."""
    source = resolve_model(str(folder))
    tokenizer = load_tokenizer(source)
    model = load_base(
        source, "classification", labels=LABELS, tokenizer=tokenizer, max_length=length
    )
    return model, tokenizer, make_task("classification", tokenizer, length, "cpu", model.config)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_alone_and_beside_longer_ones_has_the_same_logits(folders, kind: str, tmp_path):
    model, tokenizer, task = parts(folders[kind])

    def logits(*texts: str) -> torch.Tensor:
        return task.logits(model, task.encode(tokenizer, [texts], [0] * len(texts)), 64)

    together, alone = logits(*TEXTS), torch.cat([logits(text) for text in TEXTS])
    torch.testing.assert_close(together, alone, atol=2e-6, rtol=1e-4)
    assert (together[0] - together[1]).abs().max() > 1e-4
    # And so it is for whoever loads what a run saves with plain transformers.
    save_model(tmp_path / "saved", model, tokenizer)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    words = AutoTokenizer.from_pretrained(tmp_path / "saved")
    if kind != "canine":  # whose width is the task's
        with torch.no_grad():
            batch = words(
                TEXTS, padding=True, padding_side="right", truncation=True, max_length=LIMIT,
                return_tensors="pt",
            )  # fmt: skip
            torch.testing.assert_close(plain(**batch).logits, together, atol=2e-6, rtol=1e-4)


def test_canine_reads_padding_and_is_therefore_padded_alike(folders):
    model, tokenizer, task = parts(folders["canine"])
    rows = task.encode(tokenizer, [TEXTS], [0, 0, 0])
    assert task.batch(rows, [0])["input_ids"].shape == (1, LIMIT)
    bare = make_task("classification", tokenizer, LIMIT, "cpu")
    assert bare.batch(rows, [0])["input_ids"].shape < (1, LIMIT)
    apart = bare.logits(model, rows, 1) - bare.logits(model, rows, 3)
    assert apart.abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_the_longest_input_is_what_the_architecture_reads(folders, kind: str):
    model, *_ = parts(folders[kind])
    limit = longest_input(model)
    assert limit == (None if kind in UNLIMITED else 64 if kind == "canine" else LIMIT)

    def read(length: int) -> None:
        with torch.no_grad():
            ids = torch.full((1, length), 5)
            ids[0, -1] = 1 if kind == "byt5" else 2  # T5 classifies by its end token
            model(input_ids=ids, attention_mask=torch.ones_like(ids))

    read(limit or 3 * LIMIT)
    if kind in LEARNED:
        with pytest.raises((IndexError, RuntimeError)):
            read(LIMIT + 1)
        with pytest.raises(UserError, match=f"at most {LIMIT}: set max_length to {LIMIT} or less"):
            parts(folders[kind], LIMIT + 1)


@pytest.mark.parametrize("kind", BARE)
def test_a_tokenizer_without_a_vocabulary_needs_no_file(folders, kind: str):
    assert type(load_tokenizer(resolve_model(str(folders[kind])))).__name__ == BARE[kind]


def test_a_text_without_tokens_is_read_alike_alone_and_in_a_batch(folders):
    model, tokenizer, task = parts(folders["gpt2"])
    rows = task.encode(tokenizer, [["", *TEXTS]], [0] * 4)
    assert rows.lengths.min() == 1
    torch.testing.assert_close(task.logits(model, rows, 1), task.logits(model, rows, 4))
    with pytest.raises(UserError, match=r"no token for any text \(the first: ' '\)"):
        task.encode(tokenizer, [[" ", ""]], [0, 1])


@pytest.mark.parametrize("task_name", ["classification", "causal_lm"])
def test_a_token_that_the_model_has_no_embedding_for_is_one_line(folders, tmp_path, task_name):
    model, tokenizer, _ = parts(folders["gpt2"])
    size = len(tokenizer)
    tokenizer.add_tokens(["@user"])
    task = make_task(task_name, tokenizer, 96, "cpu", model.config)
    answers = ["chat"] if task_name == "causal_lm" else [0]
    task.encode(tokenizer, [["le petit"]], answers)
    wanted = rf"'@user' the id {size}, and the model has embeddings for {size} tokens"
    with pytest.raises(UserError, match=wanted):
        task.encode(tokenizer, [["@user le"]], answers)


def test_a_padding_token_without_an_embedding_gives_way_to_the_end_of_text(folders, tmp_path):
    source = resolve_model(str(folders["gpt2"]))
    tokenizer = load_tokenizer(source)
    assert tokenizer.pad_token == tokenizer.eos_token
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    model = load_base(source, "causal_lm")
    save_model(tmp_path / "padded", model, tokenizer)
    again = load_tokenizer(resolve_model(str(tmp_path / "padded")))
    assert again.pad_token_id == tokenizer.eos_token_id
    task = make_task("causal_lm", again, LIMIT, "cpu", model.config)
    assert task.pad_id < model.config.vocab_size


# ── class names ─────────────────────────────────────────────────────────────────────────────────


def trained(folder: Path, out: Path, names: dict[int, str]) -> Path:
    """A classifier that is fine-tuned already: its head has a bias, so that classes differ."""
    model, tokenizer, _ = parts(folder)
    model.config.id2label, model.config.label2id = names, {n: i for i, n in names.items()}
    save_model(out, model, tokenizer)
    return out


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta", "deberta", "mt5", "gpt2", "qwen3"])
def test_a_trained_head_is_put_into_the_datas_order_by_name(folders, kind, tmp_path):
    folder = trained(folders[kind], tmp_path / "trained", dict(enumerate(LABELS)))
    model, tokenizer, task = parts(folder)
    rows = task.encode(tokenizer, [TEXTS], [0, 1, 2])
    before = task.logits(model, rows, 4)
    source = resolve_model(str(folder))
    for order in ([2, 0, 1], [0, 1, 2]):
        wanted = [LABELS[i].upper() if order[0] else LABELS[i] for i in order]
        other = load_base(source, "classification", labels=wanted, max_length=LIMIT)
        assert list(other.config.id2label.values()) == wanted
        assert torch.equal(task.logits(other, rows, 4), before[:, order])


def test_other_class_names_are_an_error_with_both_lists(folders, tmp_path):
    names = {0: "stone", 1: "plant", 2: "metal"}
    folder = trained(folders["bert"], tmp_path / "trained", names)
    wanted = (
        r"is trained for the classes 'stone', 'plant', 'metal', "
        r"and the data has 'animal', 'plant', 'stone'"
    )
    with pytest.raises(UserError, match=wanted):
        parts(folder)


def test_generic_names_are_no_names(folders, tmp_path):
    folder = trained(folders["bert"], tmp_path / "trained", {i: f"LABEL_{i}" for i in range(3)})
    model, *_ = parts(folder)
    assert list(model.config.id2label.values()) == list(LABELS)
    saved = json.loads((folder / "config.json").read_text())
    assert saved["id2label"]["0"] == "LABEL_0"
