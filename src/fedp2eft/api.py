"""Personalize, score and export one client's adapter, without any federation around it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fedp2eft.adapters import convert
from fedp2eft.adapters.btlora import BTLora
from fedp2eft.adapters.convert import check_same_base, with_adapter
from fedp2eft.adapters.export import PEFT_TASKS, adapter_facts, auto_mapping, save_adapter
from fedp2eft.adapters.weights import AdapterWeights
from fedp2eft.bases import BASES, LocalWork
from fedp2eft.bases.parts import Overlay, Part
from fedp2eft.client.training import features, local_order, structure
from fedp2eft.client.training import personalize as fine_tune
from fedp2eft.data.federation import Federation
from fedp2eft.data.files import client_from_file
from fedp2eft.errors import UserError
from fedp2eft.generator import PSG
from fedp2eft.models.fit import class_names
from fedp2eft.models.loading import (
    ModelSource,
    load_base,
    load_config,
    load_tokenizer,
    longest_input,
    prepare_for_length,
    resolve_model,
)
from fedp2eft.models.precision import choose_device, resolve_precision
from fedp2eft.models.sources import hash_weights
from fedp2eft.results.cards import MODEL_FACTS, adapter_card
from fedp2eft.seeding import derive_seed
from fedp2eft.settings.experiment import (
    EvaluationSettings,
    LocalSettings,
    Settings,
    TaskName,
    check_rank,
)
from fedp2eft.settings.profiles import PROFILES
from fedp2eft.settings.reading import settings_from
from fedp2eft.tasks import Scores, Task, make_task
from fedp2eft.tasks.causal_lm import CausalLM
from fedp2eft.tasks.generation import check_room
from fedp2eft.tasks.generation import generate as generate_texts
from fedp2eft.tasks.prompts import Prompts
from fedp2eft.tasks.text_scores import check_scorers, text_scores

Rows = str | Path
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
            facts={"method": "fedp2eft", "rank": self.rank, **self.facts},
            card=adapter_card,
        )


def personalize(
    psg: PSG,
    model: str | Path,
    data: Rows,
    rank: int,
    *,
    test_data: Rows | None = None,
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
    """Fit one client's adapter: ξ, λ = PSG(ξ), the r·L largest kept, A and B fine-tuned.

    (Paper section 4, inference.)

    Args:
        psg: A trained PSG.
        model: Folder or hub id of the base model that the PSG was trained with.
        data: The client's rows. All of them train, or, with a column `split`, those it calls
            "train".
        rank: Rank budget r, from 1 to the PSG's r_max.
        test_data: Rows to score the adapter on; where none are given, those of `data` that its
            column `split` calls "test".
        text_columns: Columns with the text; the PSG's where none are given.
        label_column: Column with the class; the PSG's where none is given.
        target_column: Column with the response, for a causal LM; the PSG's where none is given.
        lr: Learning rate of A and B; the PSG's where none is given.
        epochs: Passes over the rows; the PSG's where none are given.
        batch_size: Rows per mini-batch; the PSG's where none is given.
        precision: Numbers of the frozen base.
        device: "auto", "cpu" or "cuda".
        seed: Seed of the mini-batch order.

    Raises:
        UserError: Bad rows, a budget outside 1..r_max, or a model that the PSG was not made for.
    """
    c = psg.config
    check_rank(rank, c.r_max)
    settings = LocalSettings(
        personalize_lr=c.personalize_lr if lr is None else lr,
        personalize_epochs=c.personalize_epochs if epochs is None else epochs,
        batch_size=c.batch_size if batch_size is None else batch_size,
        accumulate=c.accumulate,
        dropout=c.dropout,
        max_length=c.max_length,
    )
    profile = PROFILES[c.profile]
    c.check_fits(replace(c, feature_kind=profile.feature_kind))
    kind: TaskName = "causal_lm" if c.task == "causal_lm" else "classification"
    columns = tuple(text_columns or c.text_columns)
    answers = _Answers(kind, label_column or c.label_column, target_column or c.target_column)
    train = _rows(data, columns, answers, c.labels)
    test = train if test_data is None else _rows(test_data, columns, answers, c.labels, score=True)
    source = resolve_model(str(model))
    revision = hash_weights(Path(source.path))
    c.check_fits(replace(c, base_revision=revision))  # before it is loaded
    base, task, tokenizer = _load(source, kind, c.labels, c.max_length, precision, device)
    frozen = dict(base.named_parameters())
    bt = BTLora(base, c.adapter_settings(), clamp_forward=profile.clamp_forward)
    linears = tuple(name for name, _ in bt.linears)
    c.check_fits(replace(c, linear_names=linears, layer_names=bt.names))
    rows = task.encode(tokenizer, *_texts(train, train.clients[0].train))
    s = Settings(
        base=settings_from({"base": c.base}).base,
        adapter=c.adapter_settings(),
        local=settings,
        evaluation=EvaluationSettings(ranks=[rank]),
    )
    dtype, base_seed = resolve_precision(precision, task.device), derive_seed(seed, "local base")
    work = LocalWork(f"seed {seed}", task, rows, s, dtype, base_seed)
    part = _own_part(source, kind, work, frozen)
    xi = psg.features_of(features(bt, task, rows, settings, profile), len(rows))
    lam, keep = structure(psg, xi, rank)
    order_seed = derive_seed(seed, "personalize")
    scores: list[Scores] = []

    def measure(tuned: nn.Module) -> None:
        if len(held := test.clients[0].test):
            encoded = task.encode(tokenizer, *_texts(test, held))
            scores.append(task.score(tuned, encoded, settings.eval_batch_size))

    fitted = fine_tune(
        bt,
        task,
        rows,
        lam,
        keep,
        local_order(len(rows), settings.personalize_epochs, settings.batch_size, order_seed),
        settings,
        seed=order_seed,
        measure=measure,
    )
    return Adapter(
        BASES[s.base.kind].carried(fitted.weights, part),
        str(Path(source.name).resolve()) if Path(source.name).is_dir() else source.name,
        revision,
        rank,
        scores[0] if scores else None,
        {
            "task": kind,
            "labels": list(c.labels),
            "max_length": c.max_length,
            **(scores[0].facts() | {"test_rows": scores[0].examples} if scores else {}),
            "train_rows": len(rows),
            "origin": {k: v for k, v in c.origin.items() if k in MODEL_FACTS},
        },
        auto_mapping(base),
    )


def evaluate(
    model: str | Path,
    data: Rows,
    adapter: str | Path | None = None,
    *,
    text_columns: Sequence[str] | None = None,
    label_column: str = "label",
    target_column: str | None = None,
    max_length: int | None = None,
    batch_size: int = 64,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    device: str = "auto",
    generate: bool = False,
    max_new_tokens: int = 256,
) -> Scores:
    """Score a base model, with or without a PEFT adapter, on labelled rows.

    Of a file with a column `split` the rows that it calls "test" are scored, else all. Class names
    are those of the model's config. With a `target_column` the model is a causal LM,
    scored on the responses in that column. Inputs are cut at `max_length` tokens; where none is
    given, at the length that the adapter was made with, or else at 128 (a causal LM: 1024) or what
    the model reads. With `generate` the causal LM answers every prompt, greedily with at most
    `max_new_tokens` tokens, and the texts are scored too.

    Raises:
        UserError: Bad rows, a label that the model does not know, or an adapter that does not fit.
    """
    source = resolve_model(str(model))
    config = load_config(source)
    kind: TaskName = "causal_lm" if target_column else "classification"
    if generate and not target_column:
        raise UserError("Only a causal LM generates: name the column of responses, target_column.")
    if generate:
        check_scorers()
    labels = () if target_column else class_names(config)
    answers = _Answers(kind, label_column, target_column or "")
    rows = _rows(data, tuple(text_columns or ("text",)), answers, labels, score=True)
    if adapter is not None:
        check_same_base(adapter, source)
    if max_length is None and adapter is not None:
        known = adapter_facts(adapter).get("max_length")
        max_length = known if isinstance(known, int) else None
    base, task, tokenizer = _load(source, kind, (), max_length, precision, device)
    longest = longest_input(base)
    if adapter is not None:
        base = with_adapter(base, adapter)
    asked_for = _texts(rows, rows.clients[0].test)
    scores = task.score(base, task.encode(tokenizer, *asked_for), batch_size)
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
        model: Base model; the one that the adapter names where none is given.
        precision: Dtype of a merged model; "base" keeps that of the base model.

    Raises:
        UserError: No such adapter or base, or what was written computes something else.
    """
    if layout == "merged":
        convert.merge(adapter, out, model, precision)
    else:
        convert.change_layout(adapter, out, layout, model, adapter_card)


@dataclass(frozen=True)
class _Answers:
    """What the rows of a file are answered with: a class, or a text."""

    task: TaskName
    label_column: str
    target_column: str


def _rows(
    data: Rows,
    columns: tuple[str, ...],
    answers: _Answers,
    labels: tuple[str, ...],
    score: bool = False,
) -> Federation:
    """One client, whose rows train unless the file says otherwise; with `score` they are tested."""
    classes = answers.task == "classification"
    return client_from_file(
        data,
        text_columns=columns,
        label_column=answers.label_column if classes else None,
        target_column=None if classes else answers.target_column,
        labels=labels,
        test_fraction=0.0,
        only_test=score,
    )


def _load(
    source: ModelSource,
    kind: TaskName,
    labels: Sequence[str],
    max_length: int | None,
    precision: Any,
    device: str,
) -> tuple[Any, Task, Any]:
    """Model, task and tokenizer; the usual length, if none is given, or what the model reads."""
    where, tokenizer = choose_device(device), load_tokenizer(source)
    base = load_base(
        source,
        kind,
        labels=labels,
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


def _texts(
    federation: Federation, rows: NDArray[np.int64]
) -> tuple[list[Sequence[Any]], Sequence[Any]]:
    """The text columns of rows, and their answers."""
    return federation.texts_and_answers(
        rows, "classification" if federation.labels else "causal_lm"
    )


def _own_part(
    source: ModelSource, kind: TaskName, work: LocalWork, frozen: Mapping[str, nn.Parameter]
) -> Part:
    """Put the client's own part of the base into it, where clients have one, and return it."""
    training, c = BASES[work.settings.base.kind], work.settings.local

    @cache
    def finished() -> nn.Module:
        model = load_base(source, kind, device=work.task.device, max_length=c.max_length)
        return training.wrap(model, work.settings)

    part = training.own_part(finished, work)
    Overlay(frozen).put(training.replacements(finished, part))
    return part
