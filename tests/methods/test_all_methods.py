"""Every registered method in one run of `fedp2eft train`, on the local engine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from one_client import LOCAL, adapted, asked, one_client

from fedp2eft.errors import UserError
from fedp2eft.experiment.compare import compare
from fedp2eft.experiment.train import train
from fedp2eft.methods import METHODS, WITH_PRIOR, method_named
from fedp2eft.methods.settings import AdaLoraSettings, TuningSettings
from fedp2eft.results.cells import read_cells
from fedp2eft.tasks.causal_lm import CausalLM
from fedp2eft.tasks.encoded import Encoded

ONE_RUN = {n for n, m in METHODS.items() if not m.variant and not m.texts and m.shared != "fedl2p"}


def cells(folder: Path, method: str) -> dict[str, dict]:
    rank = 2 if METHODS[method].ranked else 0
    found = (folder / "cells" / f"{method}-r{rank}").glob("*.json")
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in found}


def test_every_client_is_scored_with_every_method(all_methods) -> None:
    assert len(ONE_RUN) >= 12
    for method in ONE_RUN:
        found = cells(all_methods.folder, method)
        assert set(found) == {"de-seen-00", "fr-seen-00", "de-unseen-00"}
        assert all(cell["examples"] == 6 for cell in found.values())
        assert all(0 <= cell["correct"] <= 6 for cell in found.values())


def test_methods_of_one_budget_have_adapters_of_one_kind(all_methods) -> None:
    """Uniform structures have equal sizes; a global one is the same for all clients."""
    sizes = {
        method: {cell["parameters"] for cell in cells(all_methods.folder, method).values()}
        for method in ONE_RUN
    }
    assert sizes["base"] == sizes["label-prior"] == sizes["majority"] == {0}
    assert sizes["prior"] == {3}  # a number per class
    assert sizes["lora"] == sizes["lora-tuned"] == sizes["fedp2eft-scale"]
    assert len(sizes["lora"]) == len(sizes["fedp2eft-global"]) == 1
    assert sizes["fedp2eft"] == sizes["fedp2eft-structure"] == sizes["fedp2eft-tuned"]
    assert all(0 not in sizes[m] for m in sizes if m not in ("base", "label-prior", "majority"))


def test_methods_differ(all_methods) -> None:
    losses = {
        method: tuple(cell["loss"] for _, cell in sorted(cells(all_methods.folder, method).items()))
        for method in ONE_RUN
        if method != "prior"  # which label-prior is where it chooses τ = 1
    }
    assert len(set(losses.values())) == len(losses)


def test_variant_is_refused_before_anything_runs(world, tmp_path) -> None:
    settings = world.settings(evaluation__methods=["lora", "fedp2eft-layerwise"])
    with pytest.raises(UserError, match=r"adapter\.layerwise: true"):
        train(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_variant_runs_where_the_settings_have_it(world, three_clients, tmp_path) -> None:
    settings = world.settings(
        data__path=str(three_clients), evaluation__methods=["fedp2eft-layerwise"],
        evaluation__ranks=[2], adapter__layerwise=True, base__rounds=0, federation__rounds=1,
    )  # fmt: skip
    results = train(settings, tmp_path / "run")
    assert {(row.method, row.pool) for row in results.rows} == {
        ("fedp2eft-layerwise", "seen"), ("fedp2eft-layerwise", "unseen"),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["adalora", "bt-lora", "lora-tuned", "fedp2eft-tuned"])
def test_causal_lm_is_personalized(kind, method) -> None:
    lengths = [6, 7, 8, 9, 10, 6, 7, 8]  # of one word said over and over
    rows = Encoded.from_rows([[5] * n for n in lengths], [0] * 8, starts=[3] * 8)
    own = AdaLoraSettings(lr=0.1) if method == "adalora" else TuningSettings(lrs=[1e-6, 3e-2])
    client = one_client(
        bt=adapted(kind), task=CausalLM(0, 16), train=rows, test=rows,
        settings=replace(LOCAL, batch_size=4), own=own,
    )  # fmt: skip
    told = asked(method, [client], 2)
    assert told.get("best", torch.ones(1)).tolist() == [1]  # the larger rate is likelier
    outcome = METHODS[method].fit(replace(client, prepared=told), 2)
    plain = METHODS["base"].fit(client, 0)
    assert outcome.scores.correct is None
    assert outcome.scores.loss < plain.scores.loss
    assert sum(outcome.weights.ranks.values()) == 2 * len(client.bt.names)


def test_every_method_has_its_line_in_the_docs() -> None:
    text = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
    lines = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| `")]
    names = [name for name in METHODS if "+" not in name]
    variants = ["NAME+prior", "NAME+calibrated-prior"]
    assert sorted(lines) == sorted(f"`{name}`" for name in names + variants)


def test_every_method_that_trains_has_a_variant_with_the_label_prior() -> None:
    without = {name for name in METHODS if name + WITH_PRIOR not in METHODS}
    without = {name for name in without if "+" not in name}
    assert without == {
        "base", "majority", "prior", "calibrated-prior", "unigram", "label-prior", "auto",
    }  # fmt: skip
    own = {"logit_adjustment": "own"}
    for name in ("lora-tuned", "bt-lora", "gradient-shared", "fedp2eft-global", "fedl2p"):
        plain, variant = METHODS[name], METHODS[name + WITH_PRIOR]
        assert variant.variant == {"local": own}
        assert variant.classes
        assert (variant.fit, variant.surveys, variant.phase, variant.settings) == (
            plain.fit, plain.surveys, plain.phase, plain.settings,
        )  # fmt: skip
    paper = METHODS["fedp2eft-paper"].variant
    both = {"local": paper["local"] | own, "generator": paper["generator"]}
    assert METHODS["fedp2eft-paper+prior"].variant == both


def test_a_new_method_brings_its_variant_and_takes_it_away() -> None:
    METHODS["mine"] = METHODS["lora"]
    assert METHODS["mine+prior"].variant == {"local": {"logit_adjustment": "own"}}
    assert METHODS["mine+calibrated-prior"].label_prior
    del METHODS["mine"]
    assert not {"mine", "mine+prior", "mine+calibrated-prior"} & set(METHODS)
    METHODS["mine"] = replace(METHODS["lora"], texts=True)
    assert "mine+prior" not in METHODS
    del METHODS["mine"]
    variants = r"and NAME\+prior or NAME\+calibrated-prior of those that train"
    with pytest.raises(UserError, match=rf"'lroa' is unknown.*{variants}"):
        method_named("lroa")


def test_variants_with_the_label_prior_run(world, three_clients, tmp_path) -> None:
    """Tuned, shared, from the client's own λ: with the prior in the logits, scores are others."""
    names = ["lora-tuned", "fedp2eft-tuned", "fedp2eft-scale", "fedp2eft-random",
             "fedp2eft-global", "gradient-shared", "bt-lora"]  # fmt: skip
    settings = world.settings(
        data__path=str(three_clients), base__rounds=1, federation__rounds=1, compare__seeds=[3],
        evaluation__methods=[each + end for end in ("", WITH_PRIOR) for each in names],
        evaluation__ranks=[2], evaluation__pools=["unseen"], tuning__lrs=[3e-3, 2e-2],
    )  # fmt: skip
    folder = compare(settings, tmp_path / "run")
    loss = {c["method"]: [each["loss"] for each in c["clients"]] for c in read_cells(folder)}
    assert set(loss) == {*settings.evaluation.methods}
    for name in names:
        assert loss[name] != loss[name + WITH_PRIOR]
    assert sorted(path.name for path in (folder / "runs").iterdir()) == [
        "standard-fl-s3", "standard-fl-s3-local.logit_adjustment-own",
    ]  # fmt: skip


def test_the_papers_rates_are_those_of_a_run_without_settings() -> None:
    """1e-4 for A and B, 1e-2 for λ, λ̂ starts at 1e-4, 1e-4 for φ."""
    local = {"lr": 1e-4, "lambda_lr": 1e-2, "personalize_lr": 1e-4}
    generator = {"init_lambda": 1e-4, "lr": 1e-4}
    assert METHODS["fedp2eft-paper"].variant == {"local": local, "generator": generator}
    assert METHODS["lora-paper"].variant == {"local": {"personalize_lr": 1e-4}}
