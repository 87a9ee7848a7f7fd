"""The whole way of a causal LM on a tiny random Llama: train, tables, adapters and commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import fedp2eft
from fedp2eft.cli import main
from fedp2eft.errors import UserError
from fedp2eft.experiment.train import train
from fedp2eft.models.loading import load_base, load_tokenizer
from fedp2eft.models.sources import ModelSource
from fedp2eft.results.metrics import ACCURACY, RESPONSE_LOSS, metric_of
from fedp2eft.results.rows import Results, read_results, row_of
from fedp2eft.runtime.workspace import Workspace
from fedp2eft.settings.reading import settings_from
from fedp2eft.tasks.make import make_task
from tiny_chat import LENGTH, chat_rows, make_chat_world
from tiny_run import CLIENTS, World, write_jsonl

PROBE = torch.tensor([[4, 9, 10, 7, 5]])


def loaded(base: Path, adapter: Path) -> tuple[str, torch.Tensor]:
    """PEFT's task type and the logits of an adapter folder, with nothing of this package."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    with torch.no_grad():
        return model.peft_config["default"].task_type, model(input_ids=PROBE).logits


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_chat_world(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def done(chat: World) -> Path:
    folder = chat.folder / "run"
    train(chat.settings(), folder)
    return folder


def cells(run: Path, name: str) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted((run / "cells" / name).glob("*.json"))]


def rows_of(client: str, split: str) -> list[dict]:
    return [
        {"prompt": row["prompt"], "response": row["response"]}
        for row in chat_rows()
        if (row["client"], row["split"]) == (client, split)
    ]


def test_tables_show_the_response_loss(done: Path, capsys):
    results = read_results(done)
    assert {row.metric for row in results.rows} == {"response loss"}
    base, tuned = results.row("base", 0, "seen"), results.row("lora", 2, "seen")
    assert tuned.mean < base.mean  # lower is better, and LoRA learned something
    assert tuned.worse_than_base == 0.0
    assert base.worst_language == max(base.languages.values())
    told = cells(done, "base-r0")
    assert all(set(cell) >= {"loss", "tokens", "examples"} for cell in told)
    assert all("correct" not in cell for cell in told)
    german = [cell for cell in told if (cell["language"], cell["pool"]) == ("de", "seen")]
    nats = sum(cell["loss"] * cell["tokens"] for cell in german)
    assert base.languages["de"] == pytest.approx(nats / sum(cell["tokens"] for cell in german))
    from fedp2eft.commands.terminal import show_results

    show_results(Results(done, results.rows))
    shown = capsys.readouterr().out
    assert "Response loss (nats per token), seen clients (4)" in shown
    assert f"{base.mean:.3f}" in shown


def test_a_clients_score_is_that_of_the_model_alone(chat: World, done: Path):
    """The cell of the base, recomputed with transformers' own loss row by row."""
    workspace = Workspace(chat.settings(), done)
    model = AutoModelForCausalLM.from_pretrained(done / "base").eval()
    for cell in cells(done, "base-r0")[:2]:
        data, nats, tokens = workspace.encoded(cell["client"], "test"), 0.0, 0
        for row in range(len(data)):
            batch = workspace.task.batch(data, [row])
            count = int((batch["labels"] >= 0).sum())
            with torch.no_grad():
                nats += float(model(**batch).loss) * count
            tokens += count
        assert cell["tokens"] == tokens
        assert cell["loss"] == pytest.approx(nats / tokens, rel=1e-5)


def test_every_client_ends_with_an_adapter_that_plain_peft_loads(done: Path):
    folder = done / "adapters" / "fr-unseen-00" / "fedp2eft-r2"
    kind, logits = loaded(done / "base", folder)
    assert kind == "CAUSAL_LM"
    model = AutoModelForCausalLM.from_pretrained(done / "base").eval()
    with torch.no_grad():
        bare = model(input_ids=PROBE).logits
    assert float((logits - bare).abs().max()) > 1e-3
    facts = json.loads((folder / "fedp2eft.json").read_text())
    assert facts["task"] == "causal_lm"
    assert facts["labels"] == []
    [cell] = [c for c in cells(done, "fedp2eft-r2") if c["client"] == "fr-unseen-00"]
    assert facts["response_loss"] == cell["loss"]
    assert not any("lm_head" in name for name in facts["ranks"])
    assert len(list((done / "adapters").glob("*/*"))) == 2 * len(CLIENTS)


def test_the_psg_knows_its_task_and_the_output_head(done: Path):
    config = fedp2eft.PSG.from_pretrained(done / "psg").config
    assert (config.task, config.text_columns, config.target_column) == (
        "causal_lm", ("prompt",), "response",
    )  # fmt: skip
    assert (config.local.batch_size, config.local.accumulate, config.labels) == (2, 2, ())
    assert config.linear_names[-1] == "lm_head"  # ξ hears its input; it is tied and not adapted
    assert set(config.linear_names) - set(config.layer_names) == {"lm_head"}


def test_api_and_commands(chat: World, done: Path, tmp_path: Path, capsys):
    train_file = write_jsonl(tmp_path / "train.jsonl", rows_of("de-unseen-00", "train"))
    test_file = write_jsonl(tmp_path / "test.jsonl", rows_of("de-unseen-00", "test"))
    base, out = done / "base", tmp_path / "adapter"
    psg = fedp2eft.PSG.from_pretrained(done / "psg")
    made = fedp2eft.personalize(psg, base, train_file, 2, test_data=test_file, precision="fp32")
    assert made.scores is not None
    assert made.scores.examples == 3
    plain = fedp2eft.evaluate(
        base, test_file, text_columns=["prompt"], target_column="response", precision="fp32"
    )
    assert made.scores.tokens == plain.tokens
    assert made.scores.loss < plain.loss
    [cell] = [c for c in cells(done, "base-r0") if c["client"] == "de-unseen-00"]
    assert plain.loss == pytest.approx(cell["loss"], rel=1e-5)
    made.save(out)
    both = fedp2eft.evaluate(
        base, test_file, out, text_columns=["prompt"], target_column="response", precision="fp32"
    )
    assert both.loss == pytest.approx(made.scores.loss, rel=1e-5)
    kind, logits = loaded(base, out)
    for layout in ("compact", "portable", "merged"):
        folder = tmp_path / layout
        options = ["--adapter", str(out), "--out", str(folder), "--layout", layout]
        assert main(["export", *options]) == 0
        if layout == "merged":
            with torch.no_grad():
                same = AutoModelForCausalLM.from_pretrained(folder).eval()(input_ids=PROBE).logits
        else:
            other, same = loaded(base, folder)
            assert kind == other == "CAUSAL_LM"
        torch.testing.assert_close(same, logits, rtol=0, atol=1e-5)
    capsys.readouterr()
    common = ["--text_columns", '["prompt"]', "--target_column", "response", "--precision", "fp32"]
    files = ["--model", str(tmp_path / "merged"), "--data", str(test_file)]
    assert main(["evaluate", *files, *common]) == 0
    said = capsys.readouterr().out
    assert said == f"{both}\n"
    assert f"Response loss {both.loss:.4f} ({both.tokens} tokens of 3 rows), perplexity" in said


def test_rows_left_out_and_responses_cut_are_told_once_a_client(chat: World, tmp_path: Path):
    notes: list[str] = []

    class Notes:
        def note(self, text: str) -> None:
            notes.append(text)

    from fedp2eft.progress import report_to

    settings = chat.settings(local__max_length=8)
    workspace = Workspace(settings)
    with report_to(Notes()):  # type: ignore[arg-type]
        for _ in range(2):
            data = workspace.encoded("fr-seen-00", "train")
    assert data.dropped
    assert data.cut
    assert len(data) + data.dropped == 6
    assert notes == [
        f"Client fr-seen-00, train: of 6 rows {data.dropped} left out, whose prompt fills "
        f"local.max_length, and {data.cut} responses cut there."
    ]


def test_nothing_to_answer_with_is_one_line(chat: World):
    with pytest.raises(UserError, match=r"no column of responses: set data\.target_column"):
        Workspace(chat.settings(data__target_column=None)).encoded("fr-seen-00", "train")


def test_a_task_gives_what_its_metric_needs():
    assert metric_of({"examples": 2, "correct": 1, "loss": 0.1}) is ACCURACY
    assert metric_of({"examples": 2, "tokens": 9, "loss": 0.1}) is RESPONSE_LOSS
    assert RESPONSE_LOSS.worst([1.0, 3.0]) == 3.0
    assert RESPONSE_LOSS.is_worse(3.0, 1.0)
    assert not RESPONSE_LOSS.is_worse(1.0, 3.0)
    assert RESPONSE_LOSS.shown(1.23456) == "1.235"
    two = [
        {"client": "a", "language": "de", "parameters": 0, "examples": 1, "tokens": 1, "loss": 4.0},
        {"client": "b", "language": "de", "parameters": 0, "examples": 9, "tokens": 3, "loss": 2.0},
    ]
    row = row_of("lora", 1, "seen", two, {"a": 3.0, "b": 3.0})
    assert row.languages == {"de": 2.5}
    assert (row.worst_client, row.worse_than_base, row.metric) == (4.0, 0.5, "response loss")


def test_a_run_of_full_fine_tuning_and_held_out_rows(chat: World, tmp_path: Path):
    raw = chat.raw(
        base__kind="standard-fl", base__rounds=1, base__clients_per_round=1, base__lr=1e-3,
        base__batch_size=4, evaluation__methods=["base"], federation__rounds=0, data__holdout=0.5,
    )  # fmt: skip
    results = train(settings_from(raw), tmp_path / "run")
    assert results.row("base", 0, "seen").clients == 4
    first, last = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()["lm_head.weight"]
        for folder in (chat.encoder, tmp_path / "run" / "base")
    )
    assert not torch.equal(first, last)
    source = ModelSource("x", str(tmp_path / "run" / "base"), "y")
    model, tokenizer = load_base(source, "causal_lm"), load_tokenizer(source)
    task = make_task("causal_lm", tokenizer, LENGTH, "cpu")
    data = task.encode(tokenizer, [["chat"]], ["noir"])
    assert task.score(model, data, 1).tokens == 2
