"""Lines of a comparison from hand-made cells, recomputed here by other means."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from statistics import mean, stdev
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedp2eft.results.layout import notes
from fedp2eft.results.summary import summarize
from fedp2eft.settings.experiment import CompareSettings, EvaluationSettings, Settings

SEEDS = [42, 52, 62]
LANGUAGES = {"seen": ["de", "fr"], "unseen": ["de", "fr"], "new-language": ["ko"]}


def comparison_settings(bases: Sequence[str] = ("standard-fl", "none"), **changes: Any) -> Settings:
    evaluation = {
        "methods": ["fedp2eft", "base", "label-prior", "lora"],
        "ranks": [2, 8],
        "pools": ["seen", "unseen", "new-language"],
    }
    return Settings(
        evaluation=EvaluationSettings(**(evaluation | changes)),
        compare=CompareSettings(bases=list(bases), seeds=SEEDS),
    )


def cell(base: str, method: str, rank: int, seed: int, pool: str) -> dict[str, Any]:
    """Scores that follow from the names alone."""
    chance = sum(f"{base}{method}{rank}{seed}{pool}".encode())
    rng = np.random.default_rng(chance)
    clients = []
    for language in LANGUAGES[pool]:
        for number in range(3):
            rows = 10 + 5 * number  # the same for every method, as test rows are
            facts = {"client": f"{language}-{pool}-{number:02d}", "language": language}
            facts |= {"examples": rows, "correct": int(rng.integers(0, rows + 1)), "loss": 0.5}
            clients.append(facts | {"parameters": 100 * rank + number, "seconds": 1.0 + number})
    if pool == "seen":  # a client without test rows
        empty = {"client": "xx-seen-00", "language": "xx", "examples": 0, "correct": 0, "loss": 0.0}
        clients.append(empty | {"parameters": 9, "seconds": 2.0})
    return {
        "method": method,
        "base": base,
        "rank": rank,
        "seed": seed,
        "pool": pool,
        "clients": clients,
        "seconds": 20.0,
        "bytes_up": seed,
        "bytes_down": 2 * seed,
        "peak_memory": 1000 + seed,
        "versions": {"torch": "2.13"},
        "machine": "m",
    }


def all_cells() -> list[dict[str, Any]]:
    return [
        cell(base, method, rank, seed, pool)
        for base in ("standard-fl", "none")
        for seed in SEEDS
        for pool in LANGUAGES
        for method, ranks in {
            "base": [0],
            "label-prior": [0],
            "lora": [2, 8],
            "fedp2eft": [2, 8],
        }.items()
        for rank in ranks
    ]


def test_a_comparison_shows_the_cells_of_its_budget():
    asked = comparison_settings()
    parameters = replace(asked, evaluation=replace(asked.evaluation, budget="parameters"))
    other = [
        cell(*key, seed=seed, pool="seen") | {"budget": "parameters", "seconds": 7.0}
        for key in (("none", "lora", 8), ("none", "base", 0))
        for seed in SEEDS
    ]
    whole = summarize(asked, all_cells())
    assert whole.budget == "ranks"
    assert summarize(asked, [*all_cells(), *other[:3]]) == whole
    made = summarize(parameters, [*all_cells(), *other[:3]])
    assert made.budget == "parameters"
    assert {(line.method, line.rank) for line in made.lines} == {
        ("lora", 8), ("base", 0), ("label-prior", 0),
    }  # fmt: skip
    assert "none/s42/seen/lora-p2" in made.missing
    assert "in parameters" in " ".join(notes(made))
    assert "in parameters" not in " ".join(notes(whole))


def accuracy(facts: dict[str, Any]) -> dict[str, float]:
    """By language, pooled."""
    right, rows = defaultdict(int), defaultdict(int)
    for client in facts["clients"]:
        if client["examples"]:
            right[client["language"]] += client["correct"]
            rows[client["language"]] += client["examples"]
    return {language: right[language] / rows[language] for language in rows}


def test_every_number_of_a_line():
    line = summarize(comparison_settings(), all_cells()).line("none", "seen", "lora", 8)
    assert line is not None
    mine = {seed: cell("none", "lora", 8, seed, "seen") for seed in SEEDS}
    base = {seed: cell("none", "base", 0, seed, "seen") for seed in SEEDS}
    means = [mean(accuracy(mine[seed]).values()) for seed in SEEDS]
    assert line.mean.mean == pytest.approx(mean(means))
    assert line.mean.half_width == pytest.approx(4.30265 * stdev(means) / 3**0.5)
    assert line.mean.seeds == pytest.approx(dict(zip(SEEDS, means, strict=True)))
    assert set(line.languages) == {"de", "fr"}
    german = [accuracy(mine[seed])["de"] for seed in SEEDS]
    assert line.languages["de"].mean == pytest.approx(mean(german))
    assert line.languages["de"].half_width == pytest.approx(4.30265 * stdev(german) / 3**0.5)
    worst = mean(min(accuracy(mine[seed]).values()) for seed in SEEDS)
    assert line.worst_language.mean == pytest.approx(worst)
    each = {
        seed: [c["correct"] / c["examples"] for c in mine[seed]["clients"] if c["examples"]]
        for seed in SEEDS
    }
    assert line.worst_client.mean == pytest.approx(mean(min(each[seed]) for seed in SEEDS))
    worse = [
        mean(
            a["correct"] < b["correct"]
            for a, b in zip(mine[seed]["clients"], base[seed]["clients"], strict=True)
            if a["examples"]
        )
        for seed in SEEDS
    ]
    assert line.worse_than_base is not None
    assert line.worse_than_base.mean == pytest.approx(mean(worse))
    assert line.clients == 6
    assert line.cost.seconds == pytest.approx(2.0)
    assert line.cost.parameters == pytest.approx(801)
    assert (line.cost.bytes_up, line.cost.bytes_down) == (52, 104)
    assert line.cost.peak_memory == 1062


def test_differences_are_those_of_the_means():
    made = summarize(comparison_settings(), all_cells())
    for method, rank, ranks in (("fedp2eft", 2, [2]), ("base", 0, [2, 8]), ("label-prior", 0, [2])):
        line = made.line("standard-fl", "unseen", method, rank or 2)
        for at in ranks:
            lora = made.line("standard-fl", "unseen", "lora", at)
            assert line is not None
            assert lora is not None
            found = line.difference("lora", at)
            assert found is not None
            assert found.value == pytest.approx(line.mean.mean - lora.mean.mean)
            assert found.low is not None
            assert found.high is not None
            assert found.low < found.value < found.high
    lora = made.line("standard-fl", "unseen", "lora", 2)
    assert lora is not None
    assert lora.difference("lora", 2) is None
    assert lora.difference("fedp2eft", 8) is None
    assert lora.difference("fedp2eft", 2) is not None


def test_lines_come_in_the_order_of_the_settings():
    made = summarize(comparison_settings(), all_cells())
    assert made.missing == []
    assert [(x.method, x.rank) for x in made.lines[:6]] == [
        *(("fedp2eft", 2), ("fedp2eft", 8), ("base", 0)),
        *(("label-prior", 0), ("lora", 2), ("lora", 8)),
    ]
    places = list(dict.fromkeys((line.base, line.pool) for line in made.lines))
    assert places == [(b, p) for b in ("standard-fl", "none") for p in LANGUAGES]
    assert (made.machines, made.versions) == (["m"], [{"torch": "2.13"}])


def test_cells_that_the_settings_do_not_ask_for_are_left_out():
    narrow = comparison_settings(methods=["lora"], ranks=[8], pools=["unseen"])
    made = summarize(narrow, all_cells())
    assert [(x.base, x.pool, x.method, x.rank) for x in made.lines] == [
        ("standard-fl", "unseen", "lora", 8),
        ("none", "unseen", "lora", 8),
    ]
    assert made.lines[0].worse_than_base is None
    assert made.lines[0].differences == ()


def test_missing_cells_change_no_other_line():
    whole = summarize(comparison_settings(), all_cells())
    gone = {
        ("none", "lora", 2, 42, "seen"),
        *(("none", "fedp2eft", 8, seed, "seen") for seed in SEEDS),
        ("none", "base", 0, 42, "seen"),
    }
    cells = [
        c
        for c in all_cells()
        if (c["base"], c["method"], c["rank"], c["seed"], c["pool"]) not in gone
    ]
    made = summarize(comparison_settings(), cells)
    assert sorted(made.missing) == sorted(f"{b}/s{s}/{p}/{m}-r{r}" for b, m, r, s, p in gone)
    assert made.line("none", "seen", "fedp2eft", 8) is None
    part = made.line("none", "seen", "lora", 2)
    assert part is not None
    assert list(part.mean.seeds) == [52, 62]
    mine = made.line("none", "seen", "fedp2eft", 2)
    assert mine is not None
    assert mine.worse_than_base is not None
    assert list(mine.worse_than_base.seeds) == [52, 62]
    found = mine.difference("lora", 2)
    assert found is not None
    assert found.value == pytest.approx(
        mean(mine.mean.seeds[seed] - part.mean.seeds[seed] for seed in (52, 62))
    )
    same = [line for line in whole.lines if (line.base, line.pool) != ("none", "seen")]
    assert [line for line in made.lines if (line.base, line.pool) != ("none", "seen")] == same


UNSEEN = [facts for facts in all_cells() if facts["pool"] == "unseen"]


@settings(max_examples=10, deadline=None)
@given(st.permutations(UNSEEN), st.sets(st.integers(0, len(UNSEEN) - 1)))
def test_the_order_of_the_cells_does_not_matter(order: list[Any], gone: set[int]):
    asked = comparison_settings(pools=["unseen"])
    cells = [facts for place, facts in enumerate(UNSEEN) if place not in gone]
    shuffled = [facts for facts in order if facts in cells]
    assert summarize(asked, shuffled) == summarize(asked, cells)
