"""Which split a document belongs to: fixed by a hash of its text, so that order and number of documents do not matter.

Exact copies share a hash and so a split. Near copies may not, and are found by MinHash (Broder 1997, "On the
resemblance and containment of documents") over 5-word shingles: of two resembling documents in different splits, the
one in the split that stands *earlier* in ``SPLITS`` is removed, so training text is what yields to held-out text.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from isotone.data.fractions import SPLITS

_SHINGLE_WORDS = 5
_NUM_HASHES = 128
_BAND_ROWS = 2  # 64 bands of 2: a pair of resemblance .25 becomes a candidate with probability .98
RESEMBLANCE = 0.25
"""Estimated Jaccard resemblance of 5-word shingles at or above which two documents are near-duplicates."""

_INDEX_ROWS = 100_000  # held-out documents looked up together: 128 MB
_QUERY_ROWS = 8_192
_HASHED_TOGETHER = 128  # shingles whose products stay in the processor's cache

_WORD = re.compile(r"\w+")
_RNG = np.random.default_rng(0x150701E)
_MULTIPLIERS = _RNG.integers(1, 2**63, _NUM_HASHES, dtype=np.uint64) | np.uint64(1)
_OFFSETS = _RNG.integers(0, 2**63, _NUM_HASHES, dtype=np.uint64)


def assign_split(text: str, fractions: Mapping[str, float], allowed: Sequence[str] | None = None) -> str:
    """Return the split of a text.

    Args:
        text: the whole document.
        fractions: share of each of ``SPLITS``; sums to 1.
        allowed: the only splits there are, with shares in this proportion; None: all.
    """
    if allowed is not None:
        total = sum(fractions[name] for name in allowed)
        fractions = {name: fractions[name] / total if name in allowed else 0.0 for name in SPLITS}
    point = (
        int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, person=b"isotone.split").digest(), "big") / 2**64
    )
    for name in reversed(SPLITS):
        if point < fractions[name]:
            return name
        point -= fractions[name]
    return SPLITS[0] if allowed is None else allowed[0]


def minhash(text: str) -> np.ndarray:
    """Return the MinHash signature of a text's 5-word shingles, uint32 [128]; texts under 5 words are one shingle."""
    words = _WORD.findall(text.lower())
    shingles = {" ".join(words[i : i + _SHINGLE_WORDS]) for i in range(max(1, len(words) - _SHINGLE_WORDS + 1))}
    hashes = np.frombuffer(b"".join(hashlib.blake2b(s.encode(), digest_size=8).digest() for s in shingles), "<u8")
    smallest = np.full(_NUM_HASHES, 2**32 - 1, np.uint64)
    for k in range(0, len(hashes), _HASHED_TOGETHER):
        products = hashes[k : k + _HASHED_TOGETHER, None] * _MULTIPLIERS + _OFFSETS
        products >>= np.uint64(32)  # multiply-shift (Dietzfelbinger et al. 1997), top 32 bits
        np.minimum(smallest, products.min(axis=0), out=smallest)
    return smallest.astype(np.uint32)


class SignatureIndex:
    """Finds which signatures resemble one of a given set; 1.3 KB of memory a signature of the set."""

    def __init__(self, signatures: np.ndarray):
        """Index signatures, uint32 [num_signatures, 128]."""
        self._signatures = signatures
        keys = _band_keys(signatures)
        self._order = np.stack([np.argsort(k, kind="stable").astype(np.uint32) for k in keys])
        self._keys = np.take_along_axis(keys, self._order.astype(np.int64), axis=1)

    def resembling(self, signatures: np.ndarray) -> np.ndarray:
        """Say which signatures share a band, and at least ``RESEMBLANCE`` of all entries, with an indexed one.

        Args:
            signatures: uint32 [n, 128].

        Returns:
            bool [n].
        """
        found = np.zeros(len(signatures), bool)
        for keys, indexed, order in zip(_band_keys(signatures), self._keys, self._order, strict=True):
            asked = np.flatnonzero(~found)
            first, end = (np.searchsorted(indexed, keys[asked], side) for side in ("left", "right"))
            while (open_ := first < end).any():
                asked, first, end = asked[open_], first[open_], end[open_]
                alike = (signatures[asked] == self._signatures[order[first]]).mean(axis=1) >= RESEMBLANCE
                found[asked[alike]] = True
                asked, first, end = asked[~alike], first[~alike] + 1, end[~alike]
        return found


def near_duplicates(
    levels: np.ndarray, shards: Sequence[np.ndarray], check: Callable[[], None] = lambda: None
) -> np.ndarray:
    """Say which documents are to be removed, in memory that does not grow with the corpus's text.

    Args:
        levels: for each document the position of its split in ``SPLITS``, uint8 [num_documents].
        shards: the documents' signatures, cut into arrays uint32 [n, 128] (memory-mapped ones will do).
        check: called now and then; may raise.

    Returns:
        bool [num_documents].
    """
    removed = np.zeros(len(levels), bool)
    for level in reversed(range(1, len(SPLITS))):
        for _, kept in _blocks(shards, (levels == level) & ~removed, _INDEX_ROWS):
            index = SignatureIndex(kept)
            for positions, signatures in _blocks(shards, (levels < level) & ~removed, _QUERY_ROWS):
                check()
                removed[positions[index.resembling(signatures)]] = True
    return removed


def removed_duplicates(assigned: Iterable[tuple[str, np.ndarray]]) -> Iterator[int]:
    """Yield the indices of documents to remove, given each one's (split, signature) in corpus order."""
    documents = list(assigned)
    if documents:
        levels = np.array([SPLITS.index(split) for split, _ in documents], np.uint8)
        yield from np.flatnonzero(near_duplicates(levels, [np.stack([s for _, s in documents])])).tolist()


def _band_keys(signatures: np.ndarray) -> np.ndarray:
    """Return each band's two entries as one number, uint32 [n, 128] → uint64 [64, n]."""
    return np.ascontiguousarray(np.ascontiguousarray(signatures).view(np.uint64).T)


def _blocks(shards: Sequence[np.ndarray], mask: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (positions, signatures) of the documents in a mask, at most ``size`` at a time."""
    starts = np.cumsum([0, *(len(shard) for shard in shards)])
    chosen = np.flatnonzero(mask)
    for k in range(0, len(chosen), size):
        positions = chosen[k : k + size]
        first, last = np.searchsorted(starts, positions[[0, -1]], "right") - 1
        cuts = np.searchsorted(positions, starts[first : last + 2])
        parts = [
            shards[first + i][positions[cuts[i] : cuts[i + 1]] - starts[first + i]] for i in range(last - first + 1)
        ]
        yield positions, np.concatenate(parts)
