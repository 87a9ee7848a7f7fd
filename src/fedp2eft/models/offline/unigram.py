"""Rebuilds the XLM-R tokenizer (SentencePiece Unigram) from its pieces, scores and character map.

The character map of the source file says what becomes of one code point (NFKC, with control
characters dropped and all spaces made equal). The table of the original model also joins a letter
and a combining mark; those rules follow from Unicode's canonical compositions and the map, so they
are derived here rather than stored. `tokenizers` looks a rule up only for user-perceived characters
shorter than six bytes, hence no longer keys.
"""

import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import Unigram
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from fedp2eft.models.offline.charsmap import encode_charsmap

SPECIAL_TOKENS = {0: "<s>", 1: "<pad>", 2: "</s>", 3: "<unk>"}
MASK_TOKEN = "<mask>"
_LONGEST_KEY = 5  # bytes


def composition_rules(charmap: Mapping[str, str]) -> dict[str, str]:
    """Return letter + combining mark → letter, for the pairs that XLM-R's normalizer joins.

    Args:
        charmap: one code point -> its replacement. A letter that it rewrites starts no pair, as the
            shorter rule wins; a mark that it rewrites to another mark may stand for that one.
    """
    spellings: defaultdict[str, list[str]] = defaultdict(list)
    for char, replacement in charmap.items():
        if len(replacement) == 1 and unicodedata.combining(replacement):
            spellings[replacement].append(char)
    rules = {}
    for code in range(0xC0, 0x10000):
        pair = unicodedata.normalize("NFD", chr(code))
        if len(pair) != 2 or pair[0] in charmap:
            continue
        joined = unicodedata.normalize("NFC", pair)
        for mark in (pair[1], *spellings[pair[1]]):
            key = pair[0] + mark
            if joined != pair and len(key.encode()) <= _LONGEST_KEY:
                rules[key] = joined
    return rules


def build_tokenizer(
    pieces: Sequence[str], scores: Sequence[float], charmap: Mapping[str, str], *, max_length: int
) -> PreTrainedTokenizerFast:
    """Return the tokenizer in a form that `AutoTokenizer` loads without sentencepiece.

    Args:
        pieces: the vocabulary in order of ids, in the layout of XLM-R: `<s> <pad> </s> <unk>`
            first and `<mask>` last.
        scores: log-probability of each piece.
        charmap: one code point -> its replacement.
        max_length: longest sequence that the model takes, in tokens.
    """
    tokenizer = Tokenizer(
        Unigram(list(zip(pieces, scores, strict=True)), unk_id=3, byte_fallback=False)
    )
    charsmap = encode_charsmap({**charmap, **composition_rules(charmap)})
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Precompiled(charsmap), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    tokenizer.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token in (*SPECIAL_TOKENS.values(), MASK_TOKEN)
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        mask_token=AddedToken(MASK_TOKEN, normalized=False, special=True),
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
    )
