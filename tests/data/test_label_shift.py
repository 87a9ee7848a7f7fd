"""Label shift between a client's train and test rows: measured, shown, and warned of."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from fedp2eft.cli import main
from fedp2eft.data.describe import describe
from fedp2eft.data.label_shift import label_shift
from fedp2eft.data.registry import load_clients
from fedp2eft.settings.data import DataSettings

PARTS = {
    # 3 a, 1 b against 1 a, 1 b, 2 c: half of 1/2 + 0 + 1/2
    "x": (["a", "a", "a", "b"], ["a", "b", "c", "c"]),
    "y": (["b", "c"], ["b", "c"]),
    "z": (["c"], []),
}


@pytest.fixture
def own_file(tmp_path: Path) -> Path:
    rows = [
        {"client": name, "language": "de", "text": f"{name} {n} {split}", "label": label}
        | {"split": split, "pool": "seen"}
        for name, parts in PARTS.items()
        for split, labels in zip(("train", "test"), parts, strict=True)
        for n, label in enumerate(labels)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def test_total_variation_by_client(own_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = load_clients(DataSettings("files", path=str(own_file)))
    assert label_shift(data) == {"x": 0.5, "y": 0.0}
    assert describe(data)[0]["label_shift"] == [0.25, 0.5]
    assert "label" not in caplog.text  # whoever owns the file decided what to test on


def copy(folder: Path, test: dict[str, int]) -> Path:
    """A data set of two languages: 80 train rows of two classes, and test rows as they are."""
    for language in ("aa", "bb"):
        (folder / language).mkdir(parents=True)
        for split, counts in (("train", {"a": 40, "b": 40}), ("test", test)):
            rows = [
                {"text": f"{language} {split} {label} {n}", "label": label}
                for label, count in counts.items()
                for n in range(count)
            ]
            text = "\n".join(map(json.dumps, rows))
            (folder / language / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return folder


def test_a_shifted_partition_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = copy(tmp_path / "own", {"a": 36, "b": 4})
    settings = DataSettings("hub", path=str(folder), clients_per_language=2, max_train=10)
    shift = label_shift(load_clients(settings))
    seen = [value for name, value in shift.items() if "-seen-" in name]
    mean, most = sum(seen) / 4, max(seen)
    [line] = [r.getMessage() for r in caplog.records if "seen clients'" in r.getMessage()][:1]
    assert line.startswith("The seen clients' test labels are distributed differently")
    assert f"mean total variation {mean:.2f}, largest {most:.2f}" in line
    assert "data.proportions: both" in line
    assert {r.levelno for r in caplog.records} == {logging.WARNING}
    caplog.clear()
    load_clients(settings, labels_used=False)
    assert not caplog.records
    settings.proportions = "both"
    fitted = load_clients(settings)
    assert max(label_shift(fitted).values()) <= 0.1
    assert not caplog.records


def test_a_yaml_file_and_options_describe_and_partition(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    folder = copy(tmp_path / "own", {"a": 20, "b": 20})
    config = tmp_path / "own.yaml"
    config.write_text(
        f"data: {{dataset: hub, path: {folder}, languages: [aa], clients_per_language: 2}}\n"
        "local: {lr: 0.1}\n",
        encoding="utf-8",
    )
    assert main(["data", "describe", str(config)]) == 0
    out = capsys.readouterr().out
    assert "label shift" in out
    assert "aa" in out
    assert "bb" not in out
    assert main(["data", "describe", str(config), "--data.languages", "[bb]"]) == 0
    assert "bb" in capsys.readouterr().out
    made = tmp_path / "partition.json"
    assert main(["data", "partition", str(config), "--out", str(made)]) == 0
    assert len(json.loads(made.read_text(encoding="utf-8"))["clients"]) == 4
    assert main(["data", "describe", str(tmp_path / "none.yaml")]) == 2
    assert "There is no file" in capsys.readouterr().err


def test_rows_without_classes_to_predict_are_not_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copy(tmp_path / "own", {"a": 36, "b": 4})
    data = ["--data.dataset", "hub", "--data.path", str(folder), "--data.clients_per_language", "2"]
    assert main(["data", "describe", *data, "--data.max_train", "10"]) == 0
    assert "distributed differently" in caplog.text
    caplog.clear()
    causal = ["--model.task", "causal_lm"]
    assert main(["data", "describe", *data, "--data.max_train", "10", *causal]) == 0
    assert main(["data", "partition", *data, *causal, "--out", str(tmp_path / "of.json")]) == 0
    assert not caplog.records
