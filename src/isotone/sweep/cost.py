"""What a sweep will take: its points, which of them are refused already, and what the others cost, by the planner."""

from pathlib import Path

from isotone.config import Experiment
from isotone.planning.plan import make_plan
from isotone.planning.units import duration
from isotone.sweep.points import build_points


def format_cost(experiment: Experiment, seed: int, site: str | None = None, out: Path = Path("runs")) -> str:
    """Return the points as a table, and what all of them take, one after the other, beside one setup.

    Raises:
        UsageError: the experiment has no sweep, or model, corpus or site are not known.
    """
    lines, total, setup, unknown = [], 0.0, 0.0, False
    points = build_points(experiment, seed)
    for point in points:
        settings = ", ".join(f"{key} {value}" for key, value in point.settings.items()) or "as it is"
        if point.experiment is None:
            lines.append(f"{point.id}  refused: {point.refused}  ({settings})")
            continue
        times = [row for row in make_plan(point.experiment, site, out).rows if row.resource == "time"]
        by_stage = {row.stage: row.expected for row in times if row.stage not in ("critical path", "total")}
        setup = by_stage.pop("setup") or 0.0
        seconds = sum(expected or 0.0 for expected in by_stage.values())
        unknown |= (some := None in by_stage.values())
        total += seconds
        lines.append(f"{point.id}  {'over ' if some else ''}{duration(seconds)}  ({settings})")
    refused = sum(point.experiment is None for point in points)
    counts = ", ".join(f"{arm} {sum(p.arm == arm for p in points)}" for arm in dict.fromkeys(p.arm for p in points))
    least = "at least " if unknown else ""
    return "\n".join(
        [
            *lines,
            "",
            f"{len(points)} points ({counts}), {refused} of them refused already; others may turn out not to fit the "
            f"model when they begin",
            f"{least}{duration(setup + total)} one after the other, {duration(setup)} of it for one setup"
            + ("; rates are not known: isotone plan EXPERIMENT --measure gives them" if unknown else ""),
        ]
    )
