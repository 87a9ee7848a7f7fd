"""Numbers as integers modulo 2^b, so that sums of them cannot overflow; and the clients' noise.

A value x is sent as round(x·s) modulo 2^b, s being the largest power of two at which n values of
the largest magnitude still fit. Integers and dyadic fractions of that size are exact.

Noise of the clients inside a sum is the distributed discrete Gaussian mechanism (Kairouz, Liu and
Steinke, ICML 2021): each of n clients adds discrete Gaussian noise of variance σ²/n in steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from fedp2eft.errors import ShareableError, UserError

LEAST_STEPS = 256
"""Fewer steps per client are no quantization that anyone would want: an error instead."""
TAIL = 12.0
"""Standard deviations of noise that have room; more come once in 10³² draws."""
LEAST_SIGMA = 0.5
"""In steps; below, the sum of discrete Gaussians is not accounted for (Theorem 1)."""
CHUNK = 1 << 20

Arrays = Mapping[str, NDArray[Any]]
KINDS: dict[int, type[np.generic]] = {32: np.uint32, 64: np.uint64}
_SIGNED: dict[int, type[np.generic]] = {32: np.int32, 64: np.int64}


@dataclass(frozen=True)
class Block:
    """One array of a sum.

    Args:
        shape: Its shape.
        limit: Largest magnitude of an entry; larger ones are cut to it.
        bits: b, of the modulus: 32 or 64.
        noise: Standard deviation of the noise that each client adds; counted in `limit`.
    """

    shape: tuple[int, ...]
    limit: float
    bits: int = 64
    noise: float = 0.0

    def scale(self, clients: int) -> float:
        """Return s, the steps of one unit, for a sum over so many clients.

        Raises:
            UserError: So many clients leave too few steps for each.
        """
        most = (2 ** (self.bits - 1) - 1) // clients
        if most < LEAST_STEPS:
            raise UserError(
                f"A sum of {clients} clients leaves each {most} steps of {self.bits} bits: sample "
                "fewer clients, or raise privacy.secure_bits."
            )
        exponent = math.floor(math.log2(most / self.limit))
        while math.ldexp(self.limit, exponent) > most:  # log2 rounds
            exponent -= 1
        return math.ldexp(1.0, exponent)

    def encode(self, value: Any, clients: int, key: bytes = b"") -> tuple[NDArray[Any], int]:
        """Return a client's part of the sum, unmasked, and how many entries were cut.

        Args:
            value: Anything of the block's shape.
            clients: How many may be in the sum.
            key: 32 bytes that the noise is drawn from.

        Raises:
            ShareableError: An entry is not finite, or the shape is another.
        """
        x = np.asarray(value, np.float64)
        if x.shape != self.shape or not np.isfinite(x).all():
            raise ShareableError(
                "What was to be summed holds NaN or infinity, or has other shapes."
            )
        scale, room = self.scale(clients), self.limit - TAIL * self.noise
        cut = int((np.abs(x) > room).sum())
        steps = np.rint(np.clip(x, -room, room) * scale).astype(np.int64)
        if self.noise:
            steps += discrete_gaussian(self.noise * scale, steps.size, key).reshape(self.shape)
            most = int(self.limit * scale)
            np.clip(steps, -most, most, out=steps)
        return steps.astype(KINDS[self.bits]), cut

    def decode(self, total: NDArray[Any], clients: int) -> NDArray[np.float64]:
        """Return the sum in float64."""
        signed: NDArray[Any] = total.view(_SIGNED[self.bits])
        return signed.astype(np.float64) / self.scale(clients)


Layout = Mapping[str, Block]
CUT = "#cut"
"""Entries that clients cut to their limits, in every sum: no parameter's name has a "#" in it."""


def counting_cuts(layout: Layout) -> dict[str, Block]:
    """Return the layout with the number of entries cut."""
    return {**layout, CUT: Block((1,), 2.0**40)}


# ── pseudo-random numbers ───────────────────────────────────────────────────────────────────────


def keystream(key: bytes, number: int, size: int) -> bytes:
    """Return pseudo-random bytes (AES-256 in counter mode), a stream of its own per number.

    Flower's `pseudo_rand_gen` folds its seed to 32 bits, which a server can try out.
    """
    counter = number.to_bytes(8, "big") + bytes(8)
    return Cipher(algorithms.AES(key), modes.CTR(counter)).encryptor().update(bytes(size))


def add_mask(arrays: Arrays, key: bytes, sign: int) -> None:
    """Add (or take away) the mask that a key gives, in place; uniform in every entry."""
    change = np.add if sign > 0 else np.subtract
    for number, name in enumerate(sorted(arrays)):
        array = arrays[name]
        mask = np.frombuffer(keystream(key, number, array.nbytes), array.dtype)
        change(array, mask.reshape(array.shape), out=array)


def discrete_gaussian(sigma: float, size: int, key: bytes) -> NDArray[np.int64]:
    """Return samples of the discrete Gaussian, by rejection from the discrete Laplace.

    P(y) ∝ exp(−y²/2σ²) over the integers; Canonne, Kamath and Steinke (2020), Algorithm 3, with
    uniform numbers of 53 bits in place of exact fractions.

    Args:
        sigma: σ in steps, 1/2 or more.
        size: How many.
        key: 32 bytes; secret, or the noise can be taken away.
    """
    t, number = math.floor(sigma) + 1, 0
    found = np.empty(size, np.int64)
    filled = 0
    while filled < size:
        wanted = min(CHUNK, 2 * (size - filled) + 64)
        raw = np.frombuffer(keystream(key, number, 24 * wanted), "<u8").reshape(3, wanted)
        number += 1
        u = ((raw >> np.uint64(11)) + np.uint64(1)) * 2.0**-53  # in (0, 1]
        left, right = np.floor(-t * np.log(u[:2]))  # geometric, each
        y = left - right
        kept = y[u[2] <= np.exp(-((np.abs(y) - sigma**2 / t) ** 2) / (2 * sigma**2))]
        part = kept[: size - filled]
        found[filled : filled + len(part)] = part
        filled += len(part)
    return found


# ── the account ─────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Noise:
    """Noise of all clients together on a sum of vectors.

    Args:
        norm: Clip norm C of every client's vector.
        multiplier: z: the sum gets noise of standard deviation z·C if all clients take part.
        clients: n, those sampled; each adds its share z·C/√n.
        bits: Of the modulus.
    """

    norm: float
    multiplier: float
    clients: int
    bits: int

    def block(self, shape: tuple[int, ...]) -> Block:
        """Return the block of an array, with room for the noise.

        Raises:
            UserError: The noise would be smaller than half a step.
        """
        noise = self.multiplier * self.norm / math.sqrt(self.clients)
        block = Block(shape, self.norm + TAIL * noise, self.bits, noise)
        if noise * block.scale(self.clients) < LEAST_SIGMA:
            raise UserError(
                f"The noise of {self.clients} clients is finer than the steps of a sum of "
                f"{self.bits} bits: raise privacy.secure_bits or privacy.noise_multiplier."
            )
        return block

    def rho(self, took_part: int, size: int) -> float:
        """Return ρ of zero-concentrated DP, of a sum in which so many clients took part.

        Args:
            took_part: Clients whose noise is in the sum.
            size: Entries of the vector. Rounding to the nearest step lengthens it by √size/2 steps
                at most.
        """
        block = self.block(())
        scale = block.scale(self.clients)
        reach = self.norm * scale + math.sqrt(size) / 2
        return rho_of(reach, block.noise * scale, took_part, size)


def rho_of(reach: float, sigma: float, clients: int, size: int) -> float:
    """Return ρ of the sum of discrete Gaussians: the smaller of two bounds of Theorem 1.

    Args:
        reach: How far one client can move the sum, L2, in steps.
        sigma: Standard deviation of each client's noise, in steps; `LEAST_SIGMA` or more.
        clients: How many add theirs.
        size: Entries of the vector.
    """
    tau = 10 * sum(math.exp(-2 * (math.pi * sigma) ** 2 * k / (k + 1)) for k in range(1, clients))
    ratio = reach / (math.sqrt(clients) * sigma)
    return min(ratio**2 / 2 + tau * size, (ratio + tau * math.sqrt(size)) ** 2 / 2)
