"""Counter-based hashing: every random choice about data is a hash of what it concerns, never a generator's history.

`key64` turns names and numbers into a 64-bit key once (sha256, slow, collision-free); `mix64` spreads 64-bit
counters (splitmix64's finaliser, vectorised, not cryptographic). A choice is then mix64(key + counter): the same on
every rank, after every resume and whatever was drawn before it."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

UInt64Array = npt.NDArray[np.uint64]

MASK_64 = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's increment: 2**64 / golden ratio, odd


def key64(*parts: object) -> int:
    """The first 8 bytes (little-endian) of the sha256 of the parts joined by ':'."""
    joined = ":".join(str(part) for part in parts).encode("utf-8")
    return int.from_bytes(hashlib.sha256(joined).digest()[:8], "little")


def mix64(x: npt.ArrayLike) -> UInt64Array:
    """splitmix64's finaliser, elementwise: a bijection of 64-bit words in which every input bit reaches every output
    bit. Takes any integers (modulo 2**64), returns an array of the same shape."""
    z = np.atleast_1d(np.asarray(x)).astype(np.uint64)  # at least 1-D: numpy warns about overflow on scalars only
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z.reshape(np.shape(x))


def counter_hash(key: int, counters: npt.ArrayLike) -> UInt64Array:
    """mix64(key + counter * GOLDEN): the splitmix64 stream that starts at `key`, read at any place."""
    places = np.atleast_1d(np.asarray(counters)).astype(np.uint64)
    return mix64(places * np.uint64(GOLDEN) + np.uint64(key & MASK_64)).reshape(np.shape(counters))
