"""Where a gain comes from: which steps there are, what they add up to, and what is said of them."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest

from fedp2eft.results.gains import gains_from, gains_of

RIGHT = {
    "base": (10, 12, 20, 8, 11, 15),
    "prior": (16, 17, 25, 15, 16, 22),
    "lora": (16, 18, 24, 15, 17, 21),
    "fedp2eft-structure": (16, 18, 25, 15, 18, 21),
    "fedp2eft": (13, 14, 20, 11, 14, 17),
}
"""Rows classified right of 30, of three clients per language."""
RANKED = ("lora", "fedp2eft-structure", "fedp2eft")


def clients(right: tuple[int, ...], **changes: Any) -> list[dict[str, Any]]:
    facts = [
        {"client": f"{name}-{n}", "language": name, "examples": 30, "loss": 0.5}
        for name in ("de", "ja")
        for n in range(3)
    ]
    return [{**f, "correct": n, **changes} for f, n in zip(facts, right, strict=True)]


def cells(ranks: tuple[int, ...] = (4,), **more: Any) -> dict[Any, Any]:
    made: dict[Any, Any] = {}
    for method, right in (RIGHT | more).items():
        for rank in ranks if method.startswith(RANKED) else (0,):
            made[method, rank] = {42: clients(right)}
    return made


def test_steps_are_paired_differences_and_sum_up_to_the_total():
    found = gains_of("standard-fl", "unseen", cells())
    assert found is not None
    assert [(s.before, s.after) for s in found.steps] == [
        ("base", "prior"),
        ("prior", "lora"),
        ("lora", "fedp2eft-structure"),
        ("fedp2eft-structure", "fedp2eft"),
    ]
    for step in found.steps:
        gain = (sum(RIGHT[step.after]) - sum(RIGHT[step.before])) / 180
        assert step.gain == pytest.approx(gain)
        assert step.low <= step.gain <= step.high
    assert found.total.gain == pytest.approx(sum(step.gain for step in found.steps))
    assert (found.start, found.end) == (pytest.approx(76 / 180), pytest.approx(89 / 180))
    assert found.clients == 6


def test_each_seed_may_have_languages_of_its_own():
    """Languages drawn by the seed: no client is dropped because another seed does not have it."""
    made = cells()
    for (method, _rank), seeds in made.items():
        other = [c for c in clients(RIGHT[method]) if c["language"] == "ja"]
        new = [c | {"client": c["client"] + "x", "language": "ko"} for c in other]
        seeds[52] = [*other, *new]
    found = gains_of("standard-fl", "unseen", made)
    assert found is not None
    assert found.clients == 6
    german, rest = sum(RIGHT["base"][:3]) / 90, sum(RIGHT["base"][3:]) / 90
    assert found.start == pytest.approx(((german + rest) / 2 + rest) / 2)
    assert found.total.gain == pytest.approx(found.end - found.start)


def test_what_is_said_is_one_of_three_kinds():
    found = gains_of("standard-fl", "unseen", cells())
    first, steps = found.text.split(" Step by step: ")
    assert first.startswith("Unseen clients (6): accuracy goes from 42.2 % (base model) to 49.4 %")
    assert "(fedp2eft, r = 4), a gain of +7.2 [" in first
    prior, lora, structure, size = steps.split("; ")
    assert prior.startswith("the client's label prior gains +19.4 [+")
    assert lora.startswith("LoRA at uniform ranks in place of it makes no clear difference (0.0 [")
    assert lora.endswith("which includes 0)")
    assert structure.startswith("FedP²EFT's choice of ranks makes no clear difference (+1.1 [")
    assert size.startswith("the size of its λ loses −13.3 [−")


def test_a_causal_lms_prior_is_its_unigram():
    found = gains_of("none", "unseen", cells(unigram=RIGHT["prior"]))
    assert found.steps[0].after == "prior"  # of a classification, if both were there
    causal = {key: made for key, made in cells(unigram=RIGHT["prior"]).items() if key[0] != "prior"}
    found = gains_of("none", "unseen", causal)
    assert [step.after for step in found.steps[:2]] == ["unigram", "lora"]
    assert found.steps[0].name == "the client's unigram"
    assert "the client's unigram gains +19.4" in found.text


def test_an_adapter_with_the_prior_stands_on_top_of_it():
    found = gains_of("standard-fl", "unseen", cells(), adjusted=True)
    assert "LoRA at uniform ranks on top of it" in found.text
    more = {"lora+prior": RIGHT["lora"], "fedp2eft+prior": RIGHT["fedp2eft"]}
    found = gains_of("standard-fl", "unseen", cells(**more))
    assert [s.after for s in found.steps] == ["prior", "lora+prior", "fedp2eft+prior"]
    assert "on top of it" in found.text


def test_a_temperature_stands_between_the_prior_and_an_adapter_that_has_it_too():
    calibrated = {"calibrated-prior": RIGHT["lora"]}
    after = {"lora+calibrated-prior": RIGHT["lora"], "fedp2eft+calibrated-prior": RIGHT["lora"]}
    found = gains_of("standard-fl", "unseen", cells(**calibrated, **after))
    assert [(step.after, step.name) for step in found.steps] == [
        ("prior", "the client's label prior"),
        ("calibrated-prior", "a temperature of the base's logits"),
        ("lora+calibrated-prior", "LoRA at uniform ranks on top of it"),
        ("fedp2eft+calibrated-prior", "FedP²EFT's choice of ranks and λ"),
    ]
    # An adapter without it cannot stand on top of it.
    for other in ({"lora+prior": RIGHT["lora"]}, {}):
        found = gains_of("standard-fl", "unseen", cells(**calibrated, **other))
        assert "calibrated-prior" not in [step.after for step in found.steps]
    alone = {k: v for k, v in cells(**calibrated).items() if not k[0].startswith(RANKED)}
    assert gains_of("standard-fl", "unseen", alone).steps[-1].after == "calibrated-prior"


def test_methods_that_are_not_there_have_no_step():
    some = {key: value for key, value in cells().items() if key[0] in ("base", "lora", "fedp2eft")}
    found = gains_of("standard-fl", "seen", some)
    assert [s.name for s in found.steps] == [
        "LoRA at uniform ranks",
        "FedP²EFT's choice of ranks and λ",
    ]
    assert gains_of("standard-fl", "seen", {("base", 0): {42: clients(RIGHT["base"])}}) is None
    some["fedp2eft", 4] = {52: clients(RIGHT["fedp2eft"])}  # another seed than the others so far
    found = gains_of("standard-fl", "seen", some)
    assert [s.after for s in found.steps] == ["lora"]
    assert "Step by step" not in found.text


def test_a_budget_counts_with_its_mean_and_alone():
    made = cells(ranks=(2, 8))
    made["lora", 8] = {42: clients(tuple(n + 3 for n in RIGHT["lora"]))}
    found = gains_of("standard-fl", "unseen", made)
    lora = found.steps[1]
    assert {rank: round(one.value, 6) for rank, one in lora.by_rank.items()} == {2: 0.0, 8: 0.1}
    assert lora.gain == pytest.approx(0.05)
    assert not found.steps[0].by_rank
    assert "mean of r = 2 and 8" in found.text


def test_a_budget_with_fewer_seeds_takes_none_from_the_others():
    made = cells(ranks=(2, 8))
    for (_, rank), by_seed in made.items():
        if rank != 8:
            by_seed[52] = by_seed[42]
    found = gains_of("standard-fl", "unseen", made)
    assert found.ranks == [2]
    assert "(fedp2eft, r = 2)" in found.text
    assert found.text.startswith("Unseen clients (6): ")


def test_seeds_that_the_last_method_lacks_are_named():
    made = cells()
    for by_seed in made.values():
        by_seed |= {52: by_seed[42], 62: by_seed[42]}
    del made["fedp2eft", 4][52]
    assert "clients (6; seeds 42 and 62 alone): " in gains_of("none", "seen", made).text
    del made["fedp2eft", 4][62]
    assert "clients (6; seed 42 alone): " in gains_of("none", "seen", made).text


def test_a_lower_loss_is_a_gain():
    made = {
        (method, 0): {42: clients(RIGHT["base"], tokens=100, loss=loss)}
        for method, loss in (("base", 2.5), ("lora", 2.25))
    }
    found = gains_of("standard-fl", "seen", made)
    assert found.total.gain == pytest.approx(0.25)
    assert "response loss goes from 2.500 nats per token" in found.text
    assert "a gain of +0.250 [+0.250, +0.250]" in found.text


def test_a_single_client_has_no_interval():
    made = {key: {42: made[42][2:4]} for key, made in cells().items()}
    found = gains_of("standard-fl", "seen", made)
    assert found.total.low is None
    assert "gains +20.0 (too few clients for an interval)" in found.text


def test_gains_are_read_as_they_were_written():
    found = gains_of("standard-fl", "unseen", cells(ranks=(2, 8)))
    assert gains_from(json.loads(json.dumps(asdict(found)))) == found
