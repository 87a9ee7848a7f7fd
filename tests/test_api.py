"""The Python API: the same as the commands, and the same as a run's own clients."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fedp2eft
from fedp2eft.client.training import structure
from fedp2eft.errors import UserError
from fedp2eft.methods.fedp2eft import predicted
from fedp2eft.runtime.workspace import Workspace
from fedp2eft.seeding import derive_seed
from tiny_run import R_MAX, World, write_jsonl


def test_public_names():
    for name in fedp2eft.__all__:
        found = getattr(fedp2eft, name)
        assert found is fedp2eft.METHODS or found.__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'persnalize'"):
        fedp2eft.persnalize  # noqa: B018


@pytest.mark.parametrize("client", ["de-seen-01", "fr-unseen-00"])
@pytest.mark.parametrize("rank", [1, 2, R_MAX])
def test_a_client_gets_the_ranks_and_lambda_that_the_run_gave_it(
    finished, world: World, tmp_path: Path, client: str, rank: int
):
    rows = write_jsonl(tmp_path / "rows.jsonl", world.client_rows(client, "train"))
    test = write_jsonl(tmp_path / "test.jsonl", world.client_rows(client, "test"))
    psg = fedp2eft.PSG.from_pretrained(finished.folder / "psg")
    adapter = fedp2eft.personalize(
        psg, finished.folder / "base", rows, rank, test_data=test, lr=1e-2, epochs=2, batch_size=6,
        precision="fp32",
    )  # fmt: skip
    workspace = Workspace(world.settings(), finished.folder)
    lam, keep = structure(psg, workspace.features(client), rank)
    assert list(adapter.ranks.values()) == keep.sum(dim=1).tolist()
    for row, layer in enumerate(adapter.weights.layers):
        torch.testing.assert_close(layer.lam, lam[row][keep[row]])
    assert adapter.scores is not None
    assert adapter.scores.examples == 6
    own = finished.folder / "adapters" / client / f"fedp2eft-r{rank}" / "fedp2eft.json"
    if own.exists():
        assert json.loads(own.read_text())["ranks"] == adapter.ranks


@pytest.mark.parametrize("method", ["fedp2eft", "lora", "adalora", "bt-lora", "fedp2eft-random"])
def test_a_method_gives_the_same_bits_by_both_doors(
    finished, world: World, tmp_path: Path, method: str
):
    """A client of the run's workspace, and the same rows in a file of their own."""
    client = "fr-unseen-00"
    data = write_jsonl(tmp_path / "any-name.jsonl", world.client_rows(client, "train"))
    test = write_jsonl(tmp_path / "test.jsonl", world.client_rows(client, "test"))
    psg = fedp2eft.PSG.from_pretrained(finished.folder / "psg")
    made = fedp2eft.personalize(
        psg, finished.folder / "base", data, 2, method=method, test_data=test, precision="fp32"
    )
    workspace = Workspace(world.settings(), finished.folder)
    workspace.psg = psg
    side = replace(
        workspace.side(client, method=fedp2eft.METHODS[method]), seed=derive_seed(0, "personalize")
    )
    outcome = fedp2eft.METHODS[method].fit(side, 2)
    assert outcome.weights is not None
    for one, two in zip(made.weights.layers, outcome.weights.layers, strict=True):
        assert one.name == two.name
        for name in ("A", "B", "lam"):
            assert torch.equal(getattr(one, name), getattr(two, name))
    assert made.scores == outcome.scores
    assert made.facts["method"] == method


def test_a_budget_in_parameters_is_the_runs(finished, world: World, tmp_path: Path):
    client = "fr-unseen-00"
    data = write_jsonl(tmp_path / "rows.jsonl", world.client_rows(client, "train"))
    psg = fedp2eft.PSG.from_pretrained(finished.folder / "psg")
    made = fedp2eft.personalize(
        psg, finished.folder / "base", data, 2, budget="parameters", precision="fp32"
    )
    workspace = Workspace(world.settings(evaluation__budget="parameters"), finished.folder)
    workspace.psg = psg
    _, keep = predicted(workspace.side(client), 2)
    assert list(made.ranks.values()) == keep.sum(dim=1).tolist()
    left = 2 * sum(workspace.bt.costs) - made.weights.parameters()
    assert 0 <= left < max(workspace.bt.costs)
    assert made.facts["budget"] == "parameters"
    with pytest.raises(UserError, match="budget is 'params': give ranks or parameters"):
        fedp2eft.personalize(psg, finished.folder / "base", data, 2, budget="params")


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (
            "fedl2p",
            "use fedp2eft train, or one of prior, calibrated-prior, lora, fedp2eft, adalora, "
            r"bt-lora, gradient, fedp2eft-structure, fedp2eft-scale, fedp2eft-random\.$",
        ),
        ("lora-tuned", "Method lora-tuned needs federated training of its own"),
        ("fedp2eft-layerwise", "needs a PSG trained with adapter.layerwise: true"),
        ("base", "Method base makes no adapter"),
        ("lara", "Did you mean 'lora'"),
    ],
)
def test_methods_that_one_client_cannot_have(finished, world: World, tmp_path, method, says):
    data = write_jsonl(tmp_path / "rows.jsonl", world.client_rows("fr-unseen-00", "train"))
    psg = fedp2eft.PSG.from_pretrained(finished.folder / "psg")
    with pytest.raises(fedp2eft.UserError, match=says):
        fedp2eft.personalize(psg, finished.folder / "base", data, 2, method=method)


def test_seed_and_nothing_else_decides(finished, world: World, tmp_path: Path):
    rows = write_jsonl(tmp_path / "rows.jsonl", world.client_rows("fr-unseen-00", "train"))
    psg = fedp2eft.PSG.from_pretrained(finished.folder / "psg")
    made = []
    for number, seed in enumerate((0, 0, 1)):
        torch.manual_seed(number)
        state = torch.get_rng_state()
        adapter = fedp2eft.personalize(
            psg, finished.folder / "base", rows, 2, seed=seed, batch_size=4, lr=1e-2
        )
        assert torch.equal(torch.get_rng_state(), state)
        made.append(torch.cat([layer.B.flatten() for layer in adapter.weights.layers]))
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_evaluate_and_export(finished, world: World, tmp_path: Path):
    client = "de-unseen-00"
    data = write_jsonl(tmp_path / "test.jsonl", world.client_rows(client, "test"))
    base = finished.folder / "base"
    adapter = finished.folder / "adapters" / client / "fedp2eft-r2"
    scores = fedp2eft.evaluate(base, data, adapter, precision="fp32")
    cell = json.loads((finished.folder / "cells" / "fedp2eft-r2" / f"{client}.json").read_text())
    assert (scores.correct, scores.examples) == (cell["correct"], cell["examples"])
    assert scores.loss == pytest.approx(cell["loss"], rel=1e-5)
    plain = fedp2eft.evaluate(base, data, precision="fp32")
    cell = json.loads((finished.folder / "cells" / "base-r0" / f"{client}.json").read_text())
    assert plain.loss == pytest.approx(cell["loss"], rel=1e-5)
    fedp2eft.export(adapter, tmp_path / "merged", "merged")
    merged = fedp2eft.evaluate(tmp_path / "merged", data, max_length=12, precision="fp32")
    assert merged.loss == pytest.approx(scores.loss, rel=1e-5)


def test_a_pushed_psg_is_one_folder(finished, tmp_path: Path):
    psg = fedp2eft.PSG.from_pretrained(finished.folder / "psg")
    psg.save_pretrained(tmp_path / "mine")
    again = fedp2eft.PSG.from_pretrained(tmp_path / "mine")
    assert again.config == psg.config
    assert all(torch.equal(again.state_dict()[k], v) for k, v in psg.state_dict().items())


def test_personalize_takes_the_psgs_own_recipe_where_none_is_given(
    finished, world: World, tmp_path: Path
):
    """Learning rate, epochs and batch size travel with the PSG; a given one comes before it."""
    psg = fedp2eft.PSG.from_pretrained(finished.folder / "psg")
    local = world.settings().local
    recipe = {"lr": local.personalize_lr, "epochs": local.personalize_epochs}
    assert psg.config.local == local
    assert local.personalize_lr == 1e-2
    rows = write_jsonl(tmp_path / "rows.jsonl", world.client_rows("fr-unseen-00", "train"))

    def B(**options: float) -> torch.Tensor:
        adapter = fedp2eft.personalize(
            psg, finished.folder / "base", rows, 1, precision="fp32", **options
        )
        return torch.cat([layer.B.flatten() for layer in adapter.weights.layers])

    assert torch.equal(B(), B(**recipe, batch_size=local.batch_size))
    assert not torch.equal(B(), B(lr=1e-4))


def rows_of(world: World, client: str) -> list[dict[str, str]]:
    return [
        {**row, "split": split}
        for split in ("train", "test")
        for row in world.client_rows(client, split)
    ]


def test_a_split_column_decides_what_trains_and_what_is_scored(
    finished, world: World, tmp_path: Path
):
    both = rows_of(world, "fr-unseen-00")
    psg = fedp2eft.PSG.from_pretrained(finished.folder / "psg")
    base = finished.folder / "base"
    made = fedp2eft.personalize(psg, base, write_jsonl(tmp_path / "both.jsonl", both), 2)
    train = write_jsonl(tmp_path / "train.jsonl", world.client_rows("fr-unseen-00", "train"))
    test = write_jsonl(tmp_path / "test.jsonl", world.client_rows("fr-unseen-00", "test"))
    apart = fedp2eft.personalize(psg, base, train, 2, test_data=test)
    assert made.scores == apart.scores
    assert made.facts["train_rows"] == len(world.client_rows("fr-unseen-00", "train"))
    for mine, same in zip(made.weights.layers, apart.weights.layers, strict=True):
        torch.testing.assert_close(mine.B, same.B, rtol=0, atol=0)
    same_file = fedp2eft.personalize(
        psg, base, tmp_path / "both.jsonl", 2, test_data=tmp_path / "both.jsonl"
    )
    assert same_file.scores == apart.scores
    assert fedp2eft.evaluate(base, tmp_path / "both.jsonl") == fedp2eft.evaluate(base, test)
    assert fedp2eft.personalize(psg, base, train, 2).scores is None


def test_rows_of_several_clients_are_refused(finished, world: World):
    psg = fedp2eft.PSG.from_pretrained(finished.folder / "psg")
    message = r"holds the rows of 6 clients \(column client: .*name a file with one client's rows"
    with pytest.raises(UserError, match=message):
        fedp2eft.personalize(psg, finished.folder / "base", world.rows, 2)
    with pytest.raises(UserError, match=message):
        fedp2eft.evaluate(finished.folder / "base", world.rows)


def test_a_class_that_the_model_lacks_comes_with_both_lists(finished, world: World, tmp_path: Path):
    rows = [*world.client_rows("fr-unseen-00", "test"), {"text": "le", "label": "fungus"}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    message = r"'fungus'.* The classes are animal, plant, stone; the file has animal, fungus, plan"
    with pytest.raises(UserError, match=message):
        fedp2eft.evaluate(finished.folder / "base", path)


def test_a_column_of_the_other_task_is_refused(finished, world: World):
    psg, base = fedp2eft.PSG.from_pretrained(finished.folder / "psg"), finished.folder / "base"
    with pytest.raises(UserError, match="classification, which does not use target_column"):
        fedp2eft.personalize(psg, base, world.rows, 2, target_column="text")
    with pytest.raises(UserError, match="name label_column or target_column"):
        fedp2eft.evaluate(base, world.rows, label_column="topic", target_column="text")


def test_an_adapter_remembers_its_columns(finished, world: World, tmp_path: Path):
    psg, base = fedp2eft.PSG.from_pretrained(finished.folder / "psg"), finished.folder / "base"
    rows = world.client_rows("fr-unseen-00", "test")
    plain = write_jsonl(tmp_path / "plain.jsonl", rows)
    named = [{"satz": row["text"], "klasse": row["label"], "text": "le"} for row in rows]
    data = write_jsonl(tmp_path / "named.jsonl", named)
    columns = {"text_columns": ["satz"], "label_column": "klasse"}
    fedp2eft.personalize(psg, base, data, 2, **columns).save(tmp_path / "own")
    scores = fedp2eft.evaluate(base, data, tmp_path / "own")
    assert scores == fedp2eft.evaluate(base, data, tmp_path / "own", **columns)
    assert scores == fedp2eft.evaluate(
        base, plain, tmp_path / "own", text_columns=["text"], label_column="label"
    )
    for said in (fedp2eft.evaluate, lambda *a, **k: fedp2eft.personalize(psg, base, data, 2, **k)):
        with pytest.raises(UserError, match=r"made with 1 text column \(\w+\), and 2 are named"):
            said(base, data, tmp_path / "own", text_columns=["text", "satz"])
    of_the_run = finished.folder / "adapters" / "fr-unseen-00" / "fedp2eft-r2" / "fedp2eft.json"
    facts = json.loads(of_the_run.read_text())
    assert (facts["text_columns"], facts["label_column"]) == (["text"], "label")


def test_a_merged_model_remembers_length_and_columns(finished, world: World, tmp_path: Path):
    """So that it scores as its adapter does: rows longer than the adapter's are cut likewise."""
    adapter = finished.folder / "adapters" / "fr-unseen-00" / "fedp2eft-r2"
    facts = json.loads((adapter / "fedp2eft.json").read_text()) | {"text_columns": ["satz"]}
    own = shutil.copytree(adapter, tmp_path / "own")
    (own / "fedp2eft.json").write_text(json.dumps(facts))
    rows = world.client_rows("fr-unseen-00", "test")
    rows = [{"satz": row["text"] + " le petit chat" * 5, "label": row["label"]} for row in rows]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    scores = fedp2eft.evaluate(finished.folder / "base", data, own, precision="fp32")
    fedp2eft.export(own, tmp_path / "merged", "merged")
    merged = fedp2eft.evaluate(tmp_path / "merged", data, precision="fp32")
    assert merged.loss == pytest.approx(scores.loss, rel=1e-5)
    whole = fedp2eft.evaluate(tmp_path / "merged", data, max_length=24, precision="fp32")
    assert whole.loss != pytest.approx(scores.loss, rel=1e-5)


def test_texts_that_are_cut_are_said_once(finished, world: World, tmp_path: Path, caplog):
    psg, base = fedp2eft.PSG.from_pretrained(finished.folder / "psg"), finished.folder / "base"
    rows = world.client_rows("fr-unseen-00", "test")
    long = [{**row, "text": row["text"] + " le petit chat" * 5} for row in rows[:2]]
    data = write_jsonl(tmp_path / "rows.jsonl", [*rows, *long])
    fedp2eft.personalize(psg, base, data, 2, test_data=data)
    assert [m for m in caplog.messages if "cut" in m] == [
        f"Client rows, train: 2 of {len(rows) + 2} texts are longer than local.max_length (12 "
        "tokens) and are cut there."
    ]
    caplog.clear()
    Workspace(world.settings(local__max_length=3), finished.folder).encoded("fr-unseen-00", "train")
    assert caplog.messages[0].endswith("are cut there. Other clients' are not listed.")
    caplog.clear()
    fedp2eft.evaluate(base, data, max_length=24)
    assert not caplog.messages
    fedp2eft.evaluate(base, data, max_length=12)
    assert caplog.messages == [
        f"2 of {len(rows) + 2} rows are longer than max_length (12 tokens) and are cut there."
    ]
