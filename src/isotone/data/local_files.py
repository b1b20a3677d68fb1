"""Documents from local files: txt, jsonl (plain, gz, zst) and parquet, read as streams; faults are named by place.

A line of jsonl and a row of parquet is a document. A text file is one document, unless it is the whole corpus or larger
than 4 MB: then it is cut into passages, whole paragraphs of at least 4,096 bytes together. Pairs are two fields of an
entry, or the lines of two text files.
"""

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from isotone import records
from isotone.config import Data
from isotone.data.corpora import Corpus
from isotone.data.document import Document
from isotone.errors import UsageError

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
"""What a file may be, by the end of its name."""

_WHOLE_FILE_BYTES = 4_000_000
_PASSAGE_BYTES = 4_096
_LONGEST_PASSAGE_BYTES = 65_536  # where a text has no blank lines
_PARQUET_ROWS = 256
_ZST_BLOCK_BYTES = 1 << 17


@dataclass(frozen=True)
class Fields:
    """Where an entry's text is, or the two texts of a pair.

    Attributes:
        text: the field of the text, or of the source.
        target: the field of the target; None: entries are no pairs.
    """

    text: str
    target: str | None = None

    @classmethod
    def of(cls, config: Data) -> "Fields":
        """Return the fields that a configuration names."""
        return cls(config.text_field) if config.source_field is None else cls(config.source_field, config.target_field)

    @property
    def keys(self) -> dict[str, str]:
        """The fields, by the key of the configuration that names each."""
        return (
            {"text_field": self.text}
            if self.target is None
            else {"source_field": self.text, "target_field": self.target}
        )

    def document(self, name: str, entry: Any, place: str) -> Document:
        """Return the document that an entry holds.

        Raises:
            UsageError: as ``text_of``.
        """
        text, *target = (text_of(entry, field, place, key) for key, field in self.keys.items())
        return Document(name, text, target[0] if target else None)


def open_files(path: Path, fields: Fields) -> Corpus:
    """Open a file, or all files of known kinds below a folder, in the order of their names.

    Raises:
        UsageError: nothing readable is there.
    """
    root, files = path, [path]
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.is_file() and not _hidden(f, path))
        files = [f for f in files if f.name.endswith(SUFFIXES)]
    elif path.is_file():
        root = path.parent
    else:  # a pipe would be waited on for ever, and cannot be read twice
        raise UsageError(f"data.source: {path} is neither a file nor a folder")
    if not files or not files[0].name.endswith(SUFFIXES):
        raise UsageError(f"data.source: {path} is not, and does not hold, a file named {', '.join(SUFFIXES)}")
    if fields.target and (plain := next((f for f in files if f.name.endswith(".txt")), None)):
        raise UsageError(
            f"data.source_field: {plain} is plain text and has no fields; give pairs of text files as source and "
            "target_file"
        )
    hashes = _hashes(files, root)

    def read(skip: int) -> Iterator[Document]:
        documents = (d for f in files for d in _read(f, f.relative_to(root).as_posix(), fields, len(files) == 1))
        return islice(documents, skip, None)

    return Corpus({"kind": "files", "num_files": len(files), "sha256": records.hash_json(hashes)}, read)


def open_parallel(source: Path, target: Path) -> Corpus:
    """Open two text files of which each line of the one belongs to the same line of the other.

    Raises:
        UsageError: one is missing or is no text file, or they have different numbers of lines.
    """
    for key, path in (("source", source), ("target_file", target)):
        if not path.is_file():
            raise UsageError(f"data.{key}: there is no file {path}; pairs are the lines of two text files")
    hashes = [*_hashes([source]), *_hashes([target], key="target_file")]
    num_source, num_target = (sum(1 for _ in _whole_lines(path)) for path in (source, target))
    if num_source != num_target:
        raise UsageError(
            f"data.target_file: {target} has {num_target} lines and {source} has {num_source}; line N of the one must "
            f"belong to line N of the other: look for the first pair that does not fit, and mend it or leave it out in "
            f"both (an empty line is a line)"
        )

    def read(skip: int) -> Iterator[Document]:
        lines = zip(_whole_lines(source), _whole_lines(target), strict=True)
        documents = (Document(f"{source.name}:{number}", *texts) for number, texts in enumerate(lines, 1))
        return islice(documents, skip, None)

    return Corpus({"kind": "parallel files", "sha256": records.hash_json([digest for _, digest in hashes])}, read)


def _hashes(files: list[Path], root: Path | None = None, key: str = "source") -> list[list[str]]:
    try:
        return [[f.relative_to(root).as_posix() if root else f.name, records.sha256_file(f)] for f in files]
    except OSError as error:
        raise UsageError(f"data.{key}: {error.filename} cannot be read ({error.strerror})") from error


def _whole_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a UTF-8 file without their ends."""
    number = 0
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            for line in file:
                number += 1
                yield line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, f"after line {number}") from error


def _hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def _read(path: Path, name: str, fields: Fields, alone: bool) -> Iterator[Document]:
    if name.endswith(".parquet"):
        yield from _read_parquet(path, name, fields)
    elif name.endswith(".txt"):
        whole = not alone and path.stat().st_size <= _WHOLE_FILE_BYTES
        yield from [_read_text(path, name)] if whole else _read_passages(path, name)
    else:
        yield from _read_jsonl(path, name, fields)


# --- text ------------------------------------------------------------------------------------------------------------


def _read_text(path: Path, name: str) -> Document:
    data = path.read_bytes()
    try:
        return Document(name, data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _not_utf8(path, f"byte {error.start}") from error


def _read_passages(path: Path, name: str) -> Iterator[Document]:
    """Yield whole paragraphs together, each passage named by the line that it begins on."""
    lines: list[str] = []
    size, first = 0, 1
    for number, line in enumerate(_text_lines(path), 1):
        lines.append(line)
        size += len(line)
        ended = size >= _PASSAGE_BYTES and not line.strip()
        if ended or size >= _LONGEST_PASSAGE_BYTES:
            yield Document(f"{name}:{first}", "".join(lines).strip("\r\n"))
            lines, size, first = [], 0, number + 1
    if "".join(lines).strip():
        yield Document(f"{name}:{first}", "".join(lines).strip("\r\n"))


def _text_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a UTF-8 file; a line without end comes in pieces, so that memory stays bounded."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = 0
    with open(path, "rb") as file:
        if file.read(3) == codecs.BOM_UTF8:
            position = 3
        file.seek(position)
        while True:
            line = file.readline(_LONGEST_PASSAGE_BYTES)
            undecoded = len(decoder.getstate()[0])
            try:
                text = decoder.decode(line, final=not line)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, f"byte {position - undecoded + error.start}") from error
            if not line:
                return
            position += len(line)
            yield text


# --- jsonl -----------------------------------------------------------------------------------------------------------


def _read_jsonl(path: Path, name: str, fields: Fields) -> Iterator[Document]:
    import zstandard

    number = 0
    try:
        for number, line in enumerate(_lines(path), 1):
            if line.strip():
                place = f"{path}, line {number}"
                yield fields.document(f"{name}:{number}", _entry_of_line(line, path, number), place)
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise UsageError(f"{path}, after line {number}: the compressed file is torn or damaged ({error})") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror or error})") from error


def _lines(path: Path) -> Iterator[bytes]:
    if path.name.endswith(".zst"):
        rest = b""
        for block in _zst_blocks(path):
            *lines, rest = (rest + block).split(b"\n")
            yield from lines
        yield rest
    else:
        with gzip.open(path, "rb") if path.name.endswith(".gz") else open(path, "rb") as file:
            yield from file


def _zst_blocks(path: Path) -> Iterator[bytes]:
    """Yield what a file of one or more frames holds; zstandard's own reader takes a torn frame for the end."""
    import zstandard

    decompressor = zstandard.ZstdDecompressor()
    frame = None
    with open(path, "rb") as file:
        data = file.read(_ZST_BLOCK_BYTES)
        while data:
            frame = frame or decompressor.decompressobj()
            yield frame.decompress(data)
            data = b""
            if frame.eof:
                data, frame = frame.unused_data, None
            data = data or file.read(_ZST_BLOCK_BYTES)
    if frame:
        raise EOFError("it ends within a frame")


def _entry_of_line(line: bytes, path: Path, number: int) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise _not_utf8(path, f"line {number}, byte {error.start} of the line") from error
    except ValueError as error:
        raise UsageError(f"{path}, line {number}: not valid JSON ({error})") from error


def text_of(value: Any, text_field: str, place: str, key: str = "text_field") -> str:
    """Return the text of one entry; a null counts as an empty text.

    Raises:
        UsageError: the field is missing, is not text, or cannot be written as UTF-8.
    """
    if not isinstance(value, dict):
        raise UsageError(f"{place}: expected an object with a field {text_field!r}, found {type(value).__name__}")
    if text_field not in value:
        fields = ", ".join(map(str, value))
        raise UsageError(f"{place}: there is no field {text_field!r}; fields there: {fields}; set data.{key}")
    text = value[text_field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UsageError(f"{place}: the field {text_field!r} holds {type(text).__name__}, expected text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{place}: character {error.start} of {text_field!r} is half a surrogate pair") from error
    return text


# --- parquet ---------------------------------------------------------------------------------------------------------


def _read_parquet(path: Path, name: str, fields: Fields) -> Iterator[Document]:
    import pyarrow
    from pyarrow import parquet

    row = 0
    try:
        with parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            names = file.schema_arrow.names
            for key, field in fields.keys.items():
                if field not in names:
                    raise UsageError(
                        f"{path}: there is no column {field!r}; columns there: {', '.join(names)}; set data.{key}"
                    )
            for batch in file.iter_batches(_PARQUET_ROWS, columns=list(fields.keys.values())):
                for value in batch.to_pylist():
                    row += 1
                    yield fields.document(f"{name}:{row}", value, f"{path}, row {row}")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, f"between rows {row + 1} and {row + _PARQUET_ROWS}") from error
    except (pyarrow.ArrowException, OSError) as error:
        raise UsageError(f"{path}, after row {row}: not a whole parquet file ({error})") from error


def _not_utf8(path: Path, place: str) -> UsageError:
    return UsageError(f"{path}, {place}: not UTF-8; convert the file (for example with iconv) and run again")
