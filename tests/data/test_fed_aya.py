"""Fed-Aya's file as a federation, and every way in which it may be another file."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedp2eft.data.fed_aya import LANGUAGES, UNSEEN_CLIENTS, load_fed_aya
from fedp2eft.data.registry import load_clients
from fedp2eft.errors import UserError
from fedp2eft.settings.data import DataSettings


def rows(place: int, count: int = 10) -> list[dict[str, str]]:
    """Rows of one annotator: most in one language, one in another, one in none of the eight."""
    language, other = LANGUAGES[place % 8], LANGUAGES[(place + 1) % 8]
    spoken = [language] * (count - 2) + [other, "de"]
    return [
        {"instruction": f"{place} asks {n}", "response": f"{place} says {n}", "language": name}
        for n, name in enumerate(spoken)
    ]


def write(folder: Path, change: Any = None) -> Path:
    data: Any = {f"annotator {place}": rows(place) for place in range(38)}
    if change:
        data = change(data)
    path = folder / "aya_38c.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def test_annotators_are_clients_and_eight_of_them_never_train(tmp_path: Path):
    federation = load_fed_aya(DataSettings(path=str(write(tmp_path))))
    assert UNSEEN_CLIENTS == (21, 22, 23, 24, 25, 26, 27, 34)
    places = {
        pool: [int(c.name[-2:]) for c in federation.pool(pool)] for pool in ("seen", "unseen")
    }
    assert sorted(places["unseen"]) == list(UNSEEN_CLIENTS)
    assert sorted(places["seen"] + places["unseen"]) == list(range(38))
    by_name = {client.name: client for client in federation.clients}
    assert by_name["ar-seen-00"].language == "ar"
    assert by_name["es-unseen-34"].pool == "unseen"


def test_a_fifth_of_every_clients_rows_is_test_and_no_row_is_twice(tmp_path: Path):
    federation = load_fed_aya(DataSettings(path=str(write(tmp_path))))
    for client in federation.clients:
        assert (len(client.train), len(client.test)) == (7, 2)  # 9 of the eight languages
        assert not set(client.train) & set(client.test)
        asked = federation.rows([*client.train, *client.test])["instruction"]
        assert {text.split()[0] for text in asked} == {str(int(client.name[-2:]))}
    owned = np.concatenate([part for c in federation.clients for part in (c.train, c.test)])
    assert len(set(owned.tolist())) == len(owned) == len(federation.table) == 38 * 9
    assert "de" not in set(federation.table["language"][:])


def test_prompts_and_responses_belong_together(tmp_path: Path):
    federation = load_fed_aya(DataSettings(path=str(write(tmp_path))))
    client = federation.clients[3]
    asked = federation.rows(client.train)[federation.text_columns[0]]
    said = federation.answers(client.train, "causal_lm")
    assert [text.replace("asks", "says") for text in asked] == said
    with pytest.raises(UserError, match="no label column"):
        federation.answers(client.train, "classification")


def test_seed_decides_the_test_rows_and_a_language_changes_no_other(tmp_path: Path):
    path = write(tmp_path)

    def tests(federation):
        return {c.name: federation.rows(c.test)["instruction"] for c in federation.clients}

    one, same, other = (
        tests(load_fed_aya(DataSettings(path=str(path), seed=seed))) for seed in (3, 3, 4)
    )
    assert one == same != other
    french = load_fed_aya(DataSettings(path=str(path), languages=["fr"]))
    assert Counter(c.language for c in french.clients) == {"fr": len(french.clients)}
    settings = DataSettings("fed-aya", languages=["fr"], path=str(path))
    assert [c.name for c in load_clients(settings).clients] == [c.name for c in french.clients]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: list(data.values()), "holds a JSON list, not an object of annotators"),
        (lambda data: dict(list(data.items())[:37]), "holds 37 annotators, and Fed-Aya has 38"),
        (lambda data: data | {"annotator 2": "x"}, "annotator 'annotator 2' holds no list of rows"),
        (
            lambda data: data | {"annotator 2": [{"instruction": "a", "output": "b"}]},
            "annotator 'annotator 2', row 1 has no 'response'",
        ),
        (
            lambda data: data | {"annotator 5": [*rows(5), {**rows(5)[0], "response": " "}]},
            "annotator 'annotator 5', row 11 has no 'response'",
        ),
        (
            lambda data: data | {"annotator 1": [rows(1)[-1]]},
            "annotator 'annotator 1' has no row in ar, en",
        ),
    ],
)
def test_another_schema_is_one_line(tmp_path: Path, change: Any, message: str):
    with pytest.raises(UserError, match=re.escape(message)):
        load_fed_aya(DataSettings(path=str(write(tmp_path, change))))


def test_a_file_that_is_none(tmp_path: Path):
    with pytest.raises(UserError, match=r"Set data\.path to Fed-Aya's JSON file"):
        load_clients(DataSettings("fed-aya"))
    with pytest.raises(UserError, match="cannot be read"):
        load_fed_aya(DataSettings(path=str(tmp_path / "none.json")))
    (tmp_path / "cut.json").write_text('{"a": [')
    with pytest.raises(UserError, match="is not valid JSON"):
        load_fed_aya(DataSettings(path=str(tmp_path / "cut.json")))
    with pytest.raises(UserError, match=r"'fra' is not in fed-aya. Did you mean 'fr'\?"):
        load_fed_aya(DataSettings(path=str(write(tmp_path)), languages=["fra"]))
    with pytest.raises(UserError, match=r"ignores data\.clients_per_language"):
        load_clients(DataSettings("fed-aya", path="x", clients_per_language=3))
