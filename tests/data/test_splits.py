"""Which documents are removed is fixed: a pairwise comparison, and the bundled corpus, must give the same ones."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isotone.data import splits
from isotone.data.bible import web_bible
from isotone.data.fractions import DEFAULT_FRACTIONS, SPLITS
from isotone.data.splits import assign_split, minhash, near_duplicates, removed_duplicates


def pairwise(levels: np.ndarray, signatures: np.ndarray) -> set[int]:
    removed: set[int] = set()
    for level in reversed(range(len(SPLITS))):
        for i in np.flatnonzero(levels == level):
            for j in np.flatnonzero(levels > level):
                bands = (signatures[i] == signatures[j]).reshape(64, 2).all(axis=1)
                if j not in removed and bands.any() and (signatures[i] == signatures[j]).mean() >= 0.25:
                    removed.add(int(i))
    return removed


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 7), st.integers(1, 9))
def test_near_duplicates_are_those_of_a_pairwise_comparison(seed: int, num_shards: int, index: int, query: int) -> None:
    rng = np.random.default_rng(seed)
    count = 30
    base = rng.integers(0, 2**32, (4, 128), dtype=np.uint32)
    keep = rng.random((count, 128)) < rng.choice([0.1, 0.25, 0.3, 0.9], (count, 1))
    signatures = np.where(keep, base[rng.integers(0, 4, count)], rng.integers(0, 5, (count, 128), dtype=np.uint32))
    levels = rng.integers(0, len(SPLITS), count).astype(np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splits, "_INDEX_ROWS", index)
        patch.setattr(splits, "_QUERY_ROWS", query)
        removed = near_duplicates(levels, np.array_split(signatures, num_shards))
    assert set(np.flatnonzero(removed).tolist()) == pairwise(levels, signatures)


def test_training_text_yields_to_held_out_text() -> None:
    text = " ".join(f"word{i}" for i in range(200))
    pair = [("train", minhash(text)), ("test", minhash(text + " and a little more"))]
    assert list(removed_duplicates(pair)) == [0]
    assert list(removed_duplicates(pair[::-1])) == [1]
    assert list(removed_duplicates([("train", minhash(text)), ("train", minhash(text))])) == []


def test_unlike_and_short_texts_stay() -> None:
    texts = ["", "one", "two words", " ".join(f"a{i}" for i in range(99)), " ".join(f"b{i}" for i in range(99))]
    assert list(removed_duplicates((s, minhash(t)) for s, t in zip(SPLITS, texts, strict=True))) == []


def test_shares_are_those_asked_for() -> None:
    counts = Counter(assign_split(f"document {i}", DEFAULT_FRACTIONS) for i in range(20_000))
    for name, share in DEFAULT_FRACTIONS.items():
        assert counts[name] / 20_000 == pytest.approx(share, abs=0.01)


def test_the_bundled_corpus_is_split_as_the_pocket_model_was_trained() -> None:
    documents = list(web_bible())
    names = [assign_split(d.text, DEFAULT_FRACTIONS) for d in documents]
    removed = [
        documents[i].id for i in removed_duplicates((s, minhash(d.text)) for s, d in zip(names, documents, strict=True))
    ]
    assert removed == ["2 Samuel 8", "1 Kings 10", "Isaiah 36"]
    assert Counter(names) == {"train": 946, "validation": 52, "attack_search": 43, "test": 64, "attack_test": 84}
