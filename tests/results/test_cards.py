"""Model cards: front matter that the hub reads, a code block that runs, no text of a client."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from fedp2eft import PSG, personalize
from fedp2eft.adapters.export import adapter_facts
from fedp2eft.api import export
from fedp2eft.files import read_json
from fedp2eft.models.sources import OFFLINE_PARTS, ModelSource
from fedp2eft.results.cards import adapter_card, base_card, origin_of, psg_card
from fedp2eft.settings.experiment import Settings
from tiny_run import CLIENTS, LABELS, World, plain_python, vocabulary, write_jsonl

ADAPTER = "de-unseen-00/fedp2eft-r2"
SMALL = "intfloat/multilingual-e5-small"


def code_of(card: ModelCard) -> str:
    found = re.findall(r"```python\n(.*?)```", card.text, re.S)
    assert len(found) == 1
    return found[0]


def says_nothing_private(text: str, *more: str) -> None:
    words = set(re.findall(r"\w+", text))
    # Words of the cards themselves and of the language's name.
    assert not words & ({*vocabulary(), *LABELS} - {"la"})
    assert not [name for name in (*CLIENTS, *more) if name in text]


def test_the_card_of_an_adapter(finished):
    folder = finished.folder / "adapters" / ADAPTER
    card = ModelCard.load(folder / "README.md")
    data = card.data
    assert data.library_name == "peft"
    assert data.pipeline_tag == "text-classification"
    assert data.language == ["de"]
    assert {"fedp2eft", "lora", "peft", "federated-learning"} <= set(data.tags)
    cell = read_json(finished.folder / "cells" / "fedp2eft-r2" / "de-unseen-00.json")
    [result] = data.eval_results
    assert result.metric_value == cell["correct"] / cell["examples"]
    for words in ("budget r = 2", ": 12 rows, at most 12 tokens", "set | files", "(standard-fl)"):
        assert words in card.text
    says_nothing_private(str(card), str(finished.folder))


def test_an_adapters_code_block_runs(finished):
    folder = finished.folder / "adapters" / ADAPTER
    code = code_of(ModelCard.load(folder / "README.md"))
    printed = plain_python(f"import os; os.chdir({str(folder)!r})\n{code}")
    assert printed.strip() in LABELS


def test_the_card_of_a_psg(finished, world: World):
    card = ModelCard.load(finished.folder / "psg" / "README.md")
    assert card.data.library_name == "fedp2eft"
    assert card.data.language == ["de", "fr"]
    rows = [
        r for r in read_json(finished.folder / "results.json")["rows"] if r["method"] == "fedp2eft"
    ]
    told = {each.dataset_config: each.metric_value for each in card.data.eval_results}
    assert told == {f"{row['pool']} clients, r = {row['rank']}": row["mean"] for row in rows}
    for words in ("4 clients, 3 rounds", "data set files", "| unseen (2) | lora | 2 |", "One seed"):
        assert words in card.text
    says_nothing_private(str(card), str(world.folder))


def test_the_card_of_a_base(finished, world: World):
    card = ModelCard.load(finished.folder / "base" / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-classification"
    assert card.data.language == ["de", "fr"]
    assert set(card.data.tags) == {"fedp2eft", "federated-learning"}
    results = read_json(finished.folder / "results.json")["rows"]
    told = {each.dataset_config: each.metric_value for each in card.data.eval_results}
    rows = [row for row in results if row["method"] == "base"]
    assert told == {f"{row['pool']} clients": row["mean"] for row in rows}
    for words in ("trained together", "4 clients |", "(standard-fl)", "| unseen (2) | base | – |"):
        assert words in card.text
    assert "lora" not in card.text.lower()
    says_nothing_private(str(card), str(world.folder))


def test_a_bases_code_block_runs(finished):
    folder = finished.folder / "base"
    code = code_of(ModelCard.load(folder / "README.md"))
    printed = plain_python(f"import os; os.chdir({str(folder)!r})\n{code}")
    assert printed.strip() in LABELS


@pytest.mark.parametrize(("rounds", "relation"), [(6, "finetune"), (0, None)])
def test_a_base_names_the_model_that_it_was_made_from(finished, rounds, relation):
    config = PSG.from_pretrained(finished.folder / "psg").config
    origin = config.origin | {"model": "owner/model", "base_rounds": rounds}
    card = base_card(replace(config, origin=origin))
    assert card.data.base_model == "owner/model"
    assert card.data.to_dict().get("base_model_relation") == relation
    assert ("trained together" in card.text) == bool(rounds)


@pytest.mark.parametrize(
    ("q", "source", "words"),
    [
        ((0.5, 0.3, 0.2), "counts", "summed label counts of the seen clients: 0.500, 0.300, 0.200"),
        ((0.5, 0.3, 0.2), "predicted", "mean prediction of the base model over the seen"),
        ((0.02,) * 50, "uniform", "taken as uniform: 50 shares from 0.02 to 0.02"),
        ((), "counts", ""),
    ],
)
def test_a_psgs_card_names_q_and_its_source(finished, q, source, words) -> None:
    config = PSG.from_pretrained(finished.folder / "psg").config
    local = replace(config.local, label_prior=source)
    text = psg_card(replace(config, label_prior=q, local=local)).text
    assert ("| label prior q |" in text) == bool(q)
    assert words in text


def test_a_psgs_code_block_runs(finished, world: World, tmp_path: Path, monkeypatch):
    for name in ("psg", "base"):
        (tmp_path / name).mkdir()
        for file in (finished.folder / name).iterdir():
            (tmp_path / name / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path / "psg")
    write_jsonl(Path("mine.jsonl"), world.client_rows("fr-unseen-00", "train"))
    exec(code_of(ModelCard.load("README.md")), {})
    card = ModelCard.load("my-adapter/README.md")
    assert "one client's text: 12 rows" in card.text
    assert "Not scored" in card.text
    assert "Data: its owners'" in card.text
    says_nothing_private(str(card), str(tmp_path))


def test_a_new_layout_has_the_same_card(finished, tmp_path: Path):
    folder = finished.folder / "adapters" / ADAPTER
    export(folder, tmp_path / "compact", "compact")
    old, new = ((each / "README.md").read_text() for each in (folder, tmp_path / "compact"))
    assert new == old.replace("layout portable", "layout compact")
    assert new != old


def test_an_adapter_for_a_published_base_names_that_base(finished, tmp_path: Path):
    folder = finished.folder / "adapters" / ADAPTER
    here = ModelCard.load(folder / "README.md").data
    assert here.base_model is None  # a folder on this machine
    export(folder, tmp_path / "published", "portable", model="owner/base")
    data = ModelCard.load(tmp_path / "published" / "README.md").data
    assert data.base_model == "owner/base"
    assert data.to_dict()["base_model_relation"] == "adapter"
    assert "base_model:adapter:owner/base" in data.tags
    config = read_json(tmp_path / "published" / "adapter_config.json")
    assert config["base_model_name_or_path"] == "owner/base"
    says_nothing_private(str(ModelCard.load(tmp_path / "published" / "README.md")), str(tmp_path))


def test_a_scored_adapter_of_a_new_client(finished, world: World, tmp_path: Path):
    rows = write_jsonl(tmp_path / "rows.jsonl", world.client_rows("fr-unseen-00", "train"))
    psg = PSG.from_pretrained(finished.folder / "psg")
    adapter = personalize(psg, finished.folder / "base", rows, 1, test_data=rows)
    card = ModelCard.load(adapter.save(tmp_path / "adapter") / "README.md")
    assert card.data.eval_results[0].metric_value == adapter.scores.accuracy
    assert "on 12 test rows" in card.text


def test_a_psg_that_is_saved_again_keeps_what_it_knows(finished, tmp_path: Path):
    PSG.from_pretrained(finished.folder / "psg").save_pretrained(tmp_path / "again")
    card = ModelCard.load(tmp_path / "again" / "README.md")
    assert str(card) == (finished.folder / "psg" / "README.md").read_text()


@pytest.mark.parametrize("card", [None, "---\n: [\n---\n", "no front matter"])
def test_a_psg_whose_card_cannot_be_read_is_saved(finished, tmp_path: Path, card):
    shutil.copytree(finished.folder / "psg", tmp_path / "psg")
    (tmp_path / "psg" / "README.md").unlink()
    if card is not None:
        (tmp_path / "psg" / "README.md").write_text(card)
    PSG.from_pretrained(tmp_path / "psg").save_pretrained(tmp_path / "again")
    card = ModelCard.load(tmp_path / "again" / "README.md")
    if card.data.to_dict():
        assert card.data.library_name == "fedp2eft"
        assert "2502.04387" in card.text


def test_a_4_bit_copy_says_so():
    part = OFFLINE_PARTS[SMALL]
    origin = origin_of(Settings(), ModelSource(SMALL, "/nowhere", part.revision))
    card = adapter_card({"task": "classification", "language": "zh_CN", "origin": origin})
    assert "4-bit copy" in card.text
    assert "Base model: MIT" in card.text
    assert "Debian Description Translation Project" in card.text
    assert card.data.base_model == SMALL
    assert f"base_model:adapter:{SMALL}" in card.data.tags
    assert card.data.language == ["zh"]
    assert "4-bit" not in adapter_card({"origin": origin | {"revision": "0" * 40}}).text
    assert "4bit (bitsandbytes)" in adapter_card({"origin": origin | {"quantize": "4bit"}}).text


def test_a_language_model_loads_as_one():
    card = adapter_card({"task": "causal_lm", "response_loss": 1.25, "test_rows": 3})
    assert card.data.pipeline_tag == "text-generation"
    assert "AutoModelForCausalLM" in code_of(card)
    assert "Response loss 1.250 nats on 3 test rows" in card.text


def test_signs_of_markdown_do_not_break_a_table():
    card = adapter_card({"language": "a|b", "origin": {"dataset": "x|y\nz"}, "max_length": "1); x"})
    assert "| language | a\\|b |" in card.text
    assert "| data set | x\\|y z |" in card.text
    assert "max_length=128," in code_of(card)


@pytest.mark.parametrize("origin", [{}, {"languages": 3, "model": 7, "rounds": []}])
def test_a_config_by_anybody_makes_a_card(finished, origin):
    config = PSG.from_pretrained(finished.folder / "psg").config
    for card in (psg_card, base_card):
        assert "data set unknown" in card(replace(config, origin=origin)).text
    assert json.dumps(adapter_facts(finished.folder / "adapters" / ADAPTER)["origin"])
