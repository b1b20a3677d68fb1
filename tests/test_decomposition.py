"""Every gap is the sum of its parts, exactly; exchanging the arms exchanges every sign."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from evidence_rows import ITERATIVE, TOKENS, missing, rows

from isotone.attacks.published import published_accounting
from isotone.decomposition import Account, Decomposition, Pair, accounts, published_gaps, remainder
from isotone.evidence import changes
from isotone.statistics import ratio_estimate

PUBLISHED = ("hotflip", "published")
PAIR = Pair("monotonic", "baseline", PUBLISHED)
NUM_DOCUMENTS = 40


def harms(mean: float, seed: int) -> np.ndarray:
    return mean + np.random.default_rng(seed).normal(0, 0.1, NUM_DOCUMENTS)


def of_seeds(mean: float, clean: float, num_seeds: int = 1, **options: Any) -> list[dict[str, Account]]:
    return [
        accounts(rows(harms(mean, s), attack=PUBLISHED, clean=clean, seed=s, **options), 0.15) for s in range(num_seeds)
    ]


def gaps(b: Sequence[Mapping[str, Account]], m: Sequence[Mapping[str, Account]]) -> list[Decomposition]:
    return published_gaps(PAIR, b, m, 0.15)


def through(control: float = 0.3, **of: float) -> Decomposition:
    means = {"baseline": 0.4, "monotonic": 0.25} | of
    columns = {
        arm: [changes(rows(harms(mean, s), seed=s)) for s in (0, 1, 2)]
        for arm, mean in (means | {"control": control}).items()
    }
    return remainder(Pair("monotonic", "baseline", ITERATIVE, "control"), columns)


@pytest.mark.parametrize("num_seeds", [1, 3])
def test_parts_add_up_to_the_total(num_seeds: int) -> None:
    found = gaps(of_seeds(0.5, 3.0, num_seeds), of_seeds(0.3, 4.0, num_seeds, flips=3))
    assert [gap.kind for gap in found] == ["nats", "bar", "success"]
    for gap in [*found, through()]:
        assert gap.total is not None
        assert gap.total.value == pytest.approx(math.fsum(part.value for part in gap.parts), abs=1e-12)
        assert gap.total.value != 0
        assert gap.num_seeds == (3 if gap.kind == "remainder" else num_seeds)
        assert (gap.scope == "these two models only") == (gap.num_seeds == 1)


def test_exchanging_the_arms_exchanges_every_sign() -> None:
    b, m = of_seeds(0.5, 3.0, 3), of_seeds(0.3, 4.0, 3)
    one_bar = "success"  # its bar is the baseline's, so exchanging the arms is another question there
    for one, two in zip(gaps(b, m), gaps(m, b), strict=True):
        assert one.total is not None
        assert two.total is not None
        assert one.total.value == pytest.approx(-two.total.value, abs=1e-12)
        if one.kind != one_bar:
            for part, other in zip(one.parts, two.parts, strict=True):
                assert part.value == pytest.approx(-other.value, abs=1e-12)
                assert part.ci95 == pytest.approx(tuple(-end for end in reversed(other.ci95 or ())))


def test_accounts_are_those_of_the_published_accounting() -> None:
    for row in rows(harms(0.4, 1), attack=PUBLISHED):
        clean, attacked = (
            torch.tensor([*row[f"context_{side}_nll"], *row[f"{side}_nll"]], dtype=torch.float64)
            for side in ("clean", "attacked")
        )
        flipped = torch.zeros(TOKENS, dtype=torch.bool)
        flipped[[position - 1 for position, _, _ in row["edits"]]] = True
        published = published_accounting(clean, attacked, flipped)
        account = accounts([row], 0.15)[row["id"]]
        assert account.flipped / account.tokens == pytest.approx(published["flipped"], abs=1e-12)
        assert account.other / account.tokens == pytest.approx(published["untouched"], abs=1e-12)
        assert account.clean / account.tokens == pytest.approx(published["clean"], abs=1e-12)
        assert account.success == (published["degradation"] > 0.15)


def test_an_edit_of_the_first_token_inserts_no_label() -> None:
    [row] = rows([0.4])
    before = accounts([row], 0.15)["d0"]
    with_first = accounts([row | {"edits": [[0, 5, 6], *row["edits"]]}], 0.15)["d0"]
    assert with_first == before


def test_inserted_labels_are_told_from_the_rest() -> None:
    nats, _, _ = gaps(of_seeds(0.3, 3.0, flips=6), of_seeds(0.3, 3.0, flips=0))
    labels, others = nats.parts
    assert labels.value == pytest.approx(6 * 4 / TOKENS, rel=0.1)
    assert abs(others.value) < 0.1 * labels.value


def test_a_larger_clean_loss_raises_the_bar_and_nothing_else() -> None:
    """The same nats, twice the clean loss: all of the log-ratio is the bar, and one bar takes the success gap away."""

    def doubled(found: Mapping[str, Account]) -> dict[str, Account]:
        return {
            d: Account(a.flipped, a.other, 2 * a.clean, a.tokens, a.flipped + a.other > 0.15 * 2 * a.clean)
            for d, a in found.items()
        }

    b = of_seeds(0.3, 3.0)
    nats, bar, success = gaps(b, [doubled(found) for found in b])
    assert nats.total is not None
    assert nats.total.value == 0
    assert [part.value for part in bar.parts] == [0, pytest.approx(math.log(2))]
    assert success.total is not None
    assert success.total.value > 0.2
    assert [part.value for part in success.parts] == [0, pytest.approx(success.total.value)]


def test_percentages_only_where_parts_agree_in_sign() -> None:
    agree, disagree = through(control=0.3), through(control=0.5)
    assert [part.share for part in disagree.parts] == [None, None]
    shares = [part.share for part in agree.parts]
    assert sum(share for share in shares if share is not None) == pytest.approx(1)
    assert all(share is not None and share > 0 for share in shares)


def test_a_log_ratio_of_what_is_not_positive_is_not_defined() -> None:
    b, m = of_seeds(0.3, 3.0), of_seeds(-3.0, 3.0)
    bar = gaps(b, m)[1]
    assert (bar.total, bar.parts) == (None, [])
    assert "not positive" in (bar.reason or "")


def test_a_document_that_one_side_is_missing_counts_on_neither() -> None:
    full = rows(harms(0.5, 0), attack=PUBLISHED)
    holey = [missing(full[0]), *full[1:]]
    b, m = [accounts(full, 0.15)], [accounts(holey, 0.15)]
    for gap in gaps(b, m):
        assert (gap.n, gap.num_missing) == (NUM_DOCUMENTS - 1, 1)
    [nothing, *_] = gaps([{}], m)
    assert (nothing.total, nothing.n) == (None, 0)


def test_the_remainder_is_the_paired_difference_of_control_and_arm() -> None:
    gap = through()
    x = [
        np.array(
            [
                a - b
                for (a, _), (b, _) in zip(*(changes(rows(harms(m, s), seed=s)).values() for m in means), strict=False)
            ]
        )
        for s in (0, 1, 2)
        for means in [(0.3, 0.25)]
    ]
    expected = ratio_estimate(np.array(x), np.full(NUM_DOCUMENTS, 16))
    assert gap.parts[1].value == pytest.approx(expected.value, abs=1e-12)
    assert gap.parts[1].ci95 == pytest.approx(expected.ci95)
    assert gap.parts[1].detectable == pytest.approx(2.8 * (expected.se or 0))


def test_intervals_of_the_log_ratio_hold_the_truth_as_often_as_they_say() -> None:
    """500 draws of 50 documents whose means are known: ln(x̄_B/x̄_M) = ln 2, correlated over documents."""
    generator, held = np.random.default_rng(8), 0
    for _ in range(500):
        common, own = generator.gamma(4, 1 / 4, (2, 50)), generator.gamma(4, 1 / 4, (2, 50))
        b, m = (
            {f"d{i}": Account(0.0, 64 * scale * x, 192.0, 64, True) for i, x in enumerate(values)}
            for scale, values in zip((0.4, 0.2), (common[0] + own) / 2, strict=True)
        )
        interval = gaps([b], [m])[1].parts[0].ci95
        assert interval is not None
        held += interval[0] <= math.log(2) <= interval[1]
    assert 0.92 <= held / 500 <= 0.975
