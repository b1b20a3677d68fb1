"""Takes a gap between two arms apart: inserted labels, the relative bar, lost confidence, and what remains.

Every gap is the baseline's harm minus the arm's: positive where the arm is harmed less. All four are identities, so the
parts add up to the total; each has its interval over documents crossed with seeds.

Shapes: S seeds, D documents.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from isotone.comparisons import Row, first_label_of
from isotone.evidence import AttackKey, Column, tables
from isotone.statistics import DETECTABLE, Estimate, linearized_estimate, ratio_estimate

Kind = Literal["nats", "bar", "success", "remainder"]

FORMULAS: dict[Kind, str] = {
    "nats": "x̄_B − x̄_M = (λ̄_B − λ̄_M) + (ῡ_B − ῡ_M)",
    "bar": "ln[(x̄_B/c̄_B)/(x̄_M/c̄_M)] = ln(x̄_B/x̄_M) + ln(c̄_M/c̄_B)",
    "success": "S_B − S_M = (S°_B − S°_M) + rest, S° under one bar x > share·c̄_B",
    "remainder": "Δ_B − Δ_M = (Δ_B − Δ_C) + (Δ_C − Δ_M)",
}
FORMULA_FROM_ARM = "Δ_B − Δ_M = (Δ_C − Δ_M) + (Δ_B − Δ_C)"
"""Of ``remainder``, where the control was made from the arm."""


class Term(BaseModel):
    """A gap or one part of it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    name: str
    value: float
    ci95: tuple[float, float] | None
    ci90: tuple[float, float] | None
    se: float | None
    p: float | None
    detectable: float | None
    """Smallest difference that would probably have been found: 2.8·se."""
    share: float | None = None
    """Of the total; None where parts differ in sign."""


class Decomposition(BaseModel):
    """One gap between the baseline and an arm, and its parts."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    kind: Kind
    formula: str
    arm: str
    baseline: str
    control: str | None
    """The matched-loss control that ``remainder`` goes through."""
    attack: str
    variant: str
    unit: str
    total: Term | None
    """None where it is not defined; ``reason`` says why."""
    parts: list[Term]
    reason: str | None
    n: int
    """Documents with figures on both sides, in all seeds."""
    num_missing: int
    num_seeds: int
    scope: str
    """What the intervals speak about."""


@dataclass(frozen=True)
class Account:
    """The published accounting of one document, in nats over all its tokens that have a loss.

    Attributes:
        flipped: change of loss on inserted tokens, which are labels here (n·λ).
        other: change of loss on all other tokens (n·υ).
        clean: loss of the clean text (n·c).
        tokens: n.
        success: whether the change exceeded the share of the document's own clean loss that is published as a success.
    """

    flipped: float
    other: float
    clean: float
    tokens: int
    success: bool


def accounts(rows: Sequence[Row], published_success: float) -> dict[str, Account]:
    """Return the published accounting of each document, from the losses of all its tokens.

    Args:
        rows: of one attack and variant; token t's loss stands at t − 1 of context and scored losses together, and of a
            pair, whose labels nobody edits, the target's losses stand there.
        published_success: share of the clean loss.
    """
    return {row["id"]: _account(row, published_success) for row in rows if row["status"] == "ok"}


def _account(row: Row, published_success: float) -> Account:
    clean = np.array([*row["context_clean_nll"], *row["clean_nll"]])
    change = np.array([*row["context_attacked_nll"], *row["attacked_nll"]]) - clean
    first = first_label_of(row)
    flips = [position - first for position, _, _ in row["edits"] if position >= first]  # what is before is no label
    is_flip = np.isin(np.arange(len(change)), flips)
    flipped, other, loss = (math.fsum(v.tolist()) for v in (change[is_flip], change[~is_flip], clean))
    return Account(flipped, other, loss, len(change), flipped + other > published_success * loss)


@dataclass(frozen=True)
class Pair:
    """Whom a decomposition is about, and under which attack."""

    arm: str
    baseline: str
    attack: AttackKey
    control: str | None = None
    """The matched-loss arm that ``remainder`` goes through."""
    in_place_of: Literal["baseline", "arm"] = "baseline"
    """Whom the control was made from: the better of the two is brought to the loss of the other."""


OfSeeds = Sequence[Mapping[str, Account]]


def published_gaps(pair: Pair, of_baseline: OfSeeds, of_arm: OfSeeds, published_success: float) -> list[Decomposition]:
    """Return the decompositions of the published figures: in nats, of the log-ratio, and of success points.

    Args:
        pair: the arms.
        of_baseline: accounts of the baseline, one mapping a seed.
        of_arm: those of the arm.
        published_success: share of the clean loss that is a success.
    """
    gap = _Gap(pair, of_baseline, of_arm)
    if not gap.documents:
        reason = "no document has figures on both sides in every seed"
        return [gap.undefined(kind, reason) for kind in _UNITS if kind != "remainder"]
    return [_in_nats(gap), _of_the_bar(gap), _of_success(gap, published_success)]


_UNITS: dict[Kind, str] = {
    "nats": "nats per token",
    "bar": "log-ratio",
    "success": "share of documents",
    "remainder": "nats per scored token",
}


class _Gap:
    """Both arms' accounts on common documents, as arrays [S, D]."""

    def __init__(self, pair: Pair, of_baseline: OfSeeds, of_arm: OfSeeds):
        self.pair, self.num_seeds = pair, len(of_baseline)
        every = [*of_baseline, *of_arm]
        self.documents = [d for d in every[0] if all(d in found for found in every)]
        self.num_missing = len(set().union(*every)) - len(self.documents)
        self.b, self.m = (self._arrays(of_seeds) for of_seeds in (of_baseline, of_arm))
        if not np.array_equal(self.b["tokens"], self.m["tokens"]):
            raise ValueError("two arms have different numbers of tokens of the same document")
        self.n = self.b["tokens"]

    def _arrays(self, of_seeds: OfSeeds) -> dict[str, np.ndarray]:
        names = ("flipped", "other", "clean", "tokens", "success")
        found = {k: np.array([[float(getattr(s[d], k)) for d in self.documents] for s in of_seeds]) for k in names}
        return found | {"x": found["flipped"] + found["other"]}

    def undefined(self, kind: Kind, reason: str) -> Decomposition:
        return self.build(kind, None, [], reason)

    def build(self, kind: Kind, total: Term | None, parts: Sequence[Term], reason: str | None = None) -> Decomposition:
        shape = len(self.documents), self.num_missing, self.num_seeds
        return _build(kind, self.pair, total, parts, reason, *shape)


def _in_nats(gap: _Gap) -> Decomposition:
    total, flipped, other = (
        _term(name, ratio_estimate(gap.b[key] - gap.m[key], gap.n))
        for name, key in (("total", "x"), ("inserted labels", "flipped"), ("all other tokens", "other"))
    )
    return gap.build("nats", total, [flipped, other])


def _of_the_bar(gap: _Gap) -> Decomposition:
    """Return the log-ratio of relative degradations; intervals by the delta method.

    The influence of a document on ln(x̄_B/x̄_M) is x_B/x̄_B − x_M/x̄_M: the terms in n cancel, as n is the same for both.
    """
    means = {key: (gap.b[key].sum() / gap.n.sum(), gap.m[key].sum() / gap.n.sum()) for key in ("x", "clean")}
    if any(mean <= 0 for pair in means.values() for mean in pair):
        reason = "a mean is not positive, so that it has no logarithm: the attack did not raise the loss of an arm"
        return gap.undefined("bar", reason)
    (x_b, x_m), (c_b, c_m) = means["x"], means["clean"]
    of_x, of_c = gap.b["x"] / x_b - gap.m["x"] / x_m, gap.m["clean"] / c_m - gap.b["clean"] / c_b
    values = math.log(x_b / x_m), math.log(c_m / c_b)
    total, nats, bar = (
        _term(name, linearized_estimate(value, influence, gap.n))
        for name, value, influence in (
            ("total", sum(values), of_x + of_c),
            ("nats", values[0], of_x),
            ("relative bar", values[1], of_c),
        )
    )
    return gap.build("bar", total, [nats, bar])


def _of_success(gap: _Gap, published_success: float) -> Decomposition:
    """Return the gap in published success: under one bar in nats for both arms, and what the relative bar adds.

    The bar is the baseline's (each seed's own), and counts as given: intervals are over documents at this bar.
    """
    ones = np.ones_like(gap.n)
    bar_S1 = published_success * gap.b["clean"].sum(axis=1, keepdims=True) / gap.n.sum(axis=1, keepdims=True)
    under_one = {arm: (v["x"] > bar_S1 * gap.n).astype(np.float64) for arm, v in (("b", gap.b), ("m", gap.m))}
    all_SD, one_SD = gap.b["success"] - gap.m["success"], under_one["b"] - under_one["m"]
    total, one, rest = (
        _term(name, ratio_estimate(x_SD, ones))
        for name, x_SD in (("total", all_SD), ("under one bar", one_SD), ("relative bar", all_SD - one_SD))
    )
    return gap.build("success", total, [one, rest])


def remainder(pair: Pair, of_arms: Mapping[str, Sequence[Column]]) -> Decomposition:
    """Return the primary gap by way of a control: what lower confidence explains, and what remains.

    Where the control was made from the arm, which is the better one then, it is the other way round: the damage
    explains Δ_C − Δ_M, and Δ_B − Δ_C remains.

    Args:
        pair: with its control; the baseline itself may be the control, and then nothing is explained.
        of_arms: changes of loss by document, one column a seed, of all arms that are to share documents.
    """
    assert pair.control is not None
    found = tables(of_arms)
    shape = len(found.documents), found.num_missing, len(of_arms[pair.arm])
    if not found.documents:
        reason = "no document has figures on all sides in every seed"
        return _build("remainder", pair, None, [], reason, *shape)
    x, n = found.x, found.n[pair.baseline]
    to_control, from_control = (pair.baseline, pair.control), (pair.control, pair.arm)
    damage, rest = (to_control, from_control) if pair.in_place_of == "baseline" else (from_control, to_control)
    total, explained, remains = (
        _term(name, ratio_estimate(x[a] - x[b], n))
        for name, (a, b) in (("total", (pair.baseline, pair.arm)), ("matched loss", damage), ("remainder", rest))
    )
    return _build("remainder", pair, total, [explained, remains], None, *shape)


def _build(
    kind: Kind,
    pair: Pair,
    total: Term | None,
    parts: Sequence[Term],
    reason: str | None,
    n: int,
    num_missing: int,
    num_seeds: int,
) -> Decomposition:
    return Decomposition(
        kind=kind,
        formula=FORMULA_FROM_ARM if pair.in_place_of == "arm" else FORMULAS[kind],
        arm=pair.arm,
        baseline=pair.baseline,
        control=pair.control,
        attack=pair.attack[0],
        variant=pair.attack[1],
        unit=_UNITS[kind],
        total=total,
        parts=_with_shares(total, parts),
        reason=reason,
        n=n,
        num_missing=num_missing,
        num_seeds=num_seeds,
        scope="these two models only" if num_seeds == 1 else "seeds and documents",
    )


def _with_shares(total: Term | None, parts: Sequence[Term]) -> list[Term]:
    """Give each part its share of the total, unless parts differ in sign: then a percentage would mislead."""
    if total is None or not total.value or any(part.value * total.value < 0 for part in parts):
        return list(parts)
    return [part.model_copy(update={"share": part.value / total.value}) for part in parts]


def _term(name: str, estimate: Estimate) -> Term:
    return Term(
        name=name,
        value=estimate.value,
        ci95=estimate.ci95,
        ci90=estimate.ci90,
        se=estimate.se,
        p=estimate.p,
        detectable=None if estimate.se is None else DETECTABLE * estimate.se,
    )
