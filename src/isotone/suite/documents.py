"""Which documents are attacked and which are searched on: fixed by their texts, before any model is looked at."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from isotone import records
from isotone.attacks import PrefixProtocol, Window
from isotone.config import Data, Experiment
from isotone.data.corpora import cut, open_corpus
from isotone.data.document import Document
from isotone.data.fractions import SPLITS
from isotone.data.packed import PackedDocument
from isotone.data.shards import tokenize
from isotone.data.splits import minhash, near_duplicates
from isotone.determinism import stream_key
from isotone.errors import UsageError

SEARCH_SHARE = 5
"""One in so many documents is searched on, where both kinds come from one file."""

FEW = 10
"""Fewer search documents than this are worth a word: τ and the margins rest on them."""


@dataclass(frozen=True)
class Documents:
    """The documents of a request.

    Attributes:
        test: attacked and evaluated.
        search: τ, margins, triggers and matched losses are fitted on them.
        left_out: ``id`` and ``reason`` of every document that is neither.
        identity: hash of all that was read.
        notes: what a reader of the results should know.
    """

    test: list[PackedDocument]
    search: list[PackedDocument]
    left_out: list[dict[str, str]]
    identity: str
    notes: list[str]

    def split(self, name: str) -> list[PackedDocument]:
        """Return the documents of a split, by the name that it has in an experiment."""
        return {"attack_test": self.test, "attack_search": self.search}[name]

    def windows(self, name: str, protocol: PrefixProtocol, first: int | None = None) -> list[Window]:
        """Return a split cut to the protocol; ``first`` is put before each document as its token 0."""
        return protocol.cut(self.split(name), None, first)[0]

    def counts(self) -> dict[str, Any]:
        """Return what results say of the documents."""
        return {"attack_test": len(self.test), "attack_search": len(self.search), "left_out": self.left_out}


def choose_documents(
    experiment: Experiment, tokenizer: PreTrainedTokenizerBase, documents: Path, search_documents: Path | None
) -> Documents:
    """Read, tokenize and split.

    Documents stand in an order that a hash of their texts gives, so that the split does not depend on the file's order.
    Exact copies are left out, and so are search documents that resemble an attacked one.

    Raises:
        UsageError: a file cannot be read, or too few documents are long enough.
    """
    attacks, chooser = experiment.attacks, _Chooser(experiment, tokenizer)
    test = chooser.read(documents, "--documents", least=1 if search_documents else 2)
    if search_documents is None:
        num_search = min(attacks.num_search_documents, max(1, len(test) // SEARCH_SHARE))
        search, test = test[:num_search], test[num_search:]
    else:
        found = chooser.read(search_documents, "--search-documents", least=1)
        search = chooser.first(found, attacks.num_search_documents, "attacks.num_search_documents")
    test = chooser.first(test, attacks.num_documents, "attacks.num_documents")
    search = chooser.unlike(search, test)
    if not search:
        raise UsageError(
            "--search-documents: every search document resembles an attacked one; give others, in a file of its own"
        )
    notes = []
    if len(search) < FEW:
        notes.append(
            f"The bar of success, margins of equivalence and triggers rest on {len(search)} search "
            f"document{'s' if len(search) > 1 else ''} only"
        )
    return Documents(test, search, chooser.left_out, records.hash_json(chooser.read_hashes), notes)


class _Chooser:
    """Reads files one after the other and remembers why it left documents out."""

    def __init__(self, experiment: Experiment, tokenizer: PreTrainedTokenizerBase):
        self._data, self._length = experiment.data, experiment.attacks.protocol.length
        self._tokenizer = tokenizer
        self._seen: dict[str, str] = {}
        self.left_out: list[dict[str, str]] = []
        self.read_hashes: list[Any] = []

    def read(self, path: Path, flag: str, least: int) -> list[PackedDocument]:
        """Return a file's documents that are long enough, in the order of their hashes."""
        if not path.exists():
            raise UsageError(f"{flag}: there is no file {path}")
        corpus = open_corpus(Data(source=str(path), text_field=self._data.text_field))
        self.read_hashes.append(corpus.identity)
        ranked, num_before = [], len(self.left_out)
        for document in (part for whole in corpus.read(0) for part in cut(whole)):
            digest = hashlib.sha256(document.text.encode()).hexdigest()
            if (packed := self._fit(document, digest)) is not None:
                ranked.append((stream_key(self._data.shuffle_seed, f"attacked document {digest}"), packed))
        if len(ranked) < least:
            others = self.left_out[num_before:]
            example = f"; {others[0]['id']}: {others[0]['reason']}" if others else ""
            raise UsageError(
                f"{flag}: {path} holds {len(ranked)} usable documents of {self._length} tokens or more, {least} are "
                f"needed{' (one to search on, one to attack)' if least > 1 else ''}{example}; give more or longer "
                "ones, or a shorter protocol (--prefix, --gap, --continuation)"
            )
        return [packed for _, packed in sorted(ranked, key=lambda pair: pair[0])]

    def first(self, documents: list[PackedDocument], count: int, key: str) -> list[PackedDocument]:
        """Return the first ``count``; the rest is left out."""
        self._leave_out((d.id for d in documents[count:]), f"{key} is {count}")
        return documents[:count]

    def unlike(self, search: list[PackedDocument], test: Sequence[PackedDocument]) -> list[PackedDocument]:
        """Return the search documents that resemble no attacked one."""
        levels = [SPLITS.index("attack_search")] * len(search) + [SPLITS.index("attack_test")] * len(test)
        signatures = np.stack([minhash(document.text) for document in [*search, *test]])
        alike = near_duplicates(np.array(levels, np.uint8), [signatures])[: len(search)]
        self._leave_out((d.id for d, gone in zip(search, alike, strict=True) if gone), "it resembles an attacked one")
        return [document for document, gone in zip(search, alike, strict=True) if not gone]

    def _fit(self, document: Document, digest: str) -> PackedDocument | None:
        reason, ids = "", list[int]()
        if not document.text.strip():
            reason = "it is empty"
        elif digest in self._seen:
            reason = f"it is a copy of {self._seen[digest]}"
        else:
            ids = tokenize([document.text], self._tokenizer)[0]
            if len(ids) < self._length:
                reason = f"it has {len(ids)} of the {self._length} tokens that attacks.protocol asks for"
        if reason:
            self._leave_out([document.id], reason)
            return None
        self._seen[digest] = document.id
        return PackedDocument(document.id, np.array(ids, np.int64), len(document.text.encode()), document.text)

    def _leave_out(self, ids: Iterable[str], reason: str) -> None:
        self.left_out += [{"id": name, "reason": reason} for name in ids]
