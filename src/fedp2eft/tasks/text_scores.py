"""What a generated text scores beside its reference: ROUGE-1/2/L, METEOR and chrF, each 0 to 1.

Words for ROUGE and METEOR are cut the same way in every language (`words`): runs of letters, marks
and digits after NFKC and case folding; punctuation is dropped. Scripts that are written without
spaces (Chinese and Japanese, Thai, Lao, Khmer, Burmese, Tibetan) are cut into characters, each with
its marks. chrF needs no words.

METEOR is nltk's: exact, then stem (Porter), then synonym matches. Synonyms are those of the English
WordNet where nltk finds it on this machine; nothing is downloaded. Without it the score has another
name (`meteor-no-synonyms`), so that the two are never averaged together.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

from fedp2eft.errors import UserError

ROUGE = ("rouge1", "rouge2", "rougeL")
METEOR, PLAIN_METEOR = "meteor", "meteor-no-synonyms"
TEXT_SCORES = (*ROUGE, METEOR, PLAIN_METEOR, "chrf")
"""Names under which the sums of these scores travel and are kept."""

# First and last code point of the scripts without spaces, extensions of Han included.
_UNSPACED = (
    *((0x0E00, 0x0EFF), (0x0F00, 0x0FFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3005, 0x3007)),
    *((0x3040, 0x30FF), (0x31F0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF)),
    (0x20000, 0x3FFFF),
)


def words(text: str) -> list[str]:
    """Return the words of a text, or its characters if the script has no spaces."""
    found: list[str] = []
    grows = False  # whether the next letter belongs to the last word
    for sign in unicodedata.normalize("NFKC", text.casefold()):
        kind = unicodedata.category(sign)[0]
        alone = any(first <= ord(sign) <= last for first, last in _UNSPACED)
        if kind == "M" and found:
            found[-1] += sign
        elif kind in "LNM":
            if grows and not alone:
                found[-1] += sign
            else:
                found.append(sign)
            grows = not alone
        else:
            grows = False
    return found


def check_scorers() -> None:
    """Raise a `UserError` where a library that scores texts is not installed."""
    for module in ("rouge_score", "nltk", "sacrebleu"):
        if find_spec(module) is None:
            raise UserError(
                f"Scores of generated texts need {module}: pip install 'fedp2eft[causal-lm]'."
            )


def text_scores(generated: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return the sum over the rows of every score, by name.

    ROUGE is the F-measure (rouge-score, with `words`, no stemmer), METEOR nltk's with its own
    weights (α 0.9, β 3, γ 0.5), chrF sacrebleu's (6 characters, β 2) of each row for itself.

    Raises:
        UserError: A library is missing.
    """
    check_scorers()
    sums: Counter[str] = Counter()
    for text, reference in zip(generated, references, strict=True):
        sums.update(_row(text, reference))
    return dict(sums)


def _row(text: str, reference: str) -> dict[str, float]:
    rouge, chrf, (name, meteor) = _rouge(), _chrf(), _meteor()
    scores = {key: float(made.fmeasure) for key, made in rouge.score(reference, text).items()}
    scores[name] = float(meteor(words(reference), words(text)))
    scores["chrf"] = float(chrf.sentence_score(text, [reference]).score) / 100
    return scores


class _Words:
    """`words` as rouge-score wants its tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


class _NoSynonyms:
    """Stands in for WordNet if it is absent."""

    def synsets(self, _word: str) -> Iterable[Any]:
        return ()


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(ROUGE), tokenizer=_Words())


@cache
def _chrf() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()


@cache
def _meteor() -> tuple[str, Any]:
    """Return name and function (of two word lists) of the METEOR that this machine can compute."""
    from nltk.corpus import wordnet
    from nltk.translate.meteor_score import single_meteor_score

    try:
        wordnet.ensure_loaded()
    except LookupError:
        return PLAIN_METEOR, lambda a, b: single_meteor_score(a, b, wordnet=_NoSynonyms())
    return METEOR, single_meteor_score
