"""A few thousand damaged inputs for everything that is parsed; see `targets`."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator

import pytest
import targets
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

CASES, FEW = 220, 25


@pytest.fixture(scope="module", autouse=True)
def _tidy() -> Iterator[None]:
    yield
    logging.disable(logging.NOTSET)
    shutil.rmtree(targets.folder(), ignore_errors=True)
    for made in (targets.folder, targets.psg, targets.seeds):
        made.cache_clear()


@st.composite
def damaged(draw: st.DrawFn, name: str) -> bytes:
    """A whole input with a few edits, or any bytes."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=200))
    data = bytearray(draw(st.sampled_from(targets.seeds(name))))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        to = min(len(data), at + draw(st.integers(0, 12)))
        kind = draw(st.sampled_from(["replace", "insert", "cut", "double", "text", "flip"]))
        if kind == "replace":
            data[at:to] = draw(st.binary(max_size=12))
        elif kind == "insert":
            data[at:at] = draw(st.binary(max_size=12))
        elif kind == "cut":
            del data[at : draw(st.sampled_from([to, len(data)]))]
        elif kind == "double":
            data[at:at] = data[at:to]
        elif kind == "text":
            word = st.sampled_from(
                ["null", "-1", "1e999", "NaN", "[]", "{}", '""', "true", "99999999999999999999",
                 "../../x", "\\u0000", "\\ud800", "é", "[[", "0.5", "&a", "*a", "!!python/name:os"]
            )  # fmt: skip
            data[at:to] = draw(word).encode()
        elif at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
    return bytes(data)


@pytest.mark.parametrize("name", targets.TARGETS)
def test_damaged_input_is_taken_or_refused_in_one_line(name: str) -> None:
    taken = [targets.check(name, seed) for seed in targets.seeds(name)]
    assert taken[0]

    @settings(
        max_examples=FEW if name in targets.SLOW else CASES, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(data=damaged(name))
    def run(data: bytes) -> None:
        targets.check(name, data)

    run()


def test_a_target_that_fails_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(_data: bytes) -> None:
        raise KeyError("x")

    monkeypatch.setitem(targets.TARGETS, "array", crash)
    with pytest.raises(KeyError):
        targets.check("array", b"")
