"""Personalize, score and export one client's adapter, without any federation around it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fedp2eft.adapters import convert
from fedp2eft.adapters.convert import check_same_base, with_adapter
from fedp2eft.adapters.export import (
    PEFT_TASKS,
    adapter_facts,
    auto_mapping,
    column_facts,
    save_adapter,
)
from fedp2eft.adapters.weights import AdapterWeights
from fedp2eft.client.side import check_size
from fedp2eft.data.files import client_from_file
from fedp2eft.errors import UserError, require
from fedp2eft.generator import PSG, PSGConfig
from fedp2eft.methods import METHODS, check_trained_for, method_named
from fedp2eft.models.fit import class_names, longest_input
from fedp2eft.models.loading import load_base, load_config, load_tokenizer, prepare_for_length
from fedp2eft.models.precision import choose_device, resolve_precision
from fedp2eft.models.sources import ModelSource, resolve_model
from fedp2eft.results.at_budget import AtBudget
from fedp2eft.results.cards import MODEL_FACTS, adapter_card
from fedp2eft.runtime.one_client import OneClient
from fedp2eft.settings.data import DataSettings
from fedp2eft.settings.experiment import Budget, TaskName, check_rank
from fedp2eft.tasks.causal_lm import CausalLM
from fedp2eft.tasks.generation import check_room
from fedp2eft.tasks.generation import generate as generate_texts
from fedp2eft.tasks.make import make_task
from fedp2eft.tasks.prompts import Prompts
from fedp2eft.tasks.task import Scores, Task
from fedp2eft.tasks.text_scores import check_scorers, text_scores

logger = logging.getLogger(__name__)
DataFile = str | Path
"""A JSON lines, CSV or Parquet file."""


@dataclass(frozen=True)
class Adapter:
    """One client's own adapter.

    Args:
        weights: The kept ranks.
        base: Name or folder of the base model.
        revision: Content hash of the base model's weights.
        rank: The budget r it was made for.
        scores: Scores on the test rows, where there were any.
        facts: What its folder's fedp2eft.json says.
        loads: The class of the base model, as PEFT names it.
    """

    weights: AdapterWeights
    base: str
    revision: str
    rank: int
    scores: Scores | None = None
    facts: dict[str, object] = field(default_factory=dict)
    loads: dict[str, str] = field(default_factory=dict)

    @property
    def ranks(self) -> dict[str, int]:
        """Kept ranks per module."""
        return self.weights.ranks

    def save(self, folder: str | Path, layout: Literal["portable", "compact"] = "portable") -> Path:
        """Write a folder that `peft.PeftModel.from_pretrained` loads."""
        return save_adapter(
            self.weights,
            folder,
            base=self.base,
            revision=self.revision,
            layout=layout,
            task_type=PEFT_TASKS[str(self.facts.get("task", "classification"))],
            loads=self.loads,
            facts={"rank": self.rank, **self.facts},
            card=adapter_card,
        )


def personalize(
    psg: PSG,
    model: str | Path,
    data: DataFile,
    rank: int,
    *,
    method: str | None = None,
    budget: Budget = "ranks",
    test_data: DataFile | None = None,
    text_columns: Sequence[str] | None = None,
    label_column: str | None = None,
    target_column: str | None = None,
    lr: float | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    device: str = "auto",
    seed: int = 0,
) -> Adapter:
    """Fit one client's adapter with a method, as a federation's clients do.

    FedP²EFT (paper section 4, inference): ξ, λ = PSG(ξ), the largest kept, A and B fine-tuned.

    Args:
        psg: A trained PSG.
        model: Folder or hub id of the base model that the PSG was trained with.
        data: The client's rows. All of them train, or, with a column `split`, those it calls
            "train".
        rank: Budget r, from 1 to the PSG's r_max.
        method: One of `METHODS` that needs no federation beside the PSG's, and no survey but one
            whose answers the PSG keeps. Default: "auto" if the PSG keeps a choice for this budget
            or a smaller one, else "fedp2eft".
        budget: What the adapter may have: as many "ranks", or as many "parameters", as r ranks on
            every layer.
        test_data: Rows to score the adapter on. Default: the rows of `data` with
            split "test".
        text_columns: Columns with the text. Default: the PSG's.
        label_column: Column with the class. Default: the PSG's.
        target_column: Column with the response, for a causal LM. Default: the PSG's.
        lr: Learning rate of A and B. Default: the PSG's.
        epochs: Passes over the rows. Default: the PSG's.
        batch_size: Rows per mini-batch. Default: the PSG's.
        precision: Dtype of the frozen base model.
        device: "auto", "cpu" or "cuda".
        seed: Seed of the mini-batch order.

    Raises:
        UserError: Bad rows, a budget outside 1..r_max, or a model that the PSG was not made for.
    """
    # Only methods that one client can run alone.
    c = psg.config
    check_rank(rank, c.adapter.r_max)
    require(budget in get_args(Budget), f"budget is {budget!r}: give ranks or parameters.")
    method = method or ("auto" if _choice(c, "auto", rank, budget) else "fedp2eft")
    made, prepared = method_named(method), _choice(c, method, rank, budget)
    if made.kept and not prepared:
        raise UserError(
            f"This PSG keeps no choice of method {method} for r = {rank} or less, in {budget}: "
            f"train it with {method} among evaluation.methods, and evaluation.budget: {budget}, or "
            "name another method."
        )
    if made.shared not in (None, "psg") or (made.surveys and not prepared):
        raise UserError(
            f"Method {method} needs federated training of its own, or answers from other clients: "
            f"use fedp2eft train, or one of {', '.join(_alone(c.task))}."
        )
    given: dict[str, Any] = {
        "personalize_lr": lr,
        "personalize_epochs": epochs,
        "batch_size": batch_size,
    }
    local = replace(c.local, **{key: value for key, value in given.items() if value is not None})
    # The rows, then the model: a mistake in a file shows before anything is loaded.
    text_columns = text_columns or c.text_columns
    _check_same_columns(text_columns, c.text_columns, "The PSG")
    classes = c.task == "classification"
    name = "target_column" if classes else "label_column"
    if (target_column if classes else label_column) is not None:
        raise UserError(f"The PSG's task is {c.task}, which does not use {name}: remove it.")
    columns = DataSettings(
        text_columns=list(text_columns),
        label_column=(label_column or c.label_column) if classes else None,
        target_column=None if classes else target_column or c.target_column,
        labels=list(c.labels),
        test_fraction=0.0,
    )
    rows = client_from_file(data, columns)
    held = rows if test_data is None else client_from_file(test_data, columns, only_test=True)
    client = rows.clients[0].name
    workspace = OneClient(
        psg, model, rows, held, local,
        precision=precision, device=device, seed=seed, budget=budget,
    )  # fmt: skip
    check_trained_for(method, workspace.settings)
    # The method itself, as the federation's clients run it.
    side = replace(workspace.side(client, method=made), prepared=prepared)
    outcome = made.fit(side, rank)
    if outcome.weights is None:
        raise UserError(
            f"Method {method} makes no adapter: score the model with fedp2eft evaluate."
        )
    check_size(side, outcome.weights, rank)
    # The adapter, with what its card and config tell.
    scores = outcome.scores if len(workspace.encoded(client, "test")) else None
    source = workspace.source
    return Adapter(
        workspace.carried(client, side.carrying(outcome.weights)),
        str(Path(source.name).resolve()) if Path(source.name).is_dir() else source.name,
        workspace.psg_config.base_revision,
        rank,
        scores,
        {
            "method": method,
            "budget": budget,
            "task": c.task,
            "labels": list(c.labels),
            **column_facts(columns, c.task),
            "max_length": c.local.max_length,
            **(scores.facts() | {"test_rows": scores.examples} if scores else {}),
            "train_rows": len(workspace.encoded(client, "train")),
            "origin": {k: v for k, v in c.origin.items() if k in MODEL_FACTS},
        },
        auto_mapping(workspace.bt.model.get_base_model()),
    )


def _alone(task: TaskName) -> list[str]:
    """Return the methods that make an adapter for one client from any PSG; without variants."""
    other = "texts" if task == "classification" else "classes"  # what is for the other task alone
    return [
        name
        for name, m in METHODS.items()
        if m.shared in (None, "psg")
        and not (m.surveys or m.variant or getattr(m, other))
        and (m.ranked or m.label_prior)  # the rest only score the base
        and "+" not in name
    ]


def evaluate(
    model: str | Path,
    data: DataFile,
    adapter: str | Path | None = None,
    *,
    text_columns: Sequence[str] | None = None,
    label_column: str | None = None,
    target_column: str | None = None,
    max_length: int | None = None,
    batch_size: int = 64,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    device: str = "auto",
    generate: bool = False,
    max_new_tokens: int = 256,
) -> Scores:
    """Score a base model, with or without a PEFT adapter, on labelled rows.

    If the file has a column `split`, score its rows "test", else all rows. Class names are those of
    the model's config. With a `target_column`, the model is a causal LM, scored on the responses in
    that column. Columns and `max_length` are those of the adapter, or of the one that was merged
    into the model, by default, or else `text`, `label` and 128 tokens (a causal LM: 1024) or what
    the model reads; longer inputs are cut. With `generate`, the causal LM answers every prompt
    greedily with at most `max_new_tokens` tokens, and the texts are scored too.

    Raises:
        UserError: Bad rows, a label that the model does not know, or an adapter that does not fit.
    """
    source = resolve_model(str(model))
    config = load_config(source)
    facts = adapter_facts(source.path if adapter is None else adapter)  # a merged model has them
    if target_column and label_column:
        raise UserError("Rows have a class or a response: name label_column or target_column.")
    text_columns, target_column = _columns(facts, text_columns, label_column, target_column)
    kind: TaskName = "causal_lm" if target_column else "classification"
    if generate and not target_column:
        raise UserError("Only a causal LM generates: name the column of responses, target_column.")
    if generate:
        check_scorers()
    columns = DataSettings(
        text_columns=list(text_columns),
        label_column=None
        if target_column
        else label_column or _word(facts, "label_column") or "label",
        target_column=target_column or None,
        labels=[] if target_column else list(class_names(config)),
        test_fraction=0.0,
    )
    rows = client_from_file(data, columns, only_test=True)
    if adapter is not None:
        check_same_base(adapter, source, kind)
    known = facts.get("max_length")
    if max_length is None and isinstance(known, int):
        max_length = known
    base, task, tokenizer = _load(source, kind, max_length, precision, device)
    longest = longest_input(base)
    if adapter is not None:
        base = with_adapter(base, adapter)
    asked_for = rows.texts_and_answers(rows.clients[0].test, kind)
    encoded = task.encode(tokenizer, *asked_for)
    if encoded.cut:
        logger.warning(
            "%d of %d rows are longer than max_length (%d tokens) and are cut there.",
            encoded.cut, len(asked_for[1]), task.max_length,
        )  # fmt: skip
    scores = task.score(base, encoded, batch_size)
    if not generate:
        return scores
    assert isinstance(task, CausalLM)
    check_room(longest, task.max_length, max_new_tokens)
    questions = list(task.questions(Prompts(tokenizer), *asked_for))
    texts = generate_texts(base, tokenizer, questions, max_new_tokens, batch_size)
    return replace(scores, texts=text_scores(texts, [asked.reference for asked in questions]))


def export(
    adapter: str | Path,
    out: str | Path,
    layout: Literal["portable", "compact", "merged"],
    model: str | None = None,
    *,
    precision: Literal["base", "fp32", "bf16"] = "base",
) -> None:
    """Write an adapter folder in another layout (`adapters.convert`).

    What is written is compared with base and adapter on a few rows before it is kept.

    Args:
        adapter: A folder that this package wrote.
        out: The new folder.
        layout: "portable", "compact" or "merged" (the full model).
        model: Base model. Default: the one that the adapter names.
        precision: Dtype of a merged model; "base" keeps that of the base model.

    Raises:
        UserError: No such adapter or base, or what was written computes something else.
    """
    if layout == "merged":
        convert.merge(adapter, out, model, precision)
    else:
        convert.change_layout(adapter, out, layout, model, adapter_card)


def _choice(config: PSGConfig, method: str, rank: int, budget: Budget) -> dict[str, Tensor]:
    """Return a method's kept surveys at the largest budget up to `rank`; empty if none.

    Raises:
        UserError: It is damaged.
    """
    kept = {at: v for k, v in config.choices.items() if (at := AtBudget.parse(k))}
    fitting = [at for at in kept if (at.method, at.budget) == (method, budget) and at.rank <= rank]
    try:
        found = kept[max(fitting)] if fitting else {}
        return {name: torch.tensor(values, dtype=torch.float32) for name, values in found.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"The PSG's choices cannot be read ({error}): fetch it again.") from error


def _columns(
    facts: Mapping[str, object],
    text_columns: Sequence[str] | None,
    label_column: str | None,
    target_column: str | None,
) -> tuple[tuple[str, ...], str]:
    """Return text columns and target column: as named, or as the adapter was made; "" for none."""
    known = facts.get("text_columns")
    made = tuple(map(str, known)) if isinstance(known, list) else ()
    columns = tuple(text_columns or made or ("text",))
    _check_same_columns(columns, made, "The adapter")
    return columns, target_column or ("" if label_column else _word(facts, "target_column"))


def _word(facts: Mapping[str, object], name: str) -> str:
    value = facts.get(name)
    return value if isinstance(value, str) else ""


def _check_same_columns(columns: Sequence[str], made: Sequence[str], whose: str) -> None:
    """Raise `UserError` unless there are as many text columns as something was trained on."""
    if made and len(columns) != len(made):
        raise UserError(
            f"{whose} was made with {len(made)} text column{'s' * (len(made) > 1)} "
            f"({', '.join(made)}), and {len(columns)} are named: {', '.join(columns)}. "
            "Name as many, in the same order."
        )


def _load(
    source: ModelSource, kind: TaskName, max_length: int | None, precision: Any, device: str
) -> tuple[Any, Task, Any]:
    """Return model, task and tokenizer; by default of the usual length, or what the model reads."""
    where, tokenizer = choose_device(device), load_tokenizer(source)
    base = load_base(
        source,
        kind,
        tokenizer=tokenizer,
        dtype=resolve_precision(precision, where),
        device=where,
        max_length=max_length,
    )
    if max_length is None:
        usual = 1024 if kind == "causal_lm" else 128
        max_length = min(usual, longest_input(base) or usual)
        prepare_for_length(base, max_length, where)
    return base, make_task(kind, tokenizer, max_length, where, base.config), tokenizer
