"""Whole tiny runs on every base: what leaves a client, what stays, and what is done with it."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import RecordDict
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from base_runs import PRIVATE, QUICK, Run, parts
from fedp2eft import api
from fedp2eft.adapters.convert import with_adapter
from fedp2eft.bases import BASES
from fedp2eft.bases.parts import ROWS
from fedp2eft.client.training import features
from fedp2eft.experiment.train import train
from fedp2eft.federation import client_app
from fedp2eft.federation.local import LocalGrid
from fedp2eft.federation.wire.messages import PERSONALIZE
from fedp2eft.generator import PSG
from fedp2eft.methods import ClientSide
from fedp2eft.runtime import phases, workspace
from fedp2eft.runtime.workspace import Workspace
from fedp2eft.tasks.task import Scores
from tiny_run import (
    CLIENTS,
    LABELS,
    UNSEEN,
    World,
    vocabulary,
    write_jsonl,
)
from turns import TRAIN_BASE, TRAIN_PSG


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
