"""How a run, or all seeds of an experiment, stand, with what the queue and our own records say of their jobs."""

from pathlib import Path
from typing import Any

from isotone.errors import UsageError
from isotone.pipeline.run_directory import RunDirectory
from isotone.pipeline.status import run_status
from isotone.slurm import queue
from isotone.slurm.chain import submitted_jobs
from isotone.slurm.outcome import REQUEUE, REQUEUED, job_log
from isotone.sweep.points import SweepDirectory
from isotone.sweep.standing import sweep_status

Row = dict[str, Any]


def status_with_jobs(folder: Path) -> list[Row]:
    """Return the rows of ``isotone.pipeline.status.run_status``; those of a stage that was submitted have a ``job``.

    A job is ``id``, ``queue`` (its state in the queue, or GONE; None where Slurm does not answer), ``requeues``, and
    ``ended``: why it ended, None where it was requeued or has not ended by itself. It is told in ``reason``, too.

    Raises:
        UsageError: the folder is no run.
    """
    if directory := SweepDirectory.find(folder):
        rows, places = sweep_status(directory), [directory.jobs]
        places *= len(rows)
        notes = {directory.jobs: _notes_of_sweep(directory, rows)}
    else:
        rows = run_status(folder)
        places = [_jobs_folder(folder, row) for row in rows]
        notes = {place: _notes(place) for place in dict.fromkeys(places)}
    queued = _queued({note["id"] for of_place in notes.values() for note in of_place.values()})
    found = []
    for row, place in zip(rows, places, strict=True):
        note = notes[place].get(row["name"])
        if note is None or row["state"] == "complete":
            found.append(row)
            continue
        state = None if queued is None else queued.get(note["id"])
        job = note | {"queue": None if queued is None else f"{state.state} ({state.reason})" if state else "GONE"}
        reason = "; ".join(filter(None, (row["reason"], describe_job(job))))
        found.append(row | {"job": job, "reason": reason})
    return found


def describe_job(job: Row) -> str:
    """Return one clause on a job: its id, where it stands, and why it ended."""
    clauses = [f"job {job['id']}"]
    if job["queue"] == "GONE" and job["ended"] is None:
        clauses.append(
            f"no longer in the queue: cancelled, by somebody or with a job that it waited for, or failed before "
            f"isotone began (its log, *-{job['id']}.out, says so)"
        )
    elif job["queue"] not in (None, "GONE"):
        clauses.append(job["queue"])
    if "held" in (job["queue"] or "").lower():
        clauses.append(f"Slurm holds it: scontrol release {job['id']} lets it go on")
    if job["requeues"]:
        clauses.append(f"requeued {job['requeues']} times")
    if job["ended"]:
        clauses.append(job["ended"])
    return ", ".join(clauses)


def _jobs_folder(folder: Path, row: Row) -> Path:
    """Return the folder of the scripts that a row's job was submitted from."""
    if "seed" not in row:
        return RunDirectory.find(folder).jobs
    if row["seed"] is None:
        return folder / "summary" / "jobs"
    return RunDirectory(folder / f"seed-{row['seed']}").jobs


def _notes(place: Path) -> dict[str, Row]:
    """Return the last job of each stage, and what became of it, from our own records."""
    notes = _submitted(place)
    for end in job_log(RunDirectory(place.parent)).read():
        _note_end(notes.get(end["stage"]), end)
    return notes


def _notes_of_sweep(directory: SweepDirectory, rows: list[Row]) -> dict[str, Row]:
    """Return the same of the parts and points of a sweep: what became of a point's job stands in the point's run."""
    notes = _submitted(directory.jobs)
    for row in rows:
        for end in job_log(RunDirectory(directory.root / row["folder"])).read():
            _note_end(notes.get(row["name"]), end)
    return notes


def _submitted(place: Path) -> dict[str, Row]:
    lines = submitted_jobs(place).read()
    return {line["stage"]: {"id": line["job_id"], "requeues": 0, "ended": None} for line in lines}


def _note_end(note: Row | None, end: Row) -> None:
    if note is not None and end["job_id"] == note["id"]:
        requeued = end["code"] in (REQUEUE, REQUEUED)
        note |= {"requeues": note["requeues"] + requeued, "ended": None if requeued else end["reason"]}


def _queued(job_ids: set[str]) -> dict[str, queue.JobState] | None:
    try:
        return queue.states(job_ids)
    except UsageError:
        return None
