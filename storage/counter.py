"""Counter-based random draws: pure functions of (seed, purpose, counter), with no state to save.

A draw is splitmix64's output function (Steele, Lea, Flood 2014, "Fast splittable pseudorandom
number generators", the mix64variant13 constants) applied twice to key + counter * golden gamma.
Keys come from SHA-256 over the seed and the names of the purpose, so that two purposes never share
a stream. Everything that sae-pipe draws (masks, permutations, held-out documents) is defined here,
so that a reader in another language can redo it from docs/store-format.md.
"""

import hashlib

import numpy as np
from numpy.typing import ArrayLike, NDArray

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_M1 = np.uint64(0xBF58476D1CE4E5B9)
_M2 = np.uint64(0x94D049BB133111EB)


def stream_key(seed: int, *purpose: int | str) -> int:
    """64-bit key of one stream: the first 8 bytes (little endian) of SHA-256("seed/purpose/...")."""
    name = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def _mix(z: NDArray[np.uint64]) -> None:
    z ^= z >> np.uint64(30)
    z *= _M1
    z ^= z >> np.uint64(27)
    z *= _M2
    z ^= z >> np.uint64(31)


def draw(key: int, counters: ArrayLike) -> NDArray[np.uint64]:
    """Uniform 64-bit integers, one for each counter (any shape of non-negative integers)."""
    z = np.array(counters, dtype=np.uint64, copy=True)
    shape = z.shape
    z = z.reshape(-1)  # 0-d arrays would turn into scalars, whose overflow warns
    z *= _GAMMA
    z += np.uint64(key)
    _mix(z)
    z += _GAMMA
    _mix(z)
    return z.reshape(shape)


def below(probability: float) -> int:
    """The threshold t for which `draw < t` happens with the given probability; in [0, 2**64]."""
    return min(int(probability * 2.0**64), 2**64)


def is_drawn(key: int, counters: ArrayLike, probability: float) -> NDArray[np.bool_]:
    """Bernoulli draws, nested in the probability: what is drawn at 0.2 is drawn at 0.3."""
    threshold = below(probability)
    bits = draw(key, counters)
    if threshold >= 2**64:
        return np.ones(bits.shape, dtype=np.bool_)
    return np.asarray(bits < np.uint64(threshold))


def permutation(key: int, n: int) -> NDArray[np.int64]:
    """A uniform permutation of range(n): the indices in the order of n draws.

    Of each draw the low bits give way to the index itself, as many as an index needs; what is left
    ties so rarely (n² / 2**(65 - bits): once in 70 for 2**20 rows) that no one could tell. Sorting
    those numbers is eight times as fast as an argsort.
    """
    index = np.arange(n, dtype=np.uint64)
    mask = np.uint64((1 << max(n - 1, 0).bit_length()) - 1)
    keyed = draw(key, index)
    keyed &= ~mask
    keyed |= index
    keyed.sort()
    keyed &= mask
    return keyed.view(np.int64)
