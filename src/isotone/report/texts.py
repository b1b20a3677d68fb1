"""Attacked documents as a reader sees them: what was replaced by what, and which later tokens became harder to predict.

The texts of tokens are stored beside the results when the attacks are aggregated, so that a page needs no tokenizer.
"""

import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from isotone import records

TOKEN_TEXTS = "results/tokens.json"
"""Where in a run the texts of the tokens that occur in its attack rows lie."""

_FULL_SHADE_NATS = 3.0
"""A rise of a token's loss by this many nats is shaded fully."""

Row = Mapping[str, Any]


class Tokenizer(Protocol):
    """The one method of a transformers tokenizer that is used here."""

    def decode(self, token_ids: list[int], /) -> Any:
        """Return the text of tokens."""


@dataclass(frozen=True)
class Piece:
    """A token of an attacked text: kept, replaced (then ``old`` is what stood there), in the gap, or scored."""

    kind: Literal["kept", "flip", "gap", "scored"]
    text: str
    old: str = ""
    rise_nats: float | None = None

    @property
    def shade(self) -> float:
        """Strength of the shading, −1 (easier) to 1 (harder)."""
        return max(-1.0, min(1.0, (self.rise_nats or 0.0) / _FULL_SHADE_NATS))


@dataclass(frozen=True)
class AttackedText:
    """One document attacked in one arm; ``missing`` says why there is none."""

    arm: str
    pieces: tuple[Piece, ...] = ()
    delta_nll: float | None = None
    num_edits: int = 0
    top1: Mapping[str, int] | None = None
    scored_tokens: int = 0
    missing: str = ""


@dataclass(frozen=True)
class AttackedDocument:
    """One document, as attacked in every arm."""

    id: str
    texts: tuple[AttackedText, ...]


class TokenTexts:
    """The text of each token id; an id without a stored text is shown as its number."""

    def __init__(self, texts: Mapping[str, str]):
        self._texts = texts

    @classmethod
    def of_run(cls, run_directory: Path) -> "TokenTexts":
        """Read what ``write_token_texts`` stored; nothing is there in a run that was never aggregated."""
        path = run_directory / TOKEN_TEXTS
        return cls(records.read_json(path)["texts"] if path.is_file() else {})

    def __getitem__(self, token: int) -> str:
        text = self._texts.get(str(token))
        return f"[{token}]" if text is None else visible(text)

    def join(self, tokens: Iterable[int]) -> str:
        """Return the texts of tokens, one after the other."""
        return "".join(self[token] for token in tokens)


def write_token_texts(run_directory: Path, rows: Iterable[Row], tokenizer: Tokenizer) -> Path:
    """Store the text of every token that occurs in attack rows, in results/tokens.json, and return its path.

    A token is decoded behind another one, since some tokenizers drop the blank that begins a text.
    """
    ids = sorted({token for row in rows for token in _tokens_of(row)})
    anchor = _plain_token(ids, tokenizer)
    before = len(str(tokenizer.decode(anchor)))
    texts = {str(token): visible(str(tokenizer.decode([*anchor, token]))[before:]) for token in ids}
    path = run_directory / TOKEN_TEXTS
    records.write_json(path, {"schema": 1, "texts": texts})
    return path


def _plain_token(ids: Iterable[int], tokenizer: Tokenizer) -> list[int]:
    """Return a token of letters alone: bytes of a split character would merge with what follows."""
    return next(([i] for i in ids if (t := str(tokenizer.decode([i])).strip()).isascii() and t.isalpha()), [])


def visible(text: str) -> str:
    """Return text in which control, direction and other unprintable characters are written out, such as \\u202e.

    Attacked text is hostile: a direction mark would turn the page's own words round, a lone surrogate is no UTF-8.
    """
    return "".join(c if c in "\n\t" or unicodedata.category(c)[0] != "C" else f"\\u{ord(c):04x}" for c in text)


def attacked_documents(
    rows_of_arm: Mapping[str, Iterable[Row]], texts: TokenTexts, variant: str, count: int
) -> list[AttackedDocument]:
    """Return the first documents, by index and not by outcome, that at least one arm was attacked on.

    Args:
        rows_of_arm: rows of HotFlip, by arm, in the order in which arms are shown.
        texts: the texts of tokens.
        variant: which of the rows: "iterative" or "once".
        count: how many documents.
    """
    by_index: dict[int, dict[str, Row]] = {}
    for arm, rows in rows_of_arm.items():
        for row in rows:
            if row["variant"] == variant:
                by_index.setdefault(row["index"], {})[arm] = row
    attacked = [i for i in sorted(by_index) if any(row["status"] == "ok" for row in by_index[i].values())]
    return [
        AttackedDocument(
            visible(str(next(iter(by_index[index].values()))["id"])),
            tuple(_attacked_text(arm, by_index[index].get(arm), texts) for arm in rows_of_arm),
        )
        for index in attacked[:count]
    ]


def _attacked_text(arm: str, row: Row | None, texts: TokenTexts) -> AttackedText:
    if row is None:
        return AttackedText(arm, missing="not attacked")
    if row["status"] != "ok":
        return AttackedText(arm, missing=visible(str(row["reason"])))
    return AttackedText(
        arm,
        tuple(_pieces(row, texts)),
        row["delta_nats"] / row["scored_tokens"],
        len(row["edits"]),
        row["top1"],
        row["scored_tokens"],
    )


def _pieces(row: Row, texts: TokenTexts) -> Iterable[Piece]:
    """Yield the document's tokens in order; the last are scored, the gap lies before them. Padding is left out."""
    ids, num_scored = row["clean_ids"], row["scored_tokens"]
    first_scored = row.get("first_label", len(ids) - num_scored)  # of a pair, the target's first
    first_gap = first_scored - row["delta_by_offset"].get("gap", {"tokens": 0})["tokens"]
    new_of = {position: new for position, _, new in row["edits"]}
    for position in (*range(row.get("source_tokens", first_scored)), *range(first_scored, first_scored + num_scored)):
        token = ids[position]
        if position in new_of:
            yield Piece("flip", texts[new_of[position]], old=texts[token])
        elif position < first_gap:
            yield Piece("kept", texts[token])
        elif position < first_scored:
            yield Piece("gap", texts[token])
        else:
            at = position - first_scored
            yield Piece("scored", texts[token], rise_nats=row["attacked_nll"][at] - row["clean_nll"][at])


def _tokens_of(row: Row) -> Iterable[int]:
    yield from row.get("clean_ids", ())
    for _, old, new in row.get("edits", ()):
        yield old
        yield new
