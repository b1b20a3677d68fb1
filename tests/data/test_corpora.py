import pytest

from isotone.config import Data
from isotone.data.corpora import cut, first_documents, open_corpus
from isotone.data.document import Document
from isotone.errors import UsageError


def test_the_bundled_corpus_can_be_continued_anywhere() -> None:
    corpus = open_corpus(Data())
    whole = [d.id for d in corpus.read(0)]
    assert len(whole) == len(set(whole)) == 1189
    assert [d.id for d in corpus.read(700)] == whole[700:]
    assert [d.id for d in first_documents(corpus, 702, 700)] == whole[700:702]
    assert list(first_documents(corpus, 5, 5)) == []


@pytest.mark.parametrize(
    "source", ["missing.txt", "./missing", "/nowhere/at/all", "~/nowhere/at/all", "corpus.jsonl.gz"]
)
def test_a_missing_file_is_named_and_not_looked_for_on_the_hub(source: str) -> None:
    with pytest.raises(UsageError, match=r"data\.source: there is no file or folder"):
        open_corpus(Data(source=source))


def test_overlong_documents_are_cut_at_spaces_and_lose_nothing() -> None:
    text = "some words\n" * 100 + "x" * 250
    parts = list(cut(Document("a", text), 100))
    assert "".join(p.text for p in parts) == text
    assert all(len(p.text) <= 100 for p in parts)
    assert [p.id for p in parts[:2]] == ["a#1", "a#2"]
    assert all(p.text.endswith("\n") for p in parts[:9])
    assert list(cut(Document("a", "short"), 100)) == [Document("a", "short")]
