"""What the analysis of one arm and seed reads: documents' rows by attack, and what is known about the arm itself."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from isotone.comparisons import Row

AttackKey = tuple[str, str]
"""Attack and variant, as rows name them."""

WORST: AttackKey = ("ensemble", "worst_case")
"""The rows of ``isotone.attacks.ensemble``, which is imported where it is used: the package of attacks brings torch."""

EXCHANGED = "exchanged"
"""What the rows of ``isotone.attacks.exchange`` call themselves, and their log."""


@dataclass(frozen=True)
class Evidence:
    """What one arm and seed has.

    Attributes:
        attacks: documents' rows by attack and variant, of held-out documents; the ensemble's among them.
        clean: documents' rows of the evaluation on clean text.
        transferred: rows of other arms' edits on this arm; ``source`` says whose.
        probes: rows of ``isotone.attacks.probe``.
        exchanged: rows of ``isotone.attacks.exchange``: how much the arm reads what is attacked.
        matched: of a matched-loss control: ``to``, ``by``, ``target``, ``reached``, ``reachable``, ``reason``.
        order: what the certificate says about the order of feed-forward inputs; None without a certificate.
    """

    attacks: Mapping[AttackKey, Sequence[Row]]
    clean: Sequence[Row] = ()
    transferred: Sequence[Row] = ()
    probes: Sequence[Row] = ()
    exchanged: Sequence[Row] = ()
    matched: Mapping[str, Any] | None = None
    order: str | None = None


Seeds = Sequence[Mapping[str, Evidence]]
"""For each seed, the evidence by arm."""

Column = Mapping[str, tuple[float, float]]
"""By document: a sum and its count."""


@dataclass(frozen=True)
class Tables:
    """Columns of several arms on the documents that all of them have in all seeds, as [seeds, documents].

    Attributes:
        documents: in order.
        num_missing: documents that some of them lack.
        x: sums by arm.
        n: counts by arm.
    """

    documents: Sequence[str]
    num_missing: int
    x: Mapping[str, np.ndarray] = field(default_factory=dict)
    n: Mapping[str, np.ndarray] = field(default_factory=dict)


def tables(columns: Mapping[str, Sequence[Column]]) -> Tables:
    """Bring columns, one a seed for each arm, to common documents."""
    every = [column for of_seeds in columns.values() for column in of_seeds]
    documents = [d for d in every[0] if all(d in column for column in every)] if every else []
    num_missing = len(set().union(*every)) - len(documents)
    cells = {
        arm: np.array([[column[d] for d in documents] for column in of_seeds], dtype=np.float64).reshape(
            len(of_seeds), len(documents), 2
        )
        for arm, of_seeds in columns.items()
    }
    return Tables(
        documents,
        num_missing,
        {arm: cell[..., 0] for arm, cell in cells.items()},
        {arm: cell[..., 1] for arm, cell in cells.items()},
    )


def with_ensemble(by_attack: Mapping[AttackKey, Sequence[Row]]) -> dict[AttackKey, Sequence[Row]]:
    """Return rows by attack with the worst case of all attacks on texts among them, made here where it is not there."""
    from isotone.attacks.ensemble import worst_case

    found = {key: rows for key, rows in by_attack.items() if rows}
    if WORST not in found and (worst := worst_case(list(found.values()))):
        found[WORST] = worst
    return found


def by_attack(all_rows: Iterable[Sequence[Row]]) -> dict[AttackKey, Sequence[Row]]:
    """Return rows of several attacks under the names that they give themselves."""
    return {(rows[0]["attack"], rows[0]["variant"]): rows for rows in all_rows if rows}


def members(evidence: Evidence) -> list[AttackKey]:
    """Return the attacks that the ensemble is made of."""
    from isotone.attacks.ensemble import is_member

    return [key for key, rows in evidence.attacks.items() if key != WORST and is_member(rows)]


def changes(rows: Sequence[Row]) -> Column:
    """Return Σ change and number of the scored tokens, of documents with figures in the primary protocol."""
    return {
        row["id"]: (row["delta_nats"], row["scored_tokens"])
        for row in rows
        if row["status"] == "ok" and "delta_nats" in row
    }


def clean_losses(rows: Sequence[Row]) -> Column:
    """Return Σ clean loss and number of the scored tokens, of the same documents."""
    return {
        row["id"]: (float(np.sum(row["clean_nll"])), row["scored_tokens"])
        for row in rows
        if row["status"] == "ok" and "delta_nats" in row
    }


def clean_text_losses(rows: Sequence[Row]) -> Column:
    """Return Σ loss and number of tokens of the evaluation's documents."""
    return {
        row["id"]: (row["nats"], row["num_tokens"]) for row in rows if row["num_tokens"] and row["nats"] is not None
    }
