"""Bases with a part that stays on each client: kept, resumed, damaged, lent to a comparison."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from base_runs import PRIVATE, QUICK, WORDS, Run, parts
from fedp2eft.bases.parts import ROWS
from fedp2eft.errors import UserError
from fedp2eft.experiment.compare import compare
from fedp2eft.experiment.train import train
from fedp2eft.progress import LogReporter
from fedp2eft.results.plan import plan, settings_of
from fedp2eft.runtime.workspace import Workspace
from tiny_run import SEEN, UNSEEN, World, assert_same, outcome


class PowerCutError(Exception):
    """Thrown from inside a run in place of a power cut."""


class Stopper(LogReporter):
    """Stops a run after the next finished unit (round or cell), or inside it at its n-th client."""

    def __init__(self, inside: int | None = None) -> None:
        super().__init__()
        self.inside, self.heard = inside, []  # type: ignore[var-annotated]

    def advance(self, phase: str, text: str) -> None:
        if self.inside is None:
            raise PowerCutError

    def part(self, phase: str, fraction: float, text: str) -> None:
        if self.inside is not None and text not in self.heard:
            self.heard.append(text)
            if len(self.heard) == self.inside:
                raise PowerCutError


STOPPED = QUICK | {
    "base__rounds": 3,
    "evaluation__pools": ["unseen"],
    "evaluation__methods": ["fedp2eft"],
}


@pytest.fixture(scope="module", params=PRIVATE)
def whole(request: Any, world: World, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An uninterrupted run of several base rounds."""
    settings = world.settings(**STOPPED, base__kind=request.param)
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(settings, folder)
    return Run(settings, folder)


def test_stopped_after_every_round_and_inside_rounds(whole: Run, tmp_path: Path) -> None:
    starts = 0
    while not (tmp_path / "run" / "results.json").exists():
        try:
            # in turn after a unit, and when the second client of the next one has begun
            train(whole.settings, tmp_path / "run", Stopper(2 if starts % 2 else None))
        except PowerCutError:
            starts += 1
            assert starts < 30
    assert starts >= 5
    assert_same(outcome(tmp_path / "run"), outcome(whole.folder))


@pytest.mark.parametrize("left", ["an older checkpoint", "none"])
def test_stopped_at_the_end_of_the_rounds_with_checkpoints_lost(
    whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    """A round is repeated from the client's files of that time, not from later ones."""
    if whole.settings.base.kind != "dept-spec":
        pytest.skip("its parts are made when the rounds are over")
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "save_base", power_cut)
        with pytest.raises(PowerCutError):
            train(whole.settings, folder)
    if left == "none":
        shutil.rmtree(folder / "checkpoints")
    else:
        (folder / "checkpoints" / "base-000003.safetensors").write_bytes(b"x")
    train(whole.settings, folder)
    assert_same(outcome(folder), outcome(whole.folder))


def power_cut(*_: object) -> None:
    raise PowerCutError


def test_a_damaged_part_is_named_in_one_line(whole: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole.folder, folder)
    shutil.rmtree(folder / "cells")
    shutil.rmtree(folder / "checkpoints")
    for path in (folder / "clients").glob("*/*"):
        path.write_bytes(b"x")
    with pytest.raises(UserError, match=r"-seen-0. is damaged") as caught:
        train(whole.settings, folder)
    assert "\n" not in str(caught.value)


def test_a_client_that_never_took_part(whole: Run) -> None:
    """DEPT-SPEC: the common embeddings. FedDPA-T: a local LoRA, trained when first needed."""
    for name in UNSEEN:
        has = (whole.folder / "clients" / name).exists()
        assert has == (whole.settings.base.kind == "feddpa-t")


def test_features_are_those_of_the_clients_own_part(whole: Run) -> None:
    """Two clients' parts on one client's rows give two ξ, and the common base a third."""
    work = Workspace(whole.settings, whole.folder)
    name, other = list(parts(whole))[:2]

    def xi(kept: dict[str, torch.Tensor]) -> torch.Tensor:
        work.private.files = Kept(kept)  # type: ignore[assignment]
        work.private._present = None
        work._features.clear()
        return work.features(name)

    own = xi(parts(whole)[name])
    assert not torch.allclose(own, xi(parts(whole)[other]), atol=1e-5)
    assert torch.equal(own, xi(parts(whole)[name]))


class Kept:
    """Stands in for a client's files."""

    def __init__(self, part: dict[str, torch.Tensor]) -> None:
        self.part = part

    def before(self, client: str, round_: int | None = None) -> dict[str, torch.Tensor]:
        return self.part


def test_clients_with_a_part_of_their_own_train_one_at_a_time(
    whole: Run, world: World, tmp_path: Path
) -> None:
    notes: list[str] = []

    class Notes(LogReporter):
        def note(self, text: str) -> None:
            notes.append(text)

    kind = whole.settings.base.kind
    changes = STOPPED | {"local__dropout": False, "base__rounds": 1, "federation__cohort": 4}
    train(world.settings(**changes, base__kind=kind), tmp_path / "run", Notes())
    assert any("a part of the base of its own" in note and kind in note for note in notes)


def test_a_dept_part_names_no_word_that_the_client_does_not_have(whole: Run) -> None:
    if whole.settings.base.kind != "dept-spec":
        pytest.skip("its parts are no rows")
    work = Workspace(whole.settings, whole.folder)
    for name, part in parts(whole).items():
        assert name in SEEN
        assert set(part[WORDS + ROWS].tolist()) == set(work.encoded(name, "train").tokens.tolist())


def test_a_comparison_lends_the_clients_parts_with_the_base(world: World, tmp_path: Path) -> None:
    """Its cells are those of a run that trained base and methods in one folder."""
    changes = STOPPED | {"base__kind": "dept-spec", "compare__seeds": [3], "base__rounds": 1}
    # on the clients that took part, whose own embeddings the scores depend on
    changes |= {"evaluation__methods": ["base"], "evaluation__pools": ["seen"]}
    comparison = world.settings(**changes)
    [cell] = plan(comparison)
    compare(comparison, tmp_path / "comparison")
    train(settings_of(comparison, cell.training), tmp_path / "run")
    found = json.loads(cell.path(tmp_path / "comparison").read_text())
    for client in found["clients"]:
        alone = tmp_path / "run" / "cells" / "base-r0" / f"{client['client']}.json"
        assert json.loads(alone.read_text())["loss"] == client["loss"]
    lent = tmp_path / "comparison" / "runs" / cell.training.name / "clients"
    own = tmp_path / "comparison" / "bases" / cell.training.base_name / "clients"
    names = sorted(str(path.relative_to(own)) for path in own.rglob("*.safetensors"))
    assert len(names) == 2
    assert sorted(str(path.relative_to(lent)) for path in lent.rglob("*.safetensors")) == names
