"""A user's own files as clients."""

import json
import logging
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedp2eft.data.clients import ClientData
from fedp2eft.data.describe import repeats
from fedp2eft.data.files import client_from_file, clients_from_files
from fedp2eft.errors import UserError
from fedp2eft.settings.data import ClientFile, DataSettings

ROWS = [{"text": f"text {n}", "label": ["good", "bad"][n % 4 == 0]} for n in range(40)]


@pytest.fixture
def file(tmp_path):
    def write(name, rows):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


def refused(call, *messages):
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    for message in messages:
        assert message in str(caught.value)


def with_test_path(path: Path, test: Path, **settings) -> ClientData:
    """One client with a second file of test rows."""
    files = {"a": ClientFile(str(path), test_path=str(test))}
    return clients_from_files(DataSettings(files=files, **settings))


def test_one_file_is_one_client(file):
    federation = client_from_file(file("my notes.v2.jsonl", ROWS))
    (client,) = federation.clients
    assert (client.name, client.language, client.pool) == ("my-notes", "und", "unseen")
    assert (len(client.train), len(client.test)) == (32, 8)
    assert sorted([*client.train, *client.test]) == list(range(40))
    assert np.bincount(federation.label_ids(client.test)).tolist() == [2, 6]
    assert federation.labels == ("bad", "good")
    assert federation.rows([3])["text"] == ["text 3"]


def test_seed_decides_the_test_rows(file):
    path = file("a.jsonl", ROWS)
    drawn = [
        client_from_file(path, DataSettings(seed=seed)).clients[0].test.tolist()
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_split_column_is_honoured(file):
    rows = [{**row, "split": "test" if n < 5 else "train"} for n, row in enumerate(ROWS)]
    (client,) = client_from_file(file("a.jsonl", rows)).clients
    assert client.test.tolist() == [0, 1, 2, 3, 4]
    rows[7]["split"] = "dev"
    path = file("b.jsonl", rows)
    refused(lambda: client_from_file(path), "b.jsonl, line 8: split 'dev' is neither")
    path = file("c.jsonl", [{**ROWS[0], "split": "test"}])
    refused(lambda: client_from_file(path), "Client c has no train rows")


def test_test_path(file):
    path, test = file("a.jsonl", ROWS), file("t.jsonl", ROWS[:6])
    (client,) = with_test_path(path, test).clients
    assert (len(client.train), client.test.tolist()) == (40, list(range(40, 46)))


def test_no_test_rows(file):
    (client,) = client_from_file(file("a.jsonl", ROWS), DataSettings(test_fraction=0)).clients
    assert (len(client.train), len(client.test)) == (40, 0)
    refused(lambda: client_from_file(file("a.jsonl", ROWS), DataSettings(test_fraction=1.5)), "1.5")


def test_class_names_and_ids(file, tmp_path):
    names = ("bad", "good", "so-so")
    by_name = client_from_file(file("a.jsonl", ROWS), DataSettings(labels=names))
    ids = [{**row, "label": names.index(row["label"])} for row in ROWS]
    by_id = client_from_file(file("b.jsonl", ids), DataSettings(labels=names))
    table = tmp_path / "c.csv"
    table.write_text("text,label\n" + "".join(f"{r['text']},{r['label']}\n" for r in ids))
    by_digit = client_from_file(table, DataSettings(labels=names))
    for federation in (by_name, by_id, by_digit):
        assert federation.labels == names
        assert federation.label_ids(range(40)).tolist() == [row["label"] for row in ids]


def test_classes_called_by_numbers(file):
    stars = [{"text": "t", "label": n} for n in (10, 2, 2, 1)]
    federation = client_from_file(file("a.jsonl", stars), DataSettings(test_fraction=0))
    assert federation.labels == ("1", "2", "10")
    assert federation.label_ids(range(4)).tolist() == [2, 1, 1, 0]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("goood", "line 3: column 'label' holds the unknown class 'goood'. Did you mean 'good'?"),
        (7, "unknown class '7'. The classes are good, bad; the file has 0, 7."),
        (-1, "unknown class '-1'"),
    ],
)
def test_unknown_label(file, value, message):
    rows = [{"text": "a", "label": "good" if isinstance(value, str) else 0} for _ in range(4)]
    rows[2]["label"] = value
    path = file("a.jsonl", rows)
    refused(
        lambda: client_from_file(path, DataSettings(labels=("good", "bad"))), "a.jsonl", message
    )


@pytest.mark.parametrize(
    ("value", "found"), [(None, "nothing"), (1.5, "float 1.5"), (True, "bool True")]
)
def test_label_that_is_none(file, value, found):
    path = file("a.jsonl", [{"text": "a", "label": value}] * 3)
    refused(lambda: client_from_file(path), f"line 1: column 'label' holds {found}")


def test_labels_are_not_needed_to_generate(file):
    rows = [{"text": f"q {n}", "answer": f"a {n}"} for n in range(10)]
    federation = client_from_file(
        file("a.jsonl", rows), DataSettings(label_column=None, target_column="answer")
    )
    assert (federation.labels, federation.label_column) == ((), None)
    assert federation.rows([2])["answer"] == ["a 2"]
    refused(lambda: federation.label_ids([0]), "has no label column")
    path = file("b.jsonl", [{"text": "q", "answer": None}, *rows])
    refused(
        lambda: client_from_file(path, DataSettings(label_column=None, target_column="answer")),
        "line 1: column 'answer' holds nothing",
    )


def test_a_pair_of_texts(file):
    rows = [{"premise": "p", "hypothesis": "h", "label": n % 3} for n in range(9)]
    federation = client_from_file(
        file("a.jsonl", rows),
        DataSettings(text_columns=("premise", "hypothesis"), labels=("e", "n", "c")),
    )
    assert federation.text_columns == ("premise", "hypothesis")
    path = file("b.jsonl", rows)
    refused(
        lambda: client_from_file(path, DataSettings(text_columns=("premise", "hypotesis"))),
        "'hypothesis'?",
    )


def test_one_row_is_allowed_with_a_warning(file, caplog):
    with caplog.at_level(logging.WARNING):
        (client,) = client_from_file(file("a.jsonl", ROWS[:1])).clients
    assert (client.train.tolist(), client.test.tolist()) == ([0], [])
    assert len(caplog.messages) == 1
    assert "single train row" in caplog.text


def test_one_class_is_allowed_with_a_warning(file, caplog):
    with caplog.at_level(logging.WARNING):
        client_from_file(file("a.jsonl", ROWS[1:4]), DataSettings(labels=("bad", "good")))
    assert len(caplog.messages) == 1
    assert "one class only (good)" in caplog.text


def test_one_file_a_client(file):
    a, b = file("a.jsonl", ROWS), file("b.jsonl", ROWS[:20])
    files = {
        "zoe": ClientFile(str(a), language="fr"),
        "ann": ClientFile(str(b), language="de", pool="unseen", test_path=str(a)),
    }
    federation = clients_from_files(DataSettings(files=files))
    ann, zoe = federation.clients
    assert (ann.name, ann.language, ann.pool) == ("ann", "de", "unseen")
    assert (len(ann.train), len(ann.test), len(zoe.train)) == (20, 40, 32)
    assert federation.pool("seen") == (zoe,)
    alone = clients_from_files(DataSettings(files={"zoe": files["zoe"]}))
    assert alone.clients[0].test.tolist() == zoe.test.tolist()


def test_one_file_for_all_clients(file):
    rows = [
        {**row, "client": 21 + n % 2, "language": ["fr", "de"][n % 2], "pool": "seen"}
        for n, row in enumerate(ROWS)
    ]
    federation = clients_from_files(DataSettings(path=str(file("aya.jsonl", rows))))
    assert federation.name == "aya"
    assert [(c.name, c.language) for c in federation.clients] == [("21", "fr"), ("22", "de")]
    assert all(row % 2 == 0 for row in federation.clients[0].train)
    rows[3]["language"] = "fr"
    path = file("b.jsonl", rows)
    refused(
        lambda: clients_from_files(DataSettings(path=str(path))),
        "Client 22 has two values of language: de, fr",
    )
    path = file("c.jsonl", [{**row, "client": "a/b"} for row in rows[:1]])
    refused(
        lambda: clients_from_files(DataSettings(path=str(path))), "'a/b' cannot be a client's name"
    )
    path = file("d.jsonl", [{**row, "pool": "sean"} for row in rows if row["client"] == 21])
    refused(
        lambda: clients_from_files(DataSettings(path=str(path))),
        "Client 21: pool 'sean' is not one of",
    )


def test_no_files():
    refused(lambda: clients_from_files(DataSettings()), "Set either data.path")


def test_messages_of_the_table_come_through(tmp_path):
    with pytest.raises(UserError, match=re.escape("none.jsonl does not exist")):
        client_from_file(tmp_path / "none.jsonl")


def test_two_clients_of_one_name_and_an_unknown_pool(file):
    federation = client_from_file(file("a.jsonl", ROWS))
    refused(lambda: federation.pool("sean"), "Pool 'sean' is not one of")
    refused(
        lambda: replace(federation, clients=federation.clients * 2), "Two clients are named 'a'"
    )


def test_a_column_named_for_a_purpose_has_no_other(file):
    rows = [
        {"text": f"t {n}", "language": ["fr", "de"][n % 2], "split": "abc"[n % 3]}
        for n in range(12)
    ]
    path = file("langid.jsonl", rows)
    refused(
        lambda: clients_from_files(DataSettings(path=str(path), label_column="language")),
        "split 'a' is neither",
    )
    rows = [{"text": row["text"], "language": row["language"]} for row in rows]
    federation = clients_from_files(
        DataSettings(path=str(file("langid.jsonl", rows)), label_column="language")
    )
    assert federation.labels == ("de", "fr")
    assert [client.language for client in federation.clients] == ["und"]
    for name in ("client", "pool", "split"):
        named = [{"text": row["text"], name: row["language"]} for row in rows]
        federation = clients_from_files(
            DataSettings(path=str(file(f"{name}.jsonl", named)), label_column=name)
        )
        assert (federation.labels, len(federation.clients)) == (("de", "fr"), 1)
    named = [{"client": row["text"], "label": "x"} for row in rows]
    federation = clients_from_files(
        DataSettings(path=str(file("text.jsonl", named)), text_columns=["client"])
    )
    assert federation.rows([3])["client"] == ["t 3"]


def test_a_clients_own_file_may_say_who_it_is(file):
    own = [{**row, "client": "kim", "language": "fr", "pool": "seen"} for row in ROWS]
    path = str(file("a.jsonl", own))
    (client,) = clients_from_files(DataSettings(files={"ann": ClientFile(path)})).clients
    assert (client.name, client.language, client.pool) == ("ann", "fr", "seen")
    for wrong in ({"language": "de"}, {"pool": "unseen"}):
        files = {"ann": ClientFile(path, **wrong)}
        refused(
            lambda files=files: clients_from_files(DataSettings(files=files)),
            "make them agree",
            "of client ann",
        )
    own[5]["client"] = "lee"
    path = str(file("b.jsonl", own))
    message = "b.jsonl holds the rows of 2 clients (column client: kim, lee)"
    refused(lambda: clients_from_files(DataSettings(files={"ann": ClientFile(path)})), message)
    refused(lambda: client_from_file(path), message)
    assert len(clients_from_files(DataSettings(path=str(path))).clients) == 2


def test_rows_to_score(file):
    rows = [{**row, "split": "test" if n < 5 else "train"} for n, row in enumerate(ROWS)]
    for given, count in ((rows, 5), (ROWS, 40)):
        (client,) = client_from_file(file("a.jsonl", given), only_test=True).clients
        assert (len(client.train), len(client.test)) == (0, count)
    path, test = file("a.jsonl", ROWS), file("t.jsonl", rows)
    (client,) = with_test_path(path, test).clients
    assert (len(client.train), len(client.test)) == (40, 5)
    test = file("t.jsonl", rows[5:])
    refused(lambda: with_test_path(path, test), "no row that its column split calls 't")


def test_unique_draws_by_text(file):
    rows = [{"text": f"text {n % 10}", "label": ["good", "bad"][n % 4 == 0]} for n in range(40)]
    path = file("a.jsonl", rows)
    federation = client_from_file(path)
    said = repeats(federation)
    assert said[0].startswith(
        "Repeated texts: of 8 test rows 8 (100.0%) have a copy among the train"
    )
    assert said[1] == "5 texts have more than one label."
    federation = client_from_file(path, DataSettings(unique=True))
    (client,) = federation.clients
    assert sorted([*client.train, *client.test]) == list(range(10))
    assert repeats(federation) == []
    tested = file("t.jsonl", [rows[3], {"text": "new", "label": "good"}])
    (client,) = with_test_path(path, tested, unique=True).clients
    assert (len(client.train), client.test.tolist()) == (10, [41])


def test_how_files_are_written_is_told(file, tmp_path):
    table = tmp_path / "b.tsv"
    table.write_text("text\tlabel\nx\ta\n")
    files = {"ann": ClientFile(str(file("a.jsonl", ROWS))), "bob": ClientFile(str(table))}
    assert clients_from_files(DataSettings(files=files)).notes == ("b.tsv: tab-separated",)
