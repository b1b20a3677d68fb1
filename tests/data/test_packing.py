"""A corpus is packed once, without loss, and to the same bytes however often packing was interrupted."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from isotone import records
from isotone.config import Data
from isotone.data import packing, shards
from isotone.data.corpora import open_corpus
from isotone.data.document import Document
from isotone.data.fractions import DEFAULT_FRACTIONS, SPLITS
from isotone.data.packed import open_packed
from isotone.data.splits import assign_split, minhash, removed_duplicates
from isotone.errors import DiskFullError, Stopped, UsageError
from isotone.interruption import StopFlag

from .conftest import Pack, random_texts, write_jsonl

ONLY_TEST = {"train": 0, "validation": 0, "test": 1, "attack_search": 0, "attack_test": 0}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    texts = random_texts(240)
    texts[100:100] = ["", " \n ", texts[7] + " again", "a <eos> b", texts[3]]
    return write_jsonl(tmp_path / "corpus.jsonl", texts)


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_CHARS", 3_000)
    monkeypatch.setattr(shards, "_BATCH_CHARS", 700)


def expected(corpus: Path) -> dict[str, list[Document]]:
    documents = [d for d in open_corpus(Data(source=str(corpus))).read(0) if d.text.strip()]
    names = [assign_split(d.text, DEFAULT_FRACTIONS) for d in documents]
    removed = set(removed_duplicates((n, minhash(d.text)) for n, d in zip(names, documents, strict=True)))
    found: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for i, (name, document) in enumerate(zip(names, documents, strict=True)):
        if i not in removed:
            found[name].append(document)
    return found


def content(folder: Path) -> dict[str, Any]:
    return records.read_json(folder / "manifest.json")["files"]


def test_rows_are_the_documents_after_separators_in_order(
    corpus: Path, pack: Pack, tmp_path: Path, tokenizer: Any
) -> None:
    summary = pack(corpus)
    data = open_packed(tmp_path / "packed")
    for split in ("train", "validation"):
        stream = [
            i for d in expected(corpus)[split] for i in (0, *tokenizer(d.text, split_special_tokens=True).input_ids)
        ]
        rows = data.rows(split)
        assert rows.flatten().tolist() == stream[: len(stream) // 16 * 16]
        assert rows.shape == (summary["splits"][split]["rows"], 16)
        assert summary["splits"][split]["tokens_dropped"] == len(stream) % 16
        assert rows.dtype == np.uint16


def test_held_out_documents_keep_name_text_and_tokens(corpus: Path, pack: Pack, tmp_path: Path, tokenizer: Any) -> None:
    summary = pack(corpus)
    data = open_packed(tmp_path / "packed")
    for split in SPLITS[1:]:
        documents = data.documents(split)
        assert [(d.id, d.text) for d in documents] == [(d.id, d.text) for d in expected(corpus)[split]]
        for document in documents:
            assert tokenizer.decode(document.tokens) == document.text
            assert document.num_bytes == len(document.text.encode())
        assert summary["splits"][split]["documents"] == len(documents)
        assert summary["splits"][split]["bytes"] == sum(d.num_bytes for d in documents)
        assert summary["splits"][split]["tokens"] == sum(len(d.tokens) for d in documents)


def test_what_was_left_out_is_counted_and_named(corpus: Path, pack: Pack, tmp_path: Path) -> None:
    summary = pack(corpus, min_chars=10)
    assert summary["documents_read"] == 245
    assert summary["too_short"] == 3
    removed = [json.loads(line) for line in (tmp_path / "packed" / "removed.jsonl").read_text().splitlines()]
    assert summary["near_duplicates"]["first_removed"] == [r["id"] for r in removed]
    assert sum(summary["near_duplicates"]["removed"].values()) == len(removed)
    kept = sum(s["documents"] for s in summary["splits"].values())
    assert kept + len(removed) + summary["too_short"] == 245


def test_near_duplicates_in_other_splits_are_removed(pack: Pack, tmp_path: Path) -> None:
    texts = [" ".join(f"w{i}x{j}" for j in range(60)) for i in range(300)]
    copies = [text + " extra" for text in texts]
    summary = pack(write_jsonl(tmp_path / "c.jsonl", texts + copies))
    crossing = sum(
        assign_split(a, DEFAULT_FRACTIONS) != assign_split(b, DEFAULT_FRACTIONS)
        for a, b in zip(texts, copies, strict=True)
    )
    assert sum(summary["near_duplicates"]["removed"].values()) == crossing > 50


def test_a_second_call_reads_nothing(corpus: Path, pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    first = pack(corpus)
    monkeypatch.setattr(packing, "read_into_shards", lambda *args: pytest.fail("read again"))
    assert pack(corpus) == first


def test_a_changed_corpus_setting_or_tokenizer_changes_the_fingerprint(
    corpus: Path, pack: Pack, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    prints = [pack(corpus)["fingerprint"]]
    prints += [pack(corpus, sequence_length=17)["fingerprint"], pack(corpus, num_documents=200)["fingerprint"]]
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="A")
    prints.append(pack(corpus, tokenizer=other)["fingerprint"])
    corpus.write_text(corpus.read_text() + '{"text": "one more"}\n')
    prints.append(pack(corpus)["fingerprint"])
    assert len(set(prints)) == 5
    assert open_packed(tmp_path / "packed").fingerprint == prints[-1]


def test_the_fingerprint_does_not_depend_on_where_the_corpus_lies(corpus: Path, pack: Pack, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    copy = tmp_path / "elsewhere" / corpus.name
    copy.write_bytes(corpus.read_bytes())
    assert pack(copy, "a")["fingerprint"] == pack(corpus, "b")["fingerprint"]
    assert content(tmp_path / "a")["train.rows.npy"] == content(tmp_path / "b")["train.rows.npy"]


def test_shards_and_batches_do_not_matter(
    corpus: Path, pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(corpus, "small")
    monkeypatch.setattr(shards, "SHARD_CHARS", 10**9)
    monkeypatch.setattr(shards, "_BATCH_CHARS", 10**9)
    pack(corpus, "large")
    assert content(tmp_path / "small") == content(tmp_path / "large")


class Crash(BaseException):
    """Stands for a kill: nothing may catch it."""


def crash_before_publishing(monkeypatch: pytest.MonkeyPatch, packing_call: Callable[[], Any]) -> None:
    def crash(*args: Any) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(packing, "_publish", crash)
        with pytest.raises(Crash):
            packing_call()


def test_packing_interrupted_at_any_write_ends_in_the_same_bytes(
    corpus: Path, pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Crash before the 1st, 2nd, 3rd … file operation of one packing after the other, until none is left to crash."""
    pack(corpus, "whole")
    calls = {"left": 0}

    def crashing(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            calls["left"] -= 1
            if calls["left"] == 0:
                raise Crash
            return call(*args, **kwargs)

        return wrapped

    for name in ("rename", "replace", "open", "write"):
        monkeypatch.setattr(records.os, name, crashing(getattr(records.os, name)))
    attempts = 0
    while True:
        attempts += 1
        calls["left"] = 37 * attempts % 101 + 5 * attempts
        try:
            pack(corpus, "killed")
        except Crash:
            continue
        break
    monkeypatch.undo()
    assert attempts > 5
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    assert not (tmp_path / "killed.unfinished").exists()


@pytest.mark.integration
def test_packing_killed_at_random_moments_ends_in_the_same_bytes(corpus: Path, pack: Pack, tmp_path: Path) -> None:
    pack(corpus, "whole")
    started = time.monotonic()
    pack(corpus, "timed")  # the first call also pays for what is loaded once
    duration_s, rng, kills = time.monotonic() - started, np.random.default_rng(1), 0
    for _ in range(200):
        process = os.fork()
        if process == 0:
            try:
                pack(corpus, "killed")
                os._exit(0)
            finally:
                os._exit(1)
        time.sleep(float(rng.uniform(0, 0.4)) * duration_s)
        os.kill(process, signal.SIGKILL)
        kills += 1
        if os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0:
            if kills > 5:
                break
            shutil.rmtree(tmp_path / "killed")  # it ended before enough kills had landed: from the beginning
    assert kills > 5
    pack(corpus, "killed")
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_a_stop_is_heeded_and_continued_from(corpus: Path, pack: Pack, tmp_path: Path) -> None:
    pack(corpus, "whole")
    reads: list[int] = []
    reasons = []
    for _ in range(50):
        stop = StopFlag()

        def progress(documents: int, text: str, stop: StopFlag = stop) -> None:
            reads.append(documents)
            stop.request("SIGUSR1")

        try:
            pack(corpus, "stopped", stop=stop, progress=progress)
        except Stopped as error:
            reasons.append(str(error))
        else:
            break
    assert set(reasons) == {"packing the data stopped safely (SIGUSR1)"}
    assert reads == sorted(set(reads))
    assert len(reads) > 3
    assert content(tmp_path / "stopped") == content(tmp_path / "whole")


def test_a_damaged_shard_is_made_again(
    corpus: Path, pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(corpus, "whole")
    crash_before_publishing(monkeypatch, lambda: pack(corpus, "damaged"))
    file = tmp_path / "damaged.unfinished" / "shard-000001" / "tokens.npy"
    file.write_bytes(file.read_bytes()[:-1] + b"\x07")
    pack(corpus, "damaged")
    assert content(tmp_path / "damaged") == content(tmp_path / "whole")


def test_what_was_read_of_a_changed_corpus_is_not_used(
    corpus: Path, pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash_before_publishing(monkeypatch, lambda: pack(corpus))
    write_jsonl(corpus, random_texts(200, seed=1))
    pack(corpus)
    pack(corpus, "fresh")
    assert content(tmp_path / "packed") == content(tmp_path / "fresh")


def test_a_damaged_data_set_is_packed_again(corpus: Path, pack: Pack, tmp_path: Path) -> None:
    first = pack(corpus)
    file = tmp_path / "packed" / "train.rows.npy"
    file.write_bytes(file.read_bytes()[:-2] + b"\xff\xff")
    with pytest.raises(records.CorruptError, match=r"train\.rows\.npy"):
        open_packed(tmp_path / "packed").verify()
    assert pack(corpus) == first
    open_packed(tmp_path / "packed").verify()


def test_a_full_disk_keeps_what_was_read(
    corpus: Path, pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(corpus, "whole")
    with monkeypatch.context() as patch:
        real, calls = records.publish_directory, iter(range(100))

        def full(path: Path, files: Any) -> None:
            if next(calls) == 3:
                raise DiskFullError("no space left")
            real(path, files)

        patch.setattr(records, "publish_directory", full)
        with pytest.raises(DiskFullError):
            pack(corpus, "full")
    assert len(list((tmp_path / "full.unfinished").glob("shard-*"))) == 3
    pack(corpus, "full")
    assert content(tmp_path / "full") == content(tmp_path / "whole")


def test_large_vocabularies_are_stored_in_four_bytes(corpus: Path, pack: Pack, tmp_path: Path) -> None:
    pack(corpus, "small", vocab_size=65_536)
    pack(corpus, "large", vocab_size=65_537)
    small, large = (open_packed(tmp_path / name).rows("train") for name in ("small", "large"))
    assert (small.dtype, large.dtype) == (np.uint16, np.uint32)
    assert np.array_equal(small, large)


def test_models_without_bos_and_eos_have_no_separator(corpus: Path, pack: Pack, tmp_path: Path, tokenizer: Any) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    summary = pack(corpus, tokenizer=bare)
    train = summary["splits"]["train"]
    assert open_packed(tmp_path / "packed").separator is None
    assert train["rows"] * 16 + train["tokens_dropped"] == train["tokens"]


def test_a_share_of_nothing_leaves_a_split_out(corpus: Path, pack: Pack, tmp_path: Path) -> None:
    fractions = {"train": 0.9, "validation": 0.1, "test": 0, "attack_search": 0, "attack_test": 0}
    pack(corpus, fractions=fractions)
    assert len(open_packed(tmp_path / "packed").documents("test")) == 0


def test_misfits_are_told_in_one_line(corpus: Path, pack: Pack, tmp_path: Path) -> None:
    faults: list[tuple[dict[str, Any], str]] = [
        ({"sequence_length": 65}, "data.sequence_length: rows of 65 tokens are longer than the model's context of 64"),
        ({"vocab_size": 200}, "model.source: the tokenizer knows token"),
        ({"min_chars": 10_000}, "holds no text of 10000 characters or more"),
        ({"num_documents": 12}, "gives this split 0 documents"),
        ({"num_documents": 5, "sequence_length": 64, "fractions": ONLY_TEST}, "train split of .* less than one row"),
    ]
    for settings, said in faults:
        with pytest.raises(UsageError, match=said) as caught:
            pack(corpus, **settings)
        assert "\n" not in str(caught.value)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UsageError, match=r"empty\.jsonl holds no text"):
        pack(tmp_path / "empty.jsonl")


def test_a_token_beyond_the_models_vocabulary_is_named(corpus: Path, pack: Pack, tokenizer: Any) -> None:
    extended = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>")
    size = len(extended)
    extended.add_tokens(["zebra"])
    write_jsonl(corpus, [*random_texts(100), "a zebra runs"])
    with pytest.raises(UsageError, match=rf"gives token {size} \(in document corpus\.jsonl:101\)"):
        pack(corpus, tokenizer=extended, vocab_size=size)


def test_a_corpus_is_mended_and_read_on(corpus: Path, pack: Pack, tmp_path: Path) -> None:
    """A corpus with a fault in its middle fails by name; mended, it is read whole."""
    lines = corpus.read_text().splitlines(keepends=True)
    corpus.write_text("".join([*lines[:150], '{"text": 3}\n', *lines[150:]]))
    with pytest.raises(UsageError, match="line 151"):
        pack(corpus)
    corpus.write_text("".join(lines))
    pack(corpus)
    pack(corpus, "fresh")
    assert content(tmp_path / "packed") == content(tmp_path / "fresh")
