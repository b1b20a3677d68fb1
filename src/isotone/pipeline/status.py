"""How the nodes of a run stand, from its own records, leases and attempts; needs no torch."""

from pathlib import Path
from typing import Any

from isotone import records
from isotone.config import Experiment
from isotone.config_io import load_experiment
from isotone.pipeline.graph import Graph, Node
from isotone.pipeline.lease import holder
from isotone.pipeline.record import standing
from isotone.pipeline.run_directory import RunDirectory

_ADVICE = {
    "partial": "run the same command again to continue",
    "waiting": "run the same command again to begin it",
    "failed": "mend the cause and run the same command again; it continues from what is saved",
    "stale": "undo the change, or redo the stage with --only STAGE --fresh",
    "blocked": "bring what it needs to completion first",
}


def run_status(folder: Path) -> list[dict[str, Any]]:
    """Return one row a node: stage, node, state (complete, running, partial, failed, stale, blocked, waiting), reason.

    Raises:
        UsageError: the folder is not a run.
    """
    run = RunDirectory.find(folder)
    experiment = load_experiment(str(run.config), [])
    graph, seed = Graph(experiment), seed_of(run)
    last = _last_attempts(run)
    return [_row(run, graph, experiment, seed, node, last.get(str(node))) for node in graph.nodes]


def seed_of(run: RunDirectory) -> int:
    """Return the seed that a run's folder is named for."""
    return int(run.root.resolve().name.removeprefix("seed-"))


def _last_attempts(run: RunDirectory) -> dict[str, dict[str, Any]]:
    return {entry["node"]: entry for entry in records.JsonLines(run.attempts).read()}


def _row(
    run: RunDirectory, graph: Graph, experiment: Experiment, seed: int, node: Node, last: dict[str, Any] | None
) -> dict[str, Any]:
    stage = graph.stage_of(node)
    row = {"stage": graph.stage_number(node), "name": stage, "node": str(node), "state": "", "reason": ""}
    now = standing(run, graph, experiment, seed, node)
    waiting_for = [n for n in graph.needs[node] if standing(run, graph, experiment, seed, n).state != "complete"]
    if now.state == "complete":
        seconds = records.read_json(run.record(node))["provenance"]["seconds"]
        row |= {"state": "complete", "seconds": round(seconds, 1)}
    elif at_work := holder(run.lease(node)):
        row |= {"state": "running", "reason": f"process {at_work['pid']} on {at_work['host']}"}
    elif now.state == "stale":
        row |= {"state": "stale", "reason": now.reason}
    elif last and last["outcome"] in ("partial", "started"):
        row |= {"state": "partial", "reason": last.get("reason") or "its process was killed"}
    elif last and last["outcome"] == "failed":
        row |= {"state": "failed", "reason": last["reason"]}
    elif waiting_for:
        row |= {"state": "blocked", "reason": "needs " + ", ".join(map(str, waiting_for))}
    else:
        row |= {"state": "waiting", "reason": "not begun"}
    return row


def format_status(rows: list[dict[str, Any]]) -> str:
    """Return the rows as an aligned table."""
    widths = {key: max(len(str(row[key])) for row in rows) for key in ("stage", "node", "state")}
    return "\n".join(
        f"{row['stage']:>{widths['stage']}}  {row['node']:{widths['node']}}  {row['state']:{widths['state']}}  "
        + (f"{row['seconds']:.1f} s" if "seconds" in row else row["reason"])
        for row in rows
    )


def explain_run(folder: Path) -> str:
    """Return why a run is not complete: the first cause, then what waits for it, and what to do."""
    rows = run_status(folder)
    open_rows = [row for row in rows if row["state"] != "complete"]
    if not open_rows:
        return f"{folder} is complete."
    lines = []
    for row in open_rows:
        if row["state"] != "blocked":
            advice = _ADVICE.get(row["state"])
            lines.append(f"{row['node']} is {row['state']}: {row['reason']}" + (f"; {advice}" if advice else ""))
    blocked = [row["node"] for row in open_rows if row["state"] == "blocked"]
    if blocked:
        lines.append(f"waiting for that: {', '.join(blocked)}")
    return "\n".join(lines)
