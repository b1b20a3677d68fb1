"""Every kind of file is read as it was written, and every fault is told in one line that names the place."""

import gzip
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from isotone.config import Data
from isotone.data.corpora import open_corpus
from isotone.data.document import Document
from isotone.errors import UsageError

TEXTS = ["Schöne Grüße", "two\nlines", "", "日本語 – text", "last"]
JSONL = "".join(json.dumps({"n": i, "text": t}, ensure_ascii=False) + "\n" for i, t in enumerate(TEXTS)).encode()


def write_parquet(path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": TEXTS, "n": range(len(TEXTS))}), path)


WRITERS: dict[str, Callable[[Path], object]] = {
    "a.jsonl": lambda p: p.write_bytes(JSONL),
    "a.jsonl.gz": lambda p: p.write_bytes(gzip.compress(JSONL)),
    "a.jsonl.zst": lambda p: p.write_bytes(zstandard.compress(JSONL[:60]) + zstandard.compress(JSONL[60:])),
    "a.parquet": write_parquet,
}


def read(path: Path, **settings: str) -> list[Document]:
    return list(open_corpus(Data(source=str(path), **settings)).read(0))  # type: ignore[arg-type]


def fault(path: Path, **settings: str) -> str:
    with pytest.raises(UsageError) as caught:
        read(path, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", WRITERS)
def test_a_line_or_row_is_a_document(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    assert read(tmp_path / name) == [Document(f"{name}:{i}", t) for i, t in enumerate(TEXTS, 1)]
    corpus = open_corpus(Data(source=str(tmp_path / name)))
    assert [d.text for d in corpus.read(2)] == TEXTS[2:]


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "2.txt").write_text("second")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbffirst")
    (tmp_path / "c.jsonl").write_text('{"text": "third"}\n\n{"text": null}\n')
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "notes.md").write_text("no")
    assert read(tmp_path) == [
        Document("a.txt", "first"),
        Document("b/2.txt", "second"),
        Document("c.jsonl:1", "third"),
        Document("c.jsonl:3", ""),
    ]


def test_a_single_text_is_cut_into_passages_of_whole_paragraphs(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {i}. " + "word " * 200 for i in range(40)]
    (tmp_path / "book.txt").write_text("\n\n".join(paragraphs))
    passages = read(tmp_path / "book.txt")
    assert len(passages) == 8
    assert "\n\n".join(p.text for p in passages) == "\n\n".join(paragraphs)
    assert all(p.text.startswith("Paragraph") for p in passages)
    assert [p.id for p in passages[:2]] == ["book.txt:1", "book.txt:11"]


def test_a_text_without_line_ends_is_read_in_bounded_pieces(tmp_path: Path) -> None:
    text = "ä" * 100_001
    (tmp_path / "a.txt").write_text(text)
    passages = read(tmp_path / "a.txt")
    assert "".join(p.text for p in passages) == text
    assert max(len(p.text) for p in passages) <= 65_536


def test_identity_is_the_content_wherever_it_lies(tmp_path: Path) -> None:
    for folder in ("x", "y", "z"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("one" if folder != "z" else "two")
    x, y, z = (open_corpus(Data(source=str(tmp_path / f))).identity for f in ("x", "y", "z"))
    assert x == y != z


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"fine\n" + b"\xff", "a.txt, byte 5: not UTF-8"),
        ("a.txt", b"\xef\xbb\xbfabc\xe4bc", "a.txt, byte 6: not UTF-8"),
        ("a.txt", "é".encode()[:1], "a.txt, byte 0: not UTF-8"),
        ("a.txt", b"x" * 65_535 + b"\xc3(", "a.txt, byte 65535: not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe4"}\n', "a.jsonl, line 2, byte 10 of the line: not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl, line 2: not valid JSON"),
        ("a.jsonl", b'["a"]\n', "line 1: expected an object with a field 'text', found list"),
        (
            "a.jsonl",
            b'{"body": "a", "id": 1}\n',
            "line 1: there is no field 'text'; fields there: body, id; set data.text_f",
        ),
        ("a.jsonl", b'{"text": 3}\n', "line 1: the field 'text' holds int, expected text"),
        ("a.jsonl", b'{"text": "a\\ud800"}\n', "line 1: character 1 of 'text' is half a surrogate pair"),
        ("a.jsonl.gz", gzip.compress(JSONL, mtime=0)[:-9], "after line .*: the compressed file is torn or damaged"),
        ("a.jsonl.gz", JSONL, "after line 0: the compressed file is torn or damaged"),
        ("a.jsonl.zst", JSONL, "after line 0: the compressed file is torn or damaged"),
        ("a.parquet", b"PAR1 no", "a.parquet, after row 0: not a whole parquet file"),
        ("a.csv", b"text\na\n", "is not, and does not hold, a file named .txt"),
    ],
)
def test_faults_name_their_place(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert re.search(said, fault(tmp_path / name))


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_a_torn_file_is_never_taken_for_a_shorter_one(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    whole = compress(JSONL[:60]) + compress(JSONL[60:])
    ends = {len(compress(JSONL[:60])), len(whole)}
    path = tmp_path / ("a.jsonl.gz" if compress is gzip.compress else "a.jsonl.zst")
    for size in set(range(1, len(whole))) - ends:
        path.write_bytes(whole[:size])
        assert "torn or damaged" in fault(path), size


def test_other_fields_can_be_named_and_missing_columns_list_what_is_there(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet")
    assert "there is no column 'body'; columns there: text, n; set data.text_field" in fault(
        tmp_path / "a.parquet", text_field="body"
    )
    assert "row 1: the field 'n' holds int" in fault(tmp_path / "a.parquet", text_field="n")
    (tmp_path / "b.jsonl").write_text('{"body": "x"}')
    assert read(tmp_path / "b.jsonl", text_field="body") == [Document("b.jsonl:1", "x")]


def test_a_pipe_is_refused_and_not_waited_on(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "corpus.txt")
    with pytest.raises(UsageError, match="neither a file nor a folder"):
        open_corpus(Data(source=str(tmp_path / "corpus.txt")))


def test_an_empty_folder_is_said_so(tmp_path: Path) -> None:
    assert "does not hold" in fault(tmp_path)
