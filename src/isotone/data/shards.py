"""The first half of packing: each few megabytes of text become a shard of tokens and signatures, published whole.

A kill loses the shard under way and nothing else; what is packed in the end does not depend on how often it was killed.
"""

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from isotone import records
from isotone.data.corpora import Corpus, cut, first_documents
from isotone.data.document import Document
from isotone.data.fractions import SPLITS
from isotone.data.splits import assign_split, minhash
from isotone.errors import UsageError
from isotone.interruption import StopFlag

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHARD_CHARS = 4_000_000
"""Characters of text in a shard; they are held in memory together."""

_BATCH_CHARS = 500_000  # a tokenizer's own record of a text takes some hundred bytes a token
_ALL_READ = "all-read.json"


@dataclass(frozen=True)
class PairRecipe:
    """How a pair becomes a row: source, EOS, padding up to S tokens, then target, EOS, padding up to T.

    Attributes:
        lengths: S and T.
        pad: id of the padding.
        eos: id of EOS.
        prefix: what is put before every source.
    """

    lengths: tuple[int, int]
    pad: int
    eos: int
    prefix: str


@dataclass(frozen=True)
class Recipe:
    """What decides, beside the corpus, what shards hold.

    Attributes:
        tokenizer: gives the tokens, without special ones.
        fractions: share of documents of each split.
        min_chars: shorter documents are left out.
        num_vocab: every token is below it.
        pairs: how pairs become rows; None: documents are texts.
    """

    tokenizer: "PreTrainedTokenizerBase"
    fractions: dict[str, float]
    min_chars: int
    num_vocab: int
    pairs: PairRecipe | None = None

    @property
    def dtype(self) -> str:
        """Stored type of a token."""
        return "<u2" if self.num_vocab <= 65_536 else "<u4"


@dataclass(frozen=True)
class Shard:
    """A published shard: documents in the order of the corpus, without those that were too short."""

    folder: Path

    def array(self, name: str) -> np.ndarray:
        """Return one array of the shard.

        Args:
            name: ``tokens`` of all documents, one after the other; or, with an entry for each document, ``levels``
                (position of its split in ``SPLITS``), ``num_tokens``, ``num_bytes`` or ``signatures``; of pairs, whose
                tokens are rows and whose bytes are those of what is kept of the target, also ``sides`` [n, 2] and
                ``whole_sides``: tokens of source and target, as they are kept and as they were.
        """
        return np.load(self.folder / f"{name}.npy", allow_pickle=False)

    def documents(self) -> list[dict[str, Any]]:
        """Return each document's ``id`` and, where it is held out, ``text`` and, of a pair, ``target``."""
        return [json.loads(line) for line in (self.folder / "documents.jsonl").read_bytes().splitlines()]

    def counts(self) -> dict[str, int]:
        """Return how many documents were read up to the shard's end, and how many of it were too short."""
        return records.read_json(self.folder / "counts.json")


class Signatures(Sequence[np.ndarray]):
    """The signatures of all shards, one shard at a time in memory."""

    def __init__(self, shards: Sequence[Shard]):
        self._shards = shards

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, index: Any) -> Any:
        return self._shards[index].array("signatures")


def read_into_shards(
    corpus: Corpus,
    limit: int | None,
    recipe: Recipe,
    folder: Path,
    stop: StopFlag,
    progress: Callable[[int, str], None] | None = None,
) -> list[Shard]:
    """Read what an earlier call has not read yet and return all shards.

    Args:
        corpus: the documents.
        limit: take only the first N documents.
        recipe: how they are tokenized and split.
        folder: where the shards lie.
        stop: read between batches of text.
        progress: told the documents read so far and, as text, the megabytes of them.

    Raises:
        Stopped: a stop was requested; finished shards are kept.
        UsageError: the corpus or the tokenizer cannot be used.
    """
    shards = _intact_shards(folder)
    if (folder / _ALL_READ).exists():
        return shards
    num_read = shards[-1].counts()["documents_read"] if shards else 0
    num_bytes = sum(int(shard.array("num_bytes").sum()) for shard in shards)
    for group in _groups(first_documents(corpus, limit, num_read), SHARD_CHARS):
        num_read += len(group)
        documents = [part for document in group for part in cut(document)]
        arrays, kept = _pack(documents, recipe, stop)
        files = {f"{name}.npy": _npy(array) for name, array in arrays.items()}
        files["documents.jsonl"] = "".join(
            json.dumps({"id": d.id, **(_texts(d) if level else {})}) + "\n"
            for d, level in zip(kept, arrays["levels"], strict=True)
        ).encode()
        counts = {"documents_read": num_read, "too_short": len(documents) - len(kept)}
        files["counts.json"] = records.dump_json(counts)
        shards.append(Shard(folder / f"shard-{len(shards):06d}"))
        records.publish_directory(shards[-1].folder, files)
        num_bytes += int(arrays["num_bytes"].sum())
        if progress:
            progress(num_read, f"{num_bytes / 1e6:.0f} MB of text")
    records.write_json(folder / _ALL_READ, {"documents_read": num_read})
    return shards


def _texts(document: Document) -> dict[str, str]:
    return {"text": document.text, **({} if document.target is None else {"target": document.target})}


def _intact_shards(folder: Path) -> list[Shard]:
    """Return the shards up to the first that is missing or damaged, and remove what lies beyond it."""
    shards: list[Shard] = []
    while (path := folder / f"shard-{len(shards):06d}").exists():
        try:
            records.verify_directory(path)
        except records.CorruptError:
            break
        shards.append(Shard(path))
    beyond = sorted(p for p in folder.glob("shard-*") if p.name >= f"shard-{len(shards):06d}")
    if beyond:
        (folder / _ALL_READ).unlink(missing_ok=True)
    for path in reversed(beyond):
        records.remove_directory(path)
    return shards


def _groups(documents: Iterator[Document], num_chars: int) -> Iterator[list[Document]]:
    """Gather documents until they have a number of characters."""
    group: list[Document] = []
    size = 0
    for document in documents:
        group.append(document)
        size += len(document.text) + len(document.target or "")
        if size >= num_chars:
            yield group
            group, size = [], 0
    if group:
        yield group


def _pack(
    documents: Sequence[Document], recipe: Recipe, stop: StopFlag
) -> tuple[dict[str, np.ndarray], list[Document]]:
    """Return a shard's arrays and the documents in it."""
    kept, tokens = [], [np.zeros(0, recipe.dtype)]
    sides, whole_sides, num_bytes = [], [], []
    long_enough = (
        d
        for d in documents
        if len(d.text) >= recipe.min_chars and not d.text.isspace() and (d.target is None or d.target.strip())
    )
    for batch in _groups(long_enough, _BATCH_CHARS):
        stop.check("packing the data")
        encoded = _tokenize(batch, recipe) if recipe.pairs is None else tokenize_pairs(batch, recipe, recipe.pairs)
        for document, found in zip(batch, encoded, strict=True):
            if len(found.ids):
                kept.append(document)
                tokens.append(found.ids)
                sides.append(found.sides)
                whole_sides.append(found.whole_sides)
                num_bytes.append(found.num_bytes)
    signatures = [np.zeros((0, 128), np.uint32)]
    for document in kept:
        stop.check("packing the data")
        signatures.append(minhash(document.text)[None])
    levels = [SPLITS.index(assign_split(d.group or d.text, recipe.fractions, d.splits)) for d in kept]
    arrays = {
        "tokens": np.concatenate(tokens),
        "levels": np.array(levels, np.uint8),
        "num_tokens": np.array([len(ids) for ids in tokens[1:]], np.int64),
        "num_bytes": np.array(num_bytes, np.int64),
        "signatures": np.concatenate(signatures),
    }
    if recipe.pairs is not None:
        arrays["sides"], arrays["whole_sides"] = (
            np.array(counts, np.int64).reshape(-1, 2) for counts in (sides, whole_sides)
        )
    return arrays, kept


class Encoded(NamedTuple):
    """A document's tokens (a pair's row), and the bytes of text that its losses are of."""

    ids: np.ndarray
    num_bytes: int
    sides: tuple[int, ...] = ()
    whole_sides: tuple[int, ...] = ()


def _tokenize(documents: Sequence[Document], recipe: Recipe) -> Iterator[Encoded]:
    encoded = tokenize([d.text for d in documents], recipe.tokenizer)
    for document, ids in zip(documents, encoded, strict=True):
        _require_known(ids, document, recipe)
        yield Encoded(np.array(ids, recipe.dtype), len(document.text.encode()))


def tokenize_pairs(documents: Sequence[Document], recipe: Recipe, pairs: PairRecipe) -> Iterator[Encoded]:
    """Yield the row of each pair, cut to fit; without any token where a side has none."""
    sources = tokenize([pairs.prefix + d.text for d in documents], recipe.tokenizer)
    targets = tokenize([d.target or "" for d in documents], recipe.tokenizer)
    for document, *both in zip(documents, sources, targets, strict=True):
        row, sides, whole_sides = [], [], []
        for ids, length in zip(both, pairs.lengths, strict=True):
            _require_known(ids, document, recipe)
            text = [i for i in ids if i not in (pairs.pad, pairs.eos)]  # a text that says "<pad>" is not padding
            side = [*text[: length - 1], pairs.eos]
            row += [*side, *[pairs.pad] * (length - len(side))]
            sides.append(len(side))
            whole_sides.append(len(text) + 1)
        target = document.target or ""
        if sides[1] < whole_sides[1]:
            first = pairs.lengths[0]
            target = str(recipe.tokenizer.decode(row[first : first + sides[1] - 1]))
        packed = np.array(row if min(whole_sides) > 1 else [], recipe.dtype)
        yield Encoded(packed, len(target.encode()), tuple(sides), tuple(whole_sides))


def _require_known(ids: Sequence[int], document: Document, recipe: Recipe) -> None:
    if ids and max(ids) >= recipe.num_vocab:
        raise UsageError(
            f"model.source: the tokenizer gives token {max(ids)} (in document {document.id}), but the model's "
            f"vocabulary has {recipe.num_vocab} entries; use the tokenizer that belongs to the model"
        )


def tokenize(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """Return the tokens of texts, without special ones, whatever the texts say."""
    return tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=True,  # "<|endoftext|>" in a text is text
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
