"""BT-LoRA inside the Trainer: the steps are those of stage 1, and checkpoints hold all of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    BertForSequenceClassification,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from fedp2eft import BTLora, BTLoraTrainer
from fedp2eft.adapters.export import load_adapter
from fedp2eft.adapters.trainer import STATE_FILE
from fedp2eft.client.training import stage1
from fedp2eft.errors import DivergedError, UserError
from fedp2eft.settings.experiment import AdapterSettings, LocalSettings
from fedp2eft.settings.profiles import PAPER
from fedp2eft.tasks.encoded import Encoded
from tiny import TASK, VOCABULARY, tiny
from tiny_chat import chat_tokenizer, save_llama

ROWS = 8
SHAPE = AdapterSettings(r_max=4)
FAST = {"learning_rate": 1e-2, "max_grad_norm": 0.05}


def rows(length: int = 5) -> tuple[list[list[int]], list[int]]:
    rng = np.random.default_rng(3)
    texts = rng.integers(1, VOCABULARY, size=(ROWS, length)).tolist()
    return texts, rng.integers(0, 3, size=ROWS).tolist()


def dataset() -> Dataset:
    texts, labels = rows()
    mask = [[1] * len(text) for text in texts]
    return Dataset.from_dict({"input_ids": texts, "attention_mask": mask, "labels": labels})


class Steps(TrainerCallback):
    """λ after every step."""

    def __init__(self, bt: BTLora) -> None:
        self.bt = bt
        self.lam: list[Tensor] = []

    def on_step_end(self, *args, **kwargs) -> None:
        self.lam.append(self.bt.lam.detach().clone())


def arguments(folder: Path, **others) -> TrainingArguments:
    plain = {
        "per_device_train_batch_size": 4, "num_train_epochs": 2, "lr_scheduler_type": "constant",
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True,
        "disable_tqdm": True, "train_sampling_strategy": "sequential", **FAST,
    }  # fmt: skip
    return TrainingArguments(str(folder), **(plain | others))


def trainer(folder: Path, model=None, **others) -> BTLoraTrainer:
    ours = {"rank": 2, "lambda_lr": 0.05, "first_lambda": 0.5}
    for name in ("rank", "lambda_lr", "first_lambda", "alpha_s", "examples"):
        if name in others:
            ours[name] = others.pop(name)
    bt = BTLora(model or tiny("bert", dropout=0.0), SHAPE)
    bt.reset(ours.pop("first_lambda"))
    data = {"train_dataset": dataset(), "eval_dataset": dataset()}
    return BTLoraTrainer(bt, arguments(folder, **others), **data, **ours)


def by_hand(order: Sequence[Sequence[int]], accumulate: int = 1) -> tuple[BTLora, list[float]]:
    """The same run by stage 1."""
    bt = BTLora(tiny("bert", dropout=0.0), SHAPE)
    bt.reset(0.5)
    settings = LocalSettings(
        lr=FAST["learning_rate"], max_grad_norm=FAST["max_grad_norm"], lambda_lr=0.05,
        accumulate=accumulate, dropout=False,
    )  # fmt: skip
    data = Encoded.from_rows(*rows())
    return bt, stage1(bt, TASK, data, [np.array(each) for each in order], settings, PAPER)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_are_those_of_stage_1(tmp_path: Path, accumulate: int) -> None:
    run = trainer(
        tmp_path, gradient_accumulation_steps=accumulate,
        per_device_train_batch_size=4 // accumulate,
    )  # fmt: skip
    run.train()
    size = 4 // accumulate
    order = [list(range(first, first + size)) for first in range(0, ROWS, size)] * 2
    bt, losses = by_hand(order, accumulate)
    logged = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert len(losses) == 4
    assert logged == pytest.approx(losses, rel=1e-5)
    assert torch.allclose(run.bt.lam, bt.lam, atol=1e-5, rtol=0)
    assert (bt.lam - 0.5).abs().max() > 0.05
    for mine, theirs in zip(run.bt.A + run.bt.B, bt.A + bt.B, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5, rtol=0)


def test_lambda_follows_the_schedule_and_has_no_weight_decay(tmp_path: Path) -> None:
    run = trainer(tmp_path, weight_decay=0.1, lr_scheduler_type="linear", max_steps=2)
    run.train()
    groups = run.optimizer.param_groups
    (own,) = [group for group in groups if any(p is run.bt.lam for p in group["params"])]
    assert own["params"] == [run.bt.lam]
    assert own["initial_lr"] == 0.05
    assert own["lr"] == 0.0  # the end of the schedule
    assert own["weight_decay"] == 0.0
    assert groups[0]["weight_decay"] == 0.1
    assert sum(len(group["params"]) for group in groups) == 2 * len(run.bt.names) + 1


def test_a_resumed_run_ends_at_the_same_bits(tmp_path: Path) -> None:
    saved = {"save_strategy": "steps", "save_steps": 2}
    whole = trainer(tmp_path / "whole", **saved)
    whole.train()
    resumed = trainer(tmp_path / "resumed", first_lambda=3.0, **saved)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    for mine, theirs in zip(resumed._trained(), whole._trained(), strict=True):
        assert torch.equal(mine, theirs)
    for name in ("checkpoint-4/adapter_model.safetensors", f"checkpoint-4/{STATE_FILE}"):
        ends = [(tmp_path / run / name).read_bytes() for run in ("whole", "resumed")]
        assert ends[0] == ends[1]


def test_what_is_saved_is_the_trimmed_adapter_and_plain_peft_loads_it(tmp_path: Path) -> None:
    tiny("bert", dropout=0.0).save_pretrained(tmp_path / "base")
    base = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    run = BTLoraTrainer(
        base, arguments(tmp_path / "run"), train_dataset=dataset(), eval_dataset=dataset(),
        adapter=SHAPE, first_lambda=0.5, lambda_lr=0.05,
    )  # fmt: skip
    run.train()
    whole = run.evaluate()["eval_loss"]
    weights = run.trim(1)
    assert sum(weights.ranks.values()) == len(run.bt.names)
    before = [B.clone() for B in run.bt.B]
    predicted = run.predict(dataset())
    assert all(torch.equal(a, b) for a, b in zip(before, run.bt.B, strict=True))
    assert predicted.metrics["test_loss"] != pytest.approx(whole, rel=1e-6)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "notes.txt").write_text("mine")
    run.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "notes.txt").read_text() == "mine"
    assert load_adapter(tmp_path / "adapter").ranks.keys() == weights.ranks.keys()
    facts = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert facts["base_model_name_or_path"] == str(tmp_path / "base")
    fresh = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    plain = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    texts, _ = rows()
    with torch.no_grad():
        logits = plain(torch.tensor(texts)).logits.numpy()
    assert np.allclose(logits, predicted.predictions, atol=1e-6)


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path: Path) -> None:
    run = trainer(
        tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, num_train_epochs=3, learning_rate=5.0,
    )  # fmt: skip
    run.train()
    scores = {e["step"]: e["eval_loss"] for e in run.state.log_history if "eval_loss" in e}
    best = min(scores, key=scores.__getitem__)
    assert best < max(scores)
    state = load_file(tmp_path / f"checkpoint-{best}" / STATE_FILE)
    assert torch.equal(run.bt.lam, state["lambda"])
    assert torch.equal(run.bt.B[0], state[f"B.{run.bt.names[0]}"])
    assert run.evaluate()["eval_loss"] == pytest.approx(scores[best], rel=1e-6)


def test_the_penalty_is_in_training_alone(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=1)
    first, task = run.bt.penalty(ROWS).item(), run.evaluate()["eval_loss"]
    run.train()
    entry = next(entry for entry in run.state.log_history if "loss" in entry)
    assert entry["penalty"] == pytest.approx(first, rel=1e-6)
    assert entry["loss"] - first == pytest.approx(task, abs=0.3)  # half of the rows
    assert entry["lambda_min"] <= entry["lambda_max"]


def test_a_checkpoint_keeps_the_anchor(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    with torch.no_grad():
        run.bt.B[0].fill_(0.5)
    run.bt.anchor()
    expected = run.bt.penalty(ROWS).item()
    run.save_model(str(tmp_path / "one"))
    other = trainer(tmp_path)
    other._load_from_checkpoint(str(tmp_path / "one"))
    assert other.bt.penalty(ROWS).item() == expected


def test_rounded_parameters_are_put_back(tmp_path: Path) -> None:
    """TRL rounds what it trains of a quantized model to bf16."""

    class Rounding(Trainer):
        def __init__(self, model, *args, **kwargs) -> None:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(torch.bfloat16)
            super().__init__(model, *args, **kwargs)

    class Both(BTLoraTrainer, Rounding):
        pass

    bt = BTLora(tiny("bert"), SHAPE)
    before = bt.A[0].detach().clone()
    Both(bt, arguments(tmp_path), train_dataset=dataset())
    assert bt.A[0].dtype == bt.lam.dtype == torch.float32
    assert torch.equal(bt.A[0], before)


# ── what is refused ─────────────────────────────────────────────────────────────────────────────


def test_a_loss_that_is_not_finite_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="step 1: lower the learning rates"):
        trainer(tmp_path, alpha_s=float("inf")).train()


def test_a_head_that_no_file_holds_is_refused(tmp_path: Path) -> None:
    tiny("bert").bert.save_pretrained(tmp_path / "body")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "body")
    with pytest.raises(UserError, match=r"^classifier\.weight is not in the model's files"):
        BTLoraTrainer(model, arguments(tmp_path), train_dataset=dataset())
    model.save_pretrained(tmp_path / "whole")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "whole")
    BTLoraTrainer(model, arguments(tmp_path), train_dataset=dataset())


def test_weights_that_would_not_be_saved_are_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.bt.model.get_base_model().classifier.bias.requires_grad_(True)
    with pytest.raises(UserError, match=r"classifier.*bias would train with the adapter"):
        run.train()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"rank": 5}, "Rank budget 5"),
        ({"lambda_lr": 0.0}, "lambda_lr must be above 0"),
        ({"model_init": tiny}, "model_init is incompatible with BT-LoRA"),
        ({"optimizers": (torch.optim.SGD([torch.zeros(1)]), None)}, "choose one by args.optim"),
    ],
)
def test_arguments_that_do_not_fit(tmp_path: Path, wrong: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        BTLoraTrainer(tiny("bert"), arguments(tmp_path), adapter=SHAPE, **wrong)


def test_models_that_do_not_fit(tmp_path: Path) -> None:
    bt = BTLora(tiny("bert"), SHAPE)
    for model, given, said in (
        ("some/model", {}, "not its name"),
        (bt.model, {}, "has an adapter already"),
        (bt, {"adapter": SHAPE}, "brings its own adapter"),
    ):
        with pytest.raises(UserError, match=said):
            BTLoraTrainer(model, arguments(tmp_path), **given)


def test_rows_without_a_number_need_one(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=1)
    run.train_dataset = dataset().to_iterable_dataset()
    with pytest.raises(UserError, match=r"no length: .*\(examples=\)"):
        run.train()
    run = trainer(tmp_path, max_steps=1, examples=2 * ROWS)
    assert run.examples == 2 * ROWS


@pytest.mark.parametrize("damage", ["missing", "cut", "other"])
def test_checkpoints_that_cannot_be_resumed(tmp_path: Path, damage: str) -> None:
    trainer(tmp_path).save_model(str(tmp_path / "one"))
    path = tmp_path / "one" / STATE_FILE
    model = None
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:100])
    else:
        model = tiny("bert", dropout=0.0, width=24)
    said = {"missing": "is missing", "cut": "is damaged", "other": "another model or adapter"}
    with pytest.raises(UserError, match=said[damage]):
        trainer(tmp_path, model)._load_from_checkpoint(str(tmp_path / "one"))


# ── TRL ─────────────────────────────────────────────────────────────────────────────────────────


def test_sft_trainer(tmp_path: Path) -> None:
    """TRL's own loss and saving go through the adapter, and its steps are resumed."""
    trl = pytest.importorskip("trl")
    base = save_llama(tmp_path / "base")
    texts = {"prompt": ["un chat", "le mur", "noir"] * 2, "completion": [" dort ici", " noir"] * 3}

    class Tuner(BTLoraTrainer, trl.SFTTrainer):
        pass

    def made(folder: str) -> BTLoraTrainer:
        plain = arguments(tmp_path / folder, save_strategy="steps", save_steps=2).to_dict()
        return Tuner(
            LlamaForCausalLM.from_pretrained(base),
            args=trl.SFTConfig(**plain),
            train_dataset=Dataset.from_dict(texts),
            eval_dataset=Dataset.from_dict(texts),
            processing_class=chat_tokenizer(),
            adapter=SHAPE, rank=2, first_lambda=0.5, lambda_lr=0.05,
        )  # fmt: skip

    whole, resumed = made("whole"), made("resumed")
    first = whole.bt.penalty(6).item()
    whole.train()
    entries = [entry for entry in whole.state.log_history if "loss" in entry]
    assert entries[0]["penalty"] == pytest.approx(first, rel=1e-6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for mine, theirs in zip(resumed._trained(), whole._trained(), strict=True):
        assert torch.equal(mine, theirs)
    folder = tmp_path / "whole" / "checkpoint-4"
    assert json.loads((folder / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    plain = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), folder).eval()
    row = whole.eval_dataset[0]
    with whole._trimmed(), torch.no_grad():
        inside = whole.model.eval()(torch.tensor([row["input_ids"]])).logits
    with torch.no_grad():
        outside = plain(torch.tensor([row["input_ids"]])).logits
    assert torch.allclose(inside, outside, atol=1e-5)
