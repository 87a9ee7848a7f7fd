"""personalize, evaluate, export and train do their work; plain PEFT agrees with what they print."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from fedp2eft.cli import main
from tiny_run import (
    LABELS,
    LENGTH,
    RANKS,
    World,
    all_rows,
    environment,
    in_process,
    plain_python,
    write_jsonl,
)

# A client that took part in nothing: other rows than any client of the federation has.
NEW = [{"text": row["text"], "label": row["label"]} for row in all_rows(train=30)[60:90]]
TEST = [{"text": row["text"], "label": row["label"]} for row in all_rows(train=30)[90:110]]

LOGITS = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer
base, rows, length, *folders = sys.argv[1:]
rows = [json.loads(line) for line in open(rows, encoding="utf-8")]
tokens = AutoTokenizer.from_pretrained(base)(
    [row["text"] for row in rows], truncation=True, max_length=int(length), padding=True,
    return_tensors="pt",
)
found = {}
for folder in folders:
    whole = "merged" in folder
    model = AutoModelForSequenceClassification.from_pretrained(folder if whole else base)
    if not whole:
        model = PeftModel.from_pretrained(model, folder)
    with torch.no_grad():
        logits = model.eval()(**tokens).logits
    names = model.config.id2label
    right = [names[i] == row["label"] for i, row in zip(logits.argmax(1).tolist(), rows)]
    found[folder] = {"logits": logits.tolist(), "accuracy": sum(right) / len(right)}
print(json.dumps(found))
"""


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command that works prints."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 0
    return capsys.readouterr().out


def personalize(capsys, finished, data: Path, out: Path, *more: object) -> str:
    run_folder = finished.folder
    return run(
        capsys, "personalize", "--psg", run_folder / "psg", "--model", run_folder / "base",
        "--data", data, "--rank", 2, "--out", out, "--lr", "3e-2", "--precision", "fp32", *more,
    )  # fmt: skip


def evaluate(capsys, model: Path, data: Path, *more: object) -> str:
    return run(capsys, "evaluate", "--model", model, "--data", data, "--precision", "fp32", *more)


def percent(text: str) -> float:
    """The accuracy in a command's output."""
    [found] = re.findall(r"Accuracy ([\d.]+)%", text)
    return float(found)


def adapter_bits(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def test_a_new_client_from_its_file_to_a_merged_model(finished, tmp_path: Path, capsys):
    """The printed accuracy is evaluate's and plain PEFT's; all layouts give the same logits."""
    test = write_jsonl(tmp_path / "test.jsonl", TEST)
    jsonl = write_jsonl(tmp_path / "new.jsonl", NEW)
    with (tmp_path / "new.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["label", "text"])
        writer.writeheader()
        writer.writerows(NEW)
    pq.write_table(pa.Table.from_pylist(NEW), tmp_path / "new.parquet")

    printed = personalize(capsys, finished, jsonl, tmp_path / "portable", "--test_data", test)
    assert " of 20), loss " in printed
    ranks = json.loads((tmp_path / "portable" / "fedp2eft.json").read_text())["ranks"]
    kept = sum(1 for rank in ranks.values() if rank)
    assert sum(ranks.values()) == 2 * len(ranks)
    assert f"{sum(ranks.values())} ranks in {kept} of {len(ranks)} layers" in printed

    for kind in ("csv", "parquet"):
        personalize(capsys, finished, tmp_path / f"new.{kind}", tmp_path / kind)
        assert adapter_bits(tmp_path / kind) == adapter_bits(tmp_path / "portable")

    steps = [("portable", "compact"), ("compact", "portable2"), ("portable2", "merged")]
    for source, target in steps:
        layout = target.rstrip("2")
        run(
            capsys, "export", "--adapter", tmp_path / source, "--out", tmp_path / target,
            "--layout", layout,
        )  # fmt: skip
    base = finished.folder / "base"
    layouts = ["portable", "compact", "portable2", "merged"]
    folders = [tmp_path / name for name in layouts]
    plain = json.loads(plain_python(LOGITS, base, test, LENGTH, *folders))
    first = plain[str(folders[0])]
    for folder in folders:
        one = plain[str(folder)]
        assert [v for row in one["logits"] for v in row] == pytest.approx(
            [v for row in first["logits"] for v in row], abs=1e-5
        )
        assert percent(printed) == pytest.approx(100 * one["accuracy"], abs=0.051)
    for name in layouts[:3]:
        scored = evaluate(capsys, base, test, "--adapter", tmp_path / name)
        assert percent(scored) == percent(printed)
    scored = evaluate(capsys, tmp_path / "merged", test, "--max_length", LENGTH)
    assert percent(scored) == percent(printed)
    # The adapter does something.
    assert evaluate(capsys, base, test) != scored


@pytest.fixture
def with_prior(finished, tmp_path: Path) -> Path:
    """The run's PSG as one that was trained with the label prior."""
    folder = tmp_path / "psg"
    shutil.copytree(finished.folder / "psg", folder)
    config = json.loads((folder / "config.json").read_text())
    config["local"]["logit_adjustment"] = "own"
    config["label_prior"] = [0.7, 0.2, 0.1]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("method", ["fedp2eft", "prior"])
def test_a_label_prior_is_in_every_layout(finished, with_prior, tmp_path, capsys, method):
    """The printed scores, and the logits of plain PEFT or transformers in another process."""
    base, data = finished.folder / "base", write_jsonl(tmp_path / "new.jsonl", NEW)
    test = write_jsonl(tmp_path / "test.jsonl", TEST)
    printed = run(
        capsys, "personalize", "--psg", with_prior, "--model", base, "--data", data, "--rank", 2,
        "--out", tmp_path / "portable", "--lr", "3e-2", "--precision", "fp32", "--method", method,
        "--test_data", test,
    )  # fmt: skip
    [scores] = re.findall(r"Accuracy .*, loss [\d.]+", printed)
    for source, target in [("portable", "compact"), ("compact", "again"), ("again", "merged")]:
        layout = {"again": "portable"}.get(target, target)
        run(
            capsys, "export", "--adapter", tmp_path / source, "--out", tmp_path / target,
            "--layout", layout,
        )  # fmt: skip
    folders = [tmp_path / name for name in ("portable", "compact", "again", "merged")]
    plain = json.loads(plain_python(LOGITS, base, test, LENGTH, *folders))
    first = torch.tensor(plain[str(folders[0])]["logits"])
    for folder in folders[1:]:
        assert torch.allclose(torch.tensor(plain[str(folder)]["logits"]), first, atol=1e-5, rtol=0)
    assert scores in evaluate(capsys, base, test, "--adapter", folders[2])
    assert scores in evaluate(capsys, folders[3], test, "--max_length", LENGTH)
    assert scores not in evaluate(capsys, base, test)
    for folder in folders[:3]:
        assert "| label prior | carried" in (folder / "README.md").read_text()


def test_an_adapter_of_the_run_scores_what_its_cell_says(finished, world: World, tmp_path, capsys):
    client = "fr-unseen-00"
    test = write_jsonl(tmp_path / "test.jsonl", world.client_rows(client, "test"))
    for rank in RANKS:
        cell = json.loads(
            (finished.folder / "cells" / f"fedp2eft-r{rank}" / f"{client}.json").read_text()
        )
        adapter = finished.folder / "adapters" / client / f"fedp2eft-r{rank}"
        out = evaluate(capsys, finished.folder / "base", test, "--adapter", adapter)
        assert f"({cell['correct']} of {cell['examples']}), loss {cell['loss']:.4f}" in out


def test_personalizing_again_replaces_the_adapter(finished, tmp_path: Path, capsys):
    data, out = write_jsonl(tmp_path / "new.jsonl", NEW), tmp_path / "adapter"
    personalize(capsys, finished, data, out)
    before = adapter_bits(out)
    personalize(capsys, finished, data, out, "--layout", "compact", "--seed", 1)
    assert adapter_bits(out) != before
    assert json.loads((out / "fedp2eft.json").read_text())["layout"] == "compact"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "new.jsonl"]


def test_other_columns(finished, tmp_path: Path, capsys):
    rows = [{"satz": row["text"], "klasse": LABELS.index(row["label"])} for row in NEW]
    data = write_jsonl(tmp_path / "new.jsonl", rows)
    columns = ["--text_columns", "[satz]", "--label_column", "klasse"]
    personalize(capsys, finished, data, tmp_path / "ids", *columns)
    personalize(capsys, finished, write_jsonl(tmp_path / "b.jsonl", NEW), tmp_path / "names")
    assert adapter_bits(tmp_path / "ids") == adapter_bits(tmp_path / "names")


def test_libraries_say_nothing(finished, tmp_path: Path):
    """Each command in one process of its own: a line or two on stdout, nothing on stderr."""
    data, out = write_jsonl(tmp_path / "new.jsonl", NEW), str(tmp_path / "adapter")
    base, psg = str(finished.folder / "base"), str(finished.folder / "psg")
    commands = [
        ["personalize", f"--psg={psg}", f"--model={base}", f"--data={data}", "--rank=1",
         f"--out={out}"],
        ["evaluate", f"--model={base}", f"--data={data}", f"--adapter={out}"],
        ["export", f"--adapter={out}", f"--out={out}-merged", "--layout=merged"],
    ]  # fmt: skip
    code = (
        "import json, sys; from fedp2eft.cli import main; "
        "sys.exit(any(main(command) for command in json.loads(sys.argv[1])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)],
        env=environment(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 3


def test_train_prints_progress_and_tables_and_nothing_else(world: World, tmp_path: Path):
    """A real process whose output is no terminal: whole lines, and nothing on stderr."""
    config = world.yaml(tmp_path / "small.yaml", evaluation__ranks=[1])
    done = in_process(
        "train", config, "--run", tmp_path / "run", "--federation.rounds", 2,
        "--evaluation.methods", "[base, fedp2eft]", "--local.lr=0.02",
    )  # fmt: skip
    assert done.returncode == 0
    assert done.stderr == ""
    assert "\r" not in done.stdout
    assert "\x1b" not in done.stdout
    for line in ("base model 2/2 loss", "PSG 2/2 loss", "clients 12/12 fedp2eft fr-unseen-00"):
        assert f"\n{line}" in done.stdout
    for pool, clients in (("seen", 4), ("unseen", 2)):
        assert f"Accuracy (%), {pool} clients ({clients})" in done.stdout
    for word in ("method", "rank", "de", "fr", "worst", "mean", "Run folder:", "PeftModel"):
        assert word in done.stdout
    saved = (tmp_path / "run" / "settings.yaml").read_text()
    assert "lr: 0.02" in saved
    assert "rounds: 2" in saved
    # The lines of Python that it prints are true.
    code = done.stdout[done.stdout.index("from transformers") :]
    assert "lora" in plain_python(code + "\nprint(model)").lower()


def test_train_names_the_run_folder_after_the_file(
    world: World, tmp_path: Path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    config = world.yaml(tmp_path / "mine.yaml", evaluation__methods=["base"])
    out = run(capsys, "train", config, "--federation.rounds=1", "--base.kind=none")
    assert "Run folder: runs/mine" in out
    assert (tmp_path / "runs" / "mine" / "results.json").exists()
