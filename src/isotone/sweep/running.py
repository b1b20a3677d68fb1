"""Runs the points of a sweep one after the other, over one setup, and writes down what was found and chosen."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from isotone import records
from isotone.config import Experiment
from isotone.errors import BlockedError, IsotoneError, Stopped
from isotone.interruption import StopFlag
from isotone.pipeline.graph import Node
from isotone.pipeline.run_directory import RunDirectory
from isotone.pipeline.runner import Request, run_nodes
from isotone.sweep.points import Point, SweepDirectory, build_points, with_seed_of_points
from isotone.sweep.standing import standing_of
from isotone.sweep.writing import write_results
from isotone.training.budget import Budget

SETUP, TABLE = "setup", "table"
"""Parts of a sweep that ``only`` may name beside a point."""


@dataclass
class Sweeping:
    """What ``isotone sweep`` was asked for.

    Attributes:
        experiment: with its sweep.
        seed: of all points.
        out: the folder that holds all runs.
        only: a point's id, ``setup`` or ``table``: this part alone.
        max_minutes: stop, with everything saved, after so many minutes.
    """

    experiment: Experiment
    seed: int
    out: Path
    only: str | None = None
    max_minutes: float | None = None


def run_sweep(request: Sweeping, stop: StopFlag, say: Callable[[str], None] = print) -> SweepDirectory:
    """Bring every point to its end, or those that are asked for, and write what was found.

    A point that does not fit, or whose training fails, is told with its reason and does not keep the others from their
    end; the same command tries it again.

    Args:
        request: what was asked for.
        stop: read wherever a point can stop safely.
        say: where lines for the user go.

    Raises:
        Stopped: a part was saved; run again to continue.
        BlockedError: points are not at their end: another process works on them.
        UsageError: the experiment has no sweep, or its model or data cannot be used.
    """
    seed = request.seed
    experiment = with_seed_of_points(request.experiment, seed)
    points, directory = build_points(experiment, seed), SweepDirectory.of(request.out, experiment.name)
    chosen = _chosen(points, request.only)
    if request.only in (None, TABLE) or not directory.experiment_file.is_file():
        directory.keep(experiment)  # but a part, such as an element's, leaves what a later sweep has written
    if request.only != TABLE:
        _set_up(directory, points, seed, stop, say)
    budget = Budget(None, request.max_minutes)
    for point in chosen:
        stop.check(f"the sweep, before point {point.id},")
        _run_point(directory.run(point, seed), point, seed, stop, say, budget)
    if request.only in (None, TABLE):
        with records.locked(directory.root / ".table.lock"):
            write_results(directory, experiment, points, say)
    _require_settled(directory, points if request.only == TABLE else chosen, seed)
    return directory


def _chosen(points: Sequence[Point], only: str | None) -> list[Point]:
    if only in (SETUP, TABLE):
        return []
    found = [point for point in points if only in (None, point.id)]
    if not found:
        raise IsotoneError(f"--only {only}: the sweep has no such point; isotone sweep EXPERIMENT --dry-run lists them")
    return found


def _set_up(
    directory: SweepDirectory, points: Sequence[Point], seed: int, stop: StopFlag, say: Callable[[str], None]
) -> None:
    """Pack the data once; the record that one point has of it is every point's, as they lie in one folder."""
    runs = {point.id: directory.run(point, seed) for point in points if point.experiment}
    first = next((point for point in points if point.experiment), None)
    if first is None or first.experiment is None:
        return
    run_nodes(Request(first.experiment, runs[first.id], seed, only=SETUP), stop, say)
    with records.locked(directory.root / ".setup.lock"):
        record = runs[first.id].record(Node(SETUP)).read_bytes()
        for run in runs.values():
            if not run.record(Node(SETUP)).is_file():
                records.write_bytes(run.record(Node(SETUP)), record)


def _run_point(
    run: RunDirectory, point: Point, seed: int, stop: StopFlag, say: Callable[[str], None], budget: Budget
) -> None:
    settings = ", ".join(f"{key} {value}" for key, value in point.settings.items())
    say(f"point {point.id} ({settings or 'as it is'})")
    if point.experiment is None:
        say(f"{point.id}: refused: {point.refused}")
        return
    try:
        run_nodes(Request(point.experiment, run, seed), stop, say, budget)
    except Stopped:
        raise
    except IsotoneError as error:  # the attempt is written down with its reason, where standing_of reads it
        say(f"{point.id}: {error}")


def _require_settled(directory: SweepDirectory, points: Sequence[Point], seed: int) -> None:
    found = {point.id: standing_of(directory, point, seed) for point in points}
    if waiting := [f"{name} is {now.state}: {now.reason}" for name, now in found.items() if not now.settled]:
        raise BlockedError("\n".join([*waiting, "run the same command again when nothing else works on them"]))
