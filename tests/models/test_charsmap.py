"""The charsmap, read back by the normalizer that it is written for."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.normalizers import Precompiled

from fedp2eft.models.offline import charsmap
from fedp2eft.models.offline.charsmap import encode_charsmap
from fedp2eft.models.offline.unigram import composition_rules

# Unassigned characters, marks and line ends would join their neighbours into one unit.
LETTERS = st.characters(categories=("Lu", "Ll", "Nd", "Po"), max_codepoint=0x2FFFF)


@given(
    st.dictionaries(LETTERS, st.text(LETTERS, max_size=4), min_size=1, max_size=300),
    st.lists(LETTERS, max_size=20),
)
def test_each_character_is_rewritten_or_kept(rules: dict[str, str], others: list[str]) -> None:
    normalizer = Precompiled(encode_charsmap(rules))
    for char in [*rules, *others]:
        assert normalizer.normalize_str(char) == rules.get(char, char)


def test_many_rules_and_shared_prefixes() -> None:
    rules = {chr(code): f"<{code}>" for code in range(0x4E00, 0x5800)}
    rules |= {chr(code): chr(code + 1) for code in range(ord("a"), ord("z"))}
    normalizer = Precompiled(encode_charsmap(rules))
    for char, replacement in rules.items():
        assert normalizer.normalize_str(char) == replacement
    assert normalizer.normalize_str("z\u5800") == "z\u5800"


def test_shortest_key_wins() -> None:
    normalizer = Precompiled(encode_charsmap({"e": "1", "e\u0301": "2", "n\u0303": "3"}))
    assert normalizer.normalize_str("e") == normalizer.normalize_str("e\u0301") == "1"
    assert normalizer.normalize_str("n n\u0303") == "n 3"


def test_too_many_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(charsmap, "_MAX_UNITS", 256)
    with pytest.raises(ValueError, match="beyond the format's offsets"):
        encode_charsmap({chr(code): "x" for code in range(0x100, 0x500)})


def test_compositions_join_letter_and_mark() -> None:
    rules = composition_rules({"\u0341": "\u0301", "o": "x"})
    assert rules["e\u0301"] == rules["e\u0341"] == "é"
    assert all(unicodedata.normalize("NFC", key) == value for key, value in rules.items())
    assert not any(key.startswith("o") or len(key) != 2 for key in rules)
    normalizer = Precompiled(encode_charsmap(rules))
    assert normalizer.normalize_str("cafe\u0301 ñ n\u0303") == "café ñ ñ"


@pytest.mark.parametrize("rules", [{}, {"": "a"}, {"a\0": "b"}, {"a": "\0"}])
def test_what_the_format_cannot_hold_is_refused(rules: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="charsmap"):
        encode_charsmap(rules)
