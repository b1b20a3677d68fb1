"""Submits an experiment as a chain of jobs, takes it back, and shows what would be submitted.

Submitting again while jobs run submits only what is neither in the queue nor done.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from isotone import records
from isotone.cluster import LIGHT_STAGES, Cluster, Resources, duration_s
from isotone.config import Experiment
from isotone.config_io import dump_yaml
from isotone.errors import BlockedError, UsageError
from isotone.pipeline.graph import Graph
from isotone.planning.plan import make_plan
from isotone.planning.table import unsafe_lines
from isotone.slurm import queue
from isotone.slurm.chain import Key, Link, build_chain, submitted_jobs
from isotone.slurm.script import JobScript, asked_for, render
from isotone.slurm.site import load_cluster

Say = Callable[[str], None]
_ENDS_WITHIN_S = 120
"""How long a job may be ending: KillWait, an epilog."""

_LOCAL_TYPES = {"tmpfs", "ramfs", "overlay", "devtmpfs"}
_LOCAL_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")
_HINTS = {
    "account": "set cluster.account",
    "partition": "set cluster.partition (sinfo lists them)",
    "time limit": "set a shorter cluster.time, or another cluster.partition",
    "qos": "set cluster.qos",
    "memory": "ask for less: cluster.memory",
    "gres": "set cluster.gpus or cluster.gres as sinfo -o %G shows them",
    "node configuration": "ask for less: cluster.memory, cpus, gpus or nodes",
    "feature": "set cluster.constraint",
    "cpu count": "ask for less: cluster.cpus",
}
"""What to change, by a word in what Slurm says."""


def submit_experiment(experiment: Experiment, site: str | None, seeds: list[int], out: Path, say: Say = print) -> None:
    """Submit what is neither complete nor in the queue; what the plan holds unsafe is named first.

    Args:
        experiment: as it was given.
        site: a site profile, see ``isotone.slurm.site.load_cluster``.
        seeds: of the runs.
        out: the folder that holds all runs.
        say: where lines for the user go.

    Raises:
        UsageError: Slurm is not there or would refuse a job; then nothing was submitted. Or it refused one after
            others were submitted: those are named.
        BlockedError: another process is submitting the same experiment.
    """
    cluster, out = load_cluster(site, experiment.cluster), out.resolve()
    require_shared_folder(out, cluster)
    _tell_unsafe(experiment, site, seeds, out, say)
    with one_at_a_time(out / experiment.name):
        experiment = for_cluster(experiment, cluster)
        links = build_chain(experiment, cluster, seeds, out)
        ids, dropped = _kept(links)
        _require_same_experiment(experiment, links, ids)
        open_links = [link for link in links if not link.is_complete and link.key not in ids]
        if refused := [line for link in open_links if (line := refusal(link.job, cluster))]:
            raise UsageError("\n".join([*refused, "nothing was submitted"]))
        if dropped:
            queue.cancel(dropped)
        _write_scripts(experiment, cluster, links)
        _submit(open_links, ids)
    for link in links:
        _tell(link, ids, say)


def show_experiment(experiment: Experiment, site: str | None, seeds: list[int], out: Path, say: Say = print) -> None:
    """Print the graph of jobs, their scripts and what Slurm says of them; nothing is written or submitted."""
    cluster = load_cluster(site, experiment.cluster)
    experiment = for_cluster(experiment, cluster)
    links = build_chain(experiment, cluster, seeds, out.resolve())
    names = {link.key: link.job.job_name for link in links}
    width = max(map(len, names.values()))
    for link in links:
        after = ", ".join(names[key] for key in link.needs)
        state = "complete" if link.is_complete else f"after {after}" if after else "starts at once"
        say(f"{link.job.job_name:{width}}  {state}")
    for link in links:
        say(f"\n===== {link.job.file} =====")
        say(render(link.job, cluster))
        try:
            say(f"sbatch --test-only: {refusal(link.job, cluster) or 'would be accepted'}")
        except UsageError as error:
            say(f"sbatch --test-only: not asked ({error})")
    say("")
    _tell_unsafe(experiment, site, seeds, out, say)


def cancel_experiment(name: str, seeds: list[int], out: Path, say: Say = print) -> None:
    """Take the jobs of an experiment out of the queue; what they have saved stays.

    Args:
        name: the experiment's.
        seeds: whose jobs; of all seeds, and the summary's, where none is given.
        out: the folder that holds all runs.
        say: where lines for the user go.

    Raises:
        UsageError: Slurm is not there.
        BlockedError: another process is submitting the same experiment.
    """
    folder = out.resolve() / name
    with one_at_a_time(folder):
        chosen = [folder / f"seed-{seed}" for seed in seeds] or [*folder.glob("seed-*"), folder / "summary"]
        submitted = [line["job_id"] for place in chosen for line in submitted_jobs(place / "jobs").read()]
        ids = [job_id for job_id, job in queue.states(submitted).items() if job.name.startswith(f"{name}-")]
        if ids:
            queue.cancel(ids)
    say(f"cancelled: {', '.join(ids) or 'nothing was in the queue'}")


def for_cluster(experiment: Experiment, cluster: Cluster) -> Experiment:
    """Return the experiment with the device and threads that its jobs will have, where it leaves them open.

    Stages run on different nodes, some side by side: none of them must decide for all.

    Raises:
        UsageError: some stages ask for a GPU and others do not, and the experiment does not say which device it wants.
    """
    stages = [stage for stage in Graph(experiment).stages if stage not in LIGHT_STAGES]
    asked = {stage: cluster.resources(stage) for stage in stages}
    runtime = experiment.runtime
    without = [stage for stage, resources in asked.items() if not _asks_for_gpu(resources)]
    if runtime.device == "auto" and len(without) < len(asked):
        if without:
            raise UsageError(
                f"cluster.stages.{without[0]}: asks for no GPU, and other stages do, but one device serves them all; "
                f"give it one (gpus: 1), or say which device is meant: runtime.device"
            )
        runtime = runtime.model_copy(update={"device": "cuda"})
    cpus = [resources.cpus for resources in asked.values() if resources.cpus]
    if runtime.threads is None and cpus:
        runtime = runtime.model_copy(update={"threads": min(cpus)})
    return experiment.model_copy(update={"runtime": runtime})


def require_shared_folder(out: Path, cluster: Cluster) -> None:
    """Refuse a folder that other nodes cannot see.

    Raises:
        UsageError: it lies on this node's own disk or memory, and the partition has several nodes.
    """
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    place = next((parent for parent in (out, *out.parents) if parent in mounts), None)
    named = [os.environ[name] for name in ("TMPDIR", "SLURM_TMPDIR") if os.environ.get(name)]
    local = next((folder for folder in (*_LOCAL_FOLDERS, *named) if out.is_relative_to(folder)), None)
    if local is None and (place is None or mounts[place] not in _LOCAL_TYPES):
        return
    if (queue.num_nodes(cluster.partition) or 1) > 1:
        where = local or f"{place} ({mounts[place] if place else ''})"
        raise UsageError(
            f"--out {out}: {where} belongs to this node alone, the jobs' nodes do not see it; choose a folder on a "
            f"shared file system, such as one below $SCRATCH"
        )


def _tell_unsafe(experiment: Experiment, site: str | None, seeds: list[int], out: Path, say: Say) -> None:
    """Name what does not fit by the plan; Slurm decides, and a stage that needs longer goes on under the same id."""
    try:
        lines = unsafe_lines(make_plan(experiment, site, out, seeds))
    except UsageError as error:
        lines = [f"not planned: {error}"]
    for line in lines:
        say(line)


def _asks_for_gpu(resources: Resources) -> bool:
    return bool(resources.gpus) or (resources.gres or "").startswith("gpu")


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Let no other process submit the same experiment meanwhile.

    Raises:
        BlockedError: one does.
    """
    records.make_folder(folder)
    try:
        with FileLock(folder / ".submit.lock", timeout=0):
            yield
    except Timeout as error:
        raise BlockedError(f"another process is submitting {folder.name} right now; wait for it") from error


def _kept(links: list[Link]) -> tuple[dict[Key, str], list[str]]:
    """Return the ids of the jobs that go on, and those that wait for something that is no longer so.

    A job goes on if it is in the queue, can still start, and waits for the very jobs that go on (and, as a summary, for
    the same seeds). One that is ending is waited for: it goes on if it comes back into the queue.
    """
    last = {link.key: found for link in links if (found := link.last)}
    queued = settled_jobs([found["job_id"] for found in last.values()])
    kept: dict[Key, str] = {}
    dropped: list[str] = []
    for link in links:
        found = last.get(link.key)
        job = queued.get(found["job_id"]) if found else None
        if found is None or job is None or job.name != link.job.job_name:
            continue
        complete = {other.key for other in links if other.is_complete}
        waits = all(key in complete or kept.get(key) in found["after"] for key in link.needs)
        fits = waits and tuple(found.get("seeds", ())) == link.job.seeds and job.reason != "DependencyNeverSatisfied"
        if link.is_complete:
            continue
        if fits:
            kept[link.key] = found["job_id"]
        else:
            dropped.append(found["job_id"])
    return kept, dropped


def settled_jobs(job_ids: list[str]) -> dict[str, queue.JobState]:
    """Return the jobs that are in the queue, once none of them is ending: some of those come back into it."""
    for _ in range(_ENDS_WITHIN_S // 2):
        queued = queue.states(job_ids)
        if not any(job.state == "COMPLETING" for job in queued.values()):
            break
        time.sleep(2)
    return queued


def _require_same_experiment(experiment: Experiment, links: list[Link], ids: dict[Key, str]) -> None:
    """Refuse to change what jobs in the queue are about to read.

    Raises:
        UsageError: the experiment differs from the one that they were submitted with.
    """
    text = dump_yaml(experiment)
    for link in links:
        file = link.job.file.parent / "experiment.yaml"
        if link.key in ids and file.is_file() and file.read_text(encoding="utf-8") != text:
            raise UsageError(
                f"{file}: job {ids[link.key]} is in the queue with other values of the experiment; take it back with "
                f"--cancel first, or submit under another name or --out"
            )


def refusal(job: JobScript, cluster: Cluster) -> str | None:
    """Say why a job could not run as it is asked for, by its limits and by what Slurm says of its script; or None."""
    lead, limit = duration_s(cluster.lead_time), asked_for(job, cluster).time
    if limit and duration_s(limit) <= 2 * lead:
        return (
            f"{job.stage}: its limit of {limit} leaves no time before the signal to save (cluster.lead_time "
            f"{cluster.lead_time}); set a longer cluster.time or a shorter cluster.lead_time"
        )
    longest = queue.longest_time(asked_for(job, cluster).partition)
    if limit and longest and duration_s(limit) > duration_s(longest):
        return (
            f"{job.stage}: its limit of {limit} is over the partition's longest, {longest}; set a shorter "
            f"cluster.time (the stage continues under the same job), or another cluster.partition"
        )
    said = queue.refusal(render(job, cluster), environment_of(job))
    if said is None:
        return None
    hint = next((hint for word, hint in _HINTS.items() if word in said.lower()), "change cluster in the experiment")
    return f"{job.stage}: sbatch refuses: {said}; {hint} (or the site profile)"


def environment_of(job: JobScript) -> dict[str, str]:
    """Return the environment that a job is submitted with."""
    return {**os.environ, "EXPERIMENT_SEED": str(job.seed)}


def _write_scripts(experiment: Experiment, cluster: Cluster, links: list[Link]) -> None:
    text = dump_yaml(experiment)
    for link in links:
        records.make_folder(link.job.log_folder)
        records.write_text(link.job.file, render(link.job, cluster))
        if link.job.stage == "setup":
            records.write_text(link.job.file.parent / "experiment.yaml", text)


def _submit(links: list[Link], ids: dict[Key, str]) -> None:
    """Submit jobs in order; ``ids`` gains theirs."""
    fresh: list[str] = []
    for link in links:
        after = [ids[key] for key in link.needs if key in ids]
        try:
            job_id = queue.submit(link.job.file, after, environment_of(link.job))
        except UsageError as error:
            done = (
                f"submitted before: {', '.join(fresh)}; take them back with --cancel"
                if fresh
                else "nothing was submitted"
            )
            raise UsageError(f"{link.job.job_name}: {error}; {done}") from error
        found = {"stage": link.job.stage, "job_id": job_id, "time": time.time(), "after": after}
        link.submitted.append({**found, "seeds": link.job.seeds})
        ids[link.key] = job_id
        fresh.append(job_id)


def _tell(link: Link, ids: dict[Key, str], say: Say) -> None:
    state = f"job {ids[link.key]}" if link.key in ids else "complete"
    say(f"{link.job.job_name}: {state}")
