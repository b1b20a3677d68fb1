"""How much text an experiment reads: counted where it is packed, else stated or estimated, and it says which."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from isotone.config import BIBLE_PAIRS, WEB_BIBLE, Data
from isotone.data.fractions import SPLITS
from isotone.data.packed import DATASET, open_packed
from isotone.errors import UsageError
from isotone.planning.shape import ModelShape

BYTES_PER_TOKEN = 4.0
"""Of English text under a vocabulary of some ten thousand tokens: an estimate, and said to be one."""

_BIBLE_DOCUMENTS, _BIBLE_BYTES = 1189, 4_030_656
"""Counted over ``isotone.data.bible``."""

_BIBLE_PAIRS, _PAIRS_BYTES = 30_604, 8_032_146
"""Verses, and bytes of both sides; counted as well."""

_KNOWN = {"monology/pile-uncopyrighted": (300e9, 5.91 * 1024)}
"""Tokens in all (as preset pythia-1.4b states), and bytes of a mean document (Gao et al. 2021, 2101.00027, table 1)."""

_UNITS = {"": 1, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}


@dataclass(frozen=True)
class CorpusSize:
    """Text of an experiment.

    Attributes:
        train_tokens: tokens of one epoch.
        text_bytes: bytes of all documents that setup reads.
        document_tokens: tokens of each document of each held-out split, as far as counted or estimated.
        origin: counted, stated or estimated, and from what.
    """

    train_tokens: float
    text_bytes: float
    document_tokens: dict[str, np.ndarray]
    origin: str


def parse_tokens(text: str) -> float:
    """Return a number of tokens: 300000000, 3e8, 300M, 0.3B.

    Raises:
        UsageError: it is none of these, or not above 0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)([KMBGT]?)", text.strip().upper().replace("_", ""))
    value = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if not match or not 0 < value < 1e18:
        raise UsageError(f"--tokens {text}: give the training tokens of one epoch, such as 1e9, 1B or 300M")
    return value


def corpus_size(data: Data, shape: ModelShape, packed: Path, tokens: float | None) -> CorpusSize:
    """Return the size of an experiment's corpus.

    Args:
        data: the experiment's ``data``.
        shape: the model's sizes; a small vocabulary makes more tokens of a text, which estimates leave out.
        packed: the folder that setup packs into; counted where it is there, unless ``tokens`` are stated.
        tokens: training tokens of one epoch, stated by the user; None: counted or estimated.

    Raises:
        UsageError: nothing says how much text there is; says what to give.
    """
    if tokens is None and (packed / DATASET).is_file():
        return _counted(packed, data.shuffle_seed)
    share = data.fractions["train"]
    if tokens is not None:
        mean = _KNOWN[data.source][1] / BYTES_PER_TOKEN if data.source in _KNOWN else 1000.0
        return _estimated(data, tokens / share, tokens / share / mean, "stated: --tokens")
    if data.pairs:
        return _pairs(data)
    if data.source == WEB_BIBLE:
        documents = min(data.num_documents or _BIBLE_DOCUMENTS, _BIBLE_DOCUMENTS)
        total = _BIBLE_BYTES * documents / _BIBLE_DOCUMENTS / BYTES_PER_TOKEN
        return _estimated(data, total, documents, f"estimated: {BYTES_PER_TOKEN:g} bytes a token")
    if data.source in _KNOWN:
        whole, document_bytes = _KNOWN[data.source]
        mean = document_bytes / BYTES_PER_TOKEN
        total = min(whole, (data.num_documents or whole) * mean)
        origin = f"estimated: {mean:,.0f} tokens a document" if data.num_documents else "stated: about 300B tokens"
        return _estimated(data, total, total / mean, origin)
    return _local_files(data)


def _pairs(data: Data) -> CorpusSize:
    """Return the size of a corpus of pairs, each a row whatever its length."""
    path = Path(data.source).expanduser()
    name = ", ".join(part.source for part in data.sources) or data.source
    if data.source == BIBLE_PAIRS:
        count, num_bytes, origin = _BIBLE_PAIRS, _PAIRS_BYTES, "counted: verses"
    elif not data.sources and path.is_file() and path.suffix in (".jsonl", ".txt"):
        with open(path, "rb") as file:
            count, num_bytes, origin = sum(1 for _ in file), 2 * path.stat().st_size, "counted: lines"
    else:
        raise UsageError(
            f"data.source: how many pairs {name} has is not known here; give --tokens N (of one epoch: training "
            f"pairs × {data.row_length}), or run stage 0 first: isotone run … --only setup"
        )
    taken = max(1, min(count, data.num_documents or count))
    size = _estimated(data, taken * data.row_length, taken, f"{origin}; rows of {data.row_length} tokens")
    return replace(size, text_bytes=num_bytes * taken / max(1, count))


def _local_files(data: Data) -> CorpusSize:
    path = Path(data.source).expanduser()
    if not path.exists():
        raise UsageError(
            f"data.source: how many tokens {data.source} has is not known here; give --tokens N (of one epoch), or run "
            "stage 0 first: isotone run … --only setup"
        )
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    # compressed text is about a third of its size
    num_bytes = sum(file.stat().st_size * (3 if file.suffix in (".gz", ".zst", ".parquet") else 1) for file in files)
    total = num_bytes / BYTES_PER_TOKEN
    documents = max(1.0, total / 1000)
    if data.num_documents and data.num_documents < documents:
        total, documents = total * data.num_documents / documents, data.num_documents
    return _estimated(data, total, documents, f"estimated: {BYTES_PER_TOKEN:g} bytes a token, 1,000 tokens a document")


def _estimated(data: Data, tokens: float, documents: float, origin: str) -> CorpusSize:
    mean = tokens / documents
    held_out = {
        split: np.full(min(round(documents * data.fractions[split]), 1_000_000), round(mean), np.int64)
        for split in SPLITS[1:]
    }
    return CorpusSize(tokens * data.fractions["train"], tokens * BYTES_PER_TOKEN, held_out, origin)


def _counted(folder: Path, shuffle_seed: int) -> CorpusSize:
    """Count packed data; held-out documents are in the order in which stages take the first of them."""
    packed = open_packed(folder)
    splits = packed.summary["splits"]
    held_out = {split: packed.documents(split).shuffled(shuffle_seed).num_tokens for split in SPLITS[1:]}
    rows = splits["train"]["rows"] * packed.sequence_length
    return CorpusSize(rows, sum(split["bytes"] for split in splits.values()), held_out, "counted: packed data")
