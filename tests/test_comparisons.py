"""Figures come from documents' sums; what one arm is missing is left out on both sides, and counted."""

import math
from typing import Any

import numpy as np
import pytest

from isotone.comparisons import (
    AFTER_FIRST_FLIP,
    PREFIX,
    PUBLISHED,
    SHARE,
    TEXT_SPACE,
    Key,
    Quantity,
    after_first_flip,
    attack_quantities,
    compare,
    evaluation_quantities,
    trigger_quantities,
)
from isotone.statistics import mcnemar, paired_difference

LENGTH, SCORED = 12, 4


def row(document: str, delta: float = 0.5, edits: tuple[int, ...] = (2, 5), **more: Any) -> dict[str, Any]:
    """Return a row as isotone.attacks writes it: 12 tokens, the last 4 scored, ``delta`` nats more on each of them."""
    return {
        "id": document,
        "attack": "hotflip",
        "variant": "iterative",
        "status": "ok",
        "clean_ids": list(range(LENGTH)),
        "edits": [[position, position, 99] for position in edits],
        "context_clean_nll": [1.0] * (LENGTH - SCORED - 1),
        "context_attacked_nll": [1.0 + 0.1 * t for t in range(1, LENGTH - SCORED)],
        "clean_nll": [2.0] * SCORED,
        "attacked_nll": [2.0 + delta] * SCORED,
        "scored_tokens": SCORED,
        "delta_nats": SCORED * delta,
        "top1": {"clean": 3, "attacked": 1},
        "round_trip": True,
        "text_space": None,
        "published_accounting": {"degradation": delta / 3},
        "spent_tokens": 100,
        **more,
    }


def missing(document: str) -> dict[str, Any]:
    base = {"id": document, "attack": "hotflip", "variant": "iterative", "spent_tokens": 40}
    return {**base, "status": "missing", "reason": "the loss of the clean text is not a finite number"}


def by_key(quantities: list[Quantity]) -> dict[tuple[str, str | None], Quantity]:
    return {(q.key.metric, q.key.protocol): q for q in quantities}


def test_an_attacks_figures_follow_from_its_rows() -> None:
    rows = [row("a", 0.5), row("b", 0.1), missing("c")]
    found = by_key(attack_quantities(rows, threshold=0.2, published_success=0.15))
    figures = {key: quantity.measurement("baseline", 42) for key, quantity in found.items()}
    assert figures["delta_nll", PREFIX]["value"] == pytest.approx(0.3)
    assert figures["clean_nll", PREFIX]["value"] == 2
    assert figures["attacked_nll", PREFIX]["value"] == pytest.approx(2.3)
    assert figures["top1_change", PREFIX]["value"] == pytest.approx(-0.5)
    assert figures["success_rate", PREFIX] == {
        "arm": "baseline",
        "seed": 42,
        "metric": "success_rate",
        "attack": "hotflip",
        "variant": "iterative",
        "protocol": PREFIX,
        "budget": 80.0,
        "threshold": 0.2,
        "n": 2,
        "num_missing": 1,
        "value": 0.5,
        "ci95": [pytest.approx(0.0945, abs=1e-3), pytest.approx(0.9055, abs=1e-3)],
        "unit": SHARE,
    }
    assert figures["success_rate", PUBLISHED]["value"] == 0.5
    assert figures["degradation", PUBLISHED]["value"] == pytest.approx(0.1)


def test_a_change_of_exactly_the_threshold_is_no_success() -> None:
    found = by_key(attack_quantities([row("a", 0.5)], threshold=0.5, published_success=0.15))
    assert found["success_rate", PREFIX].sums == {"a": 0}


def test_edited_labels_are_scored_by_the_published_accounting_only() -> None:
    published = row("a")
    del published["delta_nats"]
    found = by_key(attack_quantities([published], threshold=0.2, published_success=0.15))
    assert {protocol for _, protocol in found} == {PUBLISHED}


def test_text_space_takes_what_the_text_becomes() -> None:
    rows = [
        row("survives", 0.5),
        row("changes", 0.5, round_trip=False, text_space={"delta_nats": 0.4}),
        row("lost", 0.5, round_trip=False, text_space={"missing": "the scored tokens are tokenized differently"}),
        row("no tokenizer", 0.5, round_trip=None),
    ]
    quantity = by_key(attack_quantities(rows, threshold=None, published_success=0.15))["delta_nll", TEXT_SPACE]
    assert quantity.sums == {"survives": 2.0, "changes": 0.4}
    assert set(quantity.missing) == {"lost", "no tokenizer"}


def test_after_first_flip_scores_what_no_arm_touched_behind_the_last_first_edit() -> None:
    found = after_first_flip({"a": [row("d", 0.5, (2, 9))], "b": [row("d", 1.0, (5, 7))], "c": [row("d", 0.0, ())]})
    scored = [6, 8, 10, 11]  # behind 5 = max(2, 5), without 7 and 9; t = 6 is context, with a rise of .1·6
    assert {arm: q.counts["d"] for arm, q in found.items()} == dict.fromkeys("abc", len(scored))
    assert found["a"].sums["d"] == pytest.approx(0.6 + 3 * 0.5)
    assert found["b"].sums["d"] == pytest.approx(0.6 + 3 * 1.0)
    assert found["a"].key == Key("delta_nll", "hotflip", "iterative", AFTER_FIRST_FLIP)


@pytest.mark.parametrize(
    "other", [missing("d"), row("d", 0.5, (LENGTH - 1,))], ids=["an arm has no figures", "nothing is left to score"]
)
def test_after_first_flip_is_missing_for_all_or_for_none(other: dict[str, Any]) -> None:
    found = after_first_flip({"a": [row("d"), row("e")], "b": [other, row("e")]})
    assert [set(q.sums) for q in found.values()] == [{"e"}, {"e"}]
    assert [set(q.missing) for q in found.values()] == [{"d"}, {"d"}]


def test_nobody_flipped_anything_leaves_nothing_to_score() -> None:
    found = after_first_flip({"a": [row("d", 0, ())], "b": [row("d", 0, ())]})
    assert not found["a"].sums


def test_a_comparison_pairs_documents_and_counts_what_is_missing() -> None:
    a = attack_quantities(
        [row("x", 0.5), row("y", 0.2), missing("z"), row("w", 0.3)], threshold=0.25, published_success=1
    )
    b = attack_quantities(
        [row("w", 0.1), missing("y"), row("z", 0.9), row("x", 0.4)], threshold=0.25, published_success=1
    )
    entry = compare(("m", [a[0]]), ("b", [b[0]]))
    expected = paired_difference(np.array([SCORED * 0.1, SCORED * 0.2]), np.array([SCORED, SCORED]))
    assert entry is not None
    assert (entry["n"], entry["num_missing"]) == (2, 2)
    assert entry["difference"] == pytest.approx(0.15)
    assert (entry["value_a"], entry["value_b"]) == pytest.approx((0.4, 0.25))
    assert entry["ci95"] == pytest.approx(expected.ci95)
    assert (entry["a"], entry["b"], entry["scope"]) == ("m", "b", "these two models only")


def test_success_is_compared_exactly_and_by_document() -> None:
    a, b = (
        by_key(attack_quantities([row(str(i), d) for i, d in enumerate(deltas)], threshold=0.25, published_success=1))
        for deltas in ([0.5] * 7 + [0.1], [0.5] + [0.1] * 7)
    )
    entry = compare(("m", [a["success_rate", PREFIX]]), ("b", [b["success_rate", PREFIX]]))
    assert entry is not None
    assert entry["test"] == "exact McNemar"
    assert entry["p"] == mcnemar([True] * 7 + [False], [True] + [False] * 7)["p"]
    assert entry["difference"] == pytest.approx(6 / 8)
    assert (entry["only_a"], entry["only_b"]) == (6, 0)


def test_no_common_document_is_no_comparison() -> None:
    [a, *_] = attack_quantities([row("x"), missing("y")], threshold=None, published_success=1)
    [b, *_] = attack_quantities([missing("x"), row("y")], threshold=None, published_success=1)
    assert compare(("m", [a]), ("b", [b])) is None


def test_an_arm_without_a_figure_is_missing_not_zero() -> None:
    found = attack_quantities([missing("x")], threshold=0.1, published_success=0.15)
    assert [q.measurement("m", 1)["value"] for q in found] == [None] * len(found)
    assert {q.measurement("m", 1)["num_missing"] for q in found} == {1}
    assert attack_quantities([], threshold=0.1, published_success=0.15) == []


def test_several_seeds_are_crossed_with_documents() -> None:
    [first, *_] = attack_quantities([row("x", 0.5), row("y", 0.3)], threshold=None, published_success=1)
    [second, *_] = attack_quantities([row("x", 0.4), row("y", 0.2)], threshold=None, published_success=1)
    entry = compare(("m", [first, second]), ("b", [second, second]))
    assert entry is not None
    assert (entry["num_seeds"], entry["scope"]) == (2, "seeds and documents")
    assert entry["difference"] == pytest.approx(0.05)


def test_clean_text_is_compared_per_token_and_per_byte() -> None:
    rows: list[dict[str, Any]] = [
        {"id": "a", "nats": 20.0, "num_tokens": 10, "num_bytes": 40},
        {"id": "b", "nats": None, "num_tokens": 10, "num_bytes": 40},
        {"id": "c", "nats": 0.0, "num_tokens": 0, "num_bytes": 0},
    ]
    nll, bits = evaluation_quantities(rows)
    assert nll.measurement("m", 1)["value"] == 2
    assert bits.measurement("m", 1)["value"] == pytest.approx(20 / 40 / math.log(2))
    assert set(nll.missing) == {"b"}


def test_a_trigger_is_read_beside_its_controls() -> None:
    rows = [row("a", 0.5, shift_deltas=[0.1, 0.3], random_deltas=[0.4, 0.4], attack="triggers", variant="universal")]
    values = {q.key.metric: q.measurement("m", 1)["value"] for q in trigger_quantities(rows, 5000)}
    assert values["delta_nll"] == pytest.approx(0.5)
    assert values["delta_minus_shift"] == pytest.approx(0.3)
    assert values["delta_minus_random"] == pytest.approx(0.1)


def test_a_control_that_could_not_be_drawn_has_no_figure() -> None:
    rows = [row("a", 0.5, shift_deltas=[], random_deltas=[0.4], attack="triggers", variant="universal")]
    found = {q.key.metric: q.measurement("m", 1) for q in trigger_quantities(rows, 5000)}
    assert found["delta_minus_shift"]["value"] is None
    assert found["delta_minus_shift"]["num_missing"] == 1
    assert found["delta_nll"]["budget"] == 5000


def test_a_tenth_of_the_budget_counts_what_was_found_by_then() -> None:
    def row(name: str, progress: list[list[float]] | None) -> dict:
        return {
            "id": name, "attack": "gcg", "variant": "top_k", "status": "ok", "scored_tokens": 2, "delta_nats": 3.0,
            "clean_nll": [1.0, 1.0], "attacked_nll": [2.0, 3.0], "top1": {"clean": 0, "attacked": 0},
            "round_trip": True, "text_space": None, "spent_tokens": 90, "published_accounting": {"degradation": 0.1},
        } | ({} if progress is None else {"progress": progress})  # fmt: skip

    rows = [row("a", [[5, 2.5], [10, 3.0], [50, 5.0]]), row("b", [[20, 5.0]])]
    found = {
        q.key.metric: q for q in attack_quantities(rows, threshold=None, published_success=0.15, budget_tokens=100)
    }
    assert found["delta_nll_at_10_percent"].sums == {"a": 1.0, "b": 0.0}
    assert found["delta_nll_at_10_percent"].budget == 10
    without = attack_quantities(rows, threshold=None, published_success=0.15)
    assert "delta_nll_at_10_percent" not in {q.key.metric for q in without}


def test_an_upper_bound_has_figures_of_the_primary_protocol_only() -> None:
    bound = {
        "id": "a", "attack": "pgd", "variant": "l2", "status": "ok", "upper_bound": True, "scored_tokens": 2,
        "delta_nats": 3.0, "clean_nll": [1.0, 1.0], "attacked_nll": [2.0, 3.0], "top1": {"clean": 1, "attacked": 0},
        "spent_tokens": 90,
    }  # fmt: skip
    found = attack_quantities([bound], threshold=1.0, published_success=0.15)
    assert {q.key.protocol for q in found} == {"prefix"}
    assert {q.key.metric for q in found} >= {"delta_nll", "success_rate", "top1_change"}
