"""How long a run will take on this machine, from a few steps of a model of the same shape."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification

from fedp2eft.adapters.btlora import BTLora
from fedp2eft.bases import BASES
from fedp2eft.bases.base import LocalWork
from fedp2eft.client.descent import local_order
from fedp2eft.client.training import stage1
from fedp2eft.data.registry import load_clients
from fedp2eft.methods import METHODS
from fedp2eft.models.loading import load_config, prepare_for_length
from fedp2eft.models.precision import choose_device, resolve_precision
from fedp2eft.models.sources import resolve_model
from fedp2eft.settings.experiment import Settings
from fedp2eft.settings.profiles import PROFILES
from fedp2eft.tasks.classification import Classification
from fedp2eft.tasks.encoded import Encoded

WORDS = 512
"""The probe's vocabulary: embeddings cost memory and hardly any time."""
ASIDE = 12.0
"""Seconds of a small run beside its products: loading, aggregating, writing."""


@dataclass(frozen=True)
class Work:
    """What a run computes.

    Args:
        base_steps: Optimizer steps of the base's training, over all clients and rounds.
        adapter_steps: The same of stage 1 and of personalization.
        passed_rows: Rows that pass the model without gradients: ξ and scores.
    """

    base_steps: int
    adapter_steps: int
    passed_rows: int


def work_of(settings: Settings) -> Work:
    """Count what a run on a classification computes under these settings."""
    clients = load_clients(settings.data).clients
    seen = [client for client in clients if client.pool == "seen"]
    scored = [client for client in clients if client.pool in settings.evaluation.pools]
    base, local, psg = settings.base, settings.local, settings.federation
    methods = settings.evaluation.methods
    budgets = len(settings.evaluation.ranks)
    trained = budgets * sum(METHODS[name].ranked for name in methods)
    asked = budgets * sum(METHODS[name].shared == "psg" for name in methods)
    plain = [name for name in methods if not METHODS[name].ranked and name != "majority"]
    scores = trained + len(plain)  # the majority label needs no model

    def steps(rows: int, epochs: int, batch: int) -> int:
        return epochs * -(-rows // batch)

    def rounds(count: int, per_round: int) -> float:
        return count * min(1.0, per_round / max(1, len(seen)))

    base_rounds = rounds(base.rounds, base.clients_per_round)
    psg_rounds = rounds(psg.rounds, psg.clients_per_round)
    rows = {client.name: len(client.train) for client in clients}
    once = sum(steps(rows[c.name], base.epochs, base.batch_size) for c in seen)
    stage = sum(steps(rows[c.name], local.epochs, local.batch_size) for c in seen)
    own = sum(steps(rows[c.name], local.personalize_epochs, local.batch_size) for c in scored)
    passed = sum(scores * len(c.test) + asked * rows[c.name] for c in scored)
    passed += sum(rows[c.name] for c in seen)  # ξ of the rounds, kept between them
    return Work(round(base_rounds * once), round(psg_rounds * stage) + trained * own, passed)


def seconds_needed(settings: Settings, clock: Callable[[], float] = time.perf_counter) -> float:
    """Return about how many seconds a run takes on this machine; measures for a few.

    Args:
        settings: A classification.
        clock: Seconds that only rise.
    """
    work, local = work_of(settings), settings.local
    device = choose_device(settings.model.device)
    dtype = resolve_precision(settings.model.precision, device)
    # A model of the same shape with random weights, and rows that fill the longest input.
    config = load_config(resolve_model(settings.model.name, revision=settings.model.revision))
    pad = int(config.pad_token_id or 0)
    config.vocab_size = max(WORDS, pad + 1)
    task = Classification(pad, local.max_length, device, config.vocab_size)
    kept = replace(task, states_mib=settings.model.states_mib)
    with torch.random.fork_rng():
        model = AutoModelForSequenceClassification.from_config(config).to(device).eval()
    prepare_for_length(model, local.max_length, device)
    rng = np.random.default_rng(0)

    def rows(count: int) -> Encoded:
        tokens = rng.integers(5, WORDS, (count, local.max_length)).tolist()
        return Encoded.from_rows(tokens, [0] * count)

    def timed(action: Callable[[], object]) -> float:
        action()  # the first call allocates
        start = clock()
        action()
        return clock() - start

    # A step of the base's training, a step of stage 1, and a batch without gradients. Steps start
    # from kept states as in a run; rows pass the whole model, which makes up for the first time.
    kind, once = BASES[settings.base.kind], replace(settings.base, epochs=1, steps=None)
    fit = LocalWork("", kept, rows(once.batch_size), replace(settings, base=once), dtype, 0)
    wrapped = kind.wrap(model, settings)
    trained = kind.trained(wrapped, settings.base).values()
    full = timed(lambda: fit.fine_tune(wrapped, trained, once.lr)) if trained else 0.0
    bt = BTLora(kind.merged(wrapped).to(dtype), settings.adapter)
    data, profile = rows(local.batch_size), PROFILES[settings.federation.profile]
    order = list(local_order(len(data), 1, local.batch_size, 0))
    adapter = timed(lambda: stage1(bt, kept, data, order, local, profile))
    batch = rows(local.eval_batch_size)
    with bt.off():
        row = timed(lambda: task.score(bt.model, batch, local.eval_batch_size)) / len(batch)
    return work.base_steps * full + work.adapter_steps * adapter + work.passed_rows * row + ASIDE
