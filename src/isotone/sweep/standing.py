"""How the points of a sweep stand, from the records and attempts of their runs; needs no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from isotone import records
from isotone.errors import DivergedError, UnwritableError, UsageError
from isotone.pipeline.graph import Node
from isotone.pipeline.record import outputs_hash
from isotone.pipeline.run_directory import RunDirectory
from isotone.pipeline.status import run_status
from isotone.sweep.points import Point, SweepDirectory, build_points, seed_of_points

Row = dict[str, Any]


@dataclass(frozen=True)
class PointStanding:
    """How a point stands: complete, refused, diverged (these three are ends), or as ``isotone status`` names it."""

    state: str
    reason: str = ""
    seconds: float | None = None

    @property
    def settled(self) -> bool:
        """Whether there is nothing left to do that another attempt would not do the same way."""
        return self.state in ("complete", "refused", "diverged")


def standing_of(directory: SweepDirectory, point: Point, seed: int) -> PointStanding:
    """Return how a point stands."""
    if point.experiment is None:
        return PointStanding("refused", point.refused)
    run = directory.run(point, seed)
    if not run.config.is_file():
        return PointStanding("waiting", "not begun")
    rows = run_status(run.root)
    open_rows = [row for row in rows if row["state"] not in ("complete", "blocked")]
    if not open_rows:
        return PointStanding("complete", seconds=round(sum(row["seconds"] for row in rows), 1))
    node, state, reason = (open_rows[0][key] for key in ("node", "state", "reason"))
    if state != "failed":
        return PointStanding(state, reason)
    if node == "setup":  # it is every point's, and says nothing of this one
        return PointStanding("blocked", f"needs setup, which failed: {reason}")
    return PointStanding(_failure(run, node), reason)


def _failure(run: RunDirectory, node: str) -> str:
    """Return ``refused`` or ``diverged`` where another attempt would end in the same way, else ``failed``.

    A device, a disk or a node may be the cause of anything else, which is open until it has been tried again.
    """
    last = next(entry for entry in reversed(records.JsonLines(run.attempts).read()) if entry["node"] == node)
    if last.get("exit_code") == UsageError.exit_code and last.get("error") != UnwritableError.__name__:
        return "refused"
    return "diverged" if last.get("error") == DivergedError.__name__ else "failed"


def found_by(
    directory: SweepDirectory, points: Sequence[Point], standings: Mapping[str, PointStanding], seed: int
) -> dict[str, str]:
    """Return what a table is made from: how each point ended, and the hash of what a complete one found."""

    def found(point: Point) -> str:
        state = standings[point.id].state
        complete = state == "complete"
        return outputs_hash(directory.run(point, seed), Node("evaluate", point.arm)) if complete else state

    return {point.id: found(point) for point in points}


def sweep_status(directory: SweepDirectory) -> list[Row]:
    """Return one row a point, as ``isotone.pipeline.status.run_status`` does for nodes, and last the table's."""
    experiment = directory.load()
    seed = seed_of_points(experiment)
    points = build_points(experiment, seed)
    standings = {point.id: standing_of(directory, point, seed) for point in points}
    rows = [_row(point, standings[point.id], directory.run(point, seed).root.name) for point in points]
    table: Row = {"stage": 2, "name": "table", "node": "table", "state": "waiting", "reason": "not begun"}
    table["folder"] = "."
    if directory.table.is_file():
        is_new = records.read_json(directory.table)["found"] == found_by(directory, points, standings, seed)
        table |= {"state": "complete", "reason": ""} if is_new else {"state": "stale", "reason": "points have changed"}
    elif not all(now.settled for now in standings.values()):
        table |= {"state": "blocked", "reason": "needs all points"}
    return [*_setup_row(directory, points, seed), *rows, table]


def _setup_row(directory: SweepDirectory, points: Sequence[Point], seed: int) -> list[Row]:
    """Return the row of the one setup, which the first point that can begin has made."""
    first = next((directory.run(point, seed) for point in points if point.experiment), None)
    if first is None:
        return []
    row: Row = {"stage": 0, "name": "setup", "node": "setup", "state": "waiting", "reason": "not begun"}
    return [(run_status(first.root)[0] if first.config.is_file() else row) | {"folder": first.root.name}]


def _row(point: Point, now: PointStanding, folder: str) -> Row:
    settings = ", ".join(f"{key} {value}" for key, value in point.settings.items())
    row: Row = {"stage": 1, "name": point.id, "node": point.id, "state": now.state, "settings": point.settings}
    row["folder"] = folder
    reason = "; ".join(filter(None, (now.reason, settings)))
    return row | {"reason": reason} | ({} if now.seconds is None else {"seconds": now.seconds})
