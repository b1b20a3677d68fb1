"""The second half of packing: shards, less near-duplicates, become the arrays of a packed corpus, as streams of bytes.

Nothing here holds more than one shard and a few numbers a document.
"""

import hashlib
import io
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from isotone.data.fractions import SPLITS
from isotone.data.shards import Shard, Signatures
from isotone.data.splits import near_duplicates

ROW_SPLITS = ("train", "validation")
"""Splits that are packed into rows; all but the first are kept as documents, too."""

_LISTED_DUPLICATES = 20


class Assembly:
    """The files of a packed corpus, each a stream that is produced while it is written.

    Attributes:
        hashes: SHA-256 of the arrays and documents whose streams have been consumed.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        sequence_length: int,
        separator: int | None,
        dtype: str,
        check: Callable[[], None],
        pairs: bool = False,
    ):
        """Find the near-duplicates; ``check`` is called now and then and may raise. Each of ``pairs`` is a row."""
        self._shards, self._length, self._separator, self._dtype, self._check = (
            shards,
            sequence_length,
            separator,
            np.dtype(dtype),
            check,
        )
        self._levels, self._num_tokens, self._num_bytes = (
            np.concatenate([np.zeros(0, kind), *(shard.array(name) for shard in shards)])
            for name, kind in (("levels", np.uint8), ("num_tokens", np.int64), ("num_bytes", np.int64))
        )
        self._sides = {
            name: np.concatenate([shard.array(name) for shard in shards])
            for name in ("sides", "whole_sides")
            if pairs and shards
        }
        self._starts = np.cumsum([0, *(len(shard.array("levels")) for shard in shards)])
        self._removed = near_duplicates(self._levels, Signatures(shards), check)
        self.hashes: dict[str, str] = {}

    def files(self) -> dict[str, Iterable[bytes]]:
        """Return the streams by file name, in the order in which they have to be consumed."""
        files: dict[str, Iterable[bytes]] = {f"{split}.rows.npy": self._rows(split) for split in ROW_SPLITS}
        for split in SPLITS[1:]:
            lines = array("q", [0])  # where lines begin; known once the documents are written
            files[f"{split}.tokens.npy"] = self._tokens(split)
            files[f"{split}.documents.jsonl"] = self._documents(split, lines)
            files[f"{split}.offsets.npy"] = self._offsets(split, lines)
        files["removed.jsonl"] = self._removed_documents()
        return {name: self._hashed(name, parts) for name, parts in files.items()}

    def counts(self) -> dict[str, dict[str, int]]:
        """Return documents, tokens (without separators), bytes and, where there are rows, rows and tokens left over."""
        found = {}
        for split in SPLITS:
            kept = self._kept(split)
            found[split] = {
                "documents": int(kept.sum()),
                "tokens": int(self._num_tokens[kept].sum()),
                "bytes": int(self._num_bytes[kept].sum()),
            }
            if split in ROW_SPLITS:
                rows, left = divmod(self._stream_tokens(split), self._length)
                found[split] |= {"rows": rows, "tokens_dropped": left}
            if self._sides:
                found[split] |= self._pair_counts(kept)
        return found

    def _pair_counts(self, kept: np.ndarray) -> dict[str, int]:
        """Return the tokens of pairs, padding left out, and how many were too long."""
        sides, whole_sides = (array[kept] for array in self._sides.values())
        source_cut, target_cut = (sides < whole_sides).sum(axis=0).tolist()
        source_tokens, target_tokens = sides.sum(axis=0).tolist()
        return {
            "tokens": source_tokens + target_tokens,
            "target_tokens": target_tokens,
            "sources_cut": source_cut,
            "targets_cut": target_cut,
        }

    def near_duplicates(self) -> dict[str, Any]:
        """Return how many documents were removed from each split, and the names of the first of them."""
        levels = self._levels[self._removed]
        counts = {split: int((levels == level).sum()) for level, split in enumerate(SPLITS)}
        names = [d["id"] for _, d, _ in self._entries(np.flatnonzero(self._removed)[:_LISTED_DUPLICATES])]
        return {"removed": counts, "first_removed": names}

    def total_bytes(self) -> int:
        """Return about how much the files take."""
        held_out = (self._levels > 0) & ~self._removed
        tokens = int(self._num_tokens.sum()) * 2 + len(self._levels)
        return tokens * self._dtype.itemsize + int(self._num_bytes[held_out].sum() * 1.2) + 200 * int(held_out.sum())

    # --- streams -----------------------------------------------------------------------------------------------------

    def _rows(self, split: str) -> Iterator[bytes]:
        left = self._stream_tokens(split) // self._length * self._length
        yield _npy_header((left // self._length, self._length), self._dtype)
        separator = np.array([] if self._separator is None else [self._separator], self._dtype)
        for tokens in self._token_lists(split):
            stream = np.concatenate([part for ids in tokens for part in (separator, ids)])[:left]
            left -= len(stream)
            yield stream.tobytes()

    def _tokens(self, split: str) -> Iterator[bytes]:
        yield _npy_header((int(self._num_tokens[self._kept(split)].sum()),), self._dtype)
        for tokens in self._token_lists(split):
            yield np.concatenate(tokens).tobytes()

    def _documents(self, split: str, lines: array) -> Iterator[bytes]:
        for _, document, position in self._entries(np.flatnonzero(self._kept(split))):
            entry = {
                "id": document["id"],
                "num_bytes": int(self._num_bytes[position]),
                "num_tokens": int(self._num_tokens[position]),
                "text": document["text"],
                **({"target": document["target"]} if "target" in document else {}),
            }
            line = (json.dumps(entry, ensure_ascii=False) + "\n").encode()
            lines.append(lines[-1] + len(line))
            yield line

    def _offsets(self, split: str, lines: array) -> Iterator[bytes]:
        starts = np.cumsum([0, *self._num_tokens[self._kept(split)]])
        offsets = np.stack([starts, np.array(lines, np.int64)], axis=1).astype("<i8")
        yield _npy_header(offsets.shape, offsets.dtype)
        yield offsets.tobytes()

    def _removed_documents(self) -> Iterator[bytes]:
        for shard_level, document, _ in self._entries(np.flatnonzero(self._removed)):
            yield (json.dumps({"id": document["id"], "split": SPLITS[shard_level]}, ensure_ascii=False) + "\n").encode()

    # --- shards ------------------------------------------------------------------------------------------------------

    def _kept(self, split: str) -> np.ndarray:
        return (self._levels == SPLITS.index(split)) & ~self._removed

    def _stream_tokens(self, split: str) -> int:
        kept = self._kept(split)
        return int(self._num_tokens[kept].sum()) + (0 if self._separator is None else int(kept.sum()))

    def _by_shard(self, positions: np.ndarray) -> Iterator[tuple[Shard, np.ndarray]]:
        """Yield the shards that hold documents of given positions (ascending), and where in them these are."""
        cuts = np.searchsorted(positions, self._starts)
        for k, shard in enumerate(self._shards):
            if cuts[k] < cuts[k + 1]:
                self._check()
                yield shard, positions[cuts[k] : cuts[k + 1]] - self._starts[k]

    def _token_lists(self, split: str) -> Iterator[list[np.ndarray]]:
        for shard, inside in self._by_shard(np.flatnonzero(self._kept(split))):
            tokens, ends = shard.array("tokens"), np.cumsum(shard.array("num_tokens"))
            starts = ends - shard.array("num_tokens")
            yield [tokens[starts[i] : ends[i]] for i in inside]

    def _entries(self, positions: np.ndarray) -> Iterator[tuple[int, dict[str, Any], int]]:
        """Yield (level, id and text, position) of documents."""
        at = iter(positions.tolist())
        for shard, inside in self._by_shard(positions):
            documents = shard.documents()
            for i in inside:
                position = next(at)
                yield int(self._levels[position]), documents[i], position

    def _hashed(self, name: str, parts: Iterable[bytes]) -> Iterator[bytes]:
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part)
            yield part
        self.hashes[name] = digest.hexdigest()


def _npy_header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    buffer = io.BytesIO()
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, description)
    return buffer.getvalue()
