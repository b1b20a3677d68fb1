"""How the nodes of a run stand, or all seeds and their summary, from records, leases and attempts; needs no torch."""

import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from isotone import records
from isotone.config import Experiment
from isotone.config_io import load_experiment
from isotone.pipeline.graph import Graph, Node
from isotone.pipeline.lease import holder
from isotone.pipeline.record import standing
from isotone.pipeline.run_directory import ExperimentDirectory, RunDirectory
from isotone.pipeline.seeds import named, planned_seeds, summary_status

_WIDTH = 100
"""Columns of a terminal that the table over seeds fits into."""

_ADVICE = {
    "partial": "run the same command again to continue",
    "waiting": "run the same command again to begin it",
    "failed": "mend the cause and run the same command again; it continues from what is saved",
    "stale": "undo the change, or redo it: isotone run … --only {node} --fresh",
    "blocked": "bring what it needs to completion first",
}


Row = dict[str, Any]


def run_status(folder: Path) -> list[Row]:
    """Return one row a node: stage, node, state (complete, running, partial, failed, stale, blocked, waiting), reason.

    Of a folder with several seeds, the rows of all, each with its ``seed``, and last the summary's, with ``seeds``.

    Raises:
        UsageError: the folder is not a run.
    """
    experiment = ExperimentDirectory(folder)
    if not (folder / "config.yaml").is_file() and (len(experiment.runs) > 1 or experiment.summary_record.is_file()):
        return _status_over_seeds(experiment)
    return _status_of(RunDirectory.find(folder))


def _status_of(run: RunDirectory) -> list[Row]:
    experiment = load_experiment(str(run.experiment_file), [])
    graph, seed = Graph(experiment), seed_of(run)
    last = _last_attempts(run)
    return [_row(run, graph, experiment, seed, node, last.get(str(node))) for node in graph.nodes]


def _status_over_seeds(directory: ExperimentDirectory) -> list[Row]:
    rows: list[Row] = []
    for seed in planned_seeds(directory):
        if seed in directory.runs:
            rows += [{"seed": seed, **row} for row in _status_of(directory.run(seed))]
        else:
            row = {"stage": 0, "name": "setup", "node": "setup", "state": "waiting", "reason": "not begun"}
            rows.append({"seed": seed, **row})
    return [*rows, {"seed": None, "stage": None, "name": "summary", "node": "summary", **summary_status(directory)}]


def seed_of(run: RunDirectory) -> int:
    """Return the seed that a run's folder is named for."""
    return int(run.root.resolve().name.rpartition("seed-")[2])


def _last_attempts(run: RunDirectory) -> dict[str, Row]:
    return {entry["node"]: entry for entry in records.JsonLines(run.attempts).read()}


def _row(run: RunDirectory, graph: Graph, experiment: Experiment, seed: int, node: Node, last: Row | None) -> Row:
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


def format_status(rows: list[Row]) -> str:
    """Return the rows as an aligned table: one line a node, and where there are several seeds one column each."""
    if "seed" in rows[0]:
        return _format_seeds(rows)
    widths = {key: max(len(str(row[key])) for row in rows) for key in ("stage", "node", "state")}
    return "\n".join(
        f"{row['stage']:>{widths['stage']}}  {row['node']:{widths['node']}}  {row['state']:{widths['state']}}  "
        + (f"{row['seconds']:.1f} s" if "seconds" in row else row["reason"])
        for row in rows
    )


def _format_seeds(rows: list[Row]) -> str:
    """Return a table of nodes by seeds, the reasons of what is open, and how the summary stands."""
    *of_seeds, summary = rows
    seeds = list(dict.fromkeys(row["seed"] for row in of_seeds))
    cells = {(row["node"], row["seed"]): _cell(row) for row in of_seeds}
    stages = {row["node"]: row["stage"] for row in of_seeds}
    name_width = max(map(len, stages))
    width = max(len(text) for text in [*cells.values(), *(f"seed {seed}" for seed in seeds)])
    seeds_a_line = max(1, (_WIDTH - 3 - name_width) // (width + 2))
    lines = []
    for start in range(0, len(seeds), seeds_a_line):
        shown = seeds[start : start + seeds_a_line]
        lines.append(" " * (3 + name_width) + "".join(f"  {f'seed {seed}':{width}}" for seed in shown))
        for node, stage in stages.items():
            found = "".join(f"  {cells.get((node, seed), ''):{width}}" for seed in shown)
            lines.append(f"{stage:>1}  {node:{name_width}}{found}")
    lines += [line for seed in seeds for line in _open_lines(seed, [row for row in of_seeds if row["seed"] == seed])]
    reason = f" ({summary['reason']})" if summary["reason"] else ""
    return "\n".join(
        line.rstrip() for line in [*lines, f"summary over {named(summary['seeds'])}: {summary['state']}{reason}"]
    )


def _cell(row: Row) -> str:
    return f"{row['seconds']:.1f} s" if "seconds" in row else str(row["state"])


def _open_lines(seed: int, rows: Iterable[Row]) -> list[str]:
    """Name the reason of each node that is open for a cause of its own, and not for want of another."""
    found = [row for row in rows if row["state"] not in ("complete", "blocked")]
    return [f"seed {seed}: {row['node']} is {row['state']} ({row['reason']})" for row in found]


def explain_run(folder: Path, rows: list[Row]) -> str:
    """Return why a run is not complete: the first cause, then what waits for it, and what to do.

    Of a folder with several seeds, the same for each of them, and what the summary waits for.

    Args:
        folder: the run's, or runs/NAME.
        rows: how it stands.
    """
    if "seed" not in rows[0]:
        return _explanation(str(folder), rows)
    *of_seeds, summary = rows
    lines = []
    for seed in dict.fromkeys(row["seed"] for row in of_seeds):
        of_seed = [row for row in of_seeds if row["seed"] == seed]
        text = _explanation(f"seed {seed}", of_seed)
        complete = all(row["state"] == "complete" for row in of_seed)
        lines.append(text if complete else f"seed {seed}:\n{textwrap.indent(text, '  ')}")
    advice = f"; isotone summarize {folder}" if summary["state"] == "stale" else ""
    end = f"{summary['state']}: {summary['reason']}{advice}" if summary["reason"] else summary["state"]
    return "\n".join([*lines, f"the summary is {end}"])


def _explanation(name: str, rows: list[Row]) -> str:
    open_rows = [row for row in rows if row["state"] != "complete"]
    if not open_rows:
        return f"{name} is complete."
    lines = []
    for row in open_rows:
        if row["state"] != "blocked":
            advice = _ADVICE.get(row["state"], "").format(node=row["node"])
            lines.append(f"{row['node']} is {row['state']}: {row['reason']}" + (f"; {advice}" if advice else ""))
    blocked = [row for row in open_rows if row["state"] == "blocked"]
    if blocked:
        lines.append(f"waiting for that: {', '.join(row['node'] for row in blocked)}")
    gone = dict.fromkeys(row["job"]["id"] for row in blocked if row.get("job", {}).get("queue") == "GONE")
    if gone:
        lines.append(f"no longer in the queue: jobs {', '.join(gone)}; isotone submit submits them again")
    return "\n".join(lines)
