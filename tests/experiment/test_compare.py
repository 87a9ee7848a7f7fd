"""A comparison: each cell once, whoever computes it and however often it is stopped."""

from __future__ import annotations

import json
import multiprocessing as mp
import shutil
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from fedp2eft.errors import UserError
from fedp2eft.experiment.compare import _open, compare
from fedp2eft.experiment.train import train
from fedp2eft.files import write_text
from fedp2eft.methods import METHODS, ClientSide, Method, Outcome, Survey
from fedp2eft.methods.base import base
from fedp2eft.methods.fedp2eft import fedp2eft
from fedp2eft.results.plan import SharedTraining, claim, plan, settings_of
from fedp2eft.settings.reading import settings_text
from tiny_run import World

METHODS_OF_ALL = ["base", "lora", "fedp2eft"]
SMALL: dict[str, Any] = {
    "evaluation__methods": METHODS_OF_ALL,
    "evaluation__ranks": [1],
    "compare__seeds": [3, 4],
    "base__rounds": 1,
    "federation__rounds": 1,
}


class Journal:
    """Keeps what a run reports; may write finished cells to a file and be slow."""

    def __init__(self, path: Path | None = None, pause: float = 0.0) -> None:
        self.finished: list[str] = []
        self.phases: list[tuple[str, int, int]] = []
        self.notes: list[str] = []
        self.path, self.pause = path, pause

    def start(self, phase: str, total: int, done: int) -> None:
        self.phases.append((phase, total, done))

    def advance(self, phase: str, text: str) -> None:
        if phase == "compare":
            self.finished.append(text)
            if self.path:
                with self.path.open("a") as file:
                    file.write(text + "\n")
            time.sleep(self.pause)

    def part(self, phase: str, fraction: float, text: str) -> None: ...

    def note(self, text: str) -> None:
        self.notes.append(text)


def cells(folder: Path) -> dict[str, Any]:
    """Every cell's content by name, without what differs between two runs."""
    found = {}
    for path in sorted(folder.glob("cells/**/*.json")):
        cell = json.loads(path.read_text())
        cell["clients"] = [
            {key: value for key, value in client.items() if key != "seconds"}
            for client in cell["clients"]
        ]
        name = str(path.relative_to(folder / "cells").with_suffix(""))
        found[name] = {k: v for k, v in cell.items() if k not in ("seconds", "peak_memory")}
    return found


@pytest.fixture(scope="module")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison computed by one process without a stop."""
    return compare(world.settings(**SMALL), tmp_path_factory.mktemp("comparison") / "c", Journal())


def test_the_plan_is_the_product(world: World):
    settings = world.settings(
        evaluation__methods=METHODS_OF_ALL,
        evaluation__ranks=[1, 2],
        compare__seeds=[1, 2],
        compare__bases=["standard-fl", "none"],
    )
    found = plan(settings)
    # base once, lora and fedp2eft at two budgets: 5 × 2 pools × 2 seeds × 2 bases
    assert len(found) == len({cell.name for cell in found}) == 5 * 2 * 2 * 2
    order = [cell.training for cell in found]
    assert sum(a != b for a, b in pairwise(order)) == 3  # side by side


def test_a_seed_draws_everything_anew(world: World):
    settings = settings_of(world.settings(), SharedTraining("standard-fl", 77))
    assert settings.seed == 77
    for section in ("adapter", "data", "generator", "model"):
        assert getattr(settings, section).seed == 77


def test_a_budget_in_parameters_adds_cells_to_the_same_trainings(
    world: World, whole: Path, tmp_path: Path
):
    folder = tmp_path / "c"
    shutil.copytree(whole, folder)
    before, journal = cells(folder), Journal()
    compare(world.settings(**SMALL, evaluation__budget="parameters"), folder, journal)
    after = cells(folder)
    assert {name: after[name] for name in before} == before
    added = after.keys() - before.keys()
    assert {name.rpartition("/")[2] for name in added} == {"lora-p1", "fedp2eft-p1"}
    assert len(added) == len([name for name in before if "base" not in name.rpartition("/")[2]])
    assert [phase for phase, *_ in journal.phases] == ["compare"]  # nothing is trained again
    for name in added:
        assert after[name]["budget"] == "parameters"
        sizes = {client["parameters"] for client in after[name]["clients"]}
        uniform = {c["parameters"] for c in after[name.replace("fedp2eft", "lora")]["clients"]}
        assert max(sizes) <= max(uniform)
        assert min(sizes) > max(uniform) - 40  # the widest rank


def test_cells_equal_a_run_of_the_same_settings(world: World, whole: Path, tmp_path: Path):
    settings = settings_of(world.settings(**SMALL), SharedTraining("standard-fl", 4))
    train(settings, tmp_path / "run")
    found = cells(whole)
    compared = 0
    for name, cell in found.items():
        if "/s4/" not in name:
            continue
        for scores in cell["clients"]:
            path = tmp_path / "run" / "cells" / Path(name).name / f"{scores['client']}.json"
            alone = json.loads(path.read_text())
            for key in ("language", "examples", "correct", "loss", "parameters"):
                assert scores[key] == alone[key]
            compared += 1
    assert compared == 3 * 6  # base, lora, fedp2eft; four seen and two unseen clients


def test_what_a_cell_holds(world: World, whole: Path):
    cell = cells(whole)["standard-fl/s3/seen/fedp2eft-r1"]
    assert (cell["method"], cell["base"], cell["rank"]) == ("fedp2eft", "standard-fl", 1)
    assert (cell["seed"], cell["pool"]) == (3, "seen")
    assert [scores["client"] for scores in cell["clients"]] == [
        "de-seen-00", "de-seen-01", "fr-seen-00", "fr-seen-01"
    ]  # fmt: skip
    lines = (whole / "runs" / "standard-fl-s3" / "metrics.jsonl").read_text().splitlines()
    line = json.loads(lines[-1])
    assert cell["bytes_up"] == line["bytes-up"] / line["clients"] > 0
    assert cell["bytes_down"] == line["bytes-down"] / line["clients"]
    assert cells(whole)["standard-fl/s3/seen/lora-r1"]["bytes_up"] == 0
    assert set(cell["versions"]) >= {"fedp2eft", "torch", "peft"}


def test_only_what_is_missing_is_computed(world: World, whole: Path, tmp_path: Path):
    """A cell taken away, a damaged one and a new budget: these and no others."""
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy, symlinks=True)
    (copy / "cells/standard-fl/s3/seen/lora-r1.json").unlink()
    damaged = copy / "cells/standard-fl/s4/unseen/fedp2eft-r1.json"
    damaged.write_text(damaged.read_text()[:40])
    journal = Journal()
    compare(world.settings(**SMALL), copy, journal)
    assert sorted(journal.finished) == [
        "standard-fl/s3/seen/lora-r1", "standard-fl/s4/unseen/fedp2eft-r1"
    ]  # fmt: skip
    assert journal.phases == [("compare", 12, 10)]  # nothing is trained again
    assert cells(copy) == cells(whole)
    journal = Journal()
    compare(
        world.settings(**SMALL | {"evaluation__ranks": [1, 2], "compare__seeds": [3]}),
        copy,
        journal,
    )
    assert sorted(journal.finished) == [
        f"standard-fl/s3/{pool}/{method}-r2"
        for pool in ("seen", "unseen")
        for method in ("fedp2eft", "lora")
    ]


def test_another_comparison_is_refused(world: World, whole: Path, tmp_path: Path):
    before = cells(whole)
    with pytest.raises(UserError, match=r"holds another experiment: local.lr is 0.01 there"):
        compare(world.settings(**SMALL, local__lr=0.5), whole)
    assert cells(whole) == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty and holds no comparison"):
        compare(world.settings(**SMALL), tmp_path)
    with pytest.raises(UserError, match=r"base\.kind|bases"):
        compare(world.settings(**SMALL, compare__bases=["standart-fl"]), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_pool_without_clients_is_said(world: World, tmp_path: Path):
    settings = world.settings(**SMALL, evaluation__pools=["new-language"])
    with pytest.raises(UserError, match="No client is in pool 'new-language'"):
        compare(settings, tmp_path / "c", Journal())


def test_variants_share_the_base(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    variant = Method(fedp2eft, shared="psg", variant={"adapter": {"layerwise": True}})
    monkeypatch.setitem(METHODS, "per-layer", variant)
    journal = Journal()
    settings = world.settings(
        **SMALL | {"compare__seeds": [3], "evaluation__ranks": [2],  # more than a λ a layer
                   "evaluation__methods": ["fedp2eft", "per-layer"]},
    )  # fmt: skip
    folder = compare(settings, tmp_path / "c", journal)
    # After each training the lines are about the cells again.
    assert [phase for phase, _, _ in journal.phases] == [
        *("compare", "base", "psg", "compare"), *("psg", "compare"),
    ]  # fmt: skip
    runs = {path.name for path in (folder / "runs").iterdir()}
    assert runs == {"standard-fl-s3", "standard-fl-s3-adapter.layerwise-True"}
    bases = {(run / "base").resolve() for run in (folder / "runs").iterdir()}
    assert bases == {folder / "bases" / "standard-fl-s3" / "base"}
    config = json.loads(
        (folder / "runs/standard-fl-s3-adapter.layerwise-True/psg/config.json").read_text()
    )
    assert config["adapter"]["layerwise"] is True
    for run in runs:
        [found] = json.loads((folder / "runs" / run / "structure.json").read_text())
        assert sum(found["kinds"]["2"].values()) == pytest.approx(1)


def work(config: str, folder: str, journal: str, pause: float) -> None:
    """A process of its own that works on the comparison."""
    from fedp2eft.settings.reading import read_settings

    compare(read_settings(config), folder, Journal(Path(journal), pause))


def test_two_processes_share_and_one_is_killed(world: World, whole: Path, tmp_path: Path):
    """No cell twice; what the killed one held is taken over; the numbers are those of one."""
    config = world.yaml(tmp_path / "c.yaml", **SMALL)
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["fedp2eft.experiment.compare"])
    folder = tmp_path / "c"
    journals = [tmp_path / "first", tmp_path / "second"]
    first, second = (
        context.Process(target=work, args=(str(config), str(folder), str(journal), 0.05))
        for journal in journals
    )
    first.start()
    second.start()
    while not journals[0].exists() or journals[0].read_text().count("\n") < 2:
        assert first.is_alive()
        time.sleep(0.01)
    first.kill()
    first.join()
    second.join(timeout=120)
    assert second.exitcode == 0
    done = [journal.read_text().split() for journal in journals if journal.exists()]
    together = [name for names in done for name in names]
    assert len(together) == len(set(together))
    # the killed one may have finished a cell without having written so
    assert len(together) >= 11
    assert len(done) == 2
    assert cells(folder) == cells(whole)


def test_settings_that_another_process_writes_first_are_no_foreign_folder(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings, glob = world.settings(**SMALL), Path.glob

    def meanwhile(folder: Path, pattern: str):
        write_text(folder / "settings.yaml", settings_text(settings))
        return glob(folder, pattern)

    (tmp_path / "c").mkdir()
    monkeypatch.setattr(Path, "glob", meanwhile)
    _open(tmp_path / "c", settings)


def test_a_claim_goes_with_its_holder(tmp_path: Path):
    with claim(tmp_path, "a/b") as mine:
        assert mine
        with claim(tmp_path, "a/b") as again:
            assert not again
        with claim(tmp_path, "a/c") as other:
            assert other
    with claim(tmp_path, "a/b") as mine:
        assert mine


def test_structures_are_described_for_every_kept_round(whole: Path):
    found = json.loads((whole / "runs" / "standard-fl-s3" / "structure.json").read_text())
    assert [value["round"] for value in found] == [1]
    assert found[0]["clients"] == 6
    assert 0 < found[0]["overlap"]["1"] <= 1


def test_a_survey_is_taken_once_for_all_pools(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[str] = []

    def ask(client: ClientSide, rank: int) -> dict[str, torch.Tensor]:
        asked.append(f"r{rank}")
        return {"rows": torch.tensor([float(len(client.train))])}

    def fit(client: ClientSide, rank: int) -> Outcome:
        assert client.prepared["rows"].item() == 4 * 12  # four seen clients of twelve rows
        return base(client, rank)

    survey = Survey(ask, lambda sums, clients: {"rows": sums["rows"] / clients * 4})
    monkeypatch.setitem(METHODS, "asking", Method(fit, surveys=(survey,)))
    settings = world.settings(
        **SMALL | {"compare__seeds": [3], "evaluation__ranks": [1, 2],
                   "evaluation__methods": ["asking"]},
    )  # fmt: skip
    compare(settings, tmp_path / "c", Journal())
    assert sorted(asked) == ["r1"] * 4 + ["r2"] * 4  # the seen clients, not once more for "unseen"
