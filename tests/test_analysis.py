"""What follows for one seed and for several is computed in one place, from the same rows."""

import subprocess
import sys

import numpy as np
import pytest
from evidence_rows import ITERATIVE, evidence, matched_to, rows
from pydantic import ValidationError

from isotone.analysis import Analysis, analyse
from isotone.attacks import ensemble
from isotone.config import Experiment
from isotone.evidence import WORST, Evidence, with_ensemble
from isotone.robustness import Floors

PUBLISHED = ("hotflip", "published")


def arm(mean: float, seed: int, **options: object) -> Evidence:
    harms = mean + np.random.default_rng(seed).normal(0, 0.05, 40)
    published = rows(harms, attack=PUBLISHED, seed=seed)
    return evidence(rows(harms, seed=seed), published, **options)  # type: ignore[arg-type]


def one_seed(shift: float = 0.0, seed: int = 0) -> dict[str, Evidence]:
    return {
        "baseline": arm(0.4, seed),
        "monotonic": arm(0.2 + shift, seed, nll=3.5),
        "matched": arm(0.3, seed, nll=3.5, matched=matched_to("monotonic")),
    }


def analysed(*seeds: dict[str, Evidence], margins: dict[str, float] | None = None) -> Analysis:
    margins = {"ensemble": 0.04} if margins is None else margins
    return analyse(seeds, "baseline", ITERATIVE, margins, 0.15, Floors())


def test_the_same_seed_three_times_gives_the_same_figures() -> None:
    one, three = analysed(one_seed()), analysed(*[one_seed()] * 3)
    for a, b in zip(one.decompositions, three.decompositions, strict=True):
        assert a.total is not None
        assert b.total is not None
        assert a.total.value == pytest.approx(b.total.value, abs=1e-12)
    assert [v.verdict for v in one.verdicts] == [v.verdict for v in three.verdicts] == ["more_robust"]
    assert [v.num_seeds for v in three.verdicts] == [3]


def test_seeds_that_disagree_widen_the_interval() -> None:
    agree = analysed(one_seed(), one_seed(), one_seed()).decompositions[-1].parts[1]
    differ = analysed(one_seed(-0.1), one_seed(), one_seed(0.1)).decompositions[-1].parts[1]
    assert differ.value == pytest.approx(agree.value, abs=1e-9)
    assert (differ.se or 0) > 2 * (agree.se or 1)


def test_the_ensembles_margin_goes_before_that_of_a_member() -> None:
    assert analysed(one_seed(), margins={"hotflip": 0.03, "ensemble": 0.05}).verdicts[0].margin == 0.05
    assert analysed(one_seed(), margins={"hotflip": 0.03}).verdicts[0].margin == 0.03
    assert analysed(one_seed(), margins={}).verdicts[0].margin is None


def test_without_a_baseline_nothing_follows() -> None:
    assert analysed({"monotonic": arm(0.2, 0)}) == analysed() == Analysis([], {}, [])


def test_the_ensemble_is_made_of_attacks_on_unscored_text_and_keeps_its_name() -> None:
    assert WORST == (ensemble.ENSEMBLE, ensemble.WORST_CASE)
    weak, strong = rows([0.1, 0.5]), rows([0.3, 0.2], attack=("coordinate", "random"))
    published = rows([9.0, 9.0], attack=PUBLISHED)
    found = with_ensemble({ITERATIVE: weak, ("coordinate", "random"): strong, PUBLISHED: published})
    assert [row["of"]["attack"] for row in found[WORST]] == ["coordinate", "hotflip"]
    assert [row["delta_nats"] for row in found[WORST]] == [strong[0]["delta_nats"], weak[1]["delta_nats"]]


def test_the_form_of_results_is_known_without_torch() -> None:
    code = "import sys, isotone.result_models; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.parametrize(
    ("analysis", "message"),
    [
        ({"family": [{"metric": "nll", "attack": "hotflip"}]}, "nll is of clean text; leave attack and variant out"),
        ({"family": [{"metric": "delta_nll"}]}, "delta_nll is of an attack; name it"),
        ({"family": [{"metric": "delta_nll", "attack": "hotflip", "variant": "beem"}]}, "found 'beem', allowed: once"),
        ({"family": [{"metric": "nll"}, {"metric": "nll"}]}, "a member is there twice"),
        (
            {"family": [{"metric": "delta_nll", "attack": "hotflip", "variant": v} for v in (None, "iterative")]},
            "a member is there twice",
        ),
        ({"family": []}, "at least 1"),
        ({"level": 0.2}, "less than or equal to 0.05"),
        ({"margin_share": 0}, "greater than 0"),
    ],
)
def test_a_family_that_cannot_be_tested_is_refused(analysis: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Experiment.model_validate({"name": "tiny", "analysis": analysis})
