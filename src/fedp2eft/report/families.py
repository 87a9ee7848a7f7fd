"""Language families, to stand beside what a federation learns of languages."""

from __future__ import annotations

# Genus, or family where one genus is all of it here (Glottolog's classification, coarse).
_FAMILIES = {
    "Germanic": "de en nl da sv nb nn no is af yi lb",
    "Romance": "fr es it pt ro ca gl oc ast",
    "Slavic": "cs pl ru uk sk bg sr hr bs sl mk be",
    "Baltic": "lt lv",
    "Hellenic": "el",
    "Indo-Aryan": "hi ur bn mr ne pa gu si",
    "Iranian": "fa ku ps tg",
    "Celtic": "cy ga br",
    "Armenian": "hy",
    "Albanian": "sq",
    "Uralic": "fi hu et se",
    "Turkic": "tr az kk uz ky ug tt",
    "Semitic": "ar he am amh ti tir mt",
    "Cushitic": "so som om orm",
    "Chadic": "ha hau",
    "Bantu": "sw lin lug run sna xho zu zul",
    "Volta-Niger": "ibo ig yor yo",
    "English creole": "pcm",
    "Sinitic": "zh yue",
    "Tibeto-Burman": "my dz bo",
    "Japonic": "ja",
    "Koreanic": "ko",
    "Tai": "th lo",
    "Vietic": "vi",
    "Khmer": "km",
    "Austronesian": "id ms tl jv mg",
    "Dravidian": "ta te ml kn",
    "Kartvelian": "ka",
    "Basque": "eu",
    "Constructed": "eo",
}
_SPOKEN_LIKE = {"eng": "en", "fra": "fr", "swa": "sw", "deu": "de", "spa": "es", "zho": "zh"}
_OF = {code: family for family, codes in _FAMILIES.items() for code in codes.split()}


def family(language: str) -> str:
    """Family of a language code ("pt_BR" counts as "pt"); "" where it is not known."""
    code = language.replace("-", "_").split("_")[0].lower()
    return _OF.get(_SPOKEN_LIKE.get(code, code), "")
