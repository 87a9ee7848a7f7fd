"""What a label means follows from the class names alone, in every file of a federation."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedp2eft.data.files import client_from_file, clients_from_files
from fedp2eft.data.labels import check_names, class_name, found_names
from fedp2eft.data.nodes import clients_of_node
from fedp2eft.errors import UserError
from fedp2eft.settings.data import ClientFile, DataSettings

STARS = ("1", "2", "3", "4", "5")


def write(path: Path, labels: list[Any], **columns: Any) -> Path:
    rows = [{"text": f"t {n}", "label": label, **columns} for n, label in enumerate(labels)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def labels_of(path: Path, labels: Any = None) -> list[str]:
    federation = client_from_file(path, DataSettings(labels=labels or [], test_fraction=0))
    return federation.rows(range(len(federation.table)))["label"]


def refused(message: str, call: Any, *args: Any, **options: Any) -> None:
    with pytest.raises(UserError, match=message) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)


def test_numbers_are_names_where_the_names_are_numbers(tmp_path: Path) -> None:
    """Ids from 0 in one client's file, and in another's that happens to lack id 0."""
    files = {
        "oslo": ClientFile(str(write(tmp_path / "oslo.jsonl", [0, 1, 2, 3, 4]))),
        "bergen": ClientFile(str(write(tmp_path / "bergen.jsonl", [1, 2, 3, 4]))),
    }
    message = r"oslo.jsonl, line 1: column 'label' holds the unknown class '0'.*are whole numbers"
    refused(message, clients_from_files, DataSettings(files=files, labels=list(STARS)))
    alone = clients_from_files(
        DataSettings(files={"bergen": files["bergen"]}, labels=STARS, test_fraction=0)
    )
    assert alone.rows(range(4))["label"] == ["1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("names", "labels", "stray"),
    [(STARS, [1, 2, 3, 4, 5, 0], 6), (("-1", "0", "1"), [-1, 2, 0, 1], 2), (STARS, ["5", "6"], 2)],
)
def test_a_stray_value_is_an_error_of_its_own_line(
    tmp_path: Path, names: Any, labels: list[Any], stray: int
) -> None:
    path = write(tmp_path / "a.jsonl", labels)
    refused(rf"a\.jsonl, line {stray}: .* unknown class", labels_of, path, names)
    path = write(tmp_path / "b.jsonl", labels[: stray - 1])
    assert labels_of(path, names) == [str(label) for label in labels[: stray - 1]]


def test_ids_count_through_names_that_are_words(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [1, "0", "good", "bad"])
    path.write_text(path.read_text().replace(": 1", ': "1"'))
    assert labels_of(path, ("bad", "good")) == ["good", "bad", "good", "bad"]
    refused("line 1: .* unknown class '2'", labels_of, write(path, [2]), ("bad", "good"))


def test_a_node_and_a_file_read_alike(tmp_path: Path) -> None:
    """Nobody sees all files of a deployment: the names in the settings decide."""
    path = write(tmp_path / "a.jsonl", [1, 2, 3, 0])
    settings = DataSettings("nodes", labels=list(STARS))
    node = {"client": "bergen", "path": str(path)}
    refused(r"line 4: .*unknown class '0'", clients_of_node, node, settings)
    write(path, [1, 2, 3, 3])
    federation = clients_of_node(node, settings)
    assert federation.rows(range(4))["label"] == ["1", "2", "3", "3"]


def test_labels_are_stripped_and_compared_in_one_form(tmp_path: Path) -> None:
    nfc, nfd = "santé", "sante\u0301"
    path = write(tmp_path / "a.jsonl", [nfc, nfd, f" {nfc}", f"{nfc}\xa0", f"\ufeff{nfc}\t"])
    federation = client_from_file(path, DataSettings(test_fraction=0))
    assert federation.labels == (nfc,)
    assert labels_of(path, [f"{nfd} "]) == [nfc] * 5


def test_names_that_read_the_same_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["new york", "new\xa0york", "x"])
    refused(r"'new york' and 'new\\xa0york' read the same", labels_of, path)
    path = write(tmp_path / "a.jsonl", ["spam", "sp\u200bam"])
    refused(r"line 2: .*It reads as 'spam' and differs", labels_of, path, ("ham", "spam"))
    check_names(["Spam", "spam", "می\u200cخواهم"])  # visibly two, and a joiner that is a letter's
    refused("named twice", check_names, ["a", "b", "a"])


@pytest.mark.parametrize("other", ["TR", "tr\u200b", "Tr"])
def test_language_codes_that_read_the_same_are_named(tmp_path: Path, other: str) -> None:
    """Scores are pooled by language: two spellings would be two languages."""
    files = {
        name: ClientFile(str(write(tmp_path / f"{name}.jsonl", ["a", "b"])), language=language)
        for name, language in (("x", "tr"), ("y", other))
    }
    refused("Language .* read the same", clients_from_files, DataSettings(files=files))


def test_languages_hold_no_control_characters(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["a", "b"], language="de\x1b[31m")
    refused(
        r"Language 'de\\x1b\[31m' holds a control character",
        clients_from_files,
        DataSettings(path=str(path)),
    )


def test_turkish_letters_in_language_codes() -> None:
    for code in ("IT", "İT", "ıt"):
        refused("read the same", check_names, ["it", code], "Language", cases=False)


@pytest.mark.parametrize("word", ["NA", "null", "NaN", "None", "nan", "N/A", "no", "true"])
def test_words_that_others_take_for_nothing_are_words(tmp_path: Path, word: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"text,label,language\n{word},{word},{word}\nb,b,{word}\n")
    federation = clients_from_files(DataSettings(path=str(path), test_fraction=0))
    assert federation.rows([0])["text"] == [word]
    assert federation.rows([0])["label"] == [word]
    assert federation.clients[0].language == word


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (True, r'bool True, not a class name or a whole number\. Write it as text: "True"'),
        (date(2026, 1, 2), r'date 2026-01-02, .* Write it as text: "2026-01-02"'),
        (1.5, "float 1.5"),
        (float("nan"), "float nan"),
        (None, "nothing"),
    ],
)
def test_labels_of_other_kinds_say_what_to_write(tmp_path: Path, value: Any, message: str) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a", "b"], "label": [value, value]}), path)
    refused(rf"a\.parquet, row 1: column 'label' holds {message}", labels_of, path)


def test_an_unknown_class_comes_with_both_lists(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["good", "so-so", "bad"])
    message = r"line 2: .*'so-so'.* The classes are bad, good; the file has bad, good, so-so\."
    refused(message, labels_of, path, ("bad", "good"))


def test_found_names_are_in_the_order_of_numbers() -> None:
    assert found_names([10, "9", " 1"]) == ("1", "9", "10")
    assert found_names(["10", "9", "x"]) == ("10", "9", "x")
    assert class_name(" a", (), "here", "label") == "a"
