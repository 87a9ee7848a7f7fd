"""Tiny random bases of the kinds that people use, each with a tokenizer of its family's habits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

from tiny_run import vocabulary

LIMIT = 24
"""Positions in the configs of kinds that count them."""
SIZES = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "initializer_range": 0.3,
}  # fmt: skip
DECODER = SIZES | {"num_key_value_heads": 1, "head_dim": 8, "pad_token_id": None}
# The padding token is not the first of the vocabulary: an id that happens to be 0 hides mistakes.
BERT = {"specials": ["[UNK]", "[PAD]", "[CLS]", "[SEP]"], "single": "[CLS] $A [SEP]",
        "pad_token": "[PAD]", "unk_token": "[UNK]"}  # fmt: skip
ROBERTA = {"specials": ["<s>", "<pad>", "</s>", "<unk>"], "single": "<s> $A </s>",
           "pad_token": "<pad>", "unk_token": "<unk>"}  # fmt: skip
QWEN = {"specials": ["<unk>", "<|endoftext|>", "<|im_end|>"], "unk_token": "<unk>",
        "pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}  # fmt: skip
GPT2 = {"specials": ["<unk>", "<|endoftext|>"], "unk_token": "<unk>", "eos_token": "<|endoftext|>"}
LLAMA = {"specials": ["<unk>", "<s>", "</s>"], "single": "<s> $A", "unk_token": "<unk>",
         "pad_token": "<unk>", "eos_token": "</s>"}  # fmt: skip
T5 = {"specials": ["<unk>", "<pad>", "</s>"], "single": "$A </s>", "unk_token": "<unk>",
      "pad_token": "<pad>", "eos_token": "</s>"}  # fmt: skip

Kind = tuple[dict[str, Any] | None, str, str, dict[str, Any]]
"""Tokenizer (None: one without a vocabulary), config class, model class, config."""
KINDS: dict[str, Kind] = {
    "bert": (BERT, "BertConfig", "BertModel",
             SIZES | {"max_position_embeddings": LIMIT, "pad_token_id": 1}),
    "xlm-roberta": (ROBERTA, "XLMRobertaConfig", "XLMRobertaModel",
                    SIZES | {"max_position_embeddings": LIMIT + 2, "pad_token_id": 1}),
    "camembert": (ROBERTA, "CamembertConfig", "CamembertModel",
                  SIZES | {"max_position_embeddings": LIMIT + 2, "pad_token_id": 1}),
    "mpnet": (ROBERTA, "MPNetConfig", "MPNetModel",
              SIZES | {"max_position_embeddings": LIMIT + 2, "pad_token_id": 1}),
    "deberta": (BERT, "DebertaV2Config", "DebertaV2Model",
                SIZES | {"max_position_embeddings": LIMIT, "relative_attention": True,
                         "position_biased_input": False, "position_buckets": 8,
                         "pos_att_type": ["p2c", "c2p"], "share_att_key": True,
                         "pooler_hidden_size": 16, "pad_token_id": 1}),
    "distilbert": (BERT, "DistilBertConfig", "DistilBertModel",
                   {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "pad_token_id": 1,
                    "initializer_range": 0.3, "max_position_embeddings": LIMIT}),
    "electra": (BERT, "ElectraConfig", "ElectraModel",
                SIZES | {"embedding_size": 8, "max_position_embeddings": LIMIT,
                         "pad_token_id": 1}),
    "modernbert": (BERT, "ModernBertConfig", "ModernBertForMaskedLM",
                   SIZES | {"max_position_embeddings": LIMIT, "local_attention": 8,
                            "pad_token_id": 1, "cls_token_id": 2, "sep_token_id": 3,
                            "bos_token_id": 2, "eos_token_id": 3}),
    "mt5": (T5, "MT5Config", "MT5ForConditionalGeneration",
            {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2,
             "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}),
    "byt5": (None, "T5Config", "T5ForConditionalGeneration",
             {"vocab_size": 384, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2,
              "num_heads": 2, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}),
    "canine": (None, "CanineConfig", "CanineModel",
               SIZES | {"num_hash_buckets": 64, "num_hash_functions": 2,
                        "max_position_embeddings": 128}),
    "gpt2": (GPT2, "GPT2Config", "GPT2LMHeadModel",
             {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": LIMIT, "bos_token_id": 1,
              "eos_token_id": 1, "initializer_range": 0.3}),
    "llama": (LLAMA, "LlamaConfig", "LlamaForCausalLM",
              DECODER | {"eos_token_id": 2, "max_position_embeddings": LIMIT}),
    "qwen3": (QWEN, "Qwen3Config", "Qwen3ForCausalLM",
              DECODER | {"eos_token_id": 2, "max_position_embeddings": LIMIT}),
    "gemma3": (LLAMA, "Gemma3TextConfig", "Gemma3ForCausalLM",
               DECODER | {"eos_token_id": 2, "max_position_embeddings": LIMIT,
                          "sliding_window": 8}),
    "gemma3-nested": (LLAMA, "Gemma3Config", "Gemma3ForConditionalGeneration",
                      {"text_config": DECODER | {"eos_token_id": 2, "sliding_window": 8,
                                                 "max_position_embeddings": LIMIT},
                       "vision_config": {"hidden_size": 16, "intermediate_size": 24,
                                         "num_hidden_layers": 1, "num_attention_heads": 2,
                                         "image_size": 16, "patch_size": 8},
                       "mm_tokens_per_image": 1, "pad_token_id": None}),
}  # fmt: skip
BARE = {"byt5": "ByT5Tokenizer", "canine": "CanineTokenizer"}


def word_tokenizer(specials: list[str], single: str | None = None, **roles: str) -> Any:
    """Words split at white space."""
    ids = {word: i for i, word in enumerate([*specials, *vocabulary()])}
    inner = Tokenizer(models.WordLevel(ids, unk_token=roles["unk_token"]))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if single:
        named = [(token, ids[token]) for token in specials if token in single]
        inner.post_processor = processors.TemplateProcessing(single=single, special_tokens=named)
    inner.add_special_tokens([AddedToken(token, special=True) for token in specials])
    return hf.PreTrainedTokenizerFast(tokenizer_object=inner, **roles)


def save_kind(kind: str, folder: Path) -> Path:
    """A random base without a classification head, and its tokenizer."""
    habits, config_class, model_class, options = KINDS[kind]
    if habits is None:
        tokenizer = getattr(hf, BARE[kind])()
    else:
        tokenizer = word_tokenizer(**habits)
        inner = options.get("text_config", options)
        inner |= {"vocab_size": len(tokenizer)}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = getattr(hf, model_class)(getattr(hf, config_class)(**options))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
