"""An entry is a ratio of sums over the documents that have figures; the others are counted with their reasons."""

import json

import pytest
from transformers import PreTrainedModel

from isotone.attacks import HotFlip, PublishedHotFlip, Vocabulary, run_documents, summarize

from .conftest import PROTOCOL, make_windows


def row(delta: float, tokens: int, degradation: float) -> dict:
    return {
        "attack": "hotflip",
        "variant": "once",
        "status": "ok",
        "clean_nll": [2.0] * tokens,
        "attacked_nll": [2.0 + delta / tokens] * tokens,
        "delta_nats": delta,
        "scored_tokens": tokens,
        "delta_by_offset": {"gap": {"nats": 1.0, "tokens": 2}, "0-7": {"nats": delta, "tokens": tokens}},
        "top1": {"clean": tokens, "attacked": 0},
        "edits": [[1, 2, 3]],
        "spent_tokens": 10,
        "round_trip": True,
        "text_space": None,
        "published_accounting": {
            "clean": 2.0,
            "attacked": 2.0 + 2 * degradation,
            "degradation": degradation,
            "flipped": degradation,
            "untouched": degradation,
            "tokens": tokens,
        },
    }


def missing(reason: str) -> dict:
    return {"attack": "hotflip", "variant": "once", "status": "missing", "reason": reason, "spent_tokens": 10}


def test_delta_is_a_ratio_of_sums_not_a_mean_of_ratios() -> None:
    entry = summarize([row(1.0, 10, 0.1), row(10.0, 20, 0.2)], threshold=0.2)
    assert entry["delta_nll"] == pytest.approx(11 / 30)
    assert entry["attacked_nll"] - entry["clean_nll"] == pytest.approx(11 / 30)
    assert entry["clean_nll"] == 2
    assert entry["delta_by_offset"] == {"gap": pytest.approx(0.5), "0-7": pytest.approx(11 / 30)}
    assert entry["success_rate"] == 0.5
    assert entry["top1"] == {"clean": 1, "attacked": 0}
    assert entry["spent_tokens"] == 20
    assert entry["edits_per_document"] == 1


def test_short_targets_count_where_they_have_tokens() -> None:
    """A pair's target may end before the later buckets begin: it says nothing of them, and the others still do."""
    short, long = row(1.0, 8, 0.1), row(4.0, 40, 0.1)
    short["delta_by_offset"] = {"0-7": {"nats": 1.0, "tokens": 8}}
    long["delta_by_offset"] = {"0-7": {"nats": 3.0, "tokens": 8}, "32+": {"nats": 1.0, "tokens": 8}}
    assert summarize([short, long])["delta_by_offset"] == {"0-7": pytest.approx(0.25), "32+": pytest.approx(0.125)}


def test_published_figures_are_means_over_documents_under_their_own_bar() -> None:
    published = summarize([row(1.0, 10, 0.1), row(10.0, 20, 0.2)], published_success=0.15)["published_accounting"]
    assert published["degradation"] == pytest.approx(0.15)
    assert published["success_rate"] == 0.5
    assert published["threshold"] == 0.15
    assert published["flipped"] == published["untouched"] == pytest.approx(0.15)


def test_success_is_above_the_threshold_not_at_it() -> None:
    assert summarize([row(5.0, 10, 0.1)], threshold=0.5)["success_rate"] == 0
    assert summarize([row(5.0, 10, 0.1)], threshold=0.499)["success_rate"] == 1
    assert summarize([row(5.0, 10, 0.1)])["success_rate"] is None


def test_the_success_curve_falls_from_zero_on() -> None:
    curve = summarize([row(1.0, 10, 0.1), row(10.0, 20, 0.2), row(-1.0, 10, 0.0)])["success_curve"]
    assert curve[0] == [0.0, pytest.approx(2 / 3)]
    rates = [rate for _, rate in curve]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == 0
    assert curve[-1][0] == 1.0


@pytest.mark.parametrize(("delta", "threshold", "end"), [(2.31, None, 2.325), (0.2, 2.24, 2.25), (2.5, 0.1, 2.5)])
def test_the_success_curve_goes_on_until_it_is_zero_and_the_threshold_is_behind_it(
    delta: float, threshold: float | None, end: float
) -> None:
    curve = summarize([row(10 * delta, 10, 0.1), row(1.0, 10, 0.1)], threshold=threshold)["success_curve"]
    assert curve[-1] == [pytest.approx(end), 0]
    assert dict(map(tuple, curve))[0.15] == 0.5  # of two documents, one is moved by 0.1


def test_missing_documents_are_counted_by_reason_and_change_no_figure() -> None:
    rows = [row(1.0, 10, 0.1), missing("a"), missing("b"), missing("a")]
    entry = summarize(rows, threshold=0.05)
    assert entry["missing"] == {"a": 2, "b": 1}
    assert entry["n"] == 1
    assert entry["success_rate"] == 1
    assert entry["delta_nll"] == summarize(rows[:1])["delta_nll"]
    assert entry["spent_tokens"] == 40


def test_an_attack_whose_documents_are_all_missing_has_no_figures() -> None:
    entry = summarize([missing("a")], threshold=0.1)
    assert entry["delta_nll"] is entry["success_rate"] is entry["published_accounting"]["success_rate"] is None
    assert entry["success_curve"] == entry["progress"] == []
    json.dumps(entry, allow_nan=False)


def test_texts_that_changed_are_reported_as_what_they_became() -> None:
    changed = row(1.0, 10, 0.1) | {"round_trip": False, "text_space": {"delta_nats": 3.0}}
    lost = row(1.0, 10, 0.1) | {"round_trip": False, "text_space": {"missing": "why"}}
    entry = summarize([row(1.0, 10, 0.1), changed, lost])
    assert entry["text_space"] == {"survived": 1, "changed": 2, "missing": 1, "delta_nll": pytest.approx(4 / 20)}
    assert entry["delta_nll"] == pytest.approx(3 / 30)


def test_rows_of_real_attacks_make_entries(model: PreTrainedModel, vocabulary: Vocabulary) -> None:
    windows = make_windows(4)
    rows = run_documents(HotFlip(flips=3, candidates=6), model, vocabulary, windows, PROTOCOL)
    entry = summarize(rows, threshold=0.0)
    assert (entry["attack"], entry["variant"], entry["n"]) == ("hotflip", "iterative", 4)
    assert entry["delta_nll"] > 0
    spent, gains = zip(*entry["progress"], strict=True)
    assert spent == tuple((3 + 6) * PROTOCOL.length * (i + 1) for i in range(3))
    assert gains[-1] == pytest.approx(entry["delta_nll"], abs=1e-4)
    published = summarize(run_documents(PublishedHotFlip(3), model, vocabulary, windows, PROTOCOL), threshold=0.0)
    assert published["delta_nll"] is published["success_rate"] is None
    assert published["published_accounting"]["degradation"] > 0
    json.dumps([entry, published], allow_nan=False)


def test_no_rows_are_an_error() -> None:
    with pytest.raises(ValueError, match="no entry"):
        summarize([])
