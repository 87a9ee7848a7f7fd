"""Seen clients whom the base is not trained on: who they are, and who is asked what."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedp2eft.data.clients import NEW_LANGUAGE, SEEN, UNSEEN
from fedp2eft.errors import UserError
from fedp2eft.federation.server.exchange import Member
from fedp2eft.federation.server.held_out import asked, hold_out, training_base
from fedp2eft.federation.wire.messages import LABELS, SURVEY
from fedp2eft.methods import METHODS
from fedp2eft.settings.experiment import BaseSettings, Settings
from tiny_run import World
from watching import watched


def members(languages: list[int]) -> list[Member]:
    """So many seen clients of each language, one unseen and one of a new language."""
    seen = [
        Member(10 * i + j, f"l{i}-{j}", f"l{i}", SEEN, 9)
        for i, count in enumerate(languages)
        for j in range(count)
    ]
    return [*seen, Member(901, "u", "l0", UNSEEN, 9), Member(902, "n", "x", NEW_LANGUAGE, 9)]


def settings(share: float, seed: int = 42) -> Settings:
    return replace(Settings(), seed=seed, base=BaseSettings(held_out=share))


@given(
    languages=st.lists(st.integers(1, 5), min_size=1, max_size=6).filter(lambda x: sum(x) > 1),
    share=st.floats(0.01, 0.45),
    seed=st.integers(0, 99),
)
def test_share_of_the_seen_clients_is_held_out_language_by_language(languages, share, seed) -> None:
    everybody = members(languages)
    found = hold_out(everybody, settings(share, seed))
    assert [m.client for m in found] == [m.client for m in everybody]
    held = [m for m in found if m.held_out]
    assert all(m.pool == SEEN for m in held)
    assert len(held) == max(1, round(share * sum(languages)))
    assert len(training_base(found)) == sum(languages) - len(held)
    taken = Counter(m.language for m in held)
    for language, number in enumerate(languages):  # nobody gives two before all have given one
        assert taken[f"l{language}"] >= min(number, max(taken.values()) - 1)
    again = hold_out(everybody[::-1], settings(share, seed))
    assert {m.client for m in again if m.held_out} == {m.client for m in held}


def test_seed_draws_them() -> None:
    drawn = {
        tuple(m.client for m in hold_out(members([4] * 4), settings(0.25, seed)) if m.held_out)
        for seed in range(20)
    }
    assert len(drawn) > 10


def test_nobody_is_held_out_by_default_and_somebody_must_be_left() -> None:
    everybody = members([2, 1])
    assert hold_out(everybody, Settings()) == everybody
    with pytest.raises(UserError, match=r"base.held_out is 0.9: of 3 seen clients none is left"):
        hold_out(everybody, settings(0.9))


def test_surveys_that_try_methods_ask_the_held_out_alone() -> None:
    found = hold_out(members([4] * 4), settings(0.25))
    held = {m.node for m in found if m.held_out}
    trying = {name for name in METHODS for s in METHODS[name].surveys if s.held_out}
    assert trying >= {"auto", "lora-tuned", "fedp2eft-tuned", "label-prior"}
    for name, method in METHODS.items():
        for survey in method.surveys:
            nodes = set(asked(survey, found))
            assert nodes == (held if survey.held_out else {m.node for m in found if m.pool == SEEN})
            assert len(asked(survey, members([4] * 4))) == 16, name
    assert not METHODS["fedp2eft-global"].surveys[0].held_out


def test_a_run_with_held_out_clients(world: World, tmp_path: Path) -> None:
    """Two of four clients train the base and give q; the other two alone try methods."""
    done = watched(
        world.settings(
            base__held_out=0.5, base__clients_per_round=4, federation__clients_per_round=4,
            auto={"lrs": [1e-2], "epochs": [1]}, evaluation__ranks=[2],
            evaluation__methods=["prior", "lora-tuned", "auto"],
        ),
        tmp_path / "run",
    )  # fmt: skip
    nodes: dict[str, set[int]] = defaultdict(set)
    for message, _reply in done.messages:
        nodes[message.metadata.message_type].add(message.metadata.dst_node_id)
    base, trying = nodes["train.base"], nodes[SURVEY]
    assert len(base) == len(trying) == 2
    assert not base & trying
    assert nodes[LABELS] == base
    assert nodes["train.psg"] == base | trying
    facts = json.loads((done.folder / "psg" / "config.json").read_text())["origin"]
    assert facts["clients"] == 4
