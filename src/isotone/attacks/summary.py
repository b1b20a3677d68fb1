"""Turns the rows of an attack into its entry: ratios of sums, never means of ratios; what is missing is counted."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from isotone.attacks.judging import Row
from isotone.attacks.published import SUCCESS
from isotone.attacks.vocabulary import Vocabulary

Entry = dict[str, Any]

THRESHOLD_QUANTILE = 0.95
CURVE_STEP = 0.025
"""Distance of the thresholds at which success is given, nats per scored token."""


def success_threshold(rows: Sequence[Row]) -> float | None:
    """Return τ, nats per scored token: the 95th percentile of the change that random edits make.

    Args:
        rows: of ``RandomEdits`` on the baseline and search documents; all draws of all documents count alike.

    Returns:
        None if no document has figures.
    """
    deltas = [delta for row in rows if row["status"] == "ok" for delta in row["draw_deltas"]]
    return float(np.quantile(deltas, THRESHOLD_QUANTILE)) if deltas else None


def summarize(
    rows: Sequence[Row],
    *,
    threshold: float | None = None,
    published_success: float = SUCCESS,
) -> Entry:
    """Return an attack's entry.

    The success curve goes from 0 to 1 nat, or on to where it is 0 and τ is behind it.

    Args:
        rows: one a document, all of one attack and variant.
        threshold: τ, nats per scored token; a document's attack succeeds above it. None: no success rate.
        published_success: relative increase of the mean loss that the published accounting calls a success.

    Returns:
        Figures are None where no document has them; ``missing`` counts documents without figures by reason.
    """
    if not rows:
        raise ValueError("an attack without documents has no entry")
    ok = [row for row in rows if row["status"] == "ok"]
    primary = [row for row in ok if "delta_nats" in row]  # absent where scored tokens were edited
    num_scored = sum(row["scored_tokens"] for row in primary)
    deltas = [row["delta_nats"] / row["scored_tokens"] for row in primary]
    bound = {"upper_bound": True} if any(row.get("upper_bound") for row in rows) else {}
    return {
        "attack": rows[0]["attack"],
        "variant": rows[0]["variant"],
        **bound,
        "n": len(ok),
        "missing": dict(Counter(row["reason"] for row in rows if row["status"] == "missing")),
        "delta_nll": _ratio(math.fsum(row["delta_nats"] for row in primary), num_scored),
        "clean_nll": _ratio(math.fsum(math.fsum(row["clean_nll"]) for row in primary), num_scored),
        "attacked_nll": _ratio(math.fsum(math.fsum(row["attacked_nll"]) for row in primary), num_scored),
        "success_rate": None if threshold is None else _share(deltas, lambda delta: delta > threshold),
        "threshold": threshold,
        "success_curve": _curve(deltas, threshold),
        "top1": {side: _ratio(sum(row["top1"][side] for row in primary), num_scored) for side in ("clean", "attacked")},
        "delta_by_offset": _by_offset(primary),
        "edits_per_document": _mean([len(row["edits"]) if "edits" in row else None for row in ok]),
        "spent_tokens": sum(row["spent_tokens"] for row in rows),
        "progress": _progress(primary),
        "text_space": _text_space(primary),
        "published_accounting": _published(ok, published_success),
    }


def summarize_triggers(
    rows: Sequence[Row],
    found: Mapping[str, Any],
    vocabulary: Vocabulary,
    *,
    threshold: float | None = None,
    published_success: float = SUCCESS,
) -> Entry:
    """Return the entry of the triggers: that of ``summarize``, the controls, and every restart.

    Args:
        rows: of ``evaluate_trigger``.
        found: what ``search_trigger`` returned.
        vocabulary: for the triggers' texts.
        threshold: as in ``summarize``, as is ``published_success``.
    """
    ok = [row for row in rows if row["status"] == "ok"]
    entry = summarize(rows, threshold=threshold, published_success=published_success)
    shift = _mean_control(ok, lambda row: row["shift_deltas"])
    random = _mean_control(ok, lambda row: row["random_deltas"])
    best = None if found["best"] is None else found["finished"][found["best"]]
    return entry | {
        "spent_tokens": found["spent_tokens"],
        "delta_shift": shift,
        "delta_random": random,
        "delta_initial": _mean_control(ok, lambda row: [row["initial_delta"]]),
        "delta_minus_shift": _minus(entry["delta_nll"], shift),
        "delta_minus_random": _minus(entry["delta_nll"], random),
        "best_restart": found["best"],
        "trigger_ids": None if best is None else best["trigger_ids"],
        "trigger_text": None if best is None else vocabulary.decode(best["trigger_ids"]),
        "restarts": [
            restart
            | {
                "trigger_text": vocabulary.decode(restart["trigger_ids"]),
                "initial_text": vocabulary.decode(restart["initial_ids"]),
                "search_delta_nll": _minus(restart["search_nll"], found["clean_search_nll"]),
                "initial_search_delta_nll": _minus(restart["initial_search_nll"], found["clean_search_nll"]),
            }
            for restart in found["finished"]
        ],
    }


def _curve(deltas: Sequence[float], threshold: float | None) -> list[list[float]]:
    if not deltas:
        return []
    num_steps = math.ceil(max(1.0, threshold or 0.0, *deltas) / CURVE_STEP)
    taus = [round(CURVE_STEP * step, 9) for step in range(num_steps + 1)]
    return [[tau, sum(delta > tau for delta in deltas) / len(deltas)] for tau in taus]


def _by_offset(rows: Sequence[Row]) -> dict[str, float | None]:
    of_bucket: dict[str, list[Row]] = {}
    for row in rows:
        for name, found in row["delta_by_offset"].items():  # of a short target only the first buckets are there
            of_bucket.setdefault(name, []).append(found)
    return {
        name: _ratio(math.fsum(part["nats"] for part in parts), sum(part["tokens"] for part in parts))
        for name, parts in of_bucket.items()
    }


def _progress(rows: Sequence[Row]) -> list[list[float]]:
    """Return the change so far against tokens spent a document, as the attack saw it, round by round."""
    rows = [row for row in rows if row.get("progress")]
    num_scored = sum(row["scored_tokens"] for row in rows)
    clean = math.fsum(math.fsum(row["clean_nll"]) for row in rows)
    num_rounds = min((len(row["progress"]) for row in rows), default=0)
    return [
        [
            sum(row["progress"][index][0] for row in rows) / len(rows),
            (math.fsum(row["progress"][index][1] for row in rows) - clean) / num_scored,
        ]
        for index in range(num_rounds)
    ]


def _text_space(rows: Sequence[Row]) -> Entry | None:
    """Return what the attack is worth once its texts are decoded and encoded again; None where no text is known."""
    rows = [row for row in rows if row.get("round_trip") is not None]
    if not rows:
        return None
    nats = [(_text_nats(row), row["scored_tokens"]) for row in rows]
    known = [(value, count) for value, count in nats if value is not None]
    return {
        "survived": sum(row["round_trip"] for row in rows),
        "changed": sum(not row["round_trip"] for row in rows),
        "missing": len(nats) - len(known),
        "delta_nll": _ratio(math.fsum(value for value, _ in known), sum(count for _, count in known)),
    }


def _text_nats(row: Row) -> float | None:
    return row["delta_nats"] if row["round_trip"] else row["text_space"].get("delta_nats")


def _published(rows: Sequence[Row], success: float) -> Entry:
    accounts = [row["published_accounting"] for row in rows if "published_accounting" in row]
    means = {
        name: _mean([account[name] for account in accounts])
        for name in ("degradation", "clean", "attacked", "flipped", "untouched")
    }
    rate = _share([account["degradation"] for account in accounts], lambda degradation: degradation > success)
    return {"success_rate": rate, **means, "threshold": success}


def _mean_control(rows: Sequence[Row], deltas: Callable[[Row], list[float]]) -> float | None:
    values = [(float(np.mean(found)), row["scored_tokens"]) for row in rows if (found := deltas(row))]
    return _ratio(math.fsum(value * count for value, count in values), sum(count for _, count in values))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _ratio(math.fsum(known), len(known))


def _share(values: Sequence[float], holds: Callable[[float], bool]) -> float | None:
    return _ratio(sum(map(holds, values)), len(values))


def _ratio(total: float, count: int) -> float | None:
    return total / count if count else None


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b
