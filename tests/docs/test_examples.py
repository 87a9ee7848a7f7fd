"""Every example runs, on the tiny run of the desk; examples/deployment is said below."""

from __future__ import annotations

import ast
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

ROOT = Path(__file__).parents[2]
EXAMPLES = {path.stem: path for path in ROOT.glob("examples/*.py")}


@pytest.fixture
def example(desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run an example as somebody at the desk would; returns what it prints."""

    def run(name: str, *words: object) -> str:
        monkeypatch.chdir(desk)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES[name]), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_each_says_what_it_does_and_how_long_it_takes() -> None:
    """examples/deployment is one more.

    Its run.py starts a SuperLink and four SuperNodes on a real model, five minutes: not run here.
    Its parts are tested, and the same deployment on a tiny model runs, in
    tests/federation/test_deployment.py.
    """
    assert set(EXAMPLES) == {
        "personalize_client", "bt_lora", "trainer", "own_data", "serve_many"
    }  # fmt: skip
    for path in [*EXAMPLES.values(), ROOT / "examples" / "deployment" / "run.py"]:
        said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        assert f"python {path.relative_to(ROOT)}" in said
        assert "minute" in said or "second" in said, path.name


def test_personalize_client(example, desk: Path) -> None:
    out = example("personalize_client", "--rank", 2, "--out", "one")
    assert "adapter: " in out
    assert "base:    " in out
    base = AutoModelForSequenceClassification.from_pretrained(desk / "runs/quickstart/base")
    PeftModel.from_pretrained(base, desk / "one" / "adapter")
    out = example("personalize_client", "mine.jsonl", "test.jsonl", "--rank", 1, "--out", "two")
    assert "A plain PEFT folder: two/adapter" in out


def test_bt_lora_places_the_budget_and_peft_loads_it(example, desk: Path) -> None:
    out = example("bt_lora", "--rank", 2, "--epochs", 2, "--out", "bt")
    base = AutoModelForSequenceClassification.from_pretrained(desk / "runs/quickstart/base")
    layers = sum(isinstance(module, torch.nn.Linear) for module in base.modules())
    assert f"{2 * layers} ranks in" in out
    weights = load_file(desk / "bt" / "adapter_model.safetensors")
    assert any(value.abs().sum() > 0 for name, value in weights.items() if "lora_B" in name)
    PeftModel.from_pretrained(base, desk / "bt")


def test_trainer_resumes_and_peft_loads_what_it_saves(example, desk: Path) -> None:
    words = ("--rank", 2, "--epochs", 2, "--out", "hf")
    out = example("trainer", *words)
    base = AutoModelForSequenceClassification.from_pretrained(desk / "runs/quickstart/base")
    layers = sum(isinstance(module, torch.nn.Linear) for module in base.modules())
    assert f"{2 * layers} ranks in" in out
    saved = desk / "hf" / "adapter" / "adapter_model.safetensors"
    weights = saved.read_bytes()
    PeftModel.from_pretrained(base, desk / "hf" / "adapter")
    shutil.rmtree(max((desk / "hf").glob("checkpoint-*"), key=lambda p: int(p.name[11:])))
    example("trainer", *words, "--resume")
    assert saved.read_bytes() == weights


def test_own_data(example, world, desk: Path) -> None:
    words = ("--model", world.encoder, "--max-length", 12, "--run", "runs/own")
    out = example("own_data", *words)
    for line in ("seen    base", "seen    fedp2eft  rank 4", "unseen  lora      rank 4"):
        assert line in out
    assert out.count("runs/own/adapters/") == 6
    assert example("own_data", "runs/own.csv", *words) == out  # done already


def test_serve_many_gives_every_row_its_own_adapters_answer(example, desk: Path) -> None:
    out = example("serve_many", "--method", "fedp2eft-r2")
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert set(lines) == {f"{x}-{pool}-00" for x in ("de", "fr") for pool in ("seen", "unseen")}
    texts = runpy.run_path(str(EXAMPLES["serve_many"]))["TEXTS"]
    folder = desk / "runs" / "quickstart"
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    for client, line in lines.items():
        base = AutoModelForSequenceClassification.from_pretrained(folder / "base")
        alone = PeftModel.from_pretrained(base, folder / "adapters" / client / "fedp2eft-r2").eval()
        with torch.inference_mode():
            row = alone(**tokenizer(texts[client[:2]], return_tensors="pt")).logits[0]
        share, label = row.softmax(dim=0).max(dim=0)
        assert line.split() == [base.config.id2label[int(label)], f"{share:.0%}"]
    with pytest.raises(SystemExit, match="No adapters nothing"):
        example("serve_many", "--method", "nothing")
