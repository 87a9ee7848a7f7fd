"""Every mistake is one line on stderr and a status that says so; nothing is overwritten."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedp2eft.cli import main
from tiny_run import World, in_process, save_encoder, write_jsonl

ROWS = [{"text": "der hund", "label": "animal"}, {"text": "die eiche", "label": "plant"}] * 3


@pytest.fixture
def mistake(capsys: pytest.CaptureFixture[str]):
    """Runs a command that must fail in one line, and gives that line."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        status = main([str(a) for a in arguments])
        error = capsys.readouterr().err
        assert status == 2
        assert error.startswith("fedp2eft: ")
        assert error.count("\n") == 1, error
        return error

    return run


@pytest.fixture
def personalize(mistake, finished, tmp_path: Path):
    """`fedp2eft personalize` with one thing wrong."""

    def run(**wrong: object) -> str:
        options: dict[str, object] = {
            "psg": finished.folder / "psg",
            "model": finished.folder / "base",
            "data": write_jsonl(tmp_path / "good.jsonl", ROWS),
            "rank": 2,
            "out": tmp_path / "adapter",
        } | wrong
        line = mistake("personalize", *[f"--{key}={value}" for key, value in options.items()])
        assert not (tmp_path / "adapter").exists()
        return line

    return run


# ── settings ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"locale": {}}, "Unknown setting 'locale'. Did you mean 'local'?"),
        ({"local__batchsize": 3}, "Unknown setting 'local.batchsize'. Did you mean 'batch_size'?"),
        ({"data__file": "x"}, "Unknown setting 'data.file'. Did you mean 'files'?"),
        ({"local": 3}, "Setting 'local' must be a mapping, not '3'"),
        ({"data__files": {"a": "os.path"}}, "Setting 'data.files.a' must be a mapping, not 'os.p"),
        ({"data__files": {"a": {"pth": "x"}}}, "'data.files.a.pth'. Did you mean 'path'?"),
        ({"local": None}, "Setting 'local' must be a mapping"),
        ({"local__batch_size": "many"}, "local.batch_size"),
        ({"local__lr": [1]}, "local.lr"),
        ({"local__lr": -1.0}, "local.lr must be above 0"),
        ({"local__max_length": 4000}, "reads at most 24: set max_length to 24 or less"),
        ({"seed": "x"}, "seed"),
        ({"federation__profile": "papre"}, "federation.profile"),
        ({"federation__keep_checkpoints": 1}, "keep_checkpoints must be 2 or more"),
        ({"model__device": "cuda:77"}, "Device cuda:77 is asked for, but torch sees"),
        ({"model__device": "gpu"}, "Device 'gpu' is unknown"),
        ({"model__name": "/no/such/folder"}, "There is no folder '/no/such/folder'"),
        ({"model__name": "someone/unreachable"}, "the hub is unreachable"),
        ({"model__revision": "sha256:0000000000000000"}, "not sha256:0000000000000000"),
        ({"evaluation__ranks": [0]}, "Rank budget 0 is not possible"),
        ({"evaluation__ranks": [-2]}, "Rank budget -2 is not possible"),
        ({"evaluation__ranks": [5]}, "whole number from 1 to r_max = 4"),
        ({"evaluation__methods": ["lara"]}, "Method 'lara' is unknown. Did you mean 'lora'?"),
        ({"evaluation__pools": ["sene"]}, "pools"),
        ({"adapter__target_modules": ["qery"]}, "cannot be adapted at ['qery']"),
        ({"data__dataset": "fils"}, "Data set 'fils' is unknown. Did you mean 'files'?"),
        ({"data__path": None}, "Set either data.path (one file) or data.files"),
        ({"data__languages": ["de"]}, "ignores data.languages"),
        ({"data__path": "/no/such.jsonl"}, "/no/such.jsonl does not exist"),
    ],
)
def test_yaml(mistake, world: World, tmp_path: Path, changes: dict[str, Any], says: str):
    config = world.yaml(tmp_path / "bad.yaml", **changes)
    assert says in mistake("train", config, "--run", tmp_path / "run")
    assert not list((tmp_path / "run").glob("cells/*"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "holds no settings"),
        (b"- a\n- b\n", "must be a mapping"),
        (b"seed: 1\n  local: {\n", "not valid YAML at line"),
        (b"seed: 1\nseed: \xff\n", "not UTF-8 text (byte 14)"),
        (b"seed: \x00\n", "not valid YAML"),
        (b"seed: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_yaml(mistake, tmp_path: Path, text: bytes, says: str):
    (tmp_path / "bad.yaml").write_bytes(text)
    assert says in mistake("train", tmp_path / "bad.yaml", "--run", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_yaml_that_is_not_there(mistake, tmp_path: Path):
    assert "There is no file" in mistake("train", tmp_path / "no.yaml")
    assert "Cannot read" in mistake("train", tmp_path)
    assert "required: config" in mistake("train")
    assert "required: config" in mistake("train", "--run", "x")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--local.batchsize", "3"], "--local.batch_size"),
        (["--lokal.lr=3"], "--local.lr"),
        (["--local.lr", "much"], "local.lr"),
        (["--local.lr"], "local.lr"),
        (["--evaluation.ranks", "[9]"], "Rank budget 9"),
        (["--evaluation.ranks", "[two]"], "ranks"),
        (["--run"], "--run: expected one argument"),
        (["surplus"], "surplus"),
    ],
)
def test_command_line_of_train(mistake, world: World, tmp_path, monkeypatch, options, says):
    monkeypatch.chdir(tmp_path)
    assert says in mistake("train", world.config, *options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["trian"], "There is no command 'trian'. Did you mean 'train'?"),
        (["--help-me"], "There is no command"),
        (
            ["data", "discribe"],
            "'data discribe'. Did you mean 'data describe'?",
        ),
        (["data", "describe", "--data.dataset", "xnil"], "Did you mean 'xnli'?"),
        (["data", "describe", "--data.dataset", "xnli"], "hub"),
        (["data", "describe", "--data.clients_per_language", "9999999"], "clients"),
        (["data", "list", "--all"], "--all"),
        (["personalize"], "required"),
        (["personalize", "--psgg", "x"], "--psg"),
        (["evaluate", "--model", "x"], "data"),
        (["export", "--adapter", "a", "--out", "b", "--layout", "flat"], "layout"),
        (["export", "--adapter", "/no/such", "--out", "b", "--layout", "compact"], "No PEFT adapt"),
        (["quickstart", "--local.max_lenght", "3"], "--local.max_length"),
    ],
)
def test_command_lines(mistake, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    assert says in mistake(*arguments)
    assert not list(tmp_path.iterdir())


# ── data files ──────────────────────────────────────────────────────────────────────────────────

DATA = [
    ("mine.jsonl", None, "does not exist"),
    ("mine.jsonl", b"", "is empty"),
    ("mine.jsonl", b'{"text": "a", "label": "plant"}\n{"text": "b", "la', "cut off"),
    ("mine.jsonl", b'{"text": "\xff", "label": "plant"}\n', "not UTF-8"),
    ("mine.jsonl", b'{"txt": "a", "label": "plant"}\n', "no column 'text'. Did you mean 'txt'?"),
    ("mine.jsonl", b'{"text": "a", "lable": "plant"}\n', "no column 'label'"),
    ("mine.jsonl", b'{"text": "a", "label": "plnat"}\n', "Did you mean 'plant'?"),
    ("mine.jsonl", b'{"text": 7, "label": "plant"}\n', "holds int"),
    ("mine.jsonl", b'{"text": " ", "label": "plant"}\n', "blank text"),
    ("mine.csv", b"text,label\n", "has no rows"),
    ("mine.csv", b'text,label\n"a', "not closed"),
    ("mine.parquet", b"PAR1 and then nothing", "not a complete Parquet file"),
    ("mine.txt", b"a b c", "no known ending"),
    ("mine.jsonl.gz", b"\x1f\x8b\x08\x00", "mine.jsonl.gz"),
]


@pytest.mark.parametrize(("name", "content", "says"), DATA)
def test_data_files(personalize, mistake, finished, tmp_path, name, content, says):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert says in personalize(data=path)
    assert says in mistake("evaluate", "--model", finished.folder / "base", "--data", path)


@pytest.mark.parametrize(("name", "content", "says"), DATA[:6])
def test_data_files_of_a_run(mistake, world: World, tmp_path, name, content, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    config = world.yaml(tmp_path / "bad.yaml", data__path=str(tmp_path / name))
    assert says in mistake("train", config, "--run", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_client_without_training_rows(mistake, world: World, tmp_path: Path):
    rows = [json.loads(line) for line in world.rows.read_text("utf-8").splitlines()]
    kept = [row for row in rows if row["client"] != "fr-seen-01" or row["split"] == "test"]
    data = write_jsonl(tmp_path / "rows.jsonl", kept)
    config = world.yaml(tmp_path / "bad.yaml", data__path=str(data))
    assert "Client fr-seen-01 has no train rows" in mistake(
        "train", config, "--run", tmp_path / "run"
    )


def test_clients_with_one_row_or_one_class_are_served_with_a_warning(
    world: World, tmp_path: Path, capsys, caplog
):
    rows = [json.loads(line) for line in world.rows.read_text("utf-8").splitlines()]
    kept = [row for row in rows if row["client"] not in ("fr-unseen-00", "de-unseen-00")]
    one = next(row for row in rows if row["client"] == "fr-unseen-00")
    del one["split"]
    same = [row for row in rows if row["client"] == "de-unseen-00" and row["label"] == "plant"]
    data = write_jsonl(tmp_path / "rows.jsonl", [*kept, *same])
    files = {
        "one-row": {"path": str(write_jsonl(tmp_path / "one.jsonl", [one])), "pool": "unseen"},
    }
    for client in sorted({row["client"] for row in [*kept, *same]}):
        mine = [row for row in [*kept, *same] if row["client"] == client]
        path = write_jsonl(tmp_path / f"{client}.jsonl", mine)
        files[client] = {"path": str(path), "language": client[:2], "pool": client.split("-")[1]}
    config = world.yaml(
        tmp_path / "odd.yaml",
        data={"dataset": "files", "files": files, "labels": ["animal", "plant", "stone"]},
        evaluation={"ranks": [1], "pools": ["unseen"]},
        federation={"rounds": 1, "clients_per_round": 2},
        base__rounds=1,
    )
    assert data.exists()
    assert main(["train", str(config), "--run", str(tmp_path / "run")]) == 0
    said = caplog.text
    assert "Client one-row has a single train row" in said
    assert "Client one-row has no test rows: its adapter is made and not scored" in said
    assert "Client de-unseen-00 has train rows of one class only" in said
    assert "unseen clients" in capsys.readouterr().out
    for client in ("one-row", "de-unseen-00"):
        folder = tmp_path / "run" / "adapters" / client / "fedp2eft-r1"
        assert (folder / "adapter_model.safetensors").exists()
        json.loads((folder / "fedp2eft.json").read_text())
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {name for row in results["rows"] for name in row["languages"]} == {"de"}


# ── models, PSGs and adapters ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("rank", "says"), [(0, "budget 0"), (-1, "budget -1"), (5, "r_max = 4")])
def test_rank_budgets(personalize, rank, says):
    assert says in personalize(rank=rank)


def test_a_psg_of_another_model(personalize, world: World, tmp_path: Path):
    line = personalize(model=world.encoder)
    assert "another revision of the base model" in line
    other = save_encoder(tmp_path / "other", seed=6)
    assert "sha256:" in personalize(model=other)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"r_max": 8}, "has shape"),
        ({"linear_names": ["a", "b"]}, "has shape"),
        ({"base_revision": "sha256:ffffffffffffffff"}, "another revision"),
        ({"profile": "papper"}, "profile is 'papper'"),
        ({"feature_kind": "colour"}, "another feature kind"),
        ({"labels": ["animal", "plant"]}, "stone"),
        ({"local": {"max_length": 4000}}, "reads at most"),
    ],
)
def test_a_psg_with_another_config(personalize, finished, tmp_path, changes, says):
    psg = tmp_path / "psg"
    shutil.copytree(finished.folder / "psg", psg)
    config = json.loads((psg / "config.json").read_text())
    for key, value in changes.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    (psg / "config.json").write_text(json.dumps(config))
    rows = [*ROWS, {"text": "fels", "label": "stone"}]
    data = write_jsonl(tmp_path / "all.jsonl", rows)
    assert says in personalize(psg=psg, data=data)


def test_layers_that_are_not_the_models(personalize, finished, tmp_path: Path):
    psg = tmp_path / "psg"
    shutil.copytree(finished.folder / "psg", psg)
    config = json.loads((psg / "config.json").read_text())
    config["layer_names"][0] += "x"
    (psg / "config.json").write_text(json.dumps(config))
    assert "made for other adapted layers: it has" in personalize(psg=psg)


def test_nan_in_a_psg(personalize, finished, tmp_path: Path):
    psg = tmp_path / "psg"
    shutil.copytree(finished.folder / "psg", psg)
    phi = load_file(psg / "model.safetensors")
    phi["last_layer.bias"][3] = float("nan")
    save_file(phi, psg / "model.safetensors")
    assert "last_layer.bias holds NaN" in personalize(psg=psg)


@pytest.mark.parametrize(
    ("psg", "says"),
    [
        ("/no/such/psg", "No PSG at /no/such/psg"),
        ("someone/some-psg", "Could not get PSG 'someone/some-psg' from the hub"),
        ("psg", "No PSG at psg"),
    ],
)
def test_a_psg_that_is_nowhere(personalize, tmp_path, monkeypatch, psg, says):
    monkeypatch.chdir(tmp_path)
    assert says in personalize(psg=psg)


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ({"device": "tpu"}, "Device 'tpu' is unknown"),
        ({"device": "cuda"}, "torch sees 0 GPUs"),
        ({"device": "meta"}, "Device 'meta' is unknown"),
        ({"precision": "fp8"}, "precision"),
        ({"layout": "flat"}, "layout"),
        ({"batch_size": 0}, "batch_size must be 1 or more"),
        ({"epochs": -1}, "epochs must be 0 or more"),
        ({"lr": 0}, "lr must be above 0"),
        ({"lr": 1e30}, "lower"),
        ({"text_columns": "[txt]"}, "no column 'txt'"),
        ({"label_column": "class"}, "no column 'class'"),
        ({"test_data": "/no/such.csv"}, "/no/such.csv does not exist"),
        ({"model": "someone/unreachable"}, "hub is unreachable"),
    ],
)
def test_options_of_personalize(personalize, option, says):
    if option.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert says in personalize(**option)


def test_nan_in_the_base_model_names_client_and_round(mistake, world: World, tmp_path: Path):
    broken = tmp_path / "broken"
    shutil.copytree(world.encoder, broken)
    weights = load_file(broken / "model.safetensors")
    weights["encoder.layer.1.output.dense.weight"][0, 0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    config = world.yaml(tmp_path / "a.yaml", model__name=str(broken))
    line = mistake("train", config, "--run", tmp_path / "a")
    assert "-seen-0" in line
    assert "round 1 of base: " in line
    assert "holds NaN" in line
    config = world.yaml(tmp_path / "b.yaml", model__name=str(broken), base__kind="none")
    line = mistake("train", config, "--run", tmp_path / "b")
    assert "-seen-0" in line
    assert "round 1 of psg: ξ holds NaN" in line


def test_foreign_folders_are_not_overwritten(mistake, personalize, finished, tmp_path: Path):
    mine = tmp_path / "thesis"
    mine.mkdir()
    (mine / "chapter.txt").write_text("years of work")
    assert "exists and is not an adapter folder" in personalize(out=mine)
    assert "exists and is not an adapter folder" in personalize(out=mine / "chapter.txt")
    assert "Could not write" in personalize(out=mine / "chapter.txt" / "below")
    adapter = finished.folder / "adapters" / "fr-unseen-00" / "fedp2eft-r2"
    for layout in ("portable", "compact", "merged"):
        line = mistake("export", "--adapter", adapter, "--out", mine, "--layout", layout)
        assert "exists and is" in line
    assert "No PEFT adapter" in mistake(
        "export", "--adapter", mine, "--out", tmp_path / "new", "--layout", "compact"
    )
    assert "holds no run" in mistake("quickstart", "--run", mine)
    assert [path.name for path in mine.iterdir()] == ["chapter.txt"]
    assert (mine / "chapter.txt").read_text() == "years of work"


def test_adapters_that_do_not_fit(mistake, finished, world: World, tmp_path: Path):
    data = write_jsonl(tmp_path / "mine.jsonl", ROWS)
    base = finished.folder / "base"
    good = finished.folder / "adapters" / "fr-unseen-00" / "fedp2eft-r2"
    other = tmp_path / "other"
    shutil.copytree(base, other)
    weights = load_file(other / "model.safetensors")
    weights["classifier.bias"] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})

    def evaluate(model: Path, adapter: Path) -> str:
        return mistake("evaluate", "--model", model, "--data", data, "--adapter", adapter)

    assert "made for another base model" in evaluate(other, good)
    assert "made for another base model" in mistake(
        "export", "--adapter", good, "--out", tmp_path / "m", "--layout=merged", "--model", other
    )
    assert "No PEFT adapter" in evaluate(base, tmp_path)
    for name, content in (
        ("adapter_model.safetensors", b"half"),
        ("adapter_config.json", b"{}"),
        ("adapter_config.json", b"{"),
        ("adapter_config.json", b'{"peft_type": "IA3"}'),
    ):
        bad = tmp_path / "bad"
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(good, bad)
        (bad / name).write_bytes(content)
        assert str(bad) in evaluate(base, bad)
        line = mistake("export", "--adapter", bad, "--out", tmp_path / "n", "--layout", "compact")
        assert str(bad) in line
    assert not (tmp_path / "n").exists()
    assert not (tmp_path / "m").exists()


# ── real processes ──────────────────────────────────────────────────────────────────────────────


def test_as_a_real_process(world: World, finished, tmp_path: Path):
    """What the shell sees: one line, the status, and nothing from any library."""
    done = in_process("train", world.config, "--local.lrr", 3)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "Did you mean '--local.lr'?" in done.stderr
    done = in_process(
        "personalize", "--psg", finished.folder / "psg", "--model", world.encoder, "--rank", 2,
        "--data", write_jsonl(tmp_path / "mine.jsonl", ROWS), "--out", tmp_path / "adapter",
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert "another revision of the base model" in done.stderr
