"""A reader sees what an attack changed, token by token, whatever the tokenizer does with single tokens."""

from pathlib import Path

import pytest
from synthetic_run import GAP, PREFIX, SCORED, TEXT, Words, hotflip_rows

from isotone.report import write_token_texts
from isotone.report.texts import AttackedText, TokenTexts, attacked_documents, visible


@pytest.fixture
def texts(tmp_path: Path) -> TokenTexts:
    write_token_texts(tmp_path, hotflip_rows("baseline", "iterative", 5, Words()), Words())
    return TokenTexts.of_run(tmp_path)


def test_pieces_are_the_document_with_flips_gap_and_scored_tokens(texts: TokenTexts) -> None:
    rows = hotflip_rows("baseline", "iterative", 5, Words())
    (document,) = attacked_documents({"baseline": rows}, texts, "iterative", 1)
    (text,) = document.texts
    kinds = [piece.kind for piece in text.pieces]
    assert kinds[PREFIX:] == ["gap"] * GAP + ["scored"] * SCORED
    assert [i for i, kind in enumerate(kinds) if kind == "flip"] == [edit[0] for edit in rows[0]["edits"]]
    assert "".join(piece.old or piece.text for piece in text.pieces) == " " + " ".join(TEXT[: PREFIX + GAP + SCORED])
    for position, _, new in rows[0]["edits"]:
        assert text.pieces[position].text == " " + Words().words[new]
    assert text.pieces[-1].rise_nats == pytest.approx(rows[0]["attacked_nll"][-1] - rows[0]["clean_nll"][-1])
    assert text.delta_nll == pytest.approx(rows[0]["delta_nats"] / SCORED)


def test_documents_are_the_first_by_index_in_all_arms(texts: TokenTexts) -> None:
    rows = hotflip_rows("baseline", "iterative", 5, Words())
    failed = {**rows[0], "status": "missing", "reason": "no memory"}
    documents = attacked_documents({"baseline": rows[::-1], "monotonic": [failed], "other": []}, texts, "iterative", 9)
    assert [document.id for document in documents] == [f"web/Genesis/{i}" for i in (1, 2, 3, 4)]  # no arm has the fifth
    assert documents[0].texts[1:] == (
        AttackedText("monotonic", missing="no memory"),
        AttackedText("other", missing="not attacked"),
    )


def test_tokens_without_stored_text_are_shown_by_number(tmp_path: Path) -> None:
    texts = TokenTexts.of_run(tmp_path)
    assert texts[17] == "[17]"


@pytest.mark.parametrize(
    ("text", "shown"),
    [("a\u202eb", r"a\u202eb"), ("\x00", r"\u0000"), ("\ud800", r"\ud800"), ("né\n\tß 神", "né\n\tß 神")],
)
def test_control_characters_are_written_out(text: str, shown: str) -> None:
    assert visible(text) == shown
