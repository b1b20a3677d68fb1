"""Made-up rows of attacks, as ``isotone.attacks`` writes them, for tests of what follows from rows."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from isotone.evidence import AttackKey, Evidence, with_ensemble

PREFIX, GAP, SCORED = 8, 2, 16
TOKENS = PREFIX + GAP + SCORED - 1
"""Tokens of a document that have a loss."""

ITERATIVE: AttackKey = ("hotflip", "iterative")


def rows(
    harm_D: Sequence[float] | np.ndarray,
    *,
    attack: AttackKey = ITERATIVE,
    clean: float = 3.0,
    seed: int = 0,
    spent: int = 1000,
    flips: int = 2,
) -> list[dict[str, Any]]:
    """Return a row a document whose scored tokens lose ``harm`` nats each; clean losses are the same in all arms."""
    found = []
    for index, harm in enumerate(harm_D):
        generator = np.random.default_rng([seed, index])
        loss = generator.gamma(4, clean / 4, TOKENS) + 0.01
        change = generator.normal(0, 0.3, TOKENS)
        change[-SCORED:] += harm - change[-SCORED:].mean()
        positions = sorted(generator.choice(np.arange(1, PREFIX), flips, replace=False).tolist())
        for position in positions:
            change[position - 1] += 4.0  # an inserted token is a surprise
        attacked, begin = loss + change, TOKENS - SCORED
        delta = float(change[begin:].sum())
        found.append(
            {
                "index": index,
                "id": f"d{index}",
                "attack": attack[0],
                "variant": attack[1],
                "status": "ok",
                "edits": [[position, 0, 1] for position in positions],
                "clean_ids": [0] * (TOKENS + 1),
                "context_clean_nll": loss[:begin].tolist(),
                "context_attacked_nll": attacked[:begin].tolist(),
                "clean_nll": loss[begin:].tolist(),
                "attacked_nll": attacked[begin:].tolist(),
                "scored_tokens": SCORED,
                "delta_nats": delta,
                "spent_tokens": spent,
                "progress": [[n * spent // 2, float(loss[begin:].sum()) + n * delta / 2] for n in (1, 2)],
            }
        )
    return found


def missing(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row as it is where a document has no figures."""
    kept = {key: row[key] for key in ("index", "id", "attack", "variant", "spent_tokens")}
    return kept | {"status": "missing", "reason": "the loss of the clean text is not a finite number"}


def clean_rows(nll: float, num_documents: int = 40) -> list[dict[str, Any]]:
    """Return rows of the evaluation around a loss."""
    spread = np.random.default_rng(5).normal(0, 0.2, num_documents)
    return [{"id": f"t{i}", "nats": 50 * (nll + e), "num_tokens": 50, "num_bytes": 200} for i, e in enumerate(spread)]


def evidence(
    *attacks: list[dict[str, Any]], nll: float = 3.0, matched: Mapping[str, Any] | None = None, **more: Any
) -> Evidence:
    """Return an arm's evidence from rows of its attacks; unless ``exchanged`` is given, it reads what is attacked."""
    by_attack = {(found[0]["attack"], found[0]["variant"]): found for found in attacks}
    if attacks:
        more.setdefault("exchanged", exchanged(2.0, len(attacks[0])))
    return Evidence(with_ensemble(by_attack), clean_rows(nll), matched=matched, **more)


def exchanged(uses: float, num_documents: int) -> list[dict[str, Any]]:
    """Return rows of an arm that loses this many nats a token with another document's context."""
    return rows(np.full(num_documents, uses), attack=("exchanged", "exchanged"))


def matched_to(arm: str, by: str = "temperature", distance: float = 0.002, **more: Any) -> dict[str, Any]:
    """Return what the match of a control came to."""
    return {
        "to": arm,
        "by": by,
        "target": 3.5,
        "reached": 3.5 + distance,
        "reachable": True,
        "reason": "",
        "parameter": 1.0,
    } | more
