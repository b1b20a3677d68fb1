"""The parts of a run's page: which figures, tables and words stand where."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from isotone.report import content, figures, verdicts
from isotone.report.figures import Curve, Interval
from isotone.report.provenance import provenance_tables
from isotone.report.run_files import ATTACKS, RunFiles
from isotone.report.tables import Table
from isotone.report.transfer import transfer_tables

NUM_TEXTS = 3
"""Attacked documents on the page."""

MAX_POINTS = 500
"""Points of a training curve; longer ones are averaged over neighbouring steps."""


CLAIM = (
    "The claim, exactly: for each feed-forward network in scope, the map from the norm's output to before the "
    "residual sum is coordinatewise non-decreasing in real arithmetic with the exported weights. Nothing is "
    "claimed about a block, the model, or edits of tokens. Premise met: of the pairs of network inputs, before and "
    "after HotFlip, that differ, those that are ordered; of no other does the claim say anything."
)


FURTHER = (
    "The worst case takes, for each document, the attack on its text that raised the loss most. PGD moves embeddings: "
    "no text belongs to it, it estimates an upper bound, and it is no part of the worst case."
)


@dataclass(frozen=True)
class Figure:
    """An SVG with its caption, and the words that stand for it where it cannot be seen."""

    svg: str
    caption: str
    alt: str
    tall: bool = False


@dataclass(frozen=True)
class Section:
    """A part of the page; ``more`` are tables that are folded away."""

    id: str
    title: str
    text: Sequence[str] = ()
    statements: Sequence[str] = ()
    """Computed sentences, set apart from other text."""
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    more: Sequence[Table] = ()
    links: Sequence[tuple[str, str]] = ()
    """Relative address and words."""


def _conclusions(run: RunFiles) -> Section:
    return Section("conclusions", "What this run says", tables=[content.overview_table(run)], text=how_to_read(run))


def verdict_section(run: RunFiles) -> Section:
    """Return the part on robustness at matched loss, of one run or of several seeds."""
    tables = [verdicts.controls_table(run), verdicts.gaps_table(run), verdicts.masking_table(run)]
    return Section(
        "verdict", "Verdict", verdicts.on_masking(run), verdicts.sentences(run), tables=[t for t in tables if t.rows]
    )


def _cost(run: RunFiles) -> Section:
    found = _intervals(run, (run.measurement(arm, "perplexity") for arm in run.arms))
    plots = []
    if found:
        plots.append(
            interval_figure(
                "perplexity", found, "perplexity", "Held-out perplexity with its 95 % interval over documents"
            )
        )
    for metric, label in (("validation_nll", "Validation loss"), ("loss", "Training loss")):
        lines = _training_curves(run, metric)
        if lines:
            svg = figures.curves(metric, lines, "optimizer step", f"{label.lower()}, nats per token")
            absent = _absent(run, {line.label for line in lines})
            plots.append(Figure(svg, f"{label} by optimizer step.{absent}", f"{label} by step. {_ends(lines)}"))
    written = content.rouge_table(run)
    return Section("cost", "What it costs", figures=plots, tables=[written] if written.rows else [])


def _attacks(run: RunFiles) -> Section:
    made = [(attack, variant) for attack in run.attacks for variant in run.primary_variants(attack)]
    plots = []
    for name, attacks in (("each attack", ATTACKS), ("each further attack", run.further)):
        rows: list[Interval] = []
        for pair in (pair for pair in made if pair[0] in attacks):
            found = _intervals(run, (run.attacked(arm, "delta_nll", *pair) for arm in run.arms))
            rows += [Interval(content.attack_name(*pair)), *found] if found else []
        if rows:
            caption = f"Rise of the loss under {name}, with its 95 % interval over documents"
            plots.append(interval_figure(f"rise under {name}", rows, "Δ, nats per scored token", caption, zero=True))
    plots += [figure for pair in made for figure in _success_figure(run, *pair)]
    plots += [figure for pair in made for figure in _progress_figure(run, *pair)]
    tables = [content.attack_table(run, attack) for attack in ATTACKS if run.primary_variants(attack)]
    tables += [content.attack_table(run, *run.further)] if run.further else []
    tables += [t for t in (content.triggers_table(run), content.offsets_table(run)) if t.rows]
    more = [t for t in (content.restarts_table(run), content.published_table(run)) if t.rows]
    text = [FURTHER] if run.further else []
    return Section("attacks", "What attacks do", text=text, figures=plots, tables=tables, more=more)


def transfer_section(run: RunFiles) -> Section | None:
    """Return the part on what edits found on one arm do to others, of one run or of several seeds; None without it."""
    tables = transfer_tables(run)
    if not tables:
        return None
    text = (
        "A row is the arm on which edits or a trigger were found, a column the arm that then read them; framed: what "
        "they did to their own arm. Cells: Δ in nats per scored token, with its 95\u00a0% interval; the redder, the "
        "more harm (blue: the loss fell). Edits that harm an arm more than its own do are a sign of masking there."
    )
    return Section("transfer", "Transfer", [text], tables=tables[:1], more=tables[1:])


def _texts(run: RunFiles) -> Section:
    text = (
        f"The first {NUM_TEXTS} attacked documents by index, not chosen by outcome. Struck out: the token that was "
        "there; bold and underlined: what the attack put in its place; dotted: the gap, neither attacked nor scored; "
        "shaded: scored tokens that became harder (red) or easier (blue) to predict, fully at 3 nats."
    )
    return Section("texts", "Attacked texts", text=[text])


def _comparisons(run: RunFiles) -> Section:
    return Section(
        "comparisons",
        "Comparisons",
        tables=[content.comparisons_table(run, declared=True)],
        more=[content.comparisons_table(run, declared=False)],
    )


def _certificates(run: RunFiles) -> Section:
    return Section("certificates", "Certificates", text=[CLAIM], tables=[content.certificates_table(run)])


def _fairness(run: RunFiles) -> Section:
    return Section(
        "fairness",
        "Differences and gaps",
        tables=[t for t in (content.differences_table(run), content.missing_table(run)) if t.rows],
    )


def _provenance(run: RunFiles) -> Section:
    return Section("provenance", "Provenance", tables=provenance_tables(run))


SECTIONS: tuple[Callable[[RunFiles], Section | None], ...] = (
    _conclusions, verdict_section, _cost, _attacks, transfer_section, _texts, _comparisons, _certificates, _fairness,
    _provenance,
)  # fmt: skip
"""What makes the sections, in the order of the page."""


def how_to_read(run: RunFiles) -> list[str]:
    """Return what the figures mean, and what the certificates take back."""
    lines = [
        "Δ is the rise of the loss, in nats per scored token, that an attack causes on tokens it may not touch: the "
        "larger, the more harm. Where there is no figure the page says so; no gap is filled with a 0.",
    ]
    orders = {(run.arm(arm).get("certificate") or {}).get("order") for arm in run.arms}
    if "vacuous" in orders:
        lines.append(
            "LayerNorm leaves the feed-forward networks of this model no two ordered inputs: non-negative weights "
            "restrict no function here, so the property itself cannot make it robust; the way it is trained can."
        )
    if "basis-dependent" in orders:
        lines.append(
            "Which inputs are ordered depends on the basis of this model's residual stream, which is arbitrary: "
            "monotonicity is at most an inductive bias here."
        )
    return lines


def _intervals(run: RunFiles, measurements: Iterable[Mapping[str, Any]]) -> list[Interval]:
    return [
        Interval(arm, number, found["value"], *(found["ci95"] or (None, None)))
        for number, (arm, found) in enumerate(zip(run.arms, measurements, strict=True))
        if found.get("value") is not None
    ]


def interval_figure(name: str, found: Sequence[Interval], x_label: str, caption: str, *, zero: bool = False) -> Figure:
    """Return figures with their intervals, one a row; see ``figures.intervals``."""
    values = "; ".join(row.label if row.value is None else f"{row.label} {row.value:.3f}" for row in found)
    svg = figures.intervals(name, found, x_label, zero=zero)
    return Figure(svg, f"{caption}.", f"{caption}: {values}", tall=len(found) > 8)


def _training_curves(run: RunFiles, metric: str) -> list[Curve]:
    lines = []
    for number, arm in enumerate(run.arms):
        found = ((line["step"], _nats(line, metric)) for line in run.metrics(arm))
        points = [(step, value) for step, value in found if value is not None]
        if points:
            steps, values = zip(*_thinned(points), strict=True)
            lines.append(Curve(arm, number, steps, values, marked=metric == "validation_nll"))
    return lines


def _nats(line: dict[str, Any], metric: str) -> float | None:
    """Return a loss of text: where something is distilled, ``loss`` is what is trained on, and is not one."""
    if metric == "loss" and ("blocks" in line or "logits" in line):
        return line.get("nll")
    return line.get(metric)


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most ``MAX_POINTS`` points: means of equally many neighbours."""
    size = math.ceil(len(points) / MAX_POINTS)
    parts = (points[first : first + size] for first in range(0, len(points), size))
    return [(math.fsum(x for x, _ in part) / len(part), math.fsum(y for _, y in part) / len(part)) for part in parts]


def _success_figure(run: RunFiles, attack: str, variant: str) -> list[Figure]:
    lines, thresholds = [], {}
    for number, arm in enumerate(run.arms):
        entry = run.entry(arm, attack, variant)
        if entry.get("success_curve"):
            taus, rates = zip(*entry["success_curve"], strict=True)
            lines.append(Curve(arm, number, taus, rates))
            if entry.get("threshold") is not None:
                thresholds["τ"] = entry["threshold"]
    if not lines:
        return []
    name = content.attack_name(attack, variant)
    svg = figures.curves(
        f"success of {name}",
        lines,
        "threshold, nats per scored token",
        "share of documents above",
        steps=True,
        marks=thresholds,
        y_range=(0, 1),
    )
    absent = _absent(run, {line.label for line in lines})
    caption = (
        f"{name}: share of documents whose loss rose by more than a threshold; τ is the one in the tables.{absent}"
    )
    return [Figure(svg, caption, f"Success of {name} by threshold")]


def _progress_figure(run: RunFiles, attack: str, variant: str) -> list[Figure]:
    lines = []
    for number, arm in enumerate(run.arms):
        rounds = run.entry(arm, attack, variant).get("progress") or []
        if len(rounds) > 2:  # an attack in one shot has no course
            spent, deltas = zip(*_thinned(rounds), strict=True)
            lines.append(Curve(arm, number, spent, deltas))
    if not lines:
        return []
    name = content.attack_name(attack, variant)
    svg = figures.curves(f"course of {name}", lines, "tokens spent a document", "Δ so far, nats per scored token")
    caption = f"{name}: what the attack has reached by what it has spent.{_absent(run, {line.label for line in lines})}"
    return [Figure(svg, caption, f"Course of {name}. {_ends(lines)}")]


def _ends(lines: Iterable[Curve]) -> str:
    return "; ".join(f"{line.label} ends at {line.y[-1]:.3f}" for line in lines)


def _absent(run: RunFiles, shown: set[str]) -> str:
    absent = [arm for arm in run.arms if arm not in shown]
    return f" Not shown, as there is nothing of it: {', '.join(absent)}." if absent else ""
