"""Intervals cover, tests keep their size, and the estimate is a ratio of sums."""

import numpy as np
import pytest
from scipy import stats

from isotone.statistics import (
    effect_size,
    holm,
    mcnemar,
    paired_difference,
    proportion_interval,
    proportion_interval_over_seeds,
    ratio_estimate,
    sign_flip_p,
)


def simulated(
    generator: np.random.Generator,
    num_seeds: int,
    num_documents: int,
    truth: float = 0.0,
    *,
    seed_sd: float = 0.05,
    interaction_sd: float = 0.1,
) -> tuple[np.ndarray, np.ndarray]:
    """Sums of paired differences: seeds, documents and their pairs have effects, and documents their own lengths.

    With one seed its effect is part of the truth: what is estimated is the difference of the two models at hand.
    """
    n_D = generator.integers(40, 90, num_documents)
    per_token_SD = (
        truth
        + (generator.normal(0, seed_sd, (num_seeds, 1)) if num_seeds > 1 else 0)
        + generator.exponential(0.2, num_documents)
        - 0.2
        + generator.normal(0, interaction_sd, (num_seeds, num_documents))
    )
    return per_token_SD * n_D, n_D


def coverage(num_seeds: int, num_documents: int, num_draws: int = 2000, **effects: float) -> float:
    """Return how often the 95 % interval holds the truth."""
    generator = np.random.default_rng((num_seeds, num_documents))
    covered = []
    for _ in range(num_draws):
        low, high = ratio_estimate(*simulated(generator, num_seeds, num_documents, truth=0.3, **effects)).ci95 or (0, 0)
        covered.append(low <= 0.3 <= high)
    return float(np.mean(covered))


@pytest.mark.parametrize("seed_sd", [0.02, 0.05])
@pytest.mark.parametrize(("num_seeds", "num_documents"), [(3, 48), (3, 100), (5, 48), (5, 200)])
def test_intervals_over_seeds_cover_the_truth(num_seeds: int, num_documents: int, seed_sd: float) -> None:
    """Whether seeds add little to the spread of documents or as much as it (documents alone: .2/√100 = .02)."""
    assert 0.92 <= coverage(num_seeds, num_documents, seed_sd=seed_sd) <= 0.97


@pytest.mark.parametrize("num_documents", [48, 200])
def test_intervals_of_one_seed_cover_the_difference_of_its_models(num_documents: int) -> None:
    assert 0.92 <= coverage(1, num_documents) <= 0.97


@pytest.mark.parametrize(("num_seeds", "least", "most"), [(2, 0.85, 0.91), (3, 0.90, 0.95), (5, 0.92, 0.97)])
def test_what_few_seeds_that_differ_much_cost_in_coverage_is_known(num_seeds: int, least: float, most: float) -> None:
    """The page of a summary over two seeds says so."""
    assert least <= coverage(num_seeds, 100, seed_sd=0.2) <= most


@pytest.mark.parametrize("num_seeds", [3, 5])
def test_intervals_are_too_wide_and_not_too_narrow_where_pairs_vary_more_than_documents(num_seeds: int) -> None:
    """v_s and v_d both hold the variance of the pairs, so there the interval is conservative."""
    assert 0.97 <= coverage(num_seeds, 100, seed_sd=0.02, interaction_sd=0.4) <= 0.99


@pytest.mark.parametrize("num_seeds", [1, 3, 5])
def test_the_t_test_keeps_its_size(num_seeds: int) -> None:
    generator = np.random.default_rng(num_seeds)
    p = [ratio_estimate(*simulated(generator, num_seeds, 100)).p or 0 for _ in range(2000)]
    assert 0.03 <= np.mean(np.array(p) <= 0.05) <= 0.075


@pytest.mark.parametrize("num_seeds", [1, 3, 5])
def test_the_sign_flip_test_of_several_seeds_keeps_its_size(num_seeds: int) -> None:
    """Its null is about these models: documents and pairs vary around nothing, seeds add nothing."""
    generator = np.random.default_rng(num_seeds)
    rejected = []
    for draw in range(1000):
        n_D = generator.integers(40, 90, 40)
        per_token_SD = generator.laplace(0, 0.2, 40) + generator.normal(0, 0.1, (num_seeds, 40))
        rejected.append(sign_flip_p(per_token_SD * n_D, seed=draw, num_flips=399) <= 0.05)
    assert 0.03 <= np.mean(rejected) <= 0.07


def test_a_share_over_seeds_covers_the_truth() -> None:
    """Each document is a success with a chance of its own (mean .3), drawn anew in each seed."""
    generator = np.random.default_rng(5)
    covered = []
    for _ in range(1000):
        success_SD = generator.random((3, 100)) < generator.beta(0.6, 1.4, 100)
        low, high = proportion_interval_over_seeds(ratio_estimate(success_SD, np.ones(100))) or (0, 0)
        covered.append(low <= 0.3 <= high)
    assert 0.92 <= np.mean(covered) <= 0.99


def test_seeds_that_agree_on_every_document_are_no_further_trials() -> None:
    low, high = proportion_interval_over_seeds(ratio_estimate(np.zeros((3, 48)), np.ones(48))) or (1, 1)
    one_low, one_high = proportion_interval(0, 48) or (1, 1)
    assert low == pytest.approx(one_low, abs=1e-12)
    assert high == pytest.approx(one_high, rel=0.06)  # t in the place of the normal quantile
    assert proportion_interval_over_seeds(ratio_estimate(np.ones((3, 1)), np.ones(1))) is None


def test_counts_may_be_each_seeds_own() -> None:
    x_SD, n_SD = np.array([[1.0, 4.0, 3.0], [3.0, 2.0, 5.0]]), np.array([[2.0, 4.0, 6.0], [1.0, 5.0, 6.0]])
    e_SD = (x_SD - 18 / 24 * n_SD) / 4
    v_s, v_d = sum(e_SD.mean(axis=1) ** 2) / 2, sum(e_SD.mean(axis=0) ** 2) / 6
    result = ratio_estimate(x_SD, n_SD)
    assert (result.value, result.se) == pytest.approx((18 / 24, (v_s + v_d) ** 0.5))
    with pytest.raises(ValueError, match="fit"):
        ratio_estimate(x_SD, n_SD[:, :2])


def test_one_seed_of_equal_documents_is_the_paired_t_test() -> None:
    x_D = np.random.default_rng(0).normal(0.3, 1, 25)
    result, expected = paired_difference(x_D, np.ones(25)), stats.ttest_1samp(x_D, 0)
    assert result.p == pytest.approx(expected.pvalue)
    assert result.ci95 == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert result.ci90 == pytest.approx(tuple(expected.confidence_interval(0.90)))
    assert result.dof == 24
    assert result.scope == "these two models only"
    assert result.detectable == pytest.approx(2.8 * x_D.std(ddof=1) / 5)
    assert result.effect_size == pytest.approx(x_D.mean() / x_D.std(ddof=1))


def test_several_seeds_follow_the_formula_by_hand() -> None:
    x_SD, n_D = np.array([[1.0, 4.0, 3.0], [3.0, 2.0, 5.0]]), np.array([2.0, 4.0, 6.0])
    value = 18 / 24
    e_SD = (x_SD - value * n_D) / 4
    v_s = sum(e_SD.mean(axis=1) ** 2) / 2
    v_d = sum(e_SD.mean(axis=0) ** 2) / 6
    dof = (v_s + v_d) ** 2 / (v_s**2 / 1 + v_d**2 / 2)
    result = paired_difference(x_SD, n_D)
    assert (result.value, result.se, result.dof) == pytest.approx((value, (v_s + v_d) ** 0.5, dof))
    assert result.scope == "seeds and documents"


def test_the_estimate_is_a_ratio_of_sums_not_a_mean_of_ratios() -> None:
    assert ratio_estimate(np.array([10.0, 0.0]), np.array([10.0, 90.0])).value == pytest.approx(0.1)


def test_swapping_the_arms_changes_the_sign_and_nothing_else() -> None:
    x_SD, n_D = simulated(np.random.default_rng(1), 3, 30)
    ab, ba = paired_difference(x_SD, n_D), paired_difference(-x_SD, n_D)
    assert ba.value == -ab.value
    assert (ba.se, ba.p, ba.p_sign_flip, ba.dof) == (ab.se, ab.p, ab.p_sign_flip, ab.dof)
    assert ba.ci95 == pytest.approx((-ab.ci95[1], -ab.ci95[0]))  # type: ignore[index]


def test_identical_arms_differ_by_exactly_nothing() -> None:
    result = paired_difference(np.zeros(20), np.full(20, 64))
    assert (result.value, result.ci95, result.p, result.p_sign_flip, result.effect_size) == (0, (0, 0), 1, 1, 0)


def test_a_single_document_has_no_interval() -> None:
    result = paired_difference(np.array([3.0]), np.array([10]))
    assert result.value == pytest.approx(0.3)
    assert result.ci95 is result.p is result.detectable is result.effect_size is None


@pytest.mark.parametrize(
    ("x", "n"), [([1.0, np.nan], [1, 1]), ([1.0, 2.0], [1, 0]), ([1.0, 2.0], [1]), ([], []), ([1.0, np.inf], [1, 1])]
)
def test_what_cannot_be_averaged_is_refused(x: list[float], n: list[float]) -> None:
    with pytest.raises(ValueError, match=r"finite|fit"):
        ratio_estimate(np.array(x), np.array(n))


def test_sign_flips_agree_with_all_flips() -> None:
    x_D = np.array([0.4, -0.1, 0.3, 0.2, 0.5, -0.3, 0.1, 0.6])
    signs_BD = np.array(np.meshgrid(*[[-1, 1]] * 8)).reshape(8, -1).T
    exact = np.mean(np.abs(signs_BD @ x_D) >= x_D.sum() - 1e-9)
    assert sign_flip_p(x_D, seed=3) == pytest.approx(exact, abs=0.01)
    assert sign_flip_p(x_D, seed=3) == sign_flip_p(x_D, seed=3)


def test_seeds_share_their_documents_sign() -> None:
    """Two seeds that are copies carry no more evidence than one."""
    x_D = np.random.default_rng(2).normal(0.1, 0.3, 30)
    assert sign_flip_p(np.stack([x_D, x_D])) == sign_flip_p(x_D)


def test_mcnemar_is_exact_on_discordant_documents() -> None:
    a = [True] * 8 + [False] * 2 + [True] * 5
    b = [False] * 8 + [True] * 2 + [True] * 5
    assert mcnemar(a, b) == {"only_a": 8, "only_b": 2, "p": pytest.approx(2 * 56 / 1024), "n": 15}
    assert mcnemar([True, False], [True, False])["p"] == 1


def test_holm_adjusts_step_by_step() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.5}) == pytest.approx(
        {"a": 0.04, "b": 0.09, "c": 0.09, "d": 0.5}
    )
    assert holm({"a": 0.7, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def test_effect_size_is_undefined_where_nothing_varies() -> None:
    assert effect_size(np.array([0.2, 0.2, 0.2])) is None
    assert effect_size(np.zeros(3)) == 0


def test_a_share_has_an_interval_even_at_its_ends() -> None:
    low, high = proportion_interval(0, 48) or (0, 0)
    assert low == pytest.approx(0, abs=1e-12)
    assert 0.05 < high < 0.1
    assert proportion_interval(0, 0) is None
