"""Conclusions are computed: the same words in both directions, and none while clean losses differ."""

from typing import Any

import numpy as np
import pytest

from isotone.comparisons import PER_TOKEN, PREFIX, Key, Quantity, compare
from isotone.verdict import conclude_clean, conclude_robustness

DOCUMENTS = [f"d{i}" for i in range(60)]
DELTA = Key("delta_nll", "hotflip", "iterative", PREFIX)
CLEAN = Key("clean_nll", "hotflip", "iterative", PREFIX)


def quantity(key: Key, per_token_D: np.ndarray) -> Quantity:
    return Quantity(key, PER_TOKEN, dict(zip(DOCUMENTS, 64 * per_token_D, strict=True)), dict.fromkeys(DOCUMENTS, 64))


def noise(seed: int, scale: float = 0.02) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, len(DOCUMENTS))


def compared(key: Key, a_D: np.ndarray, b_D: np.ndarray) -> dict[str, Any]:
    entry = compare(("monotonic", [quantity(key, a_D)]), ("baseline", [quantity(key, b_D)]))
    assert entry is not None
    return entry


def both_ways(a: float, b: float, clean: float = 0.0, margin: float | None = None) -> list[Any]:
    """Return the conclusions on two sets of figures, and with the sets exchanged between the two arms."""
    deltas, cleans = (a + noise(1), b + noise(2)), (3 + clean + noise(3, 0.001), 3 + noise(4, 0.001))
    return [
        conclude_robustness(
            compared(DELTA, deltas[i], deltas[1 - i]), [compared(CLEAN, cleans[i], cleans[1 - i])], margin
        )
        for i in (0, 1)
    ]


def test_exchanging_the_arms_exchanges_the_words() -> None:
    more, less = both_ways(0.30, 0.38)
    assert (more.verdict, less.verdict) == ("more_robust", "less_robust")
    assert more.sentence.startswith(
        "monotonic is more robust than baseline under HotFlip (iterative): the attack raises"
    )
    assert less.sentence.startswith(
        "monotonic is less robust than baseline under HotFlip (iterative): the attack raises"
    )
    assert "by 0.299 against 0.382 nats per scored token" in more.sentence
    assert "by 0.382 against 0.299 nats per scored token" in less.sentence
    signs = str.maketrans("+-", "-+")
    assert sorted(n.translate(signs) for n in _differences(more.sentence)) == sorted(_differences(less.sentence))


@pytest.mark.parametrize(("shift", "words"), [(9e-6, {"no_difference_shown"}), (2e-5, {"more_robust", "less_robust"})])
def test_a_difference_of_rounding_is_none(shift: float, words: set[str]) -> None:
    """The shifted twin's losses differ from the baseline's in the last bits, in one direction on most documents."""
    deltas = 0.38 + noise(1), 0.38 + noise(1) + shift
    clean = [compared(CLEAN, 3 + noise(3, 0.001), 3 + noise(3, 0.001))]
    found = [conclude_robustness(compared(DELTA, deltas[i], deltas[1 - i]), clean, 0.04) for i in (0, 1)]
    assert {c.verdict for c in found} == words
    assert all(c.equivalent for c in found)


def _differences(sentence: str) -> list[str]:
    return [word.strip("[],.;") for word in sentence.split() if word.strip("[").startswith(("+", "-"))]


def test_the_ensemble_is_concluded_in_the_same_words() -> None:
    key = DELTA._replace(attack="ensemble", variant="worst_case")
    same = compared(CLEAN, 3 + noise(3, 0.001), 3 + noise(4, 0.001))
    one = conclude_robustness(compared(DELTA, 0.30 + noise(1), 0.38 + noise(2)), [same], 0.02)
    other = conclude_robustness(compared(key, 0.30 + noise(1), 0.38 + noise(2)), [same], 0.02)
    assert (other.attack, other.variant, other.verdict) == ("ensemble", "worst_case", one.verdict)
    assert other.sentence == one.sentence.replace("HotFlip (iterative)", "the worst of all attacks on its text")


def test_identical_arms_give_no_difference_shown() -> None:
    values = 0.3 + noise(1)
    result = conclude_robustness(compared(DELTA, values, values), [compared(CLEAN, values, values)], margin=0.03)
    assert result.verdict == "no_difference_shown"
    assert result.equivalent is True
    assert result.sentence.startswith("No difference shown in robustness between monotonic and baseline")
    clean = conclude_clean(compared(Key("nll"), values, values))
    assert clean.verdict == "no_difference_shown"


@pytest.mark.parametrize("clean", [0.55, -0.55, 0.021])
def test_no_word_on_robustness_while_clean_losses_differ(clean: float) -> None:
    for conclusion, sign in zip(both_ways(0.1, 0.4, clean), (1, -1), strict=True):
        assert conclusion.verdict == "not_concluded"
        assert "robust than" not in conclusion.sentence
        assert f"differ by {sign * clean:+.2f}" in conclusion.sentence
        assert "from these two alone" in conclusion.sentence
        worse, better = ("monotonic", "baseline") if sign * clean > 0 else ("baseline", "monotonic")
        assert f"{better} brought to the clean loss of {worse} (a matched_loss control)" in conclusion.sentence


@pytest.mark.parametrize("far", [0.1, -0.1])
def test_the_widest_clean_difference_decides(far: float) -> None:
    values = noise(1)
    scored, test_text = compared(CLEAN, 3 + values, 3 + values), compared(Key("nll"), 3 + far + values, 3 + values)
    for losses in ([scored, test_text], [test_text, scored]):
        conclusion = conclude_robustness(compared(DELTA, 0.1 + values, 0.4 + noise(2)), losses)
        assert conclusion.verdict == "not_concluded"
        assert "on the test text" in conclusion.sentence


def test_without_clean_losses_nothing_is_concluded() -> None:
    conclusion = conclude_robustness(compared(DELTA, 0.1 + noise(1), 0.4 + noise(2)), [])
    assert conclusion.verdict == "not_concluded"


def test_what_is_not_shown_is_not_called_equal() -> None:
    wide = compared(DELTA, 0.3 + noise(1, 0.5), 0.3 + noise(2, 0.5))
    same = compared(CLEAN, noise(3, 1e-3), noise(3, 1e-3))
    conclusion = conclude_robustness(wide, [same], margin=0.03)
    assert conclusion.verdict == "no_difference_shown"
    assert conclusion.equivalent is False
    assert "would probably have been found" in conclusion.sentence
    assert "equivalence" not in conclusion.sentence
    assert conclude_robustness(wide, [same]).equivalent is None


def test_equivalence_needs_the_whole_interval_inside_the_margin() -> None:
    conclusion, _ = both_ways(0.300, 0.300, margin=0.03)
    assert conclusion.equivalent is True
    assert "within the margin of ±0.030" in conclusion.sentence
    low, high = compared(DELTA, 0.3 + noise(1), 0.3 + noise(2))["ci90"]
    outside, _ = both_ways(
        0.300, 0.300, margin=(max(-low, high) + abs(low + high) / 2) / 2
    )  # difference in, interval out
    assert outside.equivalent is False


def test_a_corrected_p_can_take_a_statement_back() -> None:
    entry = compared(DELTA, 0.3 + noise(1), 0.38 + noise(2))
    same = compared(CLEAN, noise(3, 1e-3), noise(3, 1e-3))
    assert conclude_robustness(entry, [same]).verdict == "more_robust"
    assert conclude_robustness(entry | {"p_adjusted": 0.2}, [same]).verdict == "no_difference_shown"


def test_one_seed_speaks_of_these_two_models_only() -> None:
    assert all("(these two models only; 60 documents)" in c.sentence for c in both_ways(0.30, 0.38))


def test_clean_loss_is_concluded_in_both_directions() -> None:
    worse = conclude_clean(compared(Key("nll"), 3.9 + noise(1), 3.3 + noise(2)))
    better = conclude_clean(compared(Key("nll"), 3.3 + noise(2), 3.9 + noise(1)))
    assert (worse.verdict, better.verdict) == ("higher_loss", "lower_loss")
    assert worse.sentence.startswith("On clean text monotonic has a higher loss than baseline: perplexity 49")
    assert better.sentence.startswith("On clean text monotonic has a lower loss than baseline: perplexity 27")


def test_a_ruined_model_has_a_sentence_too() -> None:
    assert "e^" in conclude_clean(compared(Key("nll"), 900 + noise(1), 3.3 + noise(2))).sentence
