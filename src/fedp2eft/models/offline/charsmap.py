"""Writes SentencePiece's "precompiled charsmap": a text-rewriting table as a double-array trie.

The blob that the normalizer `tokenizers.normalizers.Precompiled` reads is, little endian,

    u32 size of the trie in bytes | trie: one u32 per unit | replacements, each ended by a NUL byte

A key is walked byte by byte. From the unit at `pos` the walk goes to `base = pos ^ offset(unit)`;
the child for byte c, if there is one, is the unit at `base ^ c` and carries c as its label, and
the unit at `base ^ 0` holds the value of a key that ends here. The bits of a unit:

    0-7 label | 8 a key ends here | 10-30 offset        (a node)
    0-30 where the replacement starts | 31 set           (a value)
"""

import struct
from collections.abc import Mapping
from itertools import count

import numpy as np

_ENDS_HERE = 1 << 8
_IS_VALUE = 1 << 31
_MAX_UNITS = 1 << 21
_BLOCK = 256
_WINDOW = 8 * _BLOCK  # units at the end that are tried; earlier gaps stay empty

Node = dict[int, "Node"]


def encode_charsmap(rules: Mapping[str, str]) -> bytes:
    """Return the charsmap that rewrites each key of `rules` to its value.

    Args:
        rules: at least one; non-empty keys to replacements (which may be empty). No string contains
            NUL, which the format uses as its terminator.

    Raises:
        ValueError: there is no rule or far too many, a key is empty, or a string contains NUL.
    """
    if not rules:
        raise ValueError("a charsmap has at least one rule")
    if "" in rules or any("\0" in key or "\0" in value for key, value in rules.items()):
        raise ValueError("a charsmap has no empty key and no NUL character")
    starts: dict[str, int] = {}
    text = bytearray()
    root: Node = {}
    values: dict[int, int] = {}  # id of the node where a key ends -> start of its replacement
    for key, value in rules.items():
        if value not in starts:
            starts[value] = len(text)
            text += value.encode() + b"\0"
        node = root
        for byte in key.encode():
            node = node.setdefault(byte, {})
        values[id(node)] = starts[value]
    units = _place(root, values)
    return struct.pack("<I", 4 * len(units)) + units.astype("<u4").tobytes() + bytes(text)


def _place(root: Node, values: Mapping[int, int]) -> np.ndarray:
    """Lay the trie out in an array of units: inner nodes where they first fit, then leaves.

    Blocks are kept whole, so that `base ^ c` lies in the array for every byte c.
    """
    units = [0] * _BLOCK
    taken = [False] * _BLOCK
    taken[0] = True  # the root
    bases: set[int] = set()
    inner = [(root, 0)]
    leaves: list[tuple[Node, int]] = []
    while inner:
        node, position = inner.pop()
        ends = id(node) in values
        labels = [0, *node] if ends else list(node)
        for slot in count(max(1, len(units) - _WINDOW)):
            if slot == len(units):
                units += [0] * _BLOCK
                taken += [False] * _BLOCK
            base = slot ^ labels[0]
            # Two nodes with one base would take each other's children for their own.
            if base not in bases and not any(taken[base ^ label] for label in labels):
                break
        bases.add(base)
        units[position] |= (position ^ base) << 10 | (_ENDS_HERE if ends else 0)
        for label in labels:
            taken[base ^ label] = True
            units[base ^ label] = label
        if ends:
            units[base] = _IS_VALUE | values[id(node)]
        for label, child in node.items():
            (inner if child else leaves).append((child, base ^ label))
    for leaf, position in leaves:
        units[position] |= (position ^ len(units)) << 10 | _ENDS_HERE
        units.append(_IS_VALUE | values[id(leaf)])
    units += [0] * (-len(units) % _BLOCK)
    if len(units) > _MAX_UNITS:
        raise ValueError(f"a charsmap of {len(units)} units is beyond the format's offsets")
    return np.array(units, dtype=np.uint32)
