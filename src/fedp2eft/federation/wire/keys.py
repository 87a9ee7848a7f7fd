"""Keys, encrypted shares and what proves them, for secure sums; on Flower's own primitives.

A client has three secrets per sum: the scalar of its mask key (masks with its neighbors), that of
its box key (encrypts shares), and a seed (its own mask). The first and the last are split among its
neighbors; the server can have one of the two put together, never both.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass
from hashlib import sha256

from cryptography.fernet import InvalidToken
from cryptography.hazmat.primitives.asymmetric import ec

from fedp2eft.errors import ShareableError
from fedp2eft.federation.hooks import (
    bytes_to_public_key,
    combine_shares,
    create_shares,
    decrypt,
    encrypt,
    generate_key_pairs,
    generate_shared_key,
    public_key_to_bytes,
)
from fedp2eft.settings.peers import PrivacySettings

SECURE = "secure-sum"
"""Record of a message that belongs to a sum, and of a client's state between its messages."""
KEYS, SHARES, UNMASK = "query.secure_keys", "query.secure_shares", "query.secure_unmask"
FEWEST = 3
"""Clients of a sum: of two, each could take its own part away."""
MOST_PUBLIC = 1024
SCALAR_BYTES = 48  # of P-384
SEED_BYTES = 31  # with its padding, two of the 16-byte blocks that are shared
SHARE_BYTES = {"seed": 4 + 32, "key": 4 + 64}


def degree(settings: PrivacySettings, clients: int) -> int:
    """Return how many neighbors a client of a sum has."""
    return min(settings.secure_neighbors, clients - 1)


def threshold(settings: PrivacySettings, clients: int) -> int:
    """Return how many shares give a secret: of neighbors, and of the client itself."""
    share = settings.secure_threshold * (degree(settings, clients) + 1)
    return max(2, math.ceil(share - 1e-9))


def neighbors(position: int, settings: PrivacySettings, clients: int) -> list[int]:
    """Return a client's neighbors on a ring (Harary's graph; Bell et al. 2020, section 3)."""
    wide = degree(settings, clients)
    if wide == clients - 1:
        return [other for other in range(clients) if other != position]
    half = wide // 2
    return sorted((position + step) % clients for step in range(-half, half + 1) if step)


def new_session() -> str:
    """Return a name of a sum that no other has."""
    return secrets.token_hex(16)


def new_seed() -> bytes:
    """Return the seed of a client's own mask."""
    return secrets.token_bytes(SEED_BYTES)


def new_key() -> tuple[bytes, bytes]:
    """Return a secret scalar and its public key."""
    private, public = generate_key_pairs()
    scalar = private.private_numbers().private_value
    return scalar.to_bytes(SCALAR_BYTES, "big"), public_key_to_bytes(public)


def public_of(secret: bytes) -> bytes:
    """Return the public key of a scalar."""
    return public_key_to_bytes(_private(secret).public_key())


def _private(secret: bytes) -> ec.EllipticCurvePrivateKey:
    return ec.derive_private_key(int.from_bytes(secret, "big"), ec.SECP384R1())


def agreed(secret: bytes, public: bytes) -> bytes:
    """Return the key that two clients agree on, as `encrypt` takes it.

    Raises:
        ShareableError: The other's public key cannot be used.
    """
    try:
        return generate_shared_key(_private(secret), bytes_to_public_key(public))
    except (ValueError, TypeError, AttributeError) as error:
        raise ShareableError("A public key of a secure sum cannot be used.") from error


def usable(public: object) -> bool:
    """Return whether a peer's bytes are a public key of ours; one bad key would stop neighbors."""
    if not isinstance(public, bytes) or len(public) > MOST_PUBLIC:
        return False
    try:
        key = bytes_to_public_key(public)
    except (ValueError, TypeError):
        return False
    return isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP384R1)


def mask_key(session: str, secret: bytes) -> bytes:
    """Return the 32 bytes that a mask is drawn from."""
    return sha256(b"mask" + session.encode() + secret).digest()


def split(secret: bytes, least: int, number: int) -> list[bytes]:
    """Return shares of a secret, any `least` of which give it."""
    return create_shares(secret, least, number)


def join(shares: list[bytes]) -> bytes:
    """Return the secret of shares; nothing if they are of no one secret."""
    try:
        return combine_shares(shares)
    except ValueError:
        return b""


def proof(kind: str, session: str, owner: int, holder: int, secret: bytes) -> bytes:
    """Return a hash that identifies a share or a seed without giving anything of it away.

    A share is as long as what it is of and uniform, so nobody can try out what was hashed.
    """
    return sha256(f"{kind} {session} {owner} {holder} ".encode() + secret).digest()


@dataclass(frozen=True)
class Shares:
    """One neighbor's shares of another client's seed and of its mask key."""

    seed: bytes
    key: bytes

    def proofs(self, session: str, owner: int, holder: int) -> bytes:
        """Return the proofs of both."""
        parts = (("seed", self.seed), ("key", self.key))
        return b"".join(proof(kind, session, owner, holder, value) for kind, value in parts)

    def boxed(self, key: bytes, session: str, owner: int, holder: int) -> bytes:
        """Return them encrypted for their holder."""
        return encrypt(key, _place(session, owner, holder) + self.seed + self.key)

    @classmethod
    def opened(cls, box: bytes, key: bytes, session: str, owner: int, holder: int) -> Shares | None:
        """Return what is in a box; None unless it is of this sum, this owner and this holder."""
        try:
            text = decrypt(key, box)
        except InvalidToken:
            return None
        place, size = _place(session, owner, holder), SHARE_BYTES["seed"]
        found = text.removeprefix(place)
        if not text.startswith(place) or len(found) != sum(SHARE_BYTES.values()):
            return None
        return cls(found[:size], found[size:])


def _place(session: str, owner: int, holder: int) -> bytes:
    return f"{session} {owner} {holder} ".encode()
