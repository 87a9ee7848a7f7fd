"""ROUGE, METEOR and chrF of generated texts, and how words are cut in every script."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from fedp2eft.errors import UserError
from fedp2eft.tasks import text_scores as module
from fedp2eft.tasks.text_scores import METEOR, PLAIN_METEOR, TEXT_SCORES, text_scores, words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The cat, the HAT!", ["the", "cat", "the", "hat"]),
        ("naïve Straße 42", ["naïve", "strasse", "42"]),
        ("don't", ["don", "t"]),
        ("猫が好き。", ["猫", "が", "好", "き"]),
        ("用Python写", ["用", "python", "写"]),
        ("Ａ１", ["a1"]),
        ("고양이 좋아", ["고양이", "좋아"]),
        ("पानी पीता", ["पानी", "पीता"]),  # vowel signs belong to their word
        ("తెలుగు భాష", ["తెలుగు", "భాష"]),
        ("ที่นี่", ["ที่", "นี่"]),  # Thai: a consonant with its marks
        ("قطة سوداء", ["قطة", "سوداء"]),
        ("...", []),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_equal_texts_score_one_and_foreign_ones_nothing() -> None:
    same = "a list of all the files that the package holds"
    sums = text_scores([same, "xyz"], [same, "a b c"])
    name = METEOR if METEOR in sums else PLAIN_METEOR
    assert set(sums) == {"rouge1", "rouge2", "rougeL", name, "chrf"}
    assert set(sums) < set(TEXT_SCORES)
    assert sums["rouge1"] == sums["rouge2"] == sums["rougeL"] == pytest.approx(1.0)
    assert sums["chrf"] == pytest.approx(1.0)
    assert sums[name] == pytest.approx(1 - 0.5 / 10**3)  # one chunk of ten matches


def test_rouge_by_hand_with_and_without_spaces() -> None:
    # 3 of 4 and of 5 words; 1 of 3 and of 4 pairs; longest common subsequence 3
    for text, reference in [("a b x c", "a b c y z"), ("天 地 人 和", "天地和山水")]:
        sums = text_scores([text], [reference])
        assert sums["rouge1"] == pytest.approx(2 * 3 / 9)
        assert sums["rouge2"] == pytest.approx(2 * 1 / 7)
        assert sums["rougeL"] == pytest.approx(2 * 3 / 9)


def test_chrf_is_sacrebleus_of_each_row() -> None:
    from sacrebleu.metrics import CHRF

    rows = [("der hund schläft", "der hund schlief"), ("猫", "猫が好き")]
    alone = [CHRF().sentence_score(text, [reference]).score / 100 for text, reference in rows]
    sums = text_scores(*zip(*rows, strict=True))
    assert sums["chrf"] == pytest.approx(sum(alone))
    assert 0 < min(alone) < max(alone) < 1


class WordNet:
    """A WordNet of one synonym."""

    class Lemma:
        def name(self) -> str:
            return "hound"

    class Synset:
        def lemmas(self) -> list[Any]:
            return [WordNet.Lemma()]

    def ensure_loaded(self) -> None:
        pass

    def synsets(self, word: str) -> list[Any]:
        return [WordNet.Synset()] if word == "dog" else []


class NoWordNet(WordNet):
    def ensure_loaded(self) -> None:
        raise LookupError("Resource wordnet not found.")


@pytest.fixture
def meteor(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    import nltk.corpus
    from nltk.translate import meteor_score

    monkeypatch.setattr(nltk.corpus, "wordnet", request.param)
    single = meteor_score.single_meteor_score
    defaults = (*(single.__defaults__ or ())[:2], request.param, *(single.__defaults__ or ())[3:])
    monkeypatch.setattr(single, "__defaults__", defaults)
    module._meteor.cache_clear()
    yield
    module._meteor.cache_clear()


@pytest.mark.parametrize("meteor", [WordNet()], indirect=True)
def test_meteor_counts_synonyms_where_there_is_a_wordnet(meteor: None) -> None:
    assert text_scores(["dog"], ["hound"])[METEOR] > 0
    assert text_scores(["walking"], ["walked"])[METEOR] > 0


@pytest.mark.parametrize("meteor", [NoWordNet()], indirect=True)
def test_without_wordnet_exact_and_stems_match_and_the_name_says_so(meteor: None) -> None:
    sums = text_scores(["dog"], ["hound"])
    assert METEOR not in sums
    assert sums[PLAIN_METEOR] == 0
    assert text_scores(["walking"], ["walked"])[PLAIN_METEOR] > 0


def test_an_empty_answer_scores_nothing() -> None:
    sums = text_scores([""], ["a b"])
    assert not any(sums.values())


def test_a_missing_library_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "nltk" else find(name))
    with pytest.raises(UserError, match=r"need nltk: pip install 'fedp2eft\[causal-lm\]'"):
        text_scores(["a"], ["b"])
