"""Which split a document belongs to: fixed by a hash of its text, so that order and number of documents do not matter.

Exact copies share a hash and so a split. Near copies may not, and are found by MinHash (Broder 1997, "On the resemblance
and containment of documents") over 5-word shingles: of two resembling documents in different splits, the one in the
split that stands *earlier* in ``SPLITS`` is removed, so training text is what yields to held-out text.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from isotone.data.fractions import SPLITS

_SHINGLE_WORDS = 5
_NUM_HASHES = 128
_BAND_ROWS = 2  # 64 bands of 2: a pair of resemblance .25 becomes a candidate with probability .98
RESEMBLANCE = 0.25
"""Estimated Jaccard resemblance of 5-word shingles at or above which two documents are near-duplicates."""

_WORD = re.compile(r"\w+")
_RNG = np.random.default_rng(0x150701E)
_MULTIPLIERS = _RNG.integers(1, 2**63, _NUM_HASHES, dtype=np.uint64) | np.uint64(1)
_OFFSETS = _RNG.integers(0, 2**63, _NUM_HASHES, dtype=np.uint64)


def assign_split(text: str, fractions: Mapping[str, float]) -> str:
    """Return the split of a text.

    Args:
        text: the whole document.
        fractions: share of each of ``SPLITS``; sums to 1.
    """
    point = (
        int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, person=b"isotone.split").digest(), "big") / 2**64
    )
    for name in reversed(SPLITS):
        if point < fractions[name]:
            return name
        point -= fractions[name]
    return SPLITS[0]


def minhash(text: str) -> np.ndarray:
    """Return the MinHash signature of a text's 5-word shingles, uint32 [128]; texts under 5 words are one shingle."""
    words = _WORD.findall(text.lower())
    shingles = {" ".join(words[i : i + _SHINGLE_WORDS]) for i in range(max(1, len(words) - _SHINGLE_WORDS + 1))}
    joined = sorted(shingles)
    hashes = np.fromiter(
        (int.from_bytes(hashlib.blake2b(s.encode(), digest_size=8).digest(), "little") for s in joined),
        np.uint64,
        len(joined),
    )
    signature = np.empty(_NUM_HASHES, np.uint32)
    for k in range(_NUM_HASHES):  # multiply-shift (Dietzfelbinger et al. 1997), top 32 bits
        signature[k] = ((hashes * _MULTIPLIERS[k] + _OFFSETS[k]) >> np.uint64(32)).min()
    return signature


@dataclass
class NearDuplicates:
    """Finds, among documents given from the most protected split to the least, those that resemble one given before.

    Memory is one signature (512 bytes) and 64 dictionary entries a *kept held-out* document; training documents are
    looked up and not stored.
    """

    _signatures: list[np.ndarray] = field(default_factory=list)
    _splits: list[str] = field(default_factory=list)
    _bands: dict[bytes, list[int]] = field(default_factory=dict)

    def seen(self, split: str, signature: np.ndarray) -> bool:
        """Say whether a document resembles one of another split seen before; if not, and it is held out, remember it."""
        keys = [
            bytes([b]) + signature[b * _BAND_ROWS : (b + 1) * _BAND_ROWS].tobytes()
            for b in range(_NUM_HASHES // _BAND_ROWS)
        ]
        candidates = {i for key in keys for i in self._bands.get(key, ())}
        if any(
            self._splits[i] != split and (self._signatures[i] == signature).mean() >= RESEMBLANCE
            for i in sorted(candidates)
        ):
            return True
        if split != SPLITS[0]:
            for key in keys:
                self._bands.setdefault(key, []).append(len(self._signatures))
            self._signatures.append(signature)
            self._splits.append(split)
        return False


def removed_duplicates(assigned: Iterable[tuple[str, np.ndarray]]) -> Iterator[int]:
    """Yield the indices of documents to remove, given each one's (split, signature) in corpus order."""
    documents = list(assigned)
    index = NearDuplicates()
    for split in reversed(SPLITS):
        for i, (name, signature) in enumerate(documents):
            if name == split and index.seen(split, signature):
                yield i
