"""Whole tiny runs on every base: what leaves a client, what stays, and what is done with it."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import RecordDict
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from fedp2eft import api
from fedp2eft.adapters.convert import with_adapter
from fedp2eft.bases import BASES
from fedp2eft.bases.parts import ROWS
from fedp2eft.client.training import features
from fedp2eft.errors import UserError
from fedp2eft.experiment.compare import compare
from fedp2eft.experiment.train import train
from fedp2eft.federation import client_app
from fedp2eft.federation.local import LocalGrid
from fedp2eft.federation.wire.messages import PERSONALIZE
from fedp2eft.generator import PSG
from fedp2eft.methods import ClientSide
from fedp2eft.progress import LogReporter
from fedp2eft.results.plan import plan, settings_of
from fedp2eft.runtime import phases, workspace
from fedp2eft.runtime.workspace import Workspace
from fedp2eft.settings.experiment import Settings
from fedp2eft.tasks.task import Scores
from tiny_run import (
    CLIENTS,
    LABELS,
    SEEN,
    UNSEEN,
    World,
    assert_same,
    outcome,
    vocabulary,
    write_jsonl,
)
from turns import TRAIN_BASE, TRAIN_PSG

PRIVATE = ("feddpa-t", "dept-spec")
# Large steps, so that what a client has for itself can be seen in its numbers.
QUICK = {
    "base__lora_rank": 2,
    "base__lora_alpha": 4.0,
    "base__lr": 3e-2,
    "federation__rounds": 2,
    "federation__clients_per_round": 4,  # each in both rounds: ξ is known in the second
    "evaluation__ranks": [1],
    "evaluation__methods": ["base", "lora", "fedp2eft"],
}
WORDS = "bert.embeddings.word_embeddings.weight"


@dataclass
class Run:
    """A finished run, its messages and the base weights with which each client's work was done."""

    settings: Settings
    folder: Path
    messages: list[tuple[Any, Any]] = field(default_factory=list)
    present: list[tuple[str, str, dict[str, torch.Tensor]]] = field(default_factory=list)


@pytest.fixture(scope="module", params=[kind for kind in BASES if kind != "standard-fl"])
def run(request: Any, world: World, tmp_path_factory: pytest.TempPathFactory) -> Run:
    settings = world.settings(**QUICK, base__kind=request.param)
    done = Run(settings, tmp_path_factory.mktemp(request.param) / "run")
    run_client, fine_tune = LocalGrid._run_client, phases.train_round

    def recording(grid: Any, message: Any) -> Any:
        reply = run_client(grid, message)
        done.messages.append((message, reply))
        return reply

    def watched(original: Any, kind: str, bt: Any, *args: Any, **options: Any) -> Any:
        name = str(watching[-1])
        done.present.append((kind, name, weights_of(bt)))
        return original(bt, *args, **options)

    watching: list[str] = []
    named = client_app.client_name

    def client_name(context: Any, at: Workspace) -> str:
        watching.append(named(context, at))
        return watching[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalGrid, "_run_client", recording)
        patch.setattr(client_app, "client_name", client_name)
        patch.setattr(phases, "train_round", partial(watched, fine_tune, TRAIN_PSG))
        patch.setattr(workspace, "features", partial(watched, features, "xi"))
        for name in settings.evaluation.methods:
            method = client_app.METHODS[name]

            def fitted(client: Any, rank: int, fit: Any = method.fit) -> Any:
                done.present.append((PERSONALIZE, watching[-1], weights_of(client.bt)))
                return fit(client, rank)

            patch.setitem(client_app.METHODS, name, replace(method, fit=fitted))
        train(settings, done.folder)
    return done


def weights_of(bt: Any) -> dict[str, torch.Tensor]:
    """The base's own parameters as they are now, under their names in the plain model."""
    found = {}
    for name, p in bt.model.get_base_model().named_parameters():
        if ".lora_" not in name:
            found[name.replace(".base_layer", "")] = p.detach().clone()
    return found


def parts(run: Run) -> dict[str, dict[str, torch.Tensor]]:
    """The newest part of each client that has one."""
    found = {}
    for folder in sorted((run.folder / "clients").glob("*")):
        found[folder.name] = load_file(max(folder.glob("base-*.safetensors")))
    return found


def expected_base(run: Run, name: str) -> dict[str, torch.Tensor]:
    """The base as a client has it, from the files of the run alone."""
    kind, part = run.settings.base.kind, parts(run).get(name, {})
    base = load_file(run.folder / "base" / "model.safetensors")
    for key, value in part.items():
        if kind == "dept-spec" and not key.endswith(ROWS):
            base[key][part[key + ROWS]] = value
        if kind == "feddpa-t" and key.endswith(".lora_B"):
            layer = key.removesuffix(".lora_B")
            base[f"{layer}.weight"] += value @ part[f"{layer}.lora_A"]
    return base


# ── every base ──────────────────────────────────────────────────────────────────────────────────


def test_every_method_runs_on_every_base(run: Run) -> None:
    cells = {path.parent.name for path in run.folder.glob("cells/*/*.json")}
    assert cells == {"base-r0", "lora-r1", "fedp2eft-r1"}
    assert len(list(run.folder.glob("cells/*/*.json"))) == 3 * len(CLIENTS)
    AutoModelForSequenceClassification.from_pretrained(run.folder / "base")
    assert not list((run.folder / "checkpoints").glob("base-*"))
    base = load_file(run.folder / "base" / "model.safetensors")
    assert not [name for name in base if "lora" in name]
    trained = {line["phase"] for line in map(json.loads, (run.folder / "metrics.jsonl").open())}
    assert trained == ({"psg"} if run.settings.base.kind == "none" else {"base", "psg"})


def test_what_travels_is_what_the_base_names_and_no_private_number(run: Run) -> None:
    """Every array of every message, by name and shape; and no value that stays is in any."""
    s = run.settings
    base = BASES[s.base.kind]
    plain = AutoModelForSequenceClassification.from_pretrained(run.folder / "base")
    allowed = {n: tuple(p.shape) for n, p in base.travelling(base.wrap(plain, s), s.base).items()}
    phi = PSG.from_pretrained(run.folder / "psg").state_dict()
    phi_shapes = {name: tuple(value.shape) for name, value in phi.items()}
    kinds = set()
    private = [
        value.numpy().tobytes()
        for part in parts(run).values()
        for key, value in part.items()
        if not key.endswith(ROWS) and value.numel() > 8 and value.any()
    ]
    assert bool(private) == (s.base.kind in PRIVATE)
    words = [word.encode() for word in vocabulary() if len(word) >= 5]
    words += [label.encode() for label in LABELS]
    for message, reply in run.messages:
        kind = message.metadata.message_type
        kinds.add(kind)
        asked = message.content.config_records.get("config", {}).get("method")
        for content in (message.content, reply.content):
            got = {
                name: tuple(array.numpy().shape)
                for record in content.array_records.values()
                for name, array in record.items()
            }
            if kind == TRAIN_BASE:
                assert got == allowed
            elif kind == TRAIN_PSG or (asked == "fedp2eft" and content is message.content):
                assert got == phi_shapes
            else:
                assert got == {}
            raw = deflated(content)
            assert not any(value in raw for value in private)
            assert not any(word in raw for word in words)
        assert all(
            type(value) in (int, float)
            for record in reply.content.metric_records.values()
            for value in record.values()
        )
    assert (TRAIN_BASE in kinds) == (s.base.kind != "none")


def deflated(content: RecordDict) -> bytes:
    arrays = [a.numpy().tobytes() for r in content.array_records.values() for a in r.values()]
    return b"".join([*arrays, *(record.deflate() for record in content.values())])


def test_every_clients_work_is_done_on_its_own_base(run: Run) -> None:
    """ξ, stage 1 and each method see the base recomputed from the run's files, to the last bit."""
    wanted = {name: expected_base(run, name) for name in CLIENTS}
    seen = {(kind, name) for kind, name, _ in run.present}
    assert {name for kind, name in seen if kind == "xi"} == set(CLIENTS)
    assert {name for kind, name in seen if kind == PERSONALIZE} == set(CLIENTS)
    assert [kind for kind, _, _ in run.present].count(TRAIN_PSG) == 8
    for kind, name, weights in run.present:
        for key, value in wanted[name].items():
            assert torch.allclose(weights[key], value, atol=1e-6, rtol=0), (kind, name, key)
    if run.settings.base.kind not in PRIVATE:
        assert not (run.folder / "clients").exists()
        return
    own = {name: torch.cat([v.flatten() for v in w.values()]) for name, w in wanted.items()}
    have = [*parts(run)]
    everybody = run.settings.base.kind == "feddpa-t"
    assert have == sorted(CLIENTS if everybody else trained_on(run))
    for i, one in enumerate(have):
        for other in have[i + 1 :]:
            assert not torch.equal(own[one], own[other])


def trained_on(run: Run) -> set[str]:
    replies = [r for m, r in run.messages if m.metadata.message_type == TRAIN_BASE]
    return {str(reply.content.config_records["about"]["client"]) for reply in replies}


def test_an_exported_adapter_gives_the_clients_logits_under_plain_peft(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """run/base + the exported folder, by PEFT alone, against the client's own base and adapter."""
    ids = torch.arange(4, 16).reshape(2, 6)
    for name in ("de-seen-00", "fr-unseen-00"):
        folder = run.folder / "adapters" / name / "fedp2eft-r1"
        model = AutoModelForSequenceClassification.from_pretrained(run.folder / "base")
        with torch.no_grad():
            common = model.eval()(input_ids=ids).logits
        got = PeftModel.from_pretrained(model, folder).eval()
        work = Workspace(run.settings, run.folder)
        psg = PSG.from_pretrained(run.folder / "psg")
        work.psg.load_state_dict(psg.state_dict())
        message = next(
            m for m, r in run.messages
            if m.content.config_records.get("config", {}).get("method") == "fedp2eft"
        )  # fmt: skip
        client = client_app.client_side(work, message, name)
        told: list[torch.Tensor] = []

        def measure(_: Any, model: Any, told: list[torch.Tensor] = told) -> Scores:
            with torch.no_grad():
                told.append(model.eval()(input_ids=ids).logits)
            return Scores(0, 0, 0.0)

        monkeypatch.setattr(ClientSide, "score", measure)
        client_app.METHODS["fedp2eft"].fit(client, 1)
        with torch.no_grad():
            logits = got(input_ids=ids).logits
        assert torch.allclose(logits, told[0], atol=1e-5, rtol=0)
        assert not torch.allclose(logits, common, atol=1e-3, rtol=0)
        merged = with_adapter(
            AutoModelForSequenceClassification.from_pretrained(run.folder / "base"), folder
        ).merge_and_unload()
        with torch.no_grad():
            assert torch.allclose(merged.eval()(input_ids=ids).logits, told[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", ["compact", "merged"])
def test_another_layout_of_an_exported_adapter(run: Run, tmp_path: Path, layout: Any) -> None:
    name = "de-seen-00" if "de-seen-00" in parts(run) else "de-seen-01"
    folder = run.folder / "adapters" / name / "fedp2eft-r1"
    ids = torch.arange(4, 16).reshape(2, 6)
    base = partial(AutoModelForSequenceClassification.from_pretrained, run.folder / "base")
    api.export(folder, tmp_path / "out", layout)
    if layout == "merged":
        other = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    else:
        other = PeftModel.from_pretrained(base(), tmp_path / "out")
    with torch.no_grad():
        wanted = PeftModel.from_pretrained(base(), folder).eval()(input_ids=ids).logits
        assert torch.allclose(other.eval()(input_ids=ids).logits, wanted, atol=1e-5, rtol=0)


def test_a_client_from_outside_gets_its_own_part(run: Run, world: World, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", world.client_rows("fr-unseen-00", "train"))
    psg = PSG.from_pretrained(run.folder / "psg")
    adapter = api.personalize(psg, run.folder / "base", rows, 1, test_data=rows, precision="fp32")
    assert adapter.weights.rows == ()
    local = 2 if run.settings.base.kind == "feddpa-t" else 0
    assert sum(adapter.ranks.values()) == len(adapter.ranks) * (1 + local)
    folder = adapter.save(tmp_path / "adapter")
    scores = api.evaluate(run.folder / "base", rows, folder, precision="fp32")
    assert adapter.scores
    assert scores.correct == adapter.scores.correct
    assert scores.loss == pytest.approx(adapter.scores.loss, abs=1e-5)


@pytest.mark.parametrize("kind", PRIVATE)
def test_an_own_part_and_a_label_prior_in_one_adapter(world: World, tmp_path: Path, kind) -> None:
    """On the common base the saved adapter scores as the client's own base with the offset did."""
    short = {"federation__rounds": 1, "evaluation__methods": ["prior", "fedp2eft"]}
    settings = world.settings(
        **QUICK | short, base__kind=kind, local__logit_adjustment="own",
        evaluation__pools=["unseen"],
    )  # fmt: skip
    train(settings, tmp_path / "run")
    for client in UNSEEN:
        rows = write_jsonl(tmp_path / "rows.jsonl", world.client_rows(client, "test"))
        plain = api.evaluate(tmp_path / "run" / "base", rows, precision="fp32")
        for cell in ("prior-r0", "fedp2eft-r1"):
            told = json.loads((tmp_path / "run" / "cells" / cell / f"{client}.json").read_text())
            adapter = tmp_path / "run" / "adapters" / client / cell
            scores = api.evaluate(tmp_path / "run" / "base", rows, adapter, precision="fp32")
            assert scores.correct == told["correct"]
            assert scores.loss == pytest.approx(told["loss"], abs=1e-5)
            assert scores.loss != pytest.approx(plain.loss, abs=1e-2)


# ── a base of one's own ─────────────────────────────────────────────────────────────────────────


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


def test_going_on_from_an_older_checkpoint(
    whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest checkpoint of the base is damaged: its round is repeated from the client's files
    of the time, not from those that it left later."""
    if whole.settings.base.kind != "dept-spec":
        pytest.skip("its parts are made when the rounds are over")
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "save_base", power_cut)
        with pytest.raises(PowerCutError):
            train(whole.settings, folder)
    (folder / "checkpoints" / "base-000003.safetensors").write_bytes(b"x")
    train(whole.settings, folder)
    assert_same(outcome(folder), outcome(whole.folder))


def test_from_the_beginning_where_no_checkpoint_is_left(
    whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if whole.settings.base.kind != "dept-spec":
        pytest.skip("its parts are made when the rounds are over")
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "save_base", power_cut)
        with pytest.raises(PowerCutError):
            train(whole.settings, folder)
    shutil.rmtree(folder / "checkpoints")
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
