"""What a sweep found: each point's validation loss beside the best baseline's, and the choice. Reads nothing else."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from isotone import records
from isotone.comparisons import Quantity, compare, evaluation_quantities
from isotone.config import Experiment
from isotone.pipeline.graph import Node
from isotone.result_models import Ratio, SweepResults, SweptPoint
from isotone.sweep.points import BASELINE, Point, SweepDirectory, seed_of_points
from isotone.sweep.standing import PointStanding, found_by, standing_of


def build_results(directory: SweepDirectory, experiment: Experiment, points: Sequence[Point]) -> SweepResults:
    """Return what the points of a sweep found, and which were chosen.

    Chosen is, for each arm, the complete point with the lowest loss on all validation documents; of equal ones the
    first. Nothing is chosen while a point is open, or an arm has none that can be.
    """
    seed = seed_of_points(experiment)
    standings = {point.id: standing_of(directory, point, seed) for point in points}
    swept = {point.id: _swept(directory, point, standings[point.id], seed) for point in points}
    best = {arm: _best([swept[p.id] for p in points if p.arm == arm]) for arm in dict.fromkeys(p.arm for p in points)}
    if baseline := best.get(BASELINE):
        reference = _nll(directory, next(p for p in points if p.id == baseline.id), seed)
        for point in points:
            if swept[point.id].nll is not None:
                ratio = _ratio(_nll(directory, point, seed), reference)
                swept[point.id] = swept[point.id].model_copy(update={"ratio": ratio})
    settled = all(now.settled for now in standings.values())
    return SweepResults(
        experiment=experiment.name,
        seed=seed,
        checkpoint=experiment.attacks.checkpoint,
        points=list(swept.values()),
        chosen={arm: found.id for arm, found in best.items() if found} if settled else {},
        searched=dict(Counter(point.arm for point in swept.values() if point.state == "complete")),
        notes=_notes(list(swept.values()), settled, best),
        found=found_by(directory, points, standings, seed),
    )


def _swept(directory: SweepDirectory, point: Point, now: PointStanding, seed: int) -> SweptPoint:
    found = SweptPoint(id=point.id, arm=point.arm, settings=point.settings, state=now.state, reason=now.reason)
    if now.state != "complete":
        return found
    result = records.read_json(directory.run(point, seed).node_result(Node("evaluate", point.arm)))
    nll, perplexity = (result[name] and result[name]["value"] for name in ("nll", "perplexity"))
    values: dict[str, Any] = {"nll": nll, "perplexity": perplexity}
    if missing := result["missing"]:
        values["reason"] = f"no finite loss on {len(missing)} documents: cannot be chosen"
    certificate = result.get("certificate")
    return found.model_copy(update=values | {"certificate": certificate and certificate["verdict"]})


def _best(points: Sequence[SweptPoint]) -> SweptPoint | None:
    usable = [point for point in points if point.nll is not None and not point.reason]
    return min(usable, key=lambda point: point.nll or 0.0, default=None)


def _nll(directory: SweepDirectory, point: Point, seed: int) -> Quantity:
    rows = records.JsonLines(directory.run(point, seed).documents(Node("evaluate", point.arm))).read()
    return evaluation_quantities(rows)[0]


def _ratio(of_point: Quantity, of_baseline: Quantity) -> Ratio | None:
    entry = compare(("point", [of_point]), (BASELINE, [of_baseline]))
    if entry is None or entry["difference"] > 690:
        return None
    ends = entry["ci95"] and [math.exp(min(end, 690)) for end in entry["ci95"]]
    return Ratio(value=math.exp(entry["difference"]), ci95=ends, n=entry["n"])


def _at_an_end(chosen: SweptPoint, points: Sequence[SweptPoint]) -> list[str]:
    """Say of which numbers the chosen one is the smallest or largest that was tried: the best may lie beyond."""
    notes = []
    for axis, value in chosen.settings.items():
        tried = [p.settings[axis] for p in points if p.arm == chosen.arm and p.state in ("complete", "diverged")]
        if not all(isinstance(one, int | float) and not isinstance(one, bool) for one in tried) or len(set(tried)) < 2:
            continue
        if value in (ends := {min(tried): "smallest", max(tried): "largest"}):
            notes.append(
                f"{chosen.arm}: {axis} {value} is the {ends[value]} that was tried; the best may lie beyond, if it can."
            )
    return notes


def _notes(points: Sequence[SweptPoint], settled: bool, best: dict[str, SweptPoint | None]) -> list[str]:
    notes = ["Chosen on validation text, so the chosen points' figures here are too good; best.yaml measures anew."]
    counts = Counter(point.arm for point in points if point.state == "complete")
    for arm in best:
        if arm != BASELINE and counts[arm] > counts[BASELINE]:
            notes.append(
                f"Unequal searches: {arm} has {counts[arm]} complete points and the baseline {counts[BASELINE]}; give "
                f"sweep.arms.baseline more values, or two values of training.lr between which it can be filled in."
            )
    if settled:
        notes += [note for found in best.values() if found for note in _at_an_end(found, points)]
    if diverged := sum(point.state == "diverged" for point in points):
        notes.append(f"{diverged} points diverged: their loss became not finite, and they cannot be chosen.")
    if failed := sum(point.state == "failed" for point in points):
        notes.append(f"{failed} points failed, and nothing is known of them; the same command tries them again.")
    if not settled:
        notes.append("Points are open: nothing is chosen yet, and best.yaml is not written.")
    elif lacking := [arm for arm, found in best.items() if found is None]:
        notes.append(f"No point of {', '.join(lacking)} can be chosen: best.yaml is not written.")
    return notes
