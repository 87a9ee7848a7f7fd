"""Files of prompts and responses, and of conversations."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fedp2eft.data.describe import describe
from fedp2eft.data.files import client_from_file, clients_from_files
from fedp2eft.data.registry import load_clients
from fedp2eft.errors import UserError
from fedp2eft.settings.data import DataSettings
from fedp2eft.tasks.causal_lm import CausalLM
from tiny_chat import chat_tokenizer

TALK = [
    {"role": "user", "content": "chat"},
    {"role": "assistant", "content": "noir"},
    {"role": "user", "content": "un"},
    {"role": "assistant", "content": "mur"},
]
CHAT: dict[str, Any] = {
    "text_columns": ["messages"], "target_column": "messages", "label_column": None,
}  # fmt: skip


def write(path: Path, *talks: Any) -> Path:
    rows = [{"messages": talk, "note": n} for n, talk in enumerate(talks)]
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_a_conversation_is_prompt_and_response_in_one_column(tmp_path: Path):
    named = [dict(turn, name="x") for turn in TALK]  # other keys do not matter
    path = write(tmp_path / "chat.jsonl", TALK, named, TALK[:2])
    federation = client_from_file(path, DataSettings(test_fraction=0.0, **CHAT))
    client = federation.clients[0]
    assert federation.rows(client.train)["messages"] == [TALK, TALK, TALK[:2]]
    answers = federation.answers(client.train, "causal_lm")
    data = CausalLM(3, 32).encode(chat_tokenizer(), [answers], answers)
    assert data.starts.tolist() == [10, 10, 4]  # type: ignore[union-attr]
    assert describe(federation)[0]["characters"] == pytest.approx((13 + 13 + 8) / 3, abs=0.05)


def test_it_is_reached_by_settings(tmp_path: Path):
    path = write(tmp_path / "chat.jsonl", *[TALK] * 5)
    federation = load_clients(DataSettings("files", path=str(path), **CHAT))
    assert (len(federation.clients[0].train), len(federation.clients[0].test)) == (4, 1)


NO_TALK = "line 2 holds no conversation that ends with the assistant's turn"


@pytest.mark.parametrize(
    ("talks", "message"),
    [
        (["hello", "hello"], "line 1 holds no conversation"),
        ([TALK, []], NO_TALK),
        ([TALK, None], NO_TALK),
        ([TALK, TALK[:1]], NO_TALK),
        ([TALK, TALK[:3]], NO_TALK),
        ([TALK, [TALK[0], {"role": "assistant", "content": " "}]], NO_TALK),
        ([TALK, [TALK[0], {"from": "gpt", "value": "x"}]], "a turn of a conversation has no role"),
        ([TALK, "hello"], NO_TALK),
    ],
)
def test_what_is_no_conversation_is_one_line(tmp_path: Path, talks: list[Any], message: str):
    with pytest.raises(UserError, match=re.escape(message)):
        clients_from_files(DataSettings(path=str(write(tmp_path / "chat.jsonl", *talks)), **CHAT))


def test_a_column_of_conversations_stands_alone(tmp_path: Path):
    columns = CHAT | {"text_columns": ["messages", "note"]}
    with pytest.raises(UserError, match="name no other text column"):
        clients_from_files(DataSettings(path=str(write(tmp_path / "chat.jsonl", TALK)), **columns))


def test_prompt_and_response_columns(tmp_path: Path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,response\nun,deux\ntrois,quatre\n", encoding="utf-8")
    federation = client_from_file(
        path,
        DataSettings(
            text_columns=["prompt"], target_column="response", label_column=None, test_fraction=0
        ),
    )
    assert federation.answers([1], "causal_lm") == ["quatre"]
    path.write_text("prompt,response\nun,\n", encoding="utf-8")
    with pytest.raises(UserError, match="column 'response' holds blank text"):
        client_from_file(
            path, DataSettings(text_columns=["prompt"], target_column="response", label_column=None)
        )


def test_debian_descriptions_have_a_summary_to_answer_with():
    federation = load_clients(DataSettings(languages=["fr"], max_train=3, max_test=2))
    client = federation.clients[0]
    rows = federation.rows(client.train)
    assert federation.answers(client.train, "causal_lm") == rows["summary"]
    assert all(rows["summary"])
