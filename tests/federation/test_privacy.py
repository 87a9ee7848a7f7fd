"""What leaves a client in a whole run, and what a process does once however many rounds there are.

Every message of the run is looked at, record by record.
"""

from __future__ import annotations

from typing import Any, get_args

import pytest
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from transformers import AutoModelForSequenceClassification

from fedp2eft.federation.wire.messages import DESCRIBE, PERSONALIZE, SURVEY
from fedp2eft.federation.wire.messages import LABELS as ASK_LABELS
from fedp2eft.generator import PSG
from fedp2eft.methods import METHODS
from fedp2eft.methods.auto.settings import Kind
from tiny_run import CLIENTS, LABELS, R_MAX, SEEN, UNSEEN, vocabulary
from turns import TRAIN_BASE, TRAIN_PSG

SCALARS = {
    DESCRIBE: {"num-examples", "num-tests"},
    ASK_LABELS: set(),
    TRAIN_BASE: {"num-examples", "loss"},
    TRAIN_PSG: {
        "num-examples", "psg-loss", "stage1-first", "stage1-last", "stage1-task",
        "stage1-significance", "stage1-sparsity",
    },
    PERSONALIZE: {"num-examples", "correct", "loss", "parameters", "seconds", "steps"},
}  # fmt: skip
NAMES = {DESCRIBE: {"client", "language", "pool"}}

LAYERS, RATES, TAUS, HELD_OUT = 14, 2, 2, 3
# What a client answers to each question of a method.
ANSWERS: dict[str, list[dict[str, tuple[int, ...]]]] = {
    "gradient-shared": [{}],
    "auto": [
        {
            "candidates": (5, 4), "sums": (5,), "products": (5, 5), "diverged": (5,), "rows": (1,),
            "noise": (1,), "steps": (1,),
        }
    ],
    "lora-tuned": [{"good": (RATES,), "diverged": (RATES,)}],
    "fedp2eft-tuned": [{"good": (RATES,), "diverged": (RATES,)}],
    "fedp2eft-global": [{"lambda": (LAYERS, R_MAX)}],
    "label-prior": [{"all": (3,), "kept": (3,)}, {"good": (TAUS,), "diverged": (TAUS,)}],
}  # fmt: skip


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
    labels = {"labels": (len(LABELS),)}
    return {
        DESCRIBE: {}, TRAIN_BASE: weights, TRAIN_PSG: phi, PERSONALIZE: {}, ASK_LABELS: labels,
    }  # fmt: skip


def test_every_reply_holds_parameters_counts_and_names_only(finished) -> None:
    allowed = allowed_arrays(finished)
    kinds = {message.metadata.message_type for message, _ in finished.messages}
    assert kinds == set(allowed)
    for message, reply in finished.messages:
        check_reply(message.metadata.message_type, reply, allowed)


def check_reply(kind: str, reply: Any, allowed: dict[str, dict[str, tuple[int, ...]]]) -> None:
    content = reply.content
    assert not reply.has_error()
    assert arrays_of(content) == allowed[kind]
    records = list(content.values())
    assert all(isinstance(r, ArrayRecord | ConfigRecord | MetricRecord) for r in records)
    scalars = {k: v for r in content.metric_records.values() for k, v in r.items()}
    assert set(scalars) == SCALARS[kind]
    assert all(type(value) in (int, float) for value in scalars.values())
    names = {k: v for r in content.config_records.values() for k, v in r.items()}
    if kind == PERSONALIZE and "choice" in names:
        assert names.pop("choice") in get_args(Kind)
    assert set(names) == NAMES.get(kind, {"client"})
    assert names["client"] in CLIENTS
    assert names.get("language", "de") in ("de", "fr")
    assert names.get("pool", "seen") in ("seen", "unseen")


def asked(message: Any) -> tuple[str, int]:
    """Method and number of the question of a survey."""
    config = message.content.config_records["config"]
    return config["method"], config["question"]


def test_only_these_methods_ask_and_only_the_seen_clients(all_methods) -> None:
    asking = {n for n, m in METHODS.items() if m.surveys and not n.endswith("+prior")}
    assert asking == set(ANSWERS)
    surveys = of_type(all_methods, SURVEY)
    for method, questions in ANSWERS.items():
        numbers = [asked(m)[1] for m, _ in surveys if asked(m)[0] == method]
        assert numbers == [n for n in range(len(questions)) for _ in range(2)]
    nodes = {m.metadata.dst_node_id for m, _ in surveys}
    described = {
        m.metadata.dst_node_id: r.content.config_records["about"]["pool"]
        for m, r in of_type(all_methods, DESCRIBE)
    }
    assert [described[node] for node in nodes] == ["seen", "seen"]


def test_answers_hold_what_their_method_says_and_no_more(all_methods) -> None:
    for message, reply in of_type(all_methods, SURVEY):
        method, number = asked(message)
        assert not reply.has_error()
        found = arrays_of(reply.content)
        if method == "gradient-shared":  # Ω·G: r_max × d_in of each layer
            assert (len(found), {rows for rows, _ in found.values()}) == (LAYERS, {R_MAX})
        else:
            assert found == ANSWERS[method][number]
        assert len(reply.content) == 1  # one record of arrays; no metrics, no names


def test_tuned_methods_let_out_counts_alone(all_methods) -> None:
    seen = 0
    for message, reply in of_type(all_methods, SURVEY):
        if asked(message)[0] in ("lora-tuned", "fedp2eft-tuned"):
            [record] = reply.content.array_records.values()
            counts = record["good"].numpy()
            assert all(count in range(HELD_OUT + 1) for count in counts.tolist())
            seen += 1
    assert seen == 4


def test_with_every_method_nothing_but_phi_and_scalars_leaves_otherwise(all_methods) -> None:
    allowed = allowed_arrays(all_methods)
    others = [(m, r) for m, r in all_methods.messages if m.metadata.message_type != SURVEY]
    methods = {
        m.content.config_records["config"]["method"] for m, _ in of_type(all_methods, PERSONALIZE)
    }
    assert methods == {
        n for n, m in METHODS.items() if not m.variant and not m.texts and m.shared != "fedl2p"
    }
    for message, reply in others:
        check_reply(message.metadata.message_type, reply, allowed)


def test_every_request_holds_parameters_and_settings_only(finished) -> None:
    allowed = allowed_arrays(finished)
    for message, _ in finished.messages:
        kind = message.metadata.message_type
        sent = arrays_of(message.content)
        config = {k: v for r in message.content.config_records.values() for k, v in r.items()}
        assert not message.content.metric_records
        if kind == PERSONALIZE:
            assert set(config) == {"method", "rank", "label-prior"}
            assert sent == (allowed[TRAIN_PSG] if config["method"] == "fedp2eft" else {})
        elif kind == ASK_LABELS:
            assert (sent, config) == ({}, {"source": "counts"})
        else:
            assert sent == allowed[kind]
            assert set(config) <= {"server-round", "label-prior"}


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
