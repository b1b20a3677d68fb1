"""Packed data are read from the disk as they are needed, and not at all when they are not whole."""

from pathlib import Path

import numpy as np
import pytest

from isotone.data import PackedData, open_packed
from isotone.errors import BlockedError
from isotone.records import CorruptError

from .conftest import Pack, random_texts, write_jsonl


@pytest.fixture
def data(pack: Pack, tmp_path: Path) -> PackedData:
    pack(write_jsonl(tmp_path / "corpus.jsonl", random_texts(240)))
    return open_packed(tmp_path / "packed")


def test_rows_are_memory_mapped_and_read_only(data: PackedData) -> None:
    rows = data.rows("train")
    assert isinstance(rows, np.memmap)
    assert data.rows("train")[[2, 0]].shape == (2, 16)
    with pytest.raises(ValueError, match="read-only"):
        rows[0, 0] = 1


def test_a_rows_file_holds_whole_rows_only(data: PackedData) -> None:
    for split in ("train", "validation"):
        rows = data.rows(split)
        assert isinstance(rows, np.memmap)
        assert (data.folder / f"{split}.rows.npy").stat().st_size == rows.offset + rows.nbytes


def test_documents_are_a_sequence(data: PackedData) -> None:
    documents = data.documents("attack_test")
    everything = list(documents)
    assert len(everything) == len(documents) > 3
    assert [d.id for d in documents[1:3]] == [d.id for d in everything[1:3]]
    assert documents[-1].id == everything[-1].id
    assert documents[0].tokens.dtype == np.int64
    assert documents.num_tokens.tolist() == [len(d.tokens) for d in everything]
    for index in (len(documents), -len(documents) - 1):
        with pytest.raises(IndexError):
            documents[index]


def test_a_seed_chooses_which_documents_come_first(data: PackedData) -> None:
    documents = data.documents("attack_test")
    ids = [[d.id for d in documents.shuffled(seed)] for seed in (0, 0, 1)]
    assert ids[0] == ids[1] != ids[2]
    assert sorted(ids[0]) == sorted(ids[2]) == sorted(d.id for d in documents)
    shuffled = documents.shuffled(1)
    assert shuffled.num_tokens.tolist() == [len(d.tokens) for d in shuffled]


def test_a_folder_can_be_moved(data: PackedData, tmp_path: Path) -> None:
    moved = open_packed(data.folder.rename(tmp_path / "moved"))
    assert moved.fingerprint == data.fingerprint
    assert moved.documents("test")[0].text


def test_missing_data_block_and_torn_data_are_named(data: PackedData, tmp_path: Path) -> None:
    with pytest.raises(BlockedError, match="setup"):
        open_packed(tmp_path / "nowhere")
    file = data.folder / "test.tokens.npy"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CorruptError, match=r"test\.tokens\.npy"):
        open_packed(data.folder)
