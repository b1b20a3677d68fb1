"""An arm that hides its gradients is flagged against the baseline; what was not measured is never called clean."""

from typing import Any

import numpy as np
import pytest
from evidence_rows import ITERATIVE, evidence, rows
from scipy import stats

from isotone.evidence import Evidence
from isotone.masking import Index, Masking, change_within, diagnose, rank_correlation

NUM_DOCUMENTS = 40
ONCE, COORDINATE, GCG = ("hotflip", "once"), ("coordinate", "random"), ("gcg", "top_k")


def harms(mean: float, seed: int = 0) -> np.ndarray:
    return mean + np.random.default_rng(seed).normal(0, 0.05, NUM_DOCUMENTS)


def arm(iterative: float = 0.4, once: float = 0.2, free: float = 0.3, seed: int = 0, **more: Any) -> Evidence:
    return evidence(
        rows(harms(iterative, seed)),
        rows(harms(once, seed + 1), attack=ONCE),
        rows(harms(free, seed + 2), attack=COORDINATE),
        **more,
    )


def diagnosed(of_arm: Evidence, of_baseline: Evidence, num_seeds: int = 1) -> Masking:
    return diagnose("monotonic", "baseline", [{"baseline": of_baseline, "monotonic": of_arm}] * num_seeds, ITERATIVE)


def index(masking: Masking, name: str) -> Index:
    return next(found for found in masking.indices if found.name == name)


def transferred(source: str, mean: float) -> list[dict[str, Any]]:
    return [row | {"source": source} for row in rows(harms(mean, 5))]


def probes(correlation: float, gradient: float = 0.8, chance: float = 0.3, seed: int = 0) -> list[dict[str, Any]]:
    found = []
    for number in range(NUM_DOCUMENTS):
        generator = np.random.default_rng([seed, number])
        true, noise = generator.normal(size=(2, 200))
        predicted = correlation * true + np.sqrt(1 - correlation**2) * noise
        oracle = 1 + generator.random()
        gains = {"oracle": oracle, "gradient": gradient * oracle, "random": chance * oracle}
        found.append(
            {
                "id": f"d{number}",
                "status": "ok",
                "first_order": predicted.tolist(),
                "true": true.tolist(),
                "oracle": gains,
                "tried": 4000,
                "admissible": 4000,
            }
        )
    return found


def test_either_kind_of_coordinate_search_is_the_one_without_gradients() -> None:
    drawn = index(diagnosed(arm(free=0.3), arm(free=0.1)), "gradient-free")
    monotonic, baseline = (
        evidence(rows(harms(0.4)), rows(harms(free, 2), attack=("coordinate", "surrogate"))) for free in (0.3, 0.1)
    )
    proposed = index(diagnosed(monotonic, baseline), "gradient-free")
    assert drawn.measured
    assert (proposed.measured, proposed.value_arm) == (True, drawn.value_arm)


def test_equal_arms_are_not_flagged() -> None:
    same = arm(probes=probes(0.5))
    found = diagnosed(same, same)
    assert found.label == "none flagged"
    assert not found.weak_on_both
    assert {i.difference for i in found.indices if i.measured} == {0}


def test_a_gradient_free_search_that_finds_more_is_a_sign() -> None:
    masked, honest = arm(iterative=0.2, free=0.35), arm(iterative=0.4, free=0.3)
    found = diagnosed(masked, honest)
    free = index(found, "gradient-free")
    assert found.label == "possible masking"
    assert free.flagged
    assert free.value_arm == pytest.approx(0.15, abs=0.03)
    assert free.value_baseline == pytest.approx(-0.1, abs=0.03)
    assert not index(diagnosed(honest, masked), "gradient-free").flagged  # the other direction is no sign


def test_the_best_gradient_attack_counts() -> None:
    strong = evidence(rows(harms(0.2)), rows(harms(0.5), attack=GCG), rows(harms(0.35, 2), attack=COORDINATE))
    assert index(diagnosed(strong, arm()), "gradient-free").value_arm == pytest.approx(-0.15, abs=0.03)


def test_budgets_are_made_equal() -> None:
    """A search with twice the budget is read where it had spent as much as the other: half its change, as made up."""
    rich = evidence(rows(harms(0.2)), rows(harms(0.6, 2), attack=COORDINATE, spent=2000))
    assert index(diagnosed(rich, arm()), "gradient-free").value_arm == pytest.approx(0.3 - 0.2, abs=0.03)
    [row] = rows([0.6], spent=2000)
    assert change_within(row, 2000) == row["delta_nats"]
    assert change_within(row, 1999) == pytest.approx(row["delta_nats"] / 2)
    assert change_within(row, 999) == 0
    assert change_within({k: v for k, v in row.items() if k != "progress"}, 1999) is None


def test_edits_of_another_arm_that_do_more_than_its_own_are_a_sign() -> None:
    masked = arm(iterative=0.2, transferred=transferred("baseline", 0.35))
    honest = arm(iterative=0.4, transferred=transferred("monotonic", 0.1))
    transfer = index(diagnosed(masked, honest), "transfer")
    assert transfer.flagged
    assert transfer.value_arm == pytest.approx(0.15, abs=0.03)
    from_elsewhere = arm(transferred=transferred("shifted_twin", 0.9))
    absent = index(diagnosed(from_elsewhere, honest), "transfer")
    assert not absent.measured
    assert absent.reason == "monotonic: the edits of baseline were not replayed on it"


def test_a_gradient_that_predicts_less_is_a_sign() -> None:
    found = diagnosed(arm(probes=probes(0.1)), arm(probes=probes(0.7)))
    rank = index(found, "first order")
    assert rank.flagged
    assert rank.value_baseline == pytest.approx(-0.68, abs=0.05)
    assert not found.weak_on_both
    misleading = diagnosed(arm(probes=probes(-0.3)), arm(probes=probes(-0.3)))
    assert index(misleading, "first order").weak_on_both
    assert not index(misleading, "first order").flagged
    assert misleading.weak_on_both
    assert "gradient attacks are weak on both (first order)" in misleading.sentence


def test_rank_correlation_is_spearmans() -> None:
    a, b = np.random.default_rng(0).integers(0, 9, (2, 50)).tolist()  # with ties
    assert rank_correlation(a, b) == pytest.approx(float(stats.spearmanr(a, b).statistic))
    assert rank_correlation([0.0] * 50, b) == 0


def test_regret_is_a_share_of_what_there_was_to_gain() -> None:
    found = diagnosed(arm(probes=probes(0.5, gradient=0.3)), arm(probes=probes(0.5, gradient=0.9)))
    regret = index(found, "oracle")
    assert regret.flagged
    assert (regret.value_arm, regret.value_baseline) == (pytest.approx(0.7), pytest.approx(0.1))
    assert not regret.weak_on_both  # regret is never below 0: on the baseline, random candidates are the bar
    assert regret.meaning == "regret of gradient candidates to all tokens at a position"
    sample = [row | {"tried": 1200} for row in probes(0.5)]
    assert "to 1,200 random tokens at" in index(diagnosed(arm(probes=sample), arm(probes=sample)), "oracle").meaning
    unlucky = probes(0.5, gradient=0.5, chance=0.6)
    assert index(diagnosed(arm(probes=unlucky), arm(probes=unlucky)), "oracle").weak_on_both
    for row in unlucky:
        row["oracle"] = dict.fromkeys(row["oracle"], -0.1)
    nothing = index(diagnosed(arm(probes=unlucky), arm(probes=unlucky)), "oracle")
    assert not nothing.measured
    assert "no edit at all raises the loss" in (nothing.reason or "")


def test_one_step_that_does_more_than_many_is_a_sign() -> None:
    found = diagnosed(arm(iterative=0.2, once=0.3), arm(iterative=0.4, once=0.3))
    assert index(found, "one step").flagged
    assert index(found, "one step").n == NUM_DOCUMENTS


def test_an_arm_that_all_attacks_move_less_is_told_from_one_that_hides_gradients() -> None:
    """All attacks at half strength: the index in nats comes nearer to 0, as a share it stays what it was."""
    full = arm(iterative=0.4, once=0.2)
    half = evidence(
        *(
            [{**row, "delta_nats": row["delta_nats"] / 2} for row in full.attacks[key]]
            for key in (ITERATIVE, ONCE, COORDINATE)
        )
    )
    found = index(diagnosed(half, full), "one step")
    assert found.flagged
    assert found.explained_by_size
    assert found.relative_difference == pytest.approx(0, abs=1e-12)
    assert "not so as a share of what attacks do to each arm in" in diagnosed(half, full).sentence
    hidden = index(diagnosed(arm(iterative=0.2, once=0.3), full), "one step")
    assert (hidden.flagged, hidden.explained_by_size) == (True, False)


def test_what_was_not_measured_is_named_and_never_called_clean() -> None:
    bare = evidence(rows(harms(0.4)))
    found = diagnosed(bare, bare)
    assert found.label == "not measured"
    assert found.sentence.startswith("Masking of monotonic was not measured; not measured: gradient-free (")
    assert all(i.reason and not i.flagged for i in found.indices)
    partly = diagnosed(arm(), arm())
    assert [i.name for i in partly.indices if not i.measured] == ["transfer", "first order", "oracle"]
    assert "not measured: transfer (" in partly.sentence
    assert "no masking" not in partly.sentence + found.sentence


def test_several_seeds_are_crossed_with_documents() -> None:
    found = diagnosed(arm(iterative=0.2, free=0.35), arm(), num_seeds=3)
    assert index(found, "gradient-free").num_seeds == 3
    assert index(found, "gradient-free").flagged


def test_a_flag_needs_its_lower_bound_above_zero() -> None:
    """In 200 draws without any difference an index is flagged about as often as one-sided 5 % says."""
    flags = 0
    for seed in range(200):
        generator = np.random.default_rng(seed)
        a, b, c, d = 0.3 + generator.normal(0, 0.1, (4, NUM_DOCUMENTS))
        one, two = (evidence(rows(x), rows(y, attack=ONCE)) for x, y in ((a, b), (c, d)))
        flags += index(diagnosed(one, two), "one step").flagged
    assert 0.01 <= flags / 200 <= 0.10
