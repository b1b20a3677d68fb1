"""Submits a sweep: a setup, an array with one element a point, and the table however these end.

Submitting again while jobs run submits only the points that are neither in the queue nor at their end.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from isotone import records
from isotone.cluster import Cluster
from isotone.config import Experiment
from isotone.config_io import dump_yaml
from isotone.errors import UsageError
from isotone.pipeline.graph import Graph, Node
from isotone.pipeline.record import standing
from isotone.slurm import queue
from isotone.slurm.chain import submitted_jobs
from isotone.slurm.script import SweepJob, render
from isotone.slurm.site import load_cluster
from isotone.slurm.submission import (
    environment_of,
    for_cluster,
    one_at_a_time,
    refusal,
    require_shared_folder,
    settled_jobs,
)
from isotone.sweep.points import Point, SweepDirectory, build_points, with_seed_of_points
from isotone.sweep.standing import standing_of, sweep_status

Say = Callable[[str], None]
_FILES = {"setup": "job_0_setup.sh", "points": "job_1_points.sh", "table": "job_2_table.sh"}
SETUP, POINTS, TABLE = _FILES


def submit_sweep(experiment: Experiment, seed: int, site: str | None, out: Path, say: Say = print) -> None:
    """Submit what is neither at its end nor in the queue; the table is made last, whatever became of the points.

    Args:
        experiment: as it was given, with its sweep.
        seed: of all points.
        site: a site profile, see ``isotone.slurm.site.load_cluster``.
        out: the folder that holds all runs.
        say: where lines for the user go.

    Raises:
        UsageError: Slurm is not there or would refuse a job; then nothing was submitted.
        BlockedError: another process is submitting the same experiment.
    """
    cluster, out = load_cluster(site, experiment.cluster), out.resolve()
    require_shared_folder(out, cluster)
    directory = SweepDirectory.of(out, experiment.name)
    with one_at_a_time(out / experiment.name):
        experiment, points, jobs = _jobs(experiment, seed, cluster, out)
        queued = _queued(directory)
        _require_same_sweep(experiment, directory, queued)
        open_points = [i for i, point in enumerate(points) if not standing_of(directory, point, seed).settled]
        due = [i for i in open_points if points[i].id not in queued]
        jobs[POINTS] = replace(jobs[POINTS], due=tuple(due))
        wanted = [part for part in (SETUP, POINTS) if part not in queued] if due else []
        wanted = [part for part in wanted if part != SETUP or not _is_set_up(directory, points[0], seed)]
        if wanted or queued or not _is_written(directory):
            wanted.append(TABLE)
        if refused := [line for part in wanted if (line := refusal(jobs[part], cluster))]:
            raise UsageError("\n".join([*refused, "nothing was submitted"]))
        directory.keep(experiment)
        records.make_folder(directory.jobs)
        records.write_text(_experiment_of_jobs(directory), dump_yaml(experiment))
        replaced = queued.pop(TABLE, None)
        for part in wanted:
            records.make_folder(jobs[part].log_folder)
            records.write_text(jobs[part].file, render(jobs[part], cluster))
            _submit(directory, jobs[part], queued)
        if replaced:  # only now: had Slurm refused a job, the table of those before it would have been lost
            queue.cancel([replaced])
    for part in (SETUP, TABLE):
        say(f"{jobs[part].job_name}: {f'job {queued[part]}' if part in queued else 'complete'}")
    for point in points:
        say(f"{point.id}: {f'job {queued[point.id]}' if point.id in queued else 'at its end'}")


def show_sweep(experiment: Experiment, seed: int, site: str | None, out: Path, say: Say = print) -> None:
    """Print the scripts and what Slurm says of them; nothing is written or submitted."""
    cluster = load_cluster(site, experiment.cluster)
    _, points, jobs = _jobs(experiment, seed, cluster, out.resolve())
    for job in jobs.values():
        job = replace(job, due=tuple(range(len(points))))
        say(f"\n===== {job.file} =====\n{render(job, cluster)}")
        try:
            say(f"sbatch --test-only: {refusal(job, cluster) or 'would be accepted'}")
        except UsageError as error:
            say(f"sbatch --test-only: not asked ({error})")


def cancel_sweep(name: str, out: Path, say: Say = print) -> None:
    """Take the jobs of a sweep out of the queue; what they have saved stays."""
    directory = SweepDirectory.of(out.resolve(), name)
    with one_at_a_time(out.resolve() / name):
        ids = sorted(set(_queued(directory).values()))
        if ids:
            queue.cancel(ids)
    say(f"cancelled: {', '.join(ids) or 'nothing was in the queue'}")


def _jobs(
    experiment: Experiment, seed: int, cluster: Cluster, out: Path
) -> tuple[Experiment, list[Point], dict[str, SweepJob]]:
    """Return the experiment as its jobs read it, the points that can begin, and the jobs by part."""
    experiment = with_seed_of_points(for_cluster(experiment, cluster), seed)
    points = [point for point in build_points(experiment, seed) if point.experiment]
    if not points:
        raise UsageError(f"experiment {experiment.name}: every point of its sweep is refused; isotone sweep --dry-run")
    directory = SweepDirectory.of(out, experiment.name)
    stages = {SETUP: "setup", POINTS: POINTS, TABLE: "aggregate"}
    jobs = {
        part: SweepJob(
            name=experiment.name,
            seed=seed,
            stage=stage,
            number=number,
            file=directory.jobs / _FILES[part],
            log_folder=directory.root / "logs",
            runs=out,
            project=Path.cwd(),
            python=cluster.python or sys.executable,
            is_shared=False,
            points=tuple(point.id for point in points),
        )
        for number, (part, stage) in enumerate(stages.items())
    }
    return experiment, points, jobs


def _queued(directory: SweepDirectory) -> dict[str, str]:
    """Return the last job of each part and point, as far as it is in the queue and can still start."""
    last = {line["stage"]: line["job_id"] for line in submitted_jobs(directory.jobs).read()}
    found = settled_jobs(list(last.values()))
    waiting = {job for job, state in found.items() if state.reason != "DependencyNeverSatisfied"}
    return {part: job_id for part, job_id in last.items() if job_id in waiting}


def _is_written(directory: SweepDirectory) -> bool:
    return directory.table.is_file() and sweep_status(directory)[-1]["state"] == "complete"


def _is_set_up(directory: SweepDirectory, point: Point, seed: int) -> bool:
    run = directory.run(point, seed)
    if point.experiment is None or not run.config.is_file():
        return False
    return standing(run, Graph(point.experiment), point.experiment, seed, Node("setup")).state == "complete"


def _experiment_of_jobs(directory: SweepDirectory) -> Path:
    """Return the experiment that jobs read: their own, as the sweep's follows whoever runs it beside them."""
    return directory.jobs / "experiment.yaml"


def _require_same_sweep(experiment: Experiment, directory: SweepDirectory, queued: Mapping[str, str]) -> None:
    """Refuse to change what jobs in the queue are about to read.

    Raises:
        UsageError: the sweep differs from the one that they were submitted with.
    """
    file = _experiment_of_jobs(directory)
    if queued and file.is_file() and file.read_text(encoding="utf-8") != dump_yaml(experiment):
        raise UsageError(
            f"{file}: job {next(iter(queued.values()))} is in the queue with other values of the experiment; take it "
            f"back with --cancel first, or submit under another name or --out"
        )


def _submit(directory: SweepDirectory, job: SweepJob, queued: dict[str, str]) -> None:
    """Submit one job; ``queued`` gains its id, or its elements' by point."""
    after: Sequence[str] = ()
    if job.part == POINTS:
        after = [queued[SETUP]] if SETUP in queued else []
    elif job.part == TABLE:
        after = list(dict.fromkeys(job_id.partition("_")[0] for job_id in queued.values()))  # of an array all elements
    job_id = queue.submit(job.file, after, environment_of(job), however=job.part == TABLE)
    ids = {job.points[i]: f"{job_id}_{i}" for i in job.due} if job.is_array else {job.part: job_id}
    log = submitted_jobs(directory.jobs)
    log.append(
        *({"stage": part, "job_id": each, "time": time.time(), "after": list(after)} for part, each in ids.items())
    )
    queued |= ids
