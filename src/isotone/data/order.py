"""The order in which training reads its rows: a keyed permutation, evaluated where it is needed and stored nowhere.

Batch *k* of epoch *e* is a pure function of (seed, e, k), in O(1) memory whatever the size of the corpus, so the data
position of a run is one integer. The permutation is a Feistel network (Luby and Rackoff 1988, "How to construct
pseudorandom permutations from pseudorandom functions") on the next even power of two, walked until it lands inside the
range (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
"""

import hashlib

import numpy as np

_NUM_ROUNDS = 8
_MIN_HALF_BITS = 3  # smaller networks reach too few permutations


def batch_rows(seed: int, epoch: int, first: int, count: int, num_rows: int) -> np.ndarray:
    """Return which rows stand at positions ``first … first + count - 1`` of an epoch.

    Over the positions 0 … ``num_rows`` - 1 of one epoch every row comes exactly once.

    Args:
        seed: the run's seed, any integer.
        epoch: number of the pass over the data, from 0; each has an order of its own.
        first: first position, from 0.
        count: how many positions.
        num_rows: number of rows of the dataset.

    Returns:
        Row indices, int64 [count].

    Raises:
        ValueError: the positions reach past the epoch.
    """
    if not 0 <= first <= first + count <= num_rows:
        raise ValueError(f"positions {first} to {first + count} are not within an epoch of {num_rows} rows")
    half_bits = max(_MIN_HALF_BITS, ((num_rows - 1).bit_length() + 1) // 2)
    keys = _round_keys(seed, epoch)
    values = _feistel(np.arange(first, first + count, dtype=np.uint64), keys, half_bits)
    outside = np.flatnonzero(values >= num_rows)
    while outside.size:
        values[outside] = _feistel(values[outside], keys, half_bits)
        outside = outside[values[outside] >= num_rows]
    return values.astype(np.int64)


def _round_keys(seed: int, epoch: int) -> np.ndarray:
    digest = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8 * _NUM_ROUNDS, person=b"isotone.order")
    return np.frombuffer(digest.digest(), "<u8")


def _feistel(values: np.ndarray, keys: np.ndarray, half_bits: int) -> np.ndarray:
    """Permute integers of 2 × ``half_bits`` bits, uint64 [n] → uint64 [n]."""
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << shift) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """Scramble 64-bit words: the finalizer of SplitMix64 (Steele, Lea and Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
