"""Texts of every client in a whole run: files, cells, tables, and what stays on the client."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_causal_run import cells, rows_of
from transformers import AutoModelForCausalLM

from fedp2eft.errors import UserError
from fedp2eft.experiment.train import train
from fedp2eft.federation.server.evaluation import scores_of
from fedp2eft.federation.wire.messages import PERSONALIZE
from fedp2eft.models.loading import load_tokenizer
from fedp2eft.models.sources import resolve_model
from fedp2eft.results.metrics import METRICS, PERPLEXITY
from fedp2eft.results.rows import read_results, row_of
from fedp2eft.tasks.text_scores import METEOR, PLAIN_METEOR, text_scores
from tiny_chat import WORDS, make_chat_world
from tiny_run import CLIENTS, World, plain_python
from watching import FinishedRun, watched

METHODS = ("base-r0", "unigram-r0", "lora-r2", "fedp2eft-r2")
SCORES = {"rouge1", "rouge2", "rougeL", "chrf"}
NEW = 5


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_chat_world(tmp_path_factory.mktemp("chat"))
    changes = {"evaluation__generate": True, "evaluation__max_new_tokens": NEW}
    world.yaml(world.config, federation__rounds=1, evaluation__ranks=[2], **changes)
    return world


@pytest.fixture(scope="module")
def done(chat: World) -> FinishedRun:
    return watched(chat.settings(), chat.folder / "run")


def texts_of(run: Path, method: str, client: str) -> dict[str, Any]:
    made: dict[str, Any] = json.loads((run / "generations" / method / f"{client}.json").read_text())
    return made


def test_every_client_has_its_texts_with_every_method(done: FinishedRun) -> None:
    files = sorted(done.folder.glob("generations/*/*.json"))
    assert {path.parent.name for path in files} == set(METHODS)
    assert len(files) == len(METHODS) * len(CLIENTS)
    kept = texts_of(done.folder, "fedp2eft-r2", "fr-unseen-00")
    about = {key: kept[key] for key in ("client", "language", "pool", "method", "rank")}
    assert about == {
        "client": "fr-unseen-00", "language": "fr", "pool": "unseen", "method": "fedp2eft",
        "rank": 2,
    }  # fmt: skip
    assert set(kept) == {*about, "rows"}
    rows = rows_of("fr-unseen-00", "test")
    assert [row["prompt"] for row in kept["rows"]] == [row["prompt"] for row in rows]
    assert [row["reference"] for row in kept["rows"]] == [row["response"] for row in rows]
    base = texts_of(done.folder, "base-r0", "fr-unseen-00")
    assert (base["method"], base["rank"]) == ("base", 0)
    assert [r["generated"] for r in base["rows"]] != [r["generated"] for r in kept["rows"]]
    shifted = texts_of(done.folder, "unigram-r0", "fr-unseen-00")
    assert [r["generated"] for r in base["rows"]] != [r["generated"] for r in shifted["rows"]]


def test_the_cells_are_the_sums_of_the_texts_scores(done: FinishedRun) -> None:
    for method in ("base-r0", "unigram-r0", "lora-r2"):
        for cell in cells(done.folder, method):
            rows = texts_of(done.folder, method, cell["client"])["rows"]
            sums = text_scores([r["generated"] for r in rows], [r["reference"] for r in rows])
            assert set(sums) >= SCORES
            assert {key: cell[key] for key in sums} == pytest.approx(sums)
            assert len(rows) == cell["examples"] == 3


def test_tables_average_rows_in_a_language_then_languages(done: FinishedRun) -> None:
    row = read_results(done.folder).row("lora", 2, "seen")
    assert set(row.further) >= {"perplexity", "ROUGE-1", "ROUGE-2", "ROUGE-L", "chrF"}
    assert len({"METEOR", "METEOR without synonyms"} & set(row.further)) == 1
    for language in ("de", "fr"):
        mine = [
            cell for cell in cells(done.folder, "lora-r2")
            if (cell["language"], cell["pool"]) == (language, "seen")
        ]  # fmt: skip
        mean = sum(cell["rougeL"] for cell in mine) / sum(cell["examples"] for cell in mine)
        assert row.further["ROUGE-L"][language] == pytest.approx(mean)
        assert row.further["perplexity"][language] == pytest.approx(
            2.718281828 ** row.languages[language]
        )
    assert row.further_means["chrF"] == pytest.approx(sum(row.further["chrF"].values()) / 2)


def test_the_terminal_shows_them(done: FinishedRun, capsys: pytest.CaptureFixture[str]) -> None:
    from fedp2eft.commands.terminal import show_results

    results = read_results(done.folder)
    show_results(results)
    shown = capsys.readouterr().out
    assert "scores of generated texts (%), unseen clients" in shown
    assert "ROUGE-L" in shown
    best = METRICS["chrF"].shown(results.row("lora", 2, "unseen").further_means["chrF"])
    assert best in shown


def test_only_sums_leave_a_client(done: FinishedRun) -> None:
    """No word of a prompt, a reference or a generated text; numbers between 0 and the rows."""
    sent = [(m, r) for m, r in done.messages if m.metadata.message_type == PERSONALIZE]
    assert len(sent) == len(METHODS) * len(CLIENTS)
    words = {w for text in WORDS.values() for w in text.split() if len(w) >= 4}
    for _, reply in sent:
        [metrics] = reply.content.metric_records.values()
        known = {"num-examples", "tokens", "loss", "parameters", "seconds", "steps"}
        assert set(metrics) - known - {METEOR, PLAIN_METEOR} == SCORES
        raw = b"".join(record.deflate() for record in reply.content.values())
        assert not [word for word in words if word.encode() in raw]
        assert all(0 <= metrics[name] <= 3 + 1e-6 for name in SCORES)


def test_sums_that_cannot_be_are_refused(done: FinishedRun) -> None:
    reply = done.messages[-1][1]
    [metrics] = reply.content.metric_records.values()
    before = metrics["rougeL"]
    try:
        for wrong in (3.5, -0.1):
            metrics["rougeL"] = wrong
            with pytest.raises(UserError, match="rougeL"):
                scores_of(reply)
    finally:
        metrics["rougeL"] = before
    assert scores_of(reply)["rougeL"] == before


def test_finished_texts_are_not_made_again_and_lost_ones_are(
    chat: World, done: FinishedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedp2eft.federation.client import texts

    made: list[int] = []
    generate = texts.generate

    def counting(*args: Any, **options: Any) -> Any:
        made.append(1)
        return generate(*args, **options)

    monkeypatch.setattr(texts, "generate", counting)
    path = done.folder / "generations" / "lora-r2" / "de-seen-00.json"
    before = path.read_bytes()
    path.unlink()
    (done.folder / "cells" / "lora-r2" / "de-seen-00.json").unlink()
    train(chat.settings(), done.folder)
    assert len(made) == 1
    assert path.read_bytes() == before


def test_other_numbers_take_the_texts_away_with_their_cells(done: FinishedRun) -> None:
    from fedp2eft.federation.server.run_folder import RunFolder

    folder = RunFolder.__new__(RunFolder)
    folder.path = done.folder
    path = done.folder / "generations" / "fedp2eft-r2" / "de-seen-01.json"
    cell = done.folder / "cells" / "fedp2eft-r2" / "de-seen-01.json"
    kept = {file: file.read_bytes() for file in (path, cell)}
    cell.write_text(json.dumps({**json.loads(kept[cell]), "phi": "another"}))
    [digest] = {c["phi"] for c in cells(done.folder, "fedp2eft-r2")} - {"another"}
    folder.drop_cells_of_other_phi({"fedp2eft": digest})
    assert not path.exists()
    assert not cell.exists()
    assert len(list(done.folder.glob("generations/*/*.json"))) == len(METHODS) * len(CLIENTS) - 1
    for file, content in kept.items():
        file.write_bytes(content)


GENERATE = """
from transformers import AutoModelForCausalLM, AutoTokenizer
from peft import PeftModel
import json, sys
base, adapter, prompts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(base)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
said = []
for prompt in prompts:
    turns = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    out = model.generate(
        input_ids=ids, do_sample=False, max_new_tokens=5, eos_token_id=[2, 7], pad_token_id=3
    )
    said.append(tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True).strip())
print(json.dumps(said))
"""


def test_a_portable_adapter_says_the_same_with_plain_peft(done: FinishedRun) -> None:
    rows = texts_of(done.folder, "fedp2eft-r2", "de-unseen-00")["rows"]
    adapter = done.folder / "adapters" / "de-unseen-00" / "fedp2eft-r2"
    prompts = json.dumps([row["prompt"] for row in rows])
    said = json.loads(plain_python(GENERATE, done.folder / "base", adapter, prompts))
    assert said == [row["generated"] for row in rows]
    assert any(said)


def test_evaluate_generates_where_asked(chat: World, done: FinishedRun, tmp_path: Path) -> None:
    import fedp2eft
    from tiny_run import write_jsonl

    file = write_jsonl(tmp_path / "test.jsonl", rows_of("de-unseen-00", "test"))
    adapter = done.folder / "adapters" / "de-unseen-00" / "fedp2eft-r2"
    options = {"text_columns": ["prompt"], "target_column": "response", "precision": "fp32"}
    plain = fedp2eft.evaluate(done.folder / "base", file, adapter, **options)
    scores = fedp2eft.evaluate(
        done.folder / "base", file, adapter, **options, generate=True, max_new_tokens=NEW
    )
    assert plain.texts is None
    assert scores.loss == plain.loss
    [cell] = [c for c in cells(done.folder, "fedp2eft-r2") if c["client"] == "de-unseen-00"]
    assert scores.texts is not None
    assert scores.texts == pytest.approx({name: cell[name] for name in scores.texts})
    assert f"Generated: rouge1 {cell['rouge1'] / 3:.4f}, " in str(scores)
    assert str(scores).startswith(str(plain))
    with pytest.raises(UserError, match="Only a causal LM generates"):
        fedp2eft.evaluate(done.folder / "base", file, generate=True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__task": "classification"}, r"set it to false, or model\.task to causal_lm"),
        ({"evaluation__max_new_tokens": 0}, r"evaluation\.max_new_tokens must be 1 or more"),
    ],
)
def test_settings_that_cannot_be(chat: World, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        chat.settings(**changes)


def test_more_text_than_the_model_reads_is_said_before_training(chat: World, tmp_path: Path):
    with pytest.raises(UserError, match="reads 96 tokens"):
        train(chat.settings(evaluation__max_new_tokens=90), tmp_path / "run")


def test_cells_without_texts_stay_readable_beside_others() -> None:
    old = {
        "client": "a",
        "language": "de",
        "parameters": 0,
        "examples": 2,
        "tokens": 4,
        "loss": 1.0,
    }
    new = {**old, "client": "b", "rougeL": 1.0, "chrf": 0.5}
    assert row_of("lora", 2, "seen", [old], {}).further == {
        "perplexity": {"de": pytest.approx(2.718281828)}
    }
    assert set(row_of("lora", 2, "seen", [old, new], {}).further) == {PERPLEXITY.name}
    assert row_of("lora", 2, "seen", [new], {}).further_means["ROUGE-L"] == 0.5


def test_the_base_is_read_by_transformers_alone(done: FinishedRun) -> None:
    """The texts of the base are those of the folder that a user gets."""
    from fedp2eft.tasks.causal_lm import CausalLM
    from fedp2eft.tasks.generation import generate
    from fedp2eft.tasks.prompts import Prompts

    model = AutoModelForCausalLM.from_pretrained(done.folder / "base")
    tokenizer = load_tokenizer(resolve_model(str(done.folder / "base")))
    rows = texts_of(done.folder, "base-r0", "fr-seen-01")["rows"]
    asked = [row["prompt"] for row in rows]
    questions = list(CausalLM(3, 24).questions(Prompts(tokenizer), [asked], asked))
    assert generate(model, tokenizer, questions, NEW, 1) == [row["generated"] for row in rows]
