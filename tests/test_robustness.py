"""The verdict follows its rules, in the same words for both directions; a test for each rule."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from evidence_rows import ITERATIVE, evidence, exchanged, matched_to, missing, rows

from isotone.decomposition import Term
from isotone.evidence import Evidence
from isotone.masking import Masking
from isotone.robustness import Floors, Verdict, decide, judge

NUM_DOCUMENTS = 60
CLEAR = Masking(label="none flagged", weak_on_both=False, indices=[], sentence="")


def harms(mean: float, seed: int = 0, spread: float = 0.05) -> np.ndarray:
    return mean + np.random.default_rng(seed).normal(0, spread, NUM_DOCUMENTS)


def arm(mean: float, seed: int = 0, *, spread: float = 0.05, **options: Any) -> Evidence:
    return evidence(rows(harms(mean, seed, spread)), **options)


def verdict(seeds: list[dict[str, Evidence]], margin: float | None = 0.04, masking: Masking = CLEAR) -> Verdict:
    return decide("monotonic", "baseline", seeds, margin, masking)[0]


def one_seed(monotonic: float, *controls: float, nll: float = 3.5, spread: float = 0.05) -> list[dict[str, Evidence]]:
    """Return a seed in which the monotonic arm has another clean loss than the baseline, and controls at its own."""
    found = {"baseline": arm(0.40, 1), "monotonic": arm(monotonic, 2, spread=spread, nll=nll)}
    for number, control in enumerate(controls, 1):
        found[f"control_{number}"] = arm(control, 2 + number, nll=nll, matched=matched_to("monotonic"))
    return [found]


def test_either_arm_can_come_out_ahead_in_the_same_words() -> None:
    more, less = verdict(one_seed(0.20, 0.30, 0.32)), verdict(one_seed(0.30, 0.20, 0.18))
    assert (more.verdict, less.verdict) == ("more_robust", "less_robust")
    same = "robust than baseline at matched clean loss: the worst of 1 attacks on each document raises the loss by 0."
    assert more.sentence.startswith(f"monotonic is more {same}")
    assert less.sentence.startswith(f"monotonic is less {same}")
    assert "(these two models only; 60 documents; detectable 0.0" in more.sentence


def test_exchanging_the_labels_exchanges_the_sentence() -> None:
    a, b = rows(harms(0.30, 1)), rows(harms(0.36, 2))
    one = verdict([{"baseline": evidence(a), "monotonic": evidence(b)}])
    two = verdict([{"baseline": evidence(b), "monotonic": evidence(a)}])
    assert (one.verdict, two.verdict) == ("less_robust", "more_robust")
    assert one.against[0].remainder.value == -two.against[0].remainder.value
    assert one.sentence.split(":")[0] == two.sentence.split(":")[0].replace("more", "less")
    assert one.sentence.count(" ") == two.sentence.count(" ")


def test_identical_arms_are_equivalent() -> None:
    same = rows(harms(0.3))
    result = verdict([{"baseline": evidence(same), "monotonic": evidence(same)}])
    assert result.verdict == "equivalent"
    assert result.equivalent is True
    assert result.sentence.startswith("monotonic and baseline are equivalent in robustness")
    assert "within ±0.040" in result.sentence


def test_rounding_is_no_difference() -> None:
    same = rows(harms(0.3))
    rounded = [row | {"delta_nats": row["delta_nats"] + 16e-6} for row in same]
    assert verdict([{"baseline": evidence(same), "monotonic": evidence(rounded)}]).verdict == "equivalent"


def test_every_control_must_agree() -> None:
    assert verdict(one_seed(0.25, 0.35, 0.36)).verdict == "more_robust"
    assert verdict(one_seed(0.25, 0.35, 0.25)).verdict == "inconclusive"
    assert verdict(one_seed(0.25, 0.35, 0.15)).verdict == "inconclusive"  # the controls contradict each other


def test_no_verdict_without_a_control_while_clean_losses_differ() -> None:
    result = verdict(one_seed(0.20))
    assert result.verdict == "not_concluded"
    assert "differ by +0.500 nats per token (more than 0.02) and no matched-loss arm exists" in result.sentence
    assert "robust than" not in result.sentence
    assert verdict(one_seed(0.20, nll=3.0)).verdict == "more_robust"  # the baseline is its own control
    assert verdict(one_seed(0.20, nll=3.019)).verdict == "more_robust"
    assert verdict(one_seed(0.20, nll=3.021)).verdict == "not_concluded"


def reading(found: Evidence, uses: float) -> Evidence:
    """Return an arm that loses this many nats a token with another document's context."""
    return replace(found, exchanged=exchanged(uses, NUM_DOCUMENTS))


@pytest.mark.parametrize(("monotonic", "control", "less"), [(0.05, 0.9, "monotonic"), (0.9, 0.05, "control_1")])
def test_a_model_that_does_not_read_what_is_attacked_is_not_robust(monotonic: float, control: float, less: str) -> None:
    """A unigram model is moved by no edit; nothing follows from that, whichever side it is on."""
    [seed] = one_seed(monotonic, control)
    assert verdict([seed]).verdict in ("more_robust", "less_robust")  # both read

    def with_uses(share: float) -> Verdict:
        uses = {"monotonic": 2.0, "control_1": 2.0} | {less: 2.0 * share}
        return verdict([seed | {name: reading(seed[name], value) for name, value in uses.items()}])

    ruined, reads = with_uses(0.05), with_uses(0.55)
    assert ruined.verdict == "not_concluded"
    assert (
        f"{less} is harmed less, but hardly reads what is attacked: another document's in its place costs it 0.100 "
        in (ruined.sentence)
    )
    assert "robust than" not in ruined.sentence
    assert reads.verdict == ("more_robust" if less == "monotonic" else "less_robust")
    assert (reads.unread, reads.against[0].context_baseline) == (None, pytest.approx(1.1 if less != "monotonic" else 2))


@pytest.mark.parametrize("arm", ["monotonic", "control_1"])
def test_nothing_is_concluded_where_nobody_measured_whether_the_context_is_read(arm: str) -> None:
    [seed] = one_seed(0.05, 0.9)
    result = verdict([seed | {arm: replace(seed[arm], exchanged=())}])
    assert result.verdict == "not_concluded"
    said = "monotonic is harmed less than control_1, and what both read of what is attacked was not measured"
    assert said in result.sentence


def test_one_seed_that_does_not_read_is_enough() -> None:
    [seed] = one_seed(0.05, 0.9)
    good = seed | {name: reading(seed[name], 2.0) for name in ("monotonic", "control_1")}
    assert verdict([good, good]).verdict == "more_robust"
    assert verdict([good, good | {"monotonic": reading(good["monotonic"], 0.1)}]).verdict == "not_concluded"


def test_a_model_that_reads_less_and_is_harmed_more_is_less_robust_all_the_same() -> None:
    [seed] = one_seed(0.9, 0.3)
    uses = {"monotonic": 0.1, "control_1": 2.0}
    assert verdict([seed | {n: reading(seed[n], value) for n, value in uses.items()}]).verdict == "less_robust"


def test_losses_of_the_attacked_documents_count_as_clean_losses_too() -> None:
    worse = evidence(rows(harms(0.2), clean=3.2))
    result = verdict([{"baseline": evidence(rows(harms(0.4))), "monotonic": worse}])
    assert result.verdict == "not_concluded"
    assert result.clean_difference == pytest.approx(0.2, abs=0.03)


@pytest.mark.parametrize(
    ("match", "why"),
    [
        (matched_to("monotonic", reachable=False, reason="the loss jumps past it"), "not reachable: the loss jumps"),
        (matched_to("monotonic", distance=0.011), "its clean loss is 3.5110 for the 3.5000 to be met"),
        (matched_to("monotonic", distance=-0.011), "its clean loss is 3.4890 for the 3.5000 to be met"),
        (matched_to("monotonic", reached=None), "its clean loss, or the one to be met, is not a finite number"),
    ],
)
def test_a_control_that_missed_its_loss_does_not_exist_and_is_named(match: dict[str, Any], why: str) -> None:
    [seed] = one_seed(0.20)
    missed = {"missed": arm(0.30, 5, nll=3.5, matched=match)}
    alone = verdict([seed | missed])
    assert alone.verdict == "not_concluded"
    assert f"no matched-loss arm exists (missed: {why}" in alone.sentence
    [seed] = one_seed(0.20, 0.30)
    beside = verdict([seed | {"missed": arm(0.10, 5, nll=3.5, matched=match)}])
    assert beside.verdict == "more_robust"  # it would have contradicted
    assert [entry.control for entry in beside.against] == ["control_1"]
    assert f"Controls that do not count: missed: {why}" in beside.sentence


def test_a_control_must_be_matched_in_every_seed() -> None:
    good, bad = one_seed(0.2, 0.3)[0], one_seed(0.2)[0]
    bad["control_1"] = arm(0.3, 3, nll=3.5, matched=matched_to("monotonic", distance=0.5))
    assert verdict([good, good]).verdict == "more_robust"
    assert verdict([good, bad]).verdict == "not_concluded"


def test_a_control_of_another_arm_is_none_of_this_one() -> None:
    [seed] = one_seed(0.20)
    other = arm(0.30, 5, nll=3.5, matched=matched_to("edit_trained"))
    assert verdict([seed | {"other": other}]).verdict == "not_concluded"


@pytest.mark.parametrize(("monotonic", "word"), [(0.30, "more_robust"), (0.50, "less_robust")])
def test_the_better_of_the_two_is_brought_to_the_loss_of_the_other(monotonic: float, word: str) -> None:
    """The arm is the better one here, so the control is made from it, and stands for it beside the baseline."""
    seed = {
        "baseline": arm(0.40, 1, nll=3.5),
        "monotonic": arm(monotonic + 0.08, 2, nll=3.0),
        "control": arm(monotonic, 3, nll=3.5, matched=matched_to("baseline", start="monotonic")),
        "another": arm(0.90, 4, nll=3.5, matched=matched_to("baseline", start="edit_trained")),
    }
    found = decide("monotonic", "baseline", [seed], 0.04, CLEAR)
    [entry], [gap] = found[0].against, found[1]
    assert (found[0].verdict, entry.control, entry.in_place_of) == (word, "control", "arm")
    assert entry.remainder.value == pytest.approx(entry.delta_baseline - entry.delta_control, abs=1e-12)
    assert [part.name for part in gap.parts] == ["matched loss", "remainder"]
    assert gap.parts[0].value == pytest.approx(entry.delta_control - entry.delta_arm, abs=1e-12)
    assert gap.total is not None
    assert gap.total.value == pytest.approx(sum(part.value for part in gap.parts), abs=1e-12)
    assert f"of baseline, which moves control by {entry.delta_control:.3f}" in found[0].sentence


def test_a_control_that_was_made_from_a_third_arm_does_not_count() -> None:
    [seed] = one_seed(0.20, 0.30)
    third = arm(0.10, 5, nll=3.5, matched=matched_to("monotonic", start="edit_trained"))
    result = verdict([seed | {"third": third}])
    assert [entry.control for entry in result.against] == ["control_1"]
    assert "third: it was made from edit_trained, which is neither of the two" in result.sentence


def test_too_few_documents_give_no_verdict() -> None:
    seeds = one_seed(0.20, 0.30)
    enough = decide("monotonic", "baseline", seeds, 0.04, CLEAR, Floors(documents=NUM_DOCUMENTS))[0]
    assert (enough.verdict, enough.below_floor) == ("more_robust", None)
    few = decide("monotonic", "baseline", seeds, 0.04, CLEAR, Floors(documents=NUM_DOCUMENTS + 1))[0]
    assert (few.verdict, few.equivalent) == ("not_concluded", None)
    assert "60 documents have figures on all sides, and 61 are needed" in few.sentence
    assert few.against  # what was measured is still there


@pytest.mark.parametrize("lazy", ["baseline", "monotonic", "control_1"])
def test_an_attack_that_hardly_tried_gives_no_verdict(lazy: str) -> None:
    """Random edits search nothing, so what they spend does not count."""
    [seed] = one_seed(0.20, 0.30)
    drawn = rows(harms(0.01, 7), attack=("random_edits", "uniform"), spent=10**6)
    seed = {
        name: evidence(
            list(map(dict, its.attacks[ITERATIVE])), drawn, nll=3.0 if name == "baseline" else 3.5, matched=its.matched
        )
        for name, its in seed.items()
    }
    floors = Floors(spent_tokens=1000)
    assert decide("monotonic", "baseline", [seed], 0.04, CLEAR, floors)[0].verdict == "more_robust"
    short = [{**row, "spent_tokens": 999} for row in seed[lazy].attacks[ITERATIVE]]
    seed[lazy] = evidence(short, drawn, nll=3.0 if lazy == "baseline" else 3.5, matched=seed[lazy].matched)
    result = decide("monotonic", "baseline", [seed], 0.04, CLEAR, floors)[0]
    assert result.verdict == "not_concluded"
    assert f"no search on {lazy} spent more than 999 tokens a document, and 1,000 are needed" in result.sentence


def test_an_arm_that_was_made_worse_than_another_is_no_control_of_it() -> None:
    [seed] = one_seed(0.20)
    worse = arm(0.30, 5, nll=3.5, matched=matched_to("monotonic", above=0.5))
    result = verdict([seed | {"worse": worse}])
    assert result.verdict == "not_concluded"
    assert result.excluded == []


def term(low95: float, high95: float, low90: float, high90: float) -> Term:
    value = (low95 + high95) / 2
    return Term(
        name="remainder", value=value, ci95=(low95, high95), ci90=(low90, high90), se=0.1, p=0.1, detectable=0.3
    )


@pytest.mark.parametrize(
    ("remainders", "margin", "word", "equivalent"),
    [
        ([term(0.001, 0.2, 0.01, 0.19)], 0.1, "more_robust", False),
        ([term(-0.001, 0.2, 0.01, 0.19)], 0.1, "inconclusive", False),  # 90 % beyond 0 is not enough
        ([term(-0.2, -0.001, -0.19, -0.01)], 0.1, "less_robust", False),
        ([term(-0.12, 0.12, -0.1, 0.1)], 0.1, "equivalent", True),  # 90 % inside is enough
        ([term(-0.12, 0.12, -0.101, 0.1)], 0.1, "inconclusive", False),
        ([term(-0.02, 0.02, -0.01, 0.01), term(-0.2, 0.2, -0.15, 0.15)], 0.1, "inconclusive", False),
        ([term(-0.02, 0.02, -0.01, 0.01)], None, "inconclusive", None),  # no margin, no equivalence
        ([term(0.01, 0.05, 0.012, 0.04)], 0.1, "more_robust", True),
        ([term(0.01, 0.05, 0.012, 0.04), term(-0.05, -0.01, -0.04, -0.012)], 0.01, "inconclusive", False),
        ([], 0.1, "not_concluded", None),
    ],
)
def test_the_rules_at_their_limits(remainders: list[Term], margin: float, word: str, equivalent: bool) -> None:
    assert judge(remainders, margin) == (word, equivalent)


def test_what_is_small_is_said_to_be_small() -> None:
    result = verdict(one_seed(0.30, 0.31, spread=0.01), margin=0.2)
    assert (result.verdict, result.equivalent) == ("more_robust", True) or result.verdict == "equivalent"
    tiny = decide("monotonic", "baseline", one_seed(0.30, 0.33), 0.2, CLEAR)[0]
    assert (tiny.verdict, tiny.equivalent) == ("more_robust", True)
    assert "within the margin of ±0.200 for equivalence" in tiny.sentence


def test_a_wide_interval_is_inconclusive_and_says_what_it_could_have_found() -> None:
    result = verdict(one_seed(0.30, 0.31, spread=0.8))
    assert result.verdict == "inconclusive"
    assert result.sentence.startswith("It is open whether monotonic is more or less robust than baseline")
    assert f"A difference of {result.detectable:.3f} would probably have been found" in result.sentence
    assert result.detectable == max(a.remainder.detectable for a in result.against if a.remainder.detectable)


def test_the_worst_case_of_all_attacks_decides() -> None:
    """One attack alone would call the arm more robust; another one finds what that missed."""

    def attacked(first: float, second: float, **options: Any) -> Evidence:
        other = rows(harms(second, 9), attack=("coordinate", "random"))
        return evidence(rows(harms(first, 2)), other, nll=3.5, **options)

    control = attacked(0.35, 0.30, matched=matched_to("monotonic"))
    seed = {"baseline": attacked(0.4, 0.4), "monotonic": attacked(0.20, 0.50), "control": control}
    seed["baseline"] = arm(0.4, 1)
    result = verdict([seed])
    assert result.verdict == "less_robust"
    assert result.attacks == ["hotflip iterative", "coordinate random"]


def test_masking_stands_beside_and_changes_no_verdict() -> None:
    flagged = Masking(label="possible masking", weak_on_both=True, indices=[], sentence="")
    plain, marked = verdict(one_seed(0.20, 0.30)), verdict(one_seed(0.20, 0.30), masking=flagged)
    assert (plain.verdict, marked.verdict) == ("more_robust", "more_robust")
    assert marked.possible_masking
    assert not plain.possible_masking
    assert "Possible masking: gradients mislead attacks on monotonic more than on baseline" in marked.sentence
    assert "Gradient attacks are weak on both, so this rests on the ensemble" in marked.sentence
    assert "asking" not in plain.sentence


@pytest.mark.parametrize(
    ("order", "words"), [("vacuous", "the property itself cannot be the cause"), ("basis-dependent", "inductive bias")]
)
@pytest.mark.parametrize("mean", [0.2, 0.3, 0.4])
def test_what_a_certificate_takes_back_stands_with_every_result(order: str, words: str, mean: float) -> None:
    [seed] = one_seed(mean, 0.3)
    seed["monotonic"] = arm(mean, 2, nll=3.5, order=order)
    assert words in verdict([seed]).sentence
    assert words not in verdict(one_seed(mean, 0.3)).sentence


def test_documents_that_one_arm_is_missing_are_left_out_everywhere() -> None:
    [seed] = one_seed(0.2, 0.3)
    holey = rows(harms(0.3, 3))
    holey[4] = missing(holey[4])
    seed["control_1"] = evidence(holey, nll=3.5, matched=matched_to("monotonic"))
    result, gaps = decide("monotonic", "baseline", [seed], 0.04, CLEAR)
    assert result.n == NUM_DOCUMENTS - 1
    assert [(gap.kind, gap.control, gap.n, gap.num_missing) for gap in gaps] == [("remainder", "control_1", 59, 1)]


def test_arms_without_a_common_document_give_no_verdict() -> None:
    [seed] = one_seed(0.2, 0.3)
    seed["monotonic"] = evidence([missing(row) for row in rows(harms(0.3))], nll=3.5)
    result = verdict([seed])
    assert result.verdict == "not_concluded"
    assert "no document has figures under every attack" in result.sentence


def test_a_control_without_figures_is_named_and_takes_nothing_from_the_others() -> None:
    """A model that returns NaN is missing everywhere: it must not erase the verdict at the good controls."""
    [seed] = one_seed(0.2, 0.3, 0.32)
    seed["control_1"] = evidence([missing(row) for row in rows(harms(0.3))], nll=3.5, matched=matched_to("monotonic"))
    result = verdict([seed])
    assert result.verdict == "more_robust"
    assert [(e.control, e.reason) for e in result.excluded] == [("control_1", "no attacked document has figures")]


def test_several_seeds_are_crossed_with_documents() -> None:
    seeds = [
        {
            "baseline": arm(0.4, 10 + s),
            "monotonic": arm(0.20 + 0.02 * s, 20 + s, nll=3.5),
            "control": arm(0.30, 30 + s, nll=3.5, matched=matched_to("monotonic", "noise")),
        }
        for s in range(3)
    ]
    result = verdict(seeds)
    assert result.verdict == "more_robust"
    assert "(3 seeds; 60 documents; detectable" in result.sentence
    assert "two models only" not in result.sentence
    assert result.against[0].remainder.value == pytest.approx(0.08, abs=0.02)
