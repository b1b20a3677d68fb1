"""What is measured of an arm, document by document, and how two arms are compared in it.

Everything is a quantity: for each document a sum and a count, so that a measurement is Σ sums/Σ counts and a comparison
is paired by document. A document that one side is missing is left out on both, and counted.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from isotone.statistics import (
    mcnemar,
    paired_difference,
    proportion_interval,
    proportion_interval_over_seeds,
    ratio_estimate,
)

PREFIX, TEXT_SPACE, AFTER_FIRST_FLIP, PUBLISHED = "prefix", "prefix_text_space", "after_first_flip", "published"
PREPENDED = "prepended"
"""Protocols: primary, the same with the attacked ids decoded and encoded again, secondary, published accounting;
and the triggers' own, which scores the text behind the trigger."""

AT_TENTH = "delta_nll_at_10_percent"
"""What an attack had found with a tenth of its budget."""

PER_TOKEN = "nats per token"
SHARE = "share of documents"
F1 = "F1"
"""Unit of ROUGE: the mean of the documents' F-measures."""


Row = Mapping[str, Any]


class Key(NamedTuple):
    """What is measured. Attack, variant and protocol are None where nothing is attacked."""

    metric: str
    attack: str | None = None
    variant: str | None = None
    protocol: str | None = None


@dataclass(frozen=True)
class Quantity:
    """One measure of one arm and seed, by document.

    Attributes:
        key: what is measured.
        unit: of Σ sums/Σ counts.
        sums: by document id, finite.
        counts: by document id, positive, the same for all arms (of one seed).
        missing: documents without a figure, with the reason.
        binary: sums are 0 or 1 and counts 1, so the value is a share.
        threshold: in nats, where the measure depends on one.
        budget: tokens spent a document (by a trigger: in its whole search), where something was attacked.
    """

    key: Key
    unit: str
    sums: Mapping[str, float]
    counts: Mapping[str, float]
    missing: Mapping[str, str] = field(default_factory=dict)
    binary: bool = False
    threshold: float | None = None
    budget: float | None = None

    def measurement(self, arm: str, seed: int) -> dict[str, Any]:
        """Return the measure as an entry of ``measurements``; value and interval are None without a document."""
        value = ci95 = None
        if self.sums:
            counts_D = np.array([self.counts[d] for d in self.sums])
            estimate = ratio_estimate(np.array(list(self.sums.values())), counts_D)
            value, ci95 = estimate.value, estimate.ci95
            if self.binary:
                ci95 = proportion_interval(round(sum(self.sums.values())), len(self.sums))
        return {
            "arm": arm,
            "seed": seed,
            **self.key._asdict(),
            "budget": self.budget,
            "threshold": self.threshold,
            "n": len(self.sums),
            "num_missing": len(self.missing),
            "value": value,
            "ci95": None if ci95 is None else list(ci95),
            "unit": self.unit,
        }


def measure(arm: str, of_seeds: Sequence[Quantity]) -> dict[str, Any]:
    """Return one measure of an arm over seeds; a document without a figure in one seed is left out in all, and counted.

    Each seed's successes are those over its own threshold; ``threshold`` is None where seeds have different ones.
    """
    first, documents = of_seeds[0], _common(of_seeds)
    value = ci95 = None
    if documents:
        estimate = ratio_estimate(_table(of_seeds, "sums", documents), _table(of_seeds, "counts", documents))
        value, ci95 = estimate.value, estimate.ci95
        if first.binary:
            share = round(sum(first.sums[d] for d in documents)), len(documents)
            ci95 = proportion_interval(*share) if len(of_seeds) == 1 else proportion_interval_over_seeds(estimate)
    budgets = [q.budget for q in of_seeds if q.budget is not None]
    return {
        "arm": arm,
        **first.key._asdict(),
        "budget": math.fsum(budgets) / len(budgets) if budgets else None,
        "threshold": _same_threshold(of_seeds),
        "n": len(documents),
        "num_missing": len(_all_documents(of_seeds)) - len(documents),
        "num_seeds": len(of_seeds),
        "value": value,
        "ci95": _as_list(ci95),
        "unit": first.unit,
    }


def compare(a: tuple[str, Sequence[Quantity]], b: tuple[str, Sequence[Quantity]]) -> dict[str, Any] | None:
    """Compare two arms in one quantity, given for each seed; None if no document has figures on both sides.

    Args:
        a: name and quantities, one a seed, of the arm that is asked about.
        b: the same of the arm that it is compared with, in the same order of seeds.

    Returns:
        An entry of ``comparisons``; ``difference`` is a − b. ``p_adjusted`` is None until a family is corrected.
    """
    (name_a, of_a), (name_b, of_b) = a, b
    first = of_a[0]
    documents = _common((*of_a, *of_b))
    if not documents:
        return None
    x_SD = _table(of_a, "sums", documents) - _table(of_b, "sums", documents)
    result = paired_difference(x_SD, _table(of_a, "counts", documents))
    entry = {
        **first.key._asdict(),
        "a": name_a,
        "b": name_b,
        "value_a": _value(of_a, documents),
        "value_b": _value(of_b, documents),
        "difference": result.value,
        "ci95": _as_list(result.ci95),
        "ci90": _as_list(result.ci90),
        "p": result.p,
        "p_adjusted": None,
        "family": "exploratory",
        "effect_size": result.effect_size,
        "test": "paired t, documents crossed with seeds",
        "n": len(documents),
        "num_missing": len(_all_documents((*of_a, *of_b))) - len(documents),
        "num_seeds": len(of_a),
        "scope": result.scope,
        "se": result.se,
        "dof": result.dof,
        "detectable": result.detectable,
        "p_sign_flip": result.p_sign_flip,
        "threshold": _same_threshold(of_a),
        "unit": first.unit,
    }
    if first.binary and len(of_a) == 1:
        exact = mcnemar([of_a[0].sums[d] > 0 for d in documents], [of_b[0].sums[d] > 0 for d in documents])
        entry |= {"p": exact["p"], "test": "exact McNemar", "only_a": exact["only_a"], "only_b": exact["only_b"]}
    return entry


def evaluation_quantities(rows: Iterable[Row]) -> list[Quantity]:
    """Return the quantities of clean text, from the rows of ``isotone.evaluation``."""
    rows = list(rows)
    scored = [row for row in rows if row["num_tokens"] and row["nats"] is not None]
    missing = {row["id"]: "no finite loss" for row in rows if row["num_tokens"] and row["nats"] is None}
    nats = {row["id"]: row["nats"] for row in scored}
    written = {row["id"]: row["rouge"] for row in rows if "rouge" in row}
    return [
        Quantity(Key("nll"), PER_TOKEN, nats, {row["id"]: row["num_tokens"] for row in scored}, missing),
        Quantity(
            Key("bits_per_byte"),
            "bits per byte",
            {d: value / math.log(2) for d, value in nats.items()},
            {row["id"]: row["num_bytes"] for row in scored},
            missing,
        ),
        *(
            Quantity(Key(metric), F1, {d: scores[metric] for d, scores in written.items()}, dict.fromkeys(written, 1))
            for metric in next(iter(written.values()), ())
        ),
    ]


def attack_quantities(
    rows: Sequence[Row], *, threshold: float | None, published_success: float, budget_tokens: int | None = None
) -> list[Quantity]:
    """Return the quantities of one attack variant on one arm, from the rows of ``isotone.attacks``.

    Of an upper bound, which has no text, only those of the primary protocol.

    Args:
        rows: one a document, all of the same attack and variant.
        threshold: nats per scored token above which a document counts as a success; None: no success rate.
        published_success: relative increase of the mean loss that the published accounting calls a success.
        budget_tokens: what an attack may spend on a document; then what it found with a tenth of it is given too.
    """
    if not rows:
        return []
    has_text = not any(row.get("upper_bound") for row in rows)
    ok = {row["id"]: row for row in rows if row["status"] == "ok"}
    primary = {d: row for d, row in ok.items() if "delta_nats" in row}  # absent where scored tokens were edited
    found: list[Quantity] = []
    if primary or not ok:
        tokens = {d: row["scored_tokens"] for d, row in primary.items()}
        delta = {d: (row["delta_nats"], tokens[d]) for d, row in primary.items()}
        found.append(_quantity(rows, "delta_nll", PREFIX, PER_TOKEN, delta))
        for name in ("clean_nll", "attacked_nll"):
            nats = {d: (math.fsum(row[name]), tokens[d]) for d, row in primary.items()}
            found.append(_quantity(rows, name, PREFIX, PER_TOKEN, nats))
        change = {d: (row["top1"]["attacked"] - row["top1"]["clean"], tokens[d]) for d, row in primary.items()}
        found.append(_quantity(rows, "top1_change", PREFIX, "share of scored tokens", change))
        if threshold is not None:
            success = {d: (nats / n > threshold, 1) for d, (nats, n) in delta.items()}
            found.append(_quantity(rows, "success_rate", PREFIX, SHARE, success, binary=True, threshold=threshold))
        if budget_tokens is not None and any("progress" in row for row in primary.values()):
            early = {d: (_with_tenth(row, budget_tokens), tokens[d]) for d, row in primary.items()}
            found.append(_quantity(rows, AT_TENTH, PREFIX, PER_TOKEN, early, budget_tokens / 10))
        if has_text:
            found.append(_quantity(rows, "delta_nll", TEXT_SPACE, PER_TOKEN, _in_text_space(primary)))
    if not has_text:
        return found
    degradation = {d: row["published_accounting"]["degradation"] for d, row in ok.items()}
    success = {d: (value > published_success, 1) for d, value in degradation.items()}
    found.append(_quantity(rows, "success_rate", PUBLISHED, SHARE, success, binary=True))
    relative = {d: (value, 1) for d, value in degradation.items()}
    found.append(_quantity(rows, "degradation", PUBLISHED, "mean share of the clean loss", relative))
    return found


def trigger_quantities(rows: Sequence[Row], spent_tokens: float | None) -> list[Quantity]:
    """Return the quantities of a universal trigger on one arm: its effect, and what is left of it beside its controls.

    Args:
        rows: one a document; ``shift_deltas`` and ``random_deltas`` are the controls' changes, nats per scored token.
        spent_tokens: by the search.
    """
    if not rows:
        return []
    ok = {row["id"]: row for row in rows if row["status"] == "ok"}
    values = {
        "delta_nll": {d: row["delta_nats"] for d, row in ok.items()},
        "clean_nll": {d: math.fsum(row["clean_nll"]) for d, row in ok.items()},
        "attacked_nll": {d: math.fsum(row["attacked_nll"]) for d, row in ok.items()},
    }
    for control in ("shift", "random"):  # a control that could not be drawn (a single document) has no figure
        values[f"delta_minus_{control}"] = {
            d: row["delta_nats"] - row["scored_tokens"] * float(np.mean(row[f"{control}_deltas"]))
            for d, row in ok.items()
            if row[f"{control}_deltas"]
        }
    tokens = {d: row["scored_tokens"] for d, row in ok.items()}
    return [
        _quantity(
            rows, metric, PREPENDED, PER_TOKEN, {d: (nats, tokens[d]) for d, nats in of_metric.items()}, spent_tokens
        )
        for metric, of_metric in values.items()
    ]


def change_quantity(rows: Sequence[Row], protocol: str) -> Quantity:
    """Return the change of loss alone, from rows of one attack and variant on one arm."""
    ok = {row["id"]: row for row in rows if row["status"] == "ok"}
    values = {d: (row["delta_nats"], row["scored_tokens"]) for d, row in ok.items()}
    return _quantity(rows, "delta_nll", protocol, PER_TOKEN, values)


def after_first_flip(rows_by_arm: Mapping[str, Sequence[Row]]) -> dict[str, Quantity]:
    """Return each arm's change of loss under the secondary protocol, for one attack variant.

    Scored are S_d = {t > max_a first_a(d)} minus the union over arms of edited positions, fixed after all arms were
    attacked; an arm that left a document as it was has no first edit. Where S_d is empty, or an arm has no figures, the
    document is missing for all. Of a pair, whose source alone is edited, S_d is the whole target.
    """
    by_arm = {arm: {row["id"]: row for row in rows} for arm, rows in rows_by_arm.items()}
    values: dict[str, dict[str, tuple[float, float]]] = {arm: {} for arm in by_arm}
    for document in next(iter(by_arm.values())):
        of_arms = {arm: rows[document] for arm, rows in by_arm.items() if document in rows}
        if len(of_arms) < len(by_arm) or any(row["status"] != "ok" for row in of_arms.values()):
            continue
        edited = [{edit[0] for edit in row["edits"]} for row in of_arms.values()]
        firsts = [min(positions) for positions in edited if positions]
        row = next(iter(of_arms.values()))
        first_label = first_label_of(row)
        end = first_label + len(row["context_clean_nll"]) + len(row["clean_nll"])
        scored = sorted(set(range(max(*firsts, first_label - 1) + 1, end)).difference(*edited)) if firsts else []
        if not scored:
            continue
        for arm, row in of_arms.items():
            clean = row["context_clean_nll"] + row["clean_nll"]  # token t at t − first_label
            attacked = row["context_attacked_nll"] + row["attacked_nll"]
            nats = math.fsum(attacked[t - first_label] - clean[t - first_label] for t in scored)
            values[arm][document] = (nats, len(scored))
    return {
        arm: _quantity(rows_by_arm[arm], "delta_nll", AFTER_FIRST_FLIP, PER_TOKEN, values[arm]) for arm in rows_by_arm
    }


def first_label_of(row: Row) -> int:
    """Return the position of the first token that has a loss in an attack's row: in a text the second one."""
    return int(row.get("first_label", 1))


def _with_tenth(row: Row, budget_tokens: int) -> float:
    """Return the change, as the attack saw it, that a tenth of the budget had found: none before its first round."""
    seen = [nats for spent, nats in row.get("progress", ()) if spent <= budget_tokens / 10]
    return seen[-1] - math.fsum(row["clean_nll"]) if seen else 0.0


def _quantity(
    rows: Sequence[Row],
    metric: str,
    protocol: str,
    unit: str,
    values: Mapping[str, tuple[float, float]],
    budget: float | None = None,
    **more: Any,
) -> Quantity:
    missing = {row["id"]: row.get("reason", "no figure in this protocol") for row in rows if row["id"] not in values}
    return Quantity(
        Key(metric, rows[0]["attack"], rows[0]["variant"], protocol),
        unit,
        sums={d: float(value) for d, (value, _) in values.items()},
        counts={d: float(count) for d, (_, count) in values.items()},
        missing=missing,
        budget=math.fsum(row["spent_tokens"] for row in rows) / len(rows) if budget is None else budget,
        **more,
    )


def _in_text_space(rows: Mapping[str, Row]) -> dict[str, tuple[float, float]]:
    """Return the change of loss where the attacked text is handed over as text; None known without a tokenizer."""
    values = {}
    for document, row in rows.items():
        changed = row["text_space"]
        if row["round_trip"]:
            values[document] = (row["delta_nats"], row["scored_tokens"])
        elif changed is not None and "delta_nats" in changed:
            values[document] = (changed["delta_nats"], row["scored_tokens"])
    return values


def _common(quantities: Sequence[Quantity]) -> list[str]:
    """Return the documents that have figures everywhere."""
    return [d for d in quantities[0].sums if all(d in q.sums for q in quantities)]


def _all_documents(quantities: Sequence[Quantity]) -> set[str]:
    return set().union(*(q.sums.keys() | q.missing.keys() for q in quantities))


def _table(of_seeds: Sequence[Quantity], part: Literal["sums", "counts"], documents: Sequence[str]) -> np.ndarray:
    """Return sums or counts as [seeds, documents]."""
    return np.array([[getattr(q, part)[d] for d in documents] for q in of_seeds], dtype=np.float64)


def _same_threshold(of_seeds: Sequence[Quantity]) -> float | None:
    first, *others = (q.threshold for q in of_seeds)
    return first if all(threshold == first for threshold in others) else None


def _value(of_arm: Sequence[Quantity], documents: Sequence[str]) -> float:
    """Return Σ sums/Σ counts over the documents that both arms have."""
    sums = sum(q.sums[d] for q in of_arm for d in documents)
    return float(sums / sum(q.counts[d] for q in of_arm for d in documents))


def _as_list(interval: tuple[float, float] | None) -> list[float] | None:
    return None if interval is None else list(interval)
