"""The verdict on an arm's robustness at matched clean loss: computed, and the same words in both directions.

A model that has become worse is also moved less by edits. So an arm is compared with controls: the baseline brought to
the arm's clean loss or, where the arm is the better one, the arm brought to the baseline's. What remains of the gap
then under the worst case of all attacks decides; every control must agree. A model that does not read what is attacked
is moved by no edit of it either, at whatever loss: so the side that is harmed less must still read it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from isotone.decomposition import Decomposition, Pair, Term, remainder
from isotone.evidence import WORST, Column, Evidence, Seeds, changes, clean_losses, clean_text_losses, members, tables
from isotone.masking import Masking
from isotone.statistics import ratio_estimate
from isotone.verdict import MAX_CLEAN_DIFFERENCE, RESOLUTION

MATCHED = 0.01
"""Nats per scored token within which a control's clean loss counts as matched."""

READS = 0.5
"""Share of what losing the context costs the side that is harmed more, which it must cost the other at least."""

CAVEATS = {
    "vacuous": (
        "The certificate is vacuous, so the property itself cannot be the cause of robustness; only the path of "
        "training can"
    ),
    "basis-dependent": (
        "Which inputs are ordered depends on the basis of the residual stream, so the property is at most an inductive "
        "bias"
    ),
}
"""What a certificate's order takes back from every statement on robustness (docs: science)."""


@dataclass(frozen=True)
class Floors:
    """Below these there is no verdict: an attack that hardly tried, or on hardly any document, shows nothing.

    Attributes:
        documents: attacked, with figures on all sides and in every seed.
        spent_tokens: of a document, by the search that spent most, on every side (attacks.budget).
    """

    documents: int = 20
    spent_tokens: int = 0


class Against(BaseModel):
    """An arm beside one control."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    control: str
    by: str | None
    """How it was brought to the other's clean loss; None for the baseline as it is."""
    in_place_of: Literal["baseline", "arm"]
    """Whom the control was made from, and stands for: the better of the two."""
    delta_control: float
    delta_arm: float
    delta_baseline: float
    remainder: Term
    """Δ of the baseline minus Δ of the arm, the control standing for one of them: positive where the arm is harmed
    less."""
    clean_difference: float
    """Clean loss of the arm minus that of the baseline on the attacked documents' scored tokens, the control standing
    for one of them."""
    context_arm: float | None
    """What it costs the arm that all that may be attacked is exchanged for another document's, nats per scored token;
    the control standing for it, where it was made from it. None where it was not measured."""
    context_baseline: float | None
    """The same of the baseline, the control standing for it, where it was made from it."""


class Excluded(BaseModel):
    """A matched-loss control that counts as not existing."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    control: str
    reason: str


class Verdict(BaseModel):
    """What can be said about the robustness of one arm."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    arm: str
    baseline: str
    verdict: Literal["more_robust", "less_robust", "equivalent", "inconclusive", "not_concluded"]
    equivalent: bool | None
    """Every 90 % interval lies inside ± the margin; None without a margin. May hold beside more or less robust."""
    possible_masking: bool
    weak_on_both: bool
    attacks: list[str]
    """Whose worst case for each document is taken."""
    against: list[Against]
    excluded: list[Excluded]
    below_floor: str | None
    """Why what was measured is too little for a verdict; None where it is enough."""
    unread: str | None
    """Why less harm is no robustness: who is harmed less hardly reads what is attacked, or nobody measured whether it
    does. None where that is not so."""
    clean_difference: float | None
    """Of the arm and the baseline, a − b: the larger of that on clean text and that on the attacked documents."""
    margin: float | None
    """δ, nats per scored token."""
    detectable: float | None
    """The smallest remainder that would probably have been found against every control: 2.8·se of the widest."""
    n: int
    num_seeds: int
    scope: str
    sentence: str


def decide(
    arm: str,
    baseline: str,
    seeds: Seeds,
    margin: float | None,
    masking: Masking,
    floors: Floors = Floors(),
) -> tuple[Verdict, list[Decomposition]]:
    """Return the verdict on an arm, and the decompositions of the primary gap that it rests on.

    Args:
        arm: the arm that is asked about.
        baseline: the arm without a constraint.
        seeds: evidence of all arms, by seed.
        margin: δ, half width of equivalence, nats per scored token; None: not known.
        masking: of the arm.
        floors: what must have been measured at least.
    """
    usable, excluded = find_controls(arm, baseline, seeds)
    clean = clean_difference(arm, baseline, seeds)
    # without a control the baseline is its own, if its clean loss is near enough
    own = [Control(baseline, None, "baseline")] if clean is not None and abs(clean) <= MAX_CLEAN_DIFFERENCE else []
    controls = usable or own
    columns = {name: _columns(name, seeds) for name in dict.fromkeys((baseline, arm, *(c.name for c in controls)))}
    gaps = [remainder(Pair(arm, baseline, WORST, c.name, c.in_place_of), columns) for c in controls]
    against = [_against(c, gap, columns, seeds) for c, gap in zip(controls, gaps, strict=True) if gap.total is not None]
    word, equivalent = judge([entry.remainder for entry in against], margin)
    below = _below(floors, gaps[0].n, list(columns), seeds) if against else None
    unread = _unread(arm, baseline, against, seeds) if word in ("more_robust", "less_robust") and not below else None
    if below or unread:
        word, equivalent = "not_concluded", None
    detectables = [entry.remainder.detectable for entry in against if entry.remainder.detectable is not None]
    verdict = Verdict(
        arm=arm,
        baseline=baseline,
        verdict=word,
        equivalent=equivalent,
        possible_masking=masking.label == "possible masking",
        weak_on_both=masking.weak_on_both,
        attacks=[" ".join(key) for key in members(seeds[0][arm])],
        against=against,
        excluded=excluded,
        below_floor=below,
        unread=unread,
        clean_difference=clean,
        margin=margin,
        detectable=max(detectables, default=None),
        n=gaps[0].n if gaps else 0,
        num_seeds=len(seeds),
        scope="these two models only" if len(seeds) == 1 else "seeds and documents",
        sentence="",
    )
    text = _sentence(verdict, bool(gaps), {seed[arm].order for seed in seeds})
    return verdict.model_copy(update={"sentence": text}), gaps if usable else []


class Control(NamedTuple):
    """A control that counts: how it was made, and whom from."""

    name: str
    by: str | None
    in_place_of: Literal["baseline", "arm"]


def find_controls(arm: str, baseline: str, seeds: Seeds) -> tuple[list[Control], list[Excluded]]:
    """Return the controls of an arm that exist in every seed, and those that do not count."""
    usable, excluded = [], []
    for name, evidence in seeds[0].items():
        matched = evidence.matched or {}
        if matched.get("above"):  # worse than what it is told from, so no control of that
            continue
        side: Literal["baseline", "arm"]
        start = matched.get("start", baseline)
        if matched.get("to") == arm and start == baseline:
            side = "baseline"
        elif matched.get("to") == arm:
            excluded.append(Excluded(control=name, reason=f"it was made from {start}, which is neither of the two"))
            continue
        elif matched.get("to") == baseline and start == arm:
            side = "arm"
        else:
            continue
        reasons = [_why_not(of_seed[name]) for of_seed in seeds]
        if reason := next(filter(None, reasons), None):
            excluded.append(Excluded(control=name, reason=reason))
        else:
            usable.append(Control(name, str(matched.get("by")), side))
    return usable, excluded


def _why_not(evidence: Evidence) -> str | None:
    matched = evidence.matched or {}
    reached, target = matched.get("reached"), matched.get("target")
    if not matched.get("reachable"):
        return f"not reachable: {matched.get('reason') or 'no reason is known'}"
    if reached is None or target is None:
        return "its clean loss, or the one to be met, is not a finite number"
    if not abs(reached - target) <= MATCHED:
        return f"its clean loss is {reached:.4f} for the {target:.4f} to be met, more than {MATCHED} apart"
    if not evidence.attacks.get(WORST):
        return "it was not attacked"
    if not changes(evidence.attacks[WORST]):
        return "no attacked document has figures"
    return None


def _below(floors: Floors, num_documents: int, arms: Sequence[str], seeds: Seeds) -> str | None:
    if num_documents < floors.documents:
        return f"{num_documents} documents have figures on all sides, and {floors.documents} are needed"
    for arm in arms:
        spent = min(_spent(of_seed[arm]) for of_seed in seeds)
        if spent < floors.spent_tokens:
            return (
                f"no search on {arm} spent more than {spent:,.0f} tokens a document, and {floors.spent_tokens:,} are "
                "needed"
            )
    return None


def _spent(evidence: Evidence) -> float:
    """Return the tokens a document of the search that spent most; random edits search nothing."""
    searches = [evidence.attacks[key] for key in members(evidence) if key[0] != "random_edits"]
    return max((sum(row["spent_tokens"] for row in rows) / len(rows) for rows in searches), default=0.0)


def _sides(control: str, in_place_of: str, arm: str, baseline: str) -> tuple[str, str]:
    """Return who stands for the arm and for the baseline."""
    return (arm, control) if in_place_of == "baseline" else (control, baseline)


def _unread(arm: str, baseline: str, against: Sequence[Against], seeds: Seeds) -> str | None:
    """Say where the side that is harmed less is not known to read a share of what the other reads, in any seed."""
    for entry in against:
        less, more = _sides(entry.control, entry.in_place_of, arm, baseline)[:: _direction(entry.remainder)]
        for of_seed in seeds:
            uses = context_uses((less, more), [of_seed])
            if not uses:
                return f"{less} is harmed less than {more}, and what both read of what is attacked was not measured"
            if not uses[less] >= READS * uses[more]:
                return (
                    f"{less} is harmed less, but hardly reads what is attacked: another document's in its place costs "
                    f"it {uses[less]:.3f} nats per scored token, and {more} {uses[more]:.3f}; at least {READS:.0%} of "
                    "that are needed"
                )
    return None


def context_uses(arms: Sequence[str], seeds: Seeds) -> dict[str, float]:
    """Return what arms lose, nats per scored token, when all that may be attacked is exchanged for another document's.

    Empty where that was not measured on documents that all of them share.
    """
    found = tables({arm: [changes(of_seed[arm].exchanged) for of_seed in seeds] for arm in arms})
    if not found.documents:
        return {}
    return {arm: float(found.x[arm].sum() / found.n[arm].sum()) for arm in arms}


def clean_difference(arm: str, baseline: str, seeds: Seeds) -> float | None:
    """Return the larger difference of clean losses, arm − baseline: on clean text, or on the attacked documents."""
    found = []
    for columns in (
        {name: [clean_text_losses(s[name].clean) for s in seeds] for name in (arm, baseline)},
        {name: [clean_losses(s[name].attacks.get(WORST, ())) for s in seeds] for name in (arm, baseline)},
    ):
        common = tables(columns)
        if common.documents:
            found.append(ratio_estimate(common.x[arm] - common.x[baseline], common.n[baseline]).value)
    return max(found, key=abs, default=None)


def judge(
    remainders: Sequence[Term], margin: float | None
) -> tuple[Literal["more_robust", "less_robust", "equivalent", "inconclusive", "not_concluded"], bool | None]:
    """Return the word that all remainders allow, and whether they lie inside the margin of equivalence.

    More or less robust: every 95 % interval is beyond 0 on the same side, and no difference is rounding; equivalent:
    every 90 % interval is inside ± the margin.
    """
    if not remainders:
        return "not_concluded", None
    equivalent = None if margin is None else all(_is_inside(term, margin) for term in remainders)
    directions = {_direction(term) for term in remainders}
    if directions == {1}:
        return "more_robust", equivalent
    if directions == {-1}:
        return "less_robust", equivalent
    return ("equivalent" if equivalent else "inconclusive"), equivalent


def _direction(term: Term) -> int:
    if term.ci95 is None or abs(term.value) <= RESOLUTION:
        return 0
    low, high = term.ci95
    return 1 if low > 0 else -1 if high < 0 else 0


def _is_inside(term: Term, margin: float) -> bool:
    return term.ci90 is not None and -margin <= term.ci90[0] and term.ci90[1] <= margin


def _columns(arm: str, seeds: Seeds) -> list[Column]:
    return [changes(of_seed[arm].attacks.get(WORST, ())) for of_seed in seeds]


def _against(control: Control, gap: Decomposition, columns: Mapping[str, Sequence[Column]], seeds: Seeds) -> Against:
    found = tables(columns)
    documents = found.documents

    def clean(arm: str) -> float:
        losses = [clean_losses(of_seed[arm].attacks[WORST]) for of_seed in seeds]
        return sum(of_seed[d][0] for of_seed in losses for d in documents) / float(found.n[arm].sum())

    names = (control.name, gap.arm, gap.baseline)
    delta = {arm: float(found.x[arm].sum() / found.n[arm].sum()) for arm in names}
    arm, baseline = _sides(control.name, control.in_place_of, gap.arm, gap.baseline)
    uses = context_uses((arm, baseline), seeds)
    return Against(
        control=control.name,
        by=control.by,
        in_place_of=control.in_place_of,
        delta_control=delta[control.name],
        delta_arm=delta[gap.arm],
        delta_baseline=delta[gap.baseline],
        remainder=gap.parts[1],
        clean_difference=clean(arm) - clean(baseline),
        context_arm=uses.get(arm),
        context_baseline=uses.get(baseline),
    )


# --- in words --------------------------------------------------------------------------------------------------------


def _sentence(v: Verdict, attempted: bool, orders: set[str | None]) -> str:
    parts = [_not_concluded(v, attempted) if v.verdict == "not_concluded" else f"{_claim(v)}: {_figures(v)}"]
    if v.verdict in ("more_robust", "less_robust") and v.equivalent:
        parts.append(f"The difference lies within the margin of ±{v.margin:.3f} for equivalence")
    if v.verdict == "inconclusive" and v.detectable is not None:
        parts.append(f"A difference of {v.detectable:.3f} would probably have been found")
    if v.excluded and v.verdict != "not_concluded":
        parts.append(f"Controls that do not count: {_excluded(v)}")
    if v.verdict != "not_concluded" and v.possible_masking:
        parts.append(f"Possible masking: gradients mislead attacks on {v.arm} more than on {v.baseline}")
    if v.verdict != "not_concluded" and v.weak_on_both:
        parts.append("Gradient attacks are weak on both, so this rests on the ensemble")
    if v.verdict != "not_concluded":
        parts += [f"{text} ({v.arm})" for order, text in CAVEATS.items() if order in orders]
    return ". ".join(parts) + "."


def _claim(v: Verdict) -> str:
    loss = "at matched clean loss" if v.against[0].by else f"at clean losses that differ by {v.clean_difference:+.3f}"
    match v.verdict:
        case "equivalent":
            return f"{v.arm} and {v.baseline} are equivalent in robustness {loss}, within ±{v.margin:.3f}"
        case "inconclusive":
            return f"It is open whether {v.arm} is more or less robust than {v.baseline} {loss}"
    return f"{v.arm} is {v.verdict.replace('_', ' ')} than {v.baseline} {loss}"


def _figures(v: Verdict) -> str:
    deltas = [_beside(entry, v.baseline) for entry in v.against]
    models = f"{v.scope}; " if v.num_seeds == 1 else f"{v.num_seeds} seeds; "
    detectable = f"; detectable {v.detectable:.3f}" if v.detectable is not None else ""
    return (
        f"the worst of {len(v.attacks)} attacks on each document raises the loss by {v.against[0].delta_arm:.3f} nats "
        f"per scored token, against {', '.join(deltas)} ({models}{v.n} documents{detectable})"
    )


def _beside(entry: Against, baseline: str) -> str:
    text = f"{entry.delta_control:.3f} of {entry.control}"
    if entry.in_place_of == "arm":  # the arm made as bad as the baseline
        text = f"{entry.delta_baseline:.3f} of {baseline}, which moves {entry.control} by {entry.delta_control:.3f}"
    return f"{text} ({_with_interval(entry.remainder)})"


def _with_interval(term: Term) -> str:
    ends = "" if term.ci95 is None else f" [{term.ci95[0]:+.3f}, {term.ci95[1]:+.3f}]"
    return f"remainder {term.value:+.3f}{ends}"


def _not_concluded(v: Verdict, attempted: bool) -> str:
    text = f"No verdict on the robustness of {v.arm} against {v.baseline}: "
    if v.below_floor:
        return text + v.below_floor
    if v.unread:
        return text + v.unread
    if attempted:
        return text + "no document has figures under every attack on all sides"
    if v.clean_difference is None:
        return text + "their clean losses were not compared"
    text += (
        f"their clean losses differ by {v.clean_difference:+.3f} nats per token (more than {MAX_CLEAN_DIFFERENCE}) and "
        "no matched-loss arm exists"
    )
    return f"{text} ({_excluded(v)})" if v.excluded else text


def _excluded(v: Verdict) -> str:
    return "; ".join(f"{entry.control}: {entry.reason}" for entry in v.excluded)
