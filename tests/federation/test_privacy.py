"""What leaves a client in a whole run, and what a process does once however many rounds there are.

Every message of the run is looked at, record by record.
"""

from __future__ import annotations

from typing import Any

import pytest
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from transformers import AutoModelForSequenceClassification

from fedp2eft.federation.messages import (
    DESCRIBE,
    PERSONALIZE,
    TRAIN_BASE,
    TRAIN_PSG,
)
from fedp2eft.generator import PSG
from tiny_run import CLIENTS, LABELS, SEEN, UNSEEN, vocabulary

SCALARS = {
    DESCRIBE: {"num-examples", "num-tests"},
    TRAIN_BASE: {"num-examples", "loss"},
    TRAIN_PSG: {"num-examples", "psg-loss", "stage1-first", "stage1-last"},
    PERSONALIZE: {"num-examples", "correct", "loss", "parameters", "seconds"},
}
NAMES = {DESCRIBE: {"client", "language", "pool"}}


def of_type(finished: Any, kind: str) -> list[tuple[Any, Any]]:
    return [(m, r) for m, r in finished.messages if m.metadata.message_type == kind]


def shapes(record: ArrayRecord) -> dict[str, tuple[int, ...]]:
    return {name: tuple(array.numpy().shape) for name, array in record.items()}


def arrays_of(content: Any) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for record in content.array_records.values():
        found |= shapes(record)
    return found


def allowed_arrays(finished: Any) -> dict[str, dict[str, tuple[int, ...]]]:
    """Names and shapes of φ and of the trained base's parameters."""
    psg = PSG.from_pretrained(finished.folder / "psg")
    base = AutoModelForSequenceClassification.from_pretrained(finished.folder / "base")
    phi = {name: tuple(value.shape) for name, value in psg.state_dict().items()}
    weights = {name: tuple(value.shape) for name, value in base.named_parameters()}
    return {DESCRIBE: {}, TRAIN_BASE: weights, TRAIN_PSG: phi, PERSONALIZE: {}}


def test_every_reply_holds_parameters_counts_and_names_only(finished) -> None:
    allowed = allowed_arrays(finished)
    kinds = {message.metadata.message_type for message, _ in finished.messages}
    assert kinds == set(allowed)
    for message, reply in finished.messages:
        kind = message.metadata.message_type
        content = reply.content
        assert not reply.has_error()
        assert arrays_of(content) == allowed[kind]
        records = list(content.values())
        assert all(isinstance(r, ArrayRecord | ConfigRecord | MetricRecord) for r in records)
        scalars = {k: v for r in content.metric_records.values() for k, v in r.items()}
        assert set(scalars) == SCALARS[kind]
        assert all(type(value) in (int, float) for value in scalars.values())
        names = {k: v for r in content.config_records.values() for k, v in r.items()}
        assert set(names) == NAMES.get(kind, {"client"})
        assert names["client"] in CLIENTS
        assert names.get("language", "de") in ("de", "fr")
        assert names.get("pool", "seen") in ("seen", "unseen")


def test_every_request_holds_parameters_and_settings_only(finished) -> None:
    allowed = allowed_arrays(finished)
    for message, _ in finished.messages:
        kind = message.metadata.message_type
        sent = arrays_of(message.content)
        config = {k: v for r in message.content.config_records.values() for k, v in r.items()}
        assert not message.content.metric_records
        if kind == PERSONALIZE:
            assert set(config) == {"method", "rank"}
            assert sent == (allowed[TRAIN_PSG] if config["method"] == "fedp2eft" else {})
        else:
            assert sent == allowed[kind]
            assert set(config) <= {"server-round"}


def test_no_word_of_any_client_is_in_any_message(finished) -> None:
    words = [word.encode() for word in vocabulary() if len(word) >= 5]
    words += [label.encode() for label in LABELS]
    assert len(words) > 10
    for message, reply in finished.messages:
        for content in (message.content, reply.content):
            raw = b"".join(record.deflate() for record in content.values())
            assert not any(word in raw for word in words)


def test_only_seen_clients_train_and_all_are_personalized(finished) -> None:
    for kind, least in ((TRAIN_BASE, 4), (TRAIN_PSG, 6)):
        replies = [reply for _, reply in of_type(finished, kind)]
        clients = [reply.content.config_records["about"]["client"] for reply in replies]
        assert len(clients) == least
        assert set(clients) <= set(SEEN)
    scored = [
        reply.content.config_records["about"]["client"]
        for _, reply in of_type(finished, PERSONALIZE)
    ]
    assert set(scored) == {*SEEN, *UNSEEN}


@pytest.mark.parametrize(
    ("what", "times"),
    [
        ("load_base", 2),  # once to train the base, once frozen; for six clients and five rounds
        ("features", len(CLIENTS)),
        ("encode", 2 * len(CLIENTS)),  # training rows and test rows
    ],
)
def test_work_that_never_changes_is_done_once(finished, what, times) -> None:
    assert finished.calls[what] == times
