"""A pair corpus is packed without loss: one row a pair, cut where it is too long, and what was cut is counted."""

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_pairs import EOS, PAD, pair_tokenizer, random_pairs, write_pairs

from isotone import records
from isotone.config import Data
from isotone.config_io import experiment_from_dict
from isotone.data.bible import bible_pairs, web_bible
from isotone.data.corpora import open_corpus
from isotone.data.document import Document
from isotone.data.fractions import DEFAULT_FRACTIONS, SPLITS
from isotone.data.packed import open_packed
from isotone.data.packing import prepare_data
from isotone.data.splits import assign_split
from isotone.errors import UsageError
from isotone.interruption import StopFlag
from isotone.pairs import PairLayout

FIELDS: dict[str, Any] = {"source_field": "source", "target_field": "target"}
Pack = Callable[..., dict[str, Any]]


@pytest.fixture
def pack(tmp_path: Path) -> Pack:
    def run(source: Path, **settings: Any) -> dict[str, Any]:
        config = Data(**{"source": str(source), "source_length": 16, "target_length": 8, **settings})
        return prepare_data(config, pair_tokenizer(), tmp_path / "packed", max_context=None, stop=StopFlag())

    return run


def test_each_pair_is_a_row_of_source_and_target_with_eos_and_padding(pack: Pack, tmp_path: Path) -> None:
    pairs = random_pairs(200)
    summary = pack(write_pairs(tmp_path / "pairs.jsonl", pairs), **FIELDS)
    data, tokenizer = open_packed(tmp_path / "packed"), pair_tokenizer()
    assert data.pairs == PairLayout(16, PAD)
    assert summary["pairs"] == {"source": 16, "target": 8, "pad": PAD, "eos": EOS}
    expected = []
    for pair in pairs:
        source, target = (tokenizer(pair[side], add_special_tokens=False)["input_ids"] for side in ("source", "target"))
        expected.append([*source, EOS, *[PAD] * (15 - len(source)), *target, EOS, *[PAD] * (7 - len(target))])
    for split in ("train", "validation"):
        kept = [
            row for row, p in zip(expected, pairs, strict=True) if assign_split(p["source"], DEFAULT_FRACTIONS) == split
        ]
        assert data.rows(split).tolist() == kept
        tokens = sum(1 for row in kept for token in row if token != PAD)
        assert (summary["splits"][split]["rows"], summary["splits"][split]["tokens"]) == (len(kept), tokens)
    by_source = {pair["source"]: (pair["target"], row) for pair, row in zip(pairs, expected, strict=True)}
    for split in SPLITS[1:]:
        for document in data.documents(split):
            target, row = by_source[document.text]
            assert (document.target, document.tokens.tolist()) == (target, row)
            assert document.num_bytes == len(target.encode())


def test_long_sides_are_cut_behind_an_eos_and_counted(pack: Pack, tmp_path: Path) -> None:
    long = {"source": "w1 " * 40, "target": "w2 w3 w4 w5 w6 w7 w8 w9 w10"}
    pairs = [long, *random_pairs(40)]
    only = {"train": 0, "validation": 0, "attack_search": 0, "test": 1, "attack_test": 0}
    with pytest.raises(UsageError, match="train split"):  # which counts come to hand for: nothing to train on
        pack(write_pairs(tmp_path / "pairs.jsonl", pairs), **FIELDS, fractions=only)
    summary = pack(tmp_path / "pairs.jsonl", **FIELDS, source_prefix="w59 ")
    cut = [split for split in SPLITS if summary["splits"][split]["sources_cut"]]
    split = assign_split(long["source"], DEFAULT_FRACTIONS)
    assert cut == [split]
    assert summary["splits"][split]["targets_cut"] == 1
    row = next(r for r in open_packed(tmp_path / "packed").rows(split).tolist() if r[1] == r[2] == 5)
    assert row[0] == 63  # the prefix
    assert (row[15], row[23], row[16]) == (EOS, EOS, 6)


def test_pairs_without_one_side_are_left_out_and_counted(pack: Pack, tmp_path: Path) -> None:
    pairs = [*random_pairs(60), {"source": "w1 w2", "target": " "}, {"source": "", "target": "w1"}]
    assert pack(write_pairs(tmp_path / "pairs.jsonl", pairs), **FIELDS)["too_short"] == 2


def test_a_text_that_says_pad_or_eos_is_not_taken_for_them(pack: Pack, tmp_path: Path) -> None:
    pairs = [{"source": f"w1 <pad> w{i % 60} </s> w{i // 60}", "target": "w4 <pad> w5"} for i in range(240)]
    pack(write_pairs(tmp_path / "pairs.jsonl", pairs), **FIELDS)
    for row in open_packed(tmp_path / "packed").rows("train").tolist():
        assert row[3:5] == [EOS, PAD]
        assert not {EOS, PAD} & set(row[:3])


@pytest.mark.parametrize("kind", ["jsonl.gz", "parquet", "txt"])
def test_every_kind_of_file_holds_the_same_pairs(kind: str, tmp_path: Path) -> None:
    pairs = random_pairs(5)
    path = write_pairs(tmp_path / "pairs.jsonl", pairs)
    settings: dict[str, Any] = FIELDS
    if kind == "jsonl.gz":
        zipped = tmp_path / "pairs.jsonl.gz"
        zipped.write_bytes(gzip.compress(path.read_bytes()))
        path = zipped
    elif kind == "parquet":
        import pyarrow
        from pyarrow import parquet

        path = tmp_path / "pairs.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(pairs), path)
    else:
        path = tmp_path / "a.txt"
        path.write_text("".join(p["source"] + "\r\n" for p in pairs))
        (tmp_path / "b.txt").write_text("\n".join(p["target"] for p in pairs))
        settings = {"target_file": str(tmp_path / "b.txt")}
    corpus = open_corpus(Data(source=str(path), **settings))
    assert [(d.text, d.target) for d in corpus.read(2)] == [(p["source"], p["target"]) for p in pairs[2:]]


def test_files_of_unequal_length_are_refused_with_both_counts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\n")
    (tmp_path / "b.txt").write_text("eins\n\n")
    with pytest.raises(UsageError, match=r"b\.txt has 2 lines and .*a\.txt has 3; .*mend it or leave it out in both"):
        open_corpus(Data(source=str(tmp_path / "a.txt"), target_file=str(tmp_path / "b.txt")))
    with pytest.raises(UsageError, match=r"data\.target_file: there is no file"):
        open_corpus(Data(source=str(tmp_path / "a.txt"), target_file=str(tmp_path / "c.txt")))


def sources(tmp_path: Path) -> list[dict[str, Any]]:
    write_pairs(tmp_path / "seen.jsonl", random_pairs(60))
    write_pairs(tmp_path / "held_out.jsonl", [{"a": p["source"], "b": p["target"]} for p in random_pairs(40, seed=1)])
    (tmp_path / "more.jsonl").write_text((tmp_path / "seen.jsonl").read_text())
    return [
        {"source": str(tmp_path / "seen.jsonl"), **FIELDS, "use": "train"},
        {"source": str(tmp_path / "held_out.jsonl"), "source_field": "a", "target_field": "b", "use": "test"},
    ]


def test_sources_are_trained_on_or_held_out_as_they_say(pack: Pack, tmp_path: Path) -> None:
    summary = pack(Path("web-bible"), sources=sources(tmp_path))
    assert sum(summary["splits"][split]["documents"] for split in ("train", "validation")) == 60
    held_out = ("attack_search", "test", "attack_test")
    assert sum(summary["splits"][split]["documents"] for split in held_out) == 40
    data = open_packed(tmp_path / "packed")
    assert all(d.id.startswith("1/held_out.jsonl:") for split in held_out for d in data.documents(split))


def test_training_pairs_that_are_held_out_elsewhere_are_removed(pack: Pack, tmp_path: Path) -> None:
    """As of a collection that contains the very data set that is tested on."""
    given = sources(tmp_path)
    held_out = (tmp_path / "held_out.jsonl").read_text().replace('"a"', '"source"').replace('"b"', '"target"')
    (tmp_path / "seen.jsonl").write_text((tmp_path / "more.jsonl").read_text() + held_out)
    summary = pack(Path("web-bible"), sources=given)
    removed = summary["near_duplicates"]["removed"]
    assert removed["train"] + removed["validation"] == 40


def test_documents_of_files_with_one_name_stay_apart(pack: Pack, tmp_path: Path) -> None:
    given = []
    for seed, use in enumerate(("train", "test", "test")):
        (tmp_path / str(seed)).mkdir()
        path = write_pairs(tmp_path / str(seed) / "pairs.jsonl", random_pairs(60, seed=seed))
        given.append({"source": str(path), **FIELDS, "use": use})
    pack(Path("web-bible"), sources=given)
    data = open_packed(tmp_path / "packed")
    held_out = [d for split in SPLITS[2:] for d in data.documents(split)]
    assert len({d.id for d in held_out}) == len(held_out) == 120
    assert {d.id.partition(":")[0] for d in held_out} == {"1/pairs.jsonl", "2/pairs.jsonl"}


def test_limits_and_faults_of_sources_are_their_own(tmp_path: Path) -> None:
    given = sources(tmp_path)
    few = Data(sources=[given[0] | {"num_documents": 3}, given[1]])  # type: ignore[arg-type]
    assert [d.id.partition(":")[0] for d in open_corpus(few).read(2)][:2] == ["0/seen.jsonl", "1/held_out.jsonl"]
    for settings, message in (
        ({"sources": given[:1]}, "sources: some have use: train and some use: test"),
        ({"sources": given, "source_field": "x", "target_field": "y"}, "source_field: give it under sources"),
        (
            {
                "sources": given,
                "fractions": {"train": 1, "validation": 0, "attack_search": 0, "test": 0, "attack_test": 0},
            },
            "fractions: nothing is left of attack_search, test, attack_test for use: test",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            Data(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source_field": "a"}, "source_field: a pair has two fields; give target_field"),
        ({"target_field": "a"}, "target_field: a pair has two fields; give source_field"),
        ({"source": "bible-pairs", **FIELDS}, "has its own targets"),
        ({"target_file": "a.txt", **FIELDS}, "two text files, or two fields"),
        ({"target_length": 9}, "target_length: is of pairs; give source_field"),
        (FIELDS, "source_field: web-bible holds no pairs; give the source"),
        ({"target_file": "a.txt"}, "target_file: web-bible holds no pairs; give the source"),
        ({"sequence_length": 99, **FIELDS}, "sequence_length: has no meaning for pairs"),
    ],
)
def test_contradictions_are_refused_by_key(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Data(**settings)


@pytest.mark.parametrize("name", ["bible-pairs", "web-bible"])
@pytest.mark.parametrize("fields", [{}, FIELDS])
def test_bundled_pairs_among_several_sources_are_refused_by_key(name: str, fields: dict[str, Any]) -> None:
    given = {"data": {"sources": [{"source": name, "use": "test", **fields}]}}
    with pytest.raises(UsageError, match=rf"my\.yaml: data\.sources\.0\.source: {name} is bundled"):
        experiment_from_dict(given, "my.yaml")


def test_the_file_that_cannot_be_read_is_named_with_its_own_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("a")

    def sha256_file(path: Path) -> str:
        if path.name == "b.txt":
            raise PermissionError(13, "Permission denied", str(path))
        return "0"

    monkeypatch.setattr(records, "sha256_file", sha256_file)
    with pytest.raises(UsageError, match=r"data\.target_file: .*b\.txt cannot be read \(Permission denied\)"):
        open_corpus(Data(source=str(tmp_path / "a.txt"), target_file=str(tmp_path / "b.txt")))


def test_missing_fields_are_named_with_the_key_that_sets_them(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "pairs.jsonl", random_pairs(1))
    with pytest.raises(UsageError, match=r"no field 'summary'; fields there: source, target; set data\.target_field"):
        list(open_corpus(Data(source=str(path), source_field="source", target_field="summary")).read(0))
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UsageError, match=r"plain text and has no fields; .*target_file"):
        open_corpus(Data(source=str(tmp_path / "a.txt"), **FIELDS))


def test_a_tokenizer_without_padding_is_refused(tmp_path: Path) -> None:
    tokenizer = pair_tokenizer()
    tokenizer.pad_token = None
    config = Data(source=str(write_pairs(tmp_path / "p.jsonl", random_pairs(3))), **FIELDS)
    with pytest.raises(UsageError, match="padding token and another EOS token, as T5's has"):
        prepare_data(config, tokenizer, tmp_path / "packed", max_context=None, stop=StopFlag())


def test_no_held_out_verse_repeats_one_that_the_bundled_model_was_trained_on() -> None:
    trained_on: list[Document] = []
    held_out: list[Document] = []
    for verse in bible_pairs():
        side = trained_on if assign_split(str(verse.group), DEFAULT_FRACTIONS) == "train" else held_out
        side.append(verse)
    assert len(held_out) > 6000
    for texts, known in (
        ({v.text for v in held_out}, {v.text for v in trained_on}),
        ({v.target for v in held_out}, {v.target for v in trained_on}),
    ):
        assert not texts & known


def test_verses_belong_to_the_split_of_their_chapter() -> None:
    documents = list(open_corpus(Data(source="bible-pairs")).read(0))
    chapters = {chapter.id: chapter.text for chapter in web_bible()}
    assert len(documents) > 30_000
    assert documents[0].id == "Genesis 1:1"
    assert documents[0].text.startswith("In the beginning God created the heaven")
    assert documents[0].target is not None
    assert documents[0].target.startswith("In the beginning God created the heavens")
    assert all(d.group == chapters[d.id.rpartition(":")[0]] for d in documents)
