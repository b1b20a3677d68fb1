"""What the figures allow to be said, computed: the same words in both directions, and nothing that they do not show."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

MAX_CLEAN_DIFFERENCE = 0.02
"""Nats per token by which clean losses may differ in a statement on robustness without a matched-loss arm."""

RESOLUTION = 1e-5
"""Nats per token below which a difference is rounding: losses are means of fp32 numbers."""

LEVEL = 0.05

Comparison = Mapping[str, Any]


class Conclusion(BaseModel):
    """One computed statement about two arms."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    subject: Literal["clean_loss", "robustness"]
    a: str
    b: str
    attack: str | None
    variant: str | None
    verdict: Literal["higher_loss", "lower_loss", "more_robust", "less_robust", "no_difference_shown", "not_concluded"]
    equivalent: bool | None
    """The 90 % interval lies inside ± the margin; None where no margin is known."""
    sentence: str


def conclude_clean(comparison: Comparison) -> Conclusion:
    """Say what a comparison of clean losses (metric nll) shows."""
    a, b = comparison["a"], comparison["b"]
    direction = _direction(comparison)
    figures = (
        f"perplexity {_perplexity(comparison['value_a'])} against {_perplexity(comparison['value_b'])}, "
        f"a difference of {_difference(comparison, ' nats per token')}{_scope(comparison)}"
    )
    if direction == 0:
        verdict, text = "no_difference_shown", f"No difference shown in clean loss between {a} and {b}: {figures}"
    else:
        verdict = "higher_loss" if direction > 0 else "lower_loss"
        text = f"On clean text {a} has a {verdict.removesuffix('_loss')} loss than {b}: {figures}"
    return _conclusion("clean_loss", comparison, verdict, text)


def conclude_robustness(comparison: Comparison, clean: Sequence[Comparison], margin: float | None = None) -> Conclusion:
    """Say what a comparison of an attack's ``delta_nll`` shows.

    Args:
        comparison: of a with b, under one attack and the primary protocol.
        clean: comparisons of the same arms' clean losses (on the test text, and on the attack's scored tokens).
        margin: half width of equivalence, nats per scored token; None: not known.
    """
    a, b, attack = comparison["a"], comparison["b"], attack_name(comparison)
    widest = max(clean, key=lambda c: abs(c["difference"]), default=None)
    if widest is None:
        text = (
            f"No conclusion on the robustness of {a} against {b} under {attack}: their clean losses were not compared; "
            f"evaluate both arms on the same documents"
        )
        return _conclusion("robustness", comparison, "not_concluded", text)
    if abs(widest["difference"]) > MAX_CLEAN_DIFFERENCE:
        return _conclusion("robustness", comparison, "not_concluded", _unmatched(comparison, widest))
    direction, equivalent = _direction(comparison), _is_equivalent(comparison, margin)
    figures = (
        f"the attack raises the loss by {comparison['value_a']:.3f} against {comparison['value_b']:.3f} nats per "
        f"scored token, a difference of {_difference(comparison)}{_scope(comparison)}"
    )
    small = f", within the margin of ±{margin:.3f} for equivalence" if equivalent else ""
    if direction == 0:
        text = f"No difference shown in robustness between {a} and {b} under {attack}: {figures}{small}"
        if not equivalent and comparison["detectable"]:
            text += f"; a difference of {comparison['detectable']:.3f} would probably have been found"
        return _conclusion("robustness", comparison, "no_difference_shown", text, equivalent)
    verdict = "less_robust" if direction > 0 else "more_robust"
    text = f"{a} is {verdict.replace('_', ' ')} than {b} under {attack}: {figures}{small}"
    return _conclusion("robustness", comparison, verdict, text, equivalent)


def attack_name(comparison: Comparison) -> str:
    """Return how sentences name an attack."""
    names = {
        "hotflip": f"HotFlip ({comparison['variant']})",
        "triggers": "universal triggers",
        "ensemble": "the worst of all attacks on its text",
    }
    return names.get(comparison["attack"], str(comparison["attack"]))


def _unmatched(comparison: Comparison, clean: Comparison) -> str:
    a, b = comparison["a"], comparison["b"]
    worse, better = (a, b) if clean["difference"] > 0 else (b, a)
    where = "on the test text" if clean["metric"] == "nll" else "on the scored tokens"
    return (
        f"No conclusion on the robustness of {a} against {b} under {attack_name(comparison)} from these two alone: "
        f"their clean losses {where} differ by {clean['difference']:+.3f} nats per token (more than "
        f"{MAX_CLEAN_DIFFERENCE}); only {better} brought to the clean loss of {worse} (a matched_loss control) and "
        f"attacked the same way can settle it, see the verdict"
    )


def _direction(comparison: Comparison) -> int:
    """Return the sign of a difference that is shown: more than rounding, 95 % interval beyond 0, p below the level."""
    p = comparison["p"] if comparison["p_adjusted"] is None else comparison["p_adjusted"]
    if comparison["ci95"] is None or p is None or p >= (comparison.get("level") or LEVEL):
        return 0
    if abs(comparison["difference"]) <= RESOLUTION:
        return 0
    low, high = comparison["ci95"]
    return 1 if low > 0 else -1 if high < 0 else 0


def _is_equivalent(comparison: Comparison, margin: float | None) -> bool | None:
    if margin is None or comparison["ci90"] is None:
        return None
    low, high = comparison["ci90"]
    return -margin <= low and high <= margin


def _difference(comparison: Comparison, unit: str = "") -> str:
    text = f"{comparison['difference']:+.3f}{unit}"
    if comparison["ci95"] is not None:
        low, high = comparison["ci95"]
        text += f" [{low:+.3f}, {high:+.3f}]"
    p = comparison["p"] if comparison["p_adjusted"] is None else comparison["p_adjusted"]
    if p is None:
        return text
    kind = "p" if comparison["p_adjusted"] is None else "adjusted p"
    return text + (f", {kind} < 0.001" if p < 0.001 else f", {kind} = {p:.3f}")


def _perplexity(nll: float) -> str:
    return f"{math.exp(nll):.4g}" if nll < 100 else f"e^{nll:.0f}"


def _scope(comparison: Comparison) -> str:
    kind = f"{comparison['scope']}; " if comparison["num_seeds"] == 1 else f"{comparison['num_seeds']} seeds; "
    return f" ({kind}{comparison['n']} documents)"


def _conclusion(
    subject: Literal["clean_loss", "robustness"],
    comparison: Comparison,
    verdict: Any,
    text: str,
    equivalent: bool | None = None,
) -> Conclusion:
    return Conclusion(
        subject=subject,
        a=comparison["a"],
        b=comparison["b"],
        attack=comparison["attack"],
        variant=comparison["variant"],
        verdict=verdict,
        equivalent=equivalent,
        sentence=f"{text}.",
    )
