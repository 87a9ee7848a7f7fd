"""Seeds that depend on names, not on history.

Every random choice draws from a generator seeded by what it is for (seed, phase, round, client).
A resumed run therefore draws exactly what an uninterrupted one would, with no state to restore.
"""

from __future__ import annotations

from hashlib import sha256


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed from the parts, the same on every machine and Python version."""
    digest = sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
