"""Signs that an arm hides its gradients rather than resisting attacks (1802.00420, 1902.06705), against the baseline.

An index is a number that grows where gradients mislead an attack. It is compared with the baseline's own, paired by
document: flagged if arm − baseline is above 0 at one-sided 95 %. What could not be measured is listed with its reason:
it never counts as the absence of masking.

Shapes: S seeds, D documents.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict
from scipy import stats

from isotone.comparisons import Row
from isotone.evidence import WORST, AttackKey, Column, Evidence, Seeds, changes, tables
from isotone.statistics import Estimate, linearized_estimate

WITH_GRADIENT: tuple[AttackKey, ...] = (("hotflip", "iterative"), ("hotflip", "beam"), ("gcg", "top_k"))
GRADIENT_FREE: AttackKey = ("coordinate", "random")
PER_TOKEN = "nats per scored token"
ONCE, ITERATIVE = ("hotflip", "once"), ("hotflip", "iterative")


class Index(BaseModel):
    """One index of an arm, beside the baseline's own."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    name: str
    meaning: str
    unit: str
    measured: bool
    reason: str | None
    """Why it was not measured."""
    value_arm: float | None = None
    value_baseline: float | None = None
    difference: float | None = None
    """Arm − baseline."""
    ci90: tuple[float, float] | None = None
    """Of the difference; its lower end is the one-sided 95 % bound."""
    flagged: bool = False
    """The lower bound is above 0."""
    relative_difference: float | None = None
    """The same, each arm's index as a share of the worst case of its attacks; None for an index without a unit."""
    relative_ci90: tuple[float, float] | None = None
    explained_by_size: bool = False
    """Flagged, but not as such a share: that attacks move the arm less may be all there is to it."""
    weak_on_both: bool = False
    """The baseline's own index is above 0 at one-sided 95 %: gradient attacks are weak on both."""
    n: int = 0
    num_seeds: int = 0


class Masking(BaseModel):
    """All indices of an arm, and what they come to."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    label: Literal["possible masking", "none flagged", "not measured"]
    weak_on_both: bool
    """On the baseline itself an index is positive: gradient attacks are weak, and claims rest on the ensemble."""
    indices: list[Index]
    sentence: str


@dataclass(frozen=True)
class _Definition:
    """An index: ``column`` says what a document adds to it, or why there is nothing (a text).

    ``weakness`` is what must be positive on the baseline for gradient attacks to be weak on both.
    """

    name: str
    meaning: str
    unit: str
    column: Callable[[Evidence, str], Column | str]
    weakness: Callable[[Evidence, str], Column | str]


def diagnose(arm: str, baseline: str, seeds: Seeds, primary: AttackKey) -> Masking:
    """Return every index of an arm against the baseline.

    Args:
        arm: the arm that is asked about.
        baseline: the arm that it is compared with.
        seeds: evidence of all arms, by seed.
        primary: the attack whose edits are transferred.
    """
    indices = [_index(d, arm, baseline, seeds) for d in _definitions(primary, _tried(seeds))]
    flagged = [index.name for index in indices if index.flagged]
    measured = [index for index in indices if index.measured]
    label: Literal["possible masking", "none flagged", "not measured"] = (
        "possible masking" if flagged else "none flagged" if measured else "not measured"
    )
    weak = any(index.weak_on_both for index in indices)
    return Masking(label=label, weak_on_both=weak, indices=indices, sentence=_sentence(arm, baseline, indices))


def _sentence(arm: str, baseline: str, indices: Sequence[Index]) -> str:
    measured = [index for index in indices if index.measured]
    flagged = [index.name for index in measured if index.flagged]
    weak = [index.name for index in measured if index.weak_on_both]
    absent = [f"{index.name} ({index.reason})" for index in indices if not index.measured]
    parts = []
    if flagged:
        parts.append(f"Possible masking in {arm}: above {baseline} in {', '.join(flagged)}")
        if small := [index.name for index in measured if index.explained_by_size]:
            parts.append(
                f"not so as a share of what attacks do to each arm in {', '.join(small)}, where the smaller effect "
                "of all attacks may be the reason"
            )
    elif measured:
        names = ", ".join(index.name for index in measured)
        parts.append(f"{arm} is not shown to be above {baseline} in what was measured of masking: {names}")
    else:
        parts.append(f"Masking of {arm} was not measured")
    if weak:
        parts.append(f"gradient attacks are weak on both ({', '.join(weak)}), so claims rest on the ensemble")
    if absent:
        parts.append(f"not measured: {', '.join(absent)}")
    return "; ".join(parts) + "."


def _index(definition: _Definition, arm: str, baseline: str, seeds: Seeds) -> Index:
    head = {"name": definition.name, "meaning": definition.meaning, "unit": definition.unit}

    def absent(reason: str) -> Index:
        return Index(**head, measured=False, reason=reason)  # type: ignore[arg-type]

    columns: dict[str, list[Column]] = {arm: [], baseline: [], "weakness": []}
    for of_seed in seeds:
        for name, other in ((arm, baseline), (baseline, arm)):
            found = definition.column(of_seed[name], other)
            if isinstance(found, str):
                return absent(f"{name}: {found}")
            columns[name].append(found)
        weakness = definition.weakness(of_seed[baseline], arm)
        assert not isinstance(weakness, str)  # it reads what the index reads
        columns["weakness"].append(weakness)
    found_tables = tables(columns)
    if not found_tables.documents:
        return absent("no document has figures on both sides in every seed")
    x, n = found_tables.x, found_tables.n
    if any(n[name].sum() <= 0 for name in (arm, baseline)):
        return absent("no edit at all raises the loss of an arm, so nothing can be missed")
    of_arm, of_baseline = _influence(x[arm], n[arm]), _influence(x[baseline], n[baseline])
    ones = np.ones_like(x[arm])
    value = of_arm[0] - of_baseline[0]
    difference = linearized_estimate(value, of_arm[1] - of_baseline[1], ones)
    own = linearized_estimate(*_influence(x["weakness"], n["weakness"]), ones)
    relative = _relative(definition, arm, baseline, seeds, columns)
    flagged = _is_positive(difference)
    return Index(
        **head,  # type: ignore[arg-type]
        measured=True,
        reason=None,
        value_arm=of_arm[0],
        value_baseline=of_baseline[0],
        difference=value,
        ci90=difference.ci90,
        flagged=flagged,
        relative_difference=None if relative is None else relative.value,
        relative_ci90=None if relative is None else relative.ci90,
        explained_by_size=flagged and relative is not None and not _is_positive(relative),
        weak_on_both=_is_positive(own),
        n=difference.num_documents,
        num_seeds=difference.num_seeds,
    )


def _relative(
    definition: _Definition, arm: str, baseline: str, seeds: Seeds, columns: Mapping[str, Sequence[Column]]
) -> Estimate | None:
    """Return the difference of indices in nats as shares of each arm's own worst case.

    Such an index shrinks with all that attacks do: of a model that is merely less confident, one that is negative (a
    step finds less than a search) comes nearer to 0, and so above the baseline's.
    """
    if definition.unit != PER_TOKEN:
        return None
    worst = {name: [changes(s[name].attacks.get(WORST, ())) for s in seeds] for name in (arm, baseline)}
    found = tables({**{name: columns[name] for name in worst}, **{f"worst of {name}": worst[name] for name in worst}})
    sizes = {name: found.x[f"worst of {name}"] for name in worst}
    if not found.documents or any(size.sum() <= 0 for size in sizes.values()):
        return None
    of_arm, of_baseline = (_influence(found.x[name], sizes[name]) for name in (arm, baseline))
    return linearized_estimate(of_arm[0] - of_baseline[0], of_arm[1] - of_baseline[1], np.ones_like(sizes[arm]))


def _influence(x_SD: np.ndarray, n_SD: np.ndarray) -> tuple[float, np.ndarray]:
    """Return Σx/Σn and each document's influence on it; counts may differ between arms, and be 0 in a document."""
    value = float(x_SD.sum() / n_SD.sum())
    return value, (x_SD - value * n_SD) / n_SD.mean()


def _is_positive(estimate: Estimate) -> bool:
    """Say whether a value is above 0 at one-sided 95 %: the lower end of its 90 % interval is."""
    return estimate.ci90 is not None and estimate.ci90[0] > 0


# --- what a document adds to each index ------------------------------------------------------------------------------


def _tried(seeds: Seeds) -> str:
    """Return what probes took for all tokens of a position: a sample of the vocabulary is named as such."""
    rows = [row for of_seed in seeds for found in of_seed.values() for row in found.probes if row["status"] == "ok"]
    fewest = min((row["tried"] for row in rows if row["tried"] < row["admissible"]), default=None)
    return "all tokens" if fewest is None else f"{fewest:,} random tokens"


def _definitions(primary: AttackKey, tried: str) -> tuple[_Definition, ...]:
    def transferred(evidence: Evidence, other: str) -> Column | str:
        return transferred_minus_own(evidence, other, primary)

    return (
        _Definition(
            "gradient-free", "gradient-free minus best gradient attack, equal budget", PER_TOKEN, *_twice(_free)
        ),
        _Definition("transfer", "edits found on the other arm minus its own edits", PER_TOKEN, *_twice(transferred)),
        _Definition("first order", "minus rank correlation of first-order and true change", "1", *_twice(_rank)),
        _Definition(
            "oracle", f"regret of gradient candidates to {tried} at a position", "share of gain", _regret, _luck
        ),
        _Definition("one step", "one-shot minus iterative HotFlip", PER_TOKEN, *_twice(_once)),
    )


def _twice(
    column: Callable[[Evidence, str], Column | str],
) -> tuple[Callable[[Evidence, str], Column | str], Callable[[Evidence, str], Column | str]]:
    return column, column


def _free(evidence: Evidence, other: str) -> Column | str:
    return gradient_free_minus_gradient(evidence)


def gradient_free_minus_gradient(evidence: Evidence) -> Column | str:
    """Return what the gradient-free search found beyond the best gradient attack, both at the smaller of their budgets.

    The best gradient attack is the one with the largest mean change on this arm: choosing it on the same documents can
    make the index smaller only.
    """
    free = evidence.attacks.get(GRADIENT_FREE)
    if not free:
        return "the attack coordinate was not made"
    by_gradient = [_at_equal_budget(free, evidence.attacks[k]) for k in WITH_GRADIENT if evidence.attacks.get(k)]
    if not any(by_gradient):
        return "no gradient attack with a budget was made"

    def strength(found: Mapping[str, tuple[float, float, float]]) -> float:
        return sum(gradient for _, gradient, _ in found.values()) / max(1.0, sum(n for *_, n in found.values()))

    best = max((found for found in by_gradient if found), key=strength)
    return {d: (without - gradient, n) for d, (without, gradient, n) in best.items()}


def _at_equal_budget(free: Sequence[Row], by_gradient: Sequence[Row]) -> dict[str, tuple[float, float, float]]:
    """Return by document: change without and with gradients at the smaller budget, and the number of scored tokens."""
    others = {row["id"]: row for row in by_gradient if row["status"] == "ok"}
    found = {}
    for row in free:
        if row["status"] == "ok" and row["id"] in others:
            other = others[row["id"]]
            budget = min(row["spent_tokens"], other["spent_tokens"])
            values = change_within(row, budget), change_within(other, budget)
            if values[0] is not None and values[1] is not None:
                found[row["id"]] = (values[0], values[1], float(row["scored_tokens"]))
    return found


def change_within(row: Row, budget: float) -> float | None:
    """Return the change that an attack had found when it had spent a budget; None where its course is not known."""
    if row["spent_tokens"] <= budget:
        return float(row["delta_nats"])
    if "progress" not in row:
        return None
    seen = [nats for spent, nats in row["progress"] if spent <= budget]
    return float(seen[-1] - math.fsum(row["clean_nll"])) if seen else 0.0


def transferred_minus_own(evidence: Evidence, source: str, attack: AttackKey) -> Column | str:
    """Return what edits found on another arm do to this one beyond its own."""
    rows = [r for r in evidence.transferred if r["source"] == source and (r["attack"], r["variant"]) == attack]
    if not rows:
        return f"the edits of {source} were not replayed on it"
    if not evidence.attacks.get(attack):
        return f"the attack {' '.join(attack)} was not made"
    own, moved = changes(evidence.attacks[attack]), changes(rows)
    return {d: (moved[d][0] - own[d][0], own[d][1]) for d in own if d in moved}


def _rank(evidence: Evidence, other: str) -> Column | str:
    return minus_rank_correlation(evidence.probes)


def minus_rank_correlation(probes: Sequence[Row]) -> Column | str:
    """Return minus Spearman's correlation of what the gradient predicts and what an edit does, over random edits.

    A gradient that says the same of every edit predicts nothing: its correlation counts as 0.
    """
    if not probes:
        return "the probe was not made"
    return {
        row["id"]: (-rank_correlation(row["first_order"], row["true"]), 1.0) for row in probes if row["status"] == "ok"
    }


def rank_correlation(a_E: Sequence[float], b_E: Sequence[float]) -> float:
    """Return Spearman's correlation; 0 where one side does not vary."""
    ranks = [stats.rankdata(values) for values in (a_E, b_E)]
    a, b = (r - r.mean() for r in ranks)
    norm = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / norm if norm else 0.0


def _regret(evidence: Evidence, other: str) -> Column | str:
    return _oracle(evidence, "oracle", "gradient")


def _luck(evidence: Evidence, other: str) -> Column | str:
    """Return what equally many random candidates find beyond those of the gradient: a regret is never below 0."""
    return _oracle(evidence, "random", "gradient")


def _oracle(evidence: Evidence, better: str, worse: str) -> Column | str:
    """Return the difference of two gains and the oracle's gain: the index is a share of what there was to gain.

    A token can be left as it is, so no gain is below 0.
    """
    if not evidence.probes:
        return "the probe was not made"
    found = {row["id"]: row["oracle"] for row in evidence.probes if row["status"] == "ok"}
    gains = {d: {name: max(0.0, change) for name, change in of_row.items()} for d, of_row in found.items()}
    return {d: (gain[better] - gain[worse], gain["oracle"]) for d, gain in gains.items()}


def _once(evidence: Evidence, other: str) -> Column | str:
    return once_minus_iterative(evidence)


def once_minus_iterative(evidence: Evidence) -> Column | str:
    """Return what one step found beyond the iterative search."""
    for attack in (ONCE, ITERATIVE):
        if not evidence.attacks.get(attack):
            return f"attacks.hotflip.methods lacks {attack[1]}"
    once, iterative = (changes(evidence.attacks[attack]) for attack in (ONCE, ITERATIVE))
    return {d: (once[d][0] - iterative[d][0], once[d][1]) for d in once if d in iterative}
