"""A word of YAML stays as it is written until the type of its setting asks for more."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedp2eft.cli import main
from fedp2eft.errors import UserError
from fedp2eft.settings.data import ClientFile
from fedp2eft.settings.experiment import CompareSettings, LocalSettings, Settings
from fedp2eft.settings.reading import (
    check_same,
    read_settings,
    settings_from,
    settings_of_folder,
    settings_of_run,
    settings_text,
)
from tiny_run import write_jsonl

WORDS = (
    *("no", "yes", "on", "off", "y", "N", "true", "False", "NO"),  # booleans, here or in YAML 1.1
    *("001", "010", "8", "-1", "+1", "1_000", "0x1f", "0o17", "1:30", "190:20:30"),  # whole numbers
    *("1.0", "1e-3", ".5", "1.", "1.e+3", ".inf", ".nan", "6.02e23"),  # floats
    *("2024-01-01", "2024-01-01T10:00:00Z", "12:00"),  # dates and times
    *("<<", "nan", "inf", "a.b", "München"),
)


def read(tmp_path: Path, text: str, *options: str) -> Settings:
    file = tmp_path / "experiment.yaml"
    file.write_text(text, encoding="utf-8")
    return read_settings(file, options)


@pytest.mark.parametrize("word", WORDS)
def test_text_stays_as_it_is_written(tmp_path: Path, word: str) -> None:
    """As a value, in a list, in a mapping, as a mapping's key, and on the command line."""
    text = (
        f"data:\n  path: {word}\n  languages: [{word}, 'b']\n  labels:\n  - {word}\n"
        f"  files:\n    {word if word != '<<' else 'x'}: {{path: {word}, language: {word}}}\n"
    )
    if word == "<<":
        text = text.replace("- <<", "- '<<'").replace("[<<", "['<<'").replace(": <<", ": '<<'")
    data = read(tmp_path, text).data
    assert (data.path, data.languages, data.labels) == (word, [word, "b"], [word])
    assert data.files == {word if word != "<<" else "x": ClientFile(word, word)}
    made = read(tmp_path, "seed: 1", "--data.path", word, f"--data.labels=['{word}', {word}x]")
    assert (made.data.path, made.data.labels) == (word, [word, f"{word}x"])
    # what is written is read back, and a second time too
    again = settings_of_run({"settings": settings_text(read(tmp_path, text))})
    assert again == read(tmp_path, settings_text(again)) == read(tmp_path, text)


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("8", 8), ("-1", -1), ("+1", 1), ("010", 10), ("0o17", 15), ("0x1f", 31), ("'7'", 7),
    ],
)  # fmt: skip
def test_whole_numbers(tmp_path: Path, word: str, value: int) -> None:
    assert read(tmp_path, f"seed: {word}").seed == value
    assert read(tmp_path, "seed: 5", "--seed", word.strip("'")).seed == value


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("1e-3", 1e-3), ("1E-3", 1e-3), ("1.0e-05", 1e-5), (".5", 0.5), ("1.", 1.0), ("3", 3.0),
        ("+.5", 0.5), (".inf", math.inf), ("6.02e23", 6.02e23),
    ],
)  # fmt: skip
def test_numbers(tmp_path: Path, word: str, value: float) -> None:
    for made in (
        read(tmp_path, f"federation: {{timeout: {word}}}"),
        read(tmp_path, "seed: 5", "--federation.timeout", word),
    ):
        assert made.federation.timeout == value
        assert isinstance(made.federation.timeout, float)


@pytest.mark.parametrize("word", ["true", "True", "TRUE"])
def test_booleans(tmp_path: Path, word: str) -> None:
    assert read(tmp_path, f"generator: {{log_quantity: {word}}}").generator.log_quantity is True
    assert read(tmp_path, "{}", f"--generator.log_quantity={word}").generator.log_quantity is True
    off = read(tmp_path, "local: {dropout: false}")
    assert off.local.dropout is False


@pytest.mark.parametrize("word", ["null", "~", ""])
def test_null(tmp_path: Path, word: str) -> None:
    assert read(tmp_path, f"data:\n  label_column: {word}\n").data.label_column is None
    assert read(tmp_path, "data: {label_column: 'null'}").data.label_column == "null"
    assert read(tmp_path, "{}", "--data.label_column", "null").data.label_column is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("seed: 1.5", "seed is '1.5'; give a whole number."),
        ("seed: 1:30", "seed is '1:30'; give a whole number."),
        ("seed: yes", "seed is 'yes'; give a whole number."),
        ("seed:", "seed is null; give a whole number."),
        ("local: {lr: 1e-3x}", "local.lr is '1e-3x'; give a number."),
        ("local: {lr: nan}", "local.lr is 'nan'; give a number."),
        ("local: {dropout: no}", "local.dropout is 'no'; give true or false."),
        ("local: {dropout: 0}", "local.dropout is '0'; give true or false."),
        ("data: {dataset: null}", "data.dataset is null; give text. For the word itself write it"),
        ("data: {labels: a}", "data.labels is 'a'; give a list, [a, b]."),
        ("data: {labels: [a, null]}", "data.labels[1] is null; give text."),
        ("data: {files: a.jsonl}", "data.files is 'a.jsonl'; give a mapping"),
        ("data: {files: {a: {language: de}}}", "'data.files.a' has no 'path': add path."),
        ("evaluation: {ranks: [2, x]}", "evaluation.ranks[1] is 'x'; give a whole number."),
        ("federation: {cohort: many}", "federation.cohort is 'many'; give a whole number or auto."),
        ("model: {task: causal}", "model.task is 'causal'; give one of classification, causal_lm."),
        ("compare: {bases: [fedti]}", "compare.bases[0] is 'fedti'; give one of standard-fl, "),
        ("seed: 1\nlocal: {lr: 1e-3}\nseed: 2", "Key 'seed' occurs twice, the second time at line"),
        ("? [a]\n: 1", "is not valid YAML"),
        ("seed: !!int x", "is not valid YAML"),
    ],
)
def test_a_message_names_file_key_and_remedy(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UserError) as error:
        read(tmp_path, text)
    assert says in str(error.value)
    assert str(error.value).startswith(str(tmp_path / "experiment.yaml"))


def test_anchors_and_merges(tmp_path: Path) -> None:
    text = """
        data: {files: {a: &de {path: a.csv, language: de}, b: {<<: *de, path: b.csv}}}
    """
    files = read(tmp_path, text).data.files
    assert files == {"a": ClientFile("a.csv", "de"), "b": ClientFile("b.csv", "de")}


def test_options_go_on_top_of_the_file(tmp_path: Path) -> None:
    text = "seed: 1\nlocal: {lr: 1, epochs: 3}\ndata: {files: {a: {path: a.csv}}}"
    made = read(tmp_path, text, "--local.lr", "2", "--data={languages: [no], path: b}", "--seed=-3")
    assert (made.seed, made.local.lr, made.local.epochs) == (-3, 2.0, 3)
    assert (made.data.languages, made.data.path) == (["no"], "b")
    assert list(made.data.files) == ["a"]
    made = read(tmp_path, text, "--local", "{lr: 5}", "--local.epochs", "4")
    assert (made.local.lr, made.local.epochs) == (5.0, 4)
    with pytest.raises(UserError, match=r"with the options given: local\.lr is 'x'"):
        read(tmp_path, text, "--local.lr", "x")
    with pytest.raises(UserError, match=r"--local is '3'; give a mapping, or --local\.KEY"):
        read(tmp_path, text, "--local", "3", "--local.lr", "1")
    with pytest.raises(UserError, match="--local has no value"):
        read(tmp_path, text, "--local", "--seed")


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({"data": {"files": {1: {"path": "x"}}}}, "Key 1 is not text"),
        (
            {"data": {"labels": [0, 1]}},
            r"data.labels\[0\] is 0; give text. Write .* quotes: '0'",
        ),
        ({"seed": True}, "seed is True; give a whole number"),
        ({"local": {"dropout": 1}}, "local.dropout is 1; give true or false"),
    ],
)
def test_python_values_are_checked_too(raw: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        settings_from(raw)


def test_sections_may_be_given_as_they_are() -> None:
    local = LocalSettings(lr=3.0)
    assert settings_from({"local": local}).local is local


def test_all_settings_survive_a_file(tmp_path: Path) -> None:
    made = replace(settings_from({}), seed=7, compare=CompareSettings(bases=["none"], seeds=[1]))
    made.data.files["no"] = ClientFile("010", "no", "unseen", None)
    (tmp_path / "settings.yaml").write_text(settings_text(made), encoding="utf-8")
    assert settings_of_folder(tmp_path) == made


def test_two_experiments_are_compared_by_value(tmp_path: Path) -> None:
    free = {("federation", "rounds"), ("compare",)}
    old = settings_from({})
    new = settings_from({"federation": {"rounds": 9}, "compare": {"seeds": [1]}})
    check_same(tmp_path, old, new, free)
    with pytest.raises(UserError, match=r"local\.lr is 0\.0001 there and 1\.0 here"):
        check_same(tmp_path, old, settings_from({"local": {"lr": 1}}), free)
    files = settings_from({"data": {"files": {"a": {"path": "x"}}}})
    with pytest.raises(UserError, match=r"data\.files is \{\} there"):
        check_same(tmp_path, old, files, free)


def test_clients_and_languages_are_called_as_they_are_written(tmp_path, capsys) -> None:
    """Through `fedp2eft data describe`, whose options jsonargparse reads."""
    for name in ("a", "b"):
        rows = [{"text": f"{name} {n}", "label": f"{n % 2}"} for n in range(4)]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    files = f"{{001: {{path: {tmp_path}/a.jsonl, language: no}}, no: {{path: {tmp_path}/b.jsonl}}}}"
    options = ["--data.dataset", "files", "--data.files", files, "--data.labels", "[0, 1]"]
    assert main(["data", "partition", *options, "--out", str(tmp_path / "out.json")]) == 0
    saved = (tmp_path / "out.json").read_text(encoding="utf-8")
    assert '"001"' in saved
    assert '"no"' in saved
    assert main(["data", "describe", "--data.languages", "[no, de]"]) == 2
    assert "'no'" in capsys.readouterr().err
