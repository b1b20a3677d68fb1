"""Says, after a job's process has ended, what became of its stage and whether the job is to be put back into the queue.

    python -m isotone.slurm.outcome --run RUN --stage STAGE --exit-code CODE [--signal USR1] [--max-requeues N]

Exit code 0: the stage is complete. 75: not yet, requeue the job. 76: not yet, and Slurm has requeued the job itself. 1:
give up. Every decision is written down with its reason in RUN/logs/jobs.jsonl, where ``isotone why`` finds it. Imports
no torch: a job that asks has little time left.
"""

import argparse
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from isotone import records
from isotone.cluster import POINTS
from isotone.config_io import load_experiment
from isotone.errors import IsotoneError
from isotone.pipeline.graph import Graph, Node
from isotone.pipeline.record import standing
from isotone.pipeline.run_directory import RunDirectory
from isotone.pipeline.status import seed_of
from isotone.slurm.queue import JobState, job_state

COMPLETE, REQUEUE, REQUEUED, GIVE_UP = 0, 75, 76, 1
_CONTINUES = 75
"""Exit code of a run that stopped safely."""
_KILLED = 128
"""Exit codes from here on are signals."""
_NO_PROGRESS = ("identity.json", "attempt.json")
"""Written by every start, however little it does."""


@dataclass(frozen=True)
class Decision:
    """What becomes of a job, and why.

    Attributes:
        code: COMPLETE, REQUEUE, REQUEUED (by Slurm) or GIVE_UP.
        cause: complete, or what ended the process, see ``End.cause``.
        reason: one line for the log.
        progress: hash of what the stage has durably done so far.
    """

    code: int
    cause: str
    reason: str
    progress: str


@dataclass(frozen=True)
class End:
    """How a job's process ended.

    Attributes:
        exit_code: of the process; 128 + N for signal N.
        signal: what the job's shell was sent: USR1 when the limit came near; none.
        state: what Slurm says of the job; None where it does not answer.
        job_id: the job's, where it is one.
        restarts: how often the job had been put back into the queue when it started.
        has_begun: the process has begun; srun ends with a code of its own where it could not start it.
    """

    exit_code: int
    signal: str = "none"
    state: JobState | None = None
    job_id: str | None = None
    restarts: int = 0
    has_begun: bool = True

    @property
    def is_back_in_queue(self) -> bool:
        """Whether Slurm itself has put the job back since it started, as it does when a node is lost."""
        return self.state is not None and self.state.restarts > self.restarts

    @property
    def cause(self) -> str:
        """What ended the process: failed, node lost, time limit, cancelled, preemption, stopped, not started, killed.

        Of a stage that is not complete. 0 is then srun's code for a node that it has lost, not the process's.
        """
        if self.has_begun and self.exit_code not in (0, _CONTINUES) and self.exit_code < _KILLED:
            return "failed"
        if self.state is not None and self.state.is_out_of_time:
            return "time limit"
        if self.state is not None and self.state.is_preempted:
            return "preemption"
        if self.is_back_in_queue:
            return "node lost"
        if self.state is not None and not self.state.is_running:
            return "cancelled"
        if self.signal == "USR1":
            return "time limit"
        if not self.has_begun:
            return "not started"
        return "stopped" if self.exit_code == _CONTINUES else "killed"


def decide(run: RunDirectory, stage: str, end: End, max_requeues: int) -> Decision:
    """Return what becomes of a job whose process has ended.

    A job is requeued where its process stopped safely, was killed or never began, unless somebody has cancelled it, it
    was requeued ``max_requeues`` times, or nothing was done since it was last requeued: what stands still would loop.

    Args:
        run: the run's folder.
        stage: as ``isotone run --only`` takes it.
        end: how the process ended.
        max_requeues: how often this job may requeue itself.
    """
    experiment, seed = load_experiment(str(run.experiment_file), []), seed_of(run)
    graph = Graph(experiment)
    nodes = [node for node in graph.nodes if stage == POINTS or graph.stage_of(node) == stage]
    now = progress(run, nodes)
    missing = [str(n) for n in nodes if standing(run, graph, experiment, seed, n).state != "complete"]
    if not missing:
        return Decision(COMPLETE, "complete", f"{stage} is complete", now)
    attempts = records.JsonLines(run.attempts).read()
    if stage == POINTS and end.exit_code == 0 and attempts and attempts[-1]["outcome"] == "failed":
        return Decision(COMPLETE, "complete", f"the point has ended: {attempts[-1]['reason']}", now)
    cause = end.cause
    if cause == "failed":
        return Decision(GIVE_UP, cause, f"{stage} failed with exit code {end.exit_code}: see the lines above", now)
    still = f"{', '.join(missing)} not complete yet ({cause})"
    if end.is_back_in_queue:
        return Decision(REQUEUED, cause, f"{still}: Slurm has requeued the job", now)
    if cause == "cancelled":
        return Decision(GIVE_UP, cause, "the job was cancelled; isotone submit continues it", now)
    before = [line for line in job_log(run).read() if (line["stage"], line["job_id"]) == (stage, end.job_id)]
    before = [line for line in before if line["code"] == REQUEUE]
    if len(before) >= max_requeues:
        reason = f"requeued {len(before)} times, as often as cluster.max_requeues allows; isotone submit continues it"
        return Decision(GIVE_UP, cause, reason, now)
    if before and before[-1]["progress"] == now and cause != "preemption":  # which says nothing about the job
        reason = (
            f"nothing was done between two requeues ({cause}): give the jobs of {stage} a longer cluster.time, or save "
            f"more often (training.save_every_minutes); isotone submit tries again"
        )
        return Decision(GIVE_UP, cause, reason, now)
    return Decision(REQUEUE, cause, f"{still}: the job is requeued", now)


def progress(run: RunDirectory, nodes: list[Node]) -> str:
    """Return a hash of what nodes have durably done: checkpoints, documents, states of searches, packed data."""
    found: dict[str, object] = {}
    for node in nodes:
        for place in (run.record(node), *run.found_by(node)):
            for file in [place] if place.is_file() else place.rglob("*"):
                if file.name not in _NO_PROGRESS:
                    found[run.relative(file)] = _content(file)
        if node.kind == "setup":  # shards may be many: their sizes tell enough
            found |= {run.relative(f): _size(f) for f in run.setup.rglob("*") if "leases" not in f.parts}
        if node.arm and node.kind in ("train", "constrain", "match"):
            found[str(node)] = sorted(p.name for p in run.checkpoints(node.arm).glob("step-*"))
            for ledger in run.checkpoints(node.arm).parent.glob("micro_batch.*"):  # less memory next time is progress
                found[ledger.name] = _content(ledger)
    return records.hash_json(found)


def job_log(run: RunDirectory) -> records.JsonLines:
    """Return the log of what became of a run's jobs."""
    return records.JsonLines(run.root / "logs" / "jobs.jsonl")


def _content(file: Path) -> object:
    """Return a file's size, and its hash where that is quick; None where it is just being replaced."""
    size = _size(file)
    try:
        return [size, records.sha256_file(file)] if size is not None and size <= 32 * 2**20 else size
    except OSError:
        return None


def _size(file: Path) -> int | None:
    try:
        return file.stat().st_size if file.is_file() else None
    except OSError:
        return None


def decide_summary(exit_code: int, restarts: int, max_requeues: int, what: str = "summary") -> Decision:
    """Return what becomes of the job of a summary, or of a sweep's table: it takes seconds, and is written or not."""
    if exit_code == 0:
        return Decision(COMPLETE, "complete", f"the {what} is complete", "")
    if exit_code == _CONTINUES and restarts < max_requeues:
        return Decision(REQUEUE, "stopped", f"the {what} stopped safely: the job is requeued", "")
    return Decision(GIVE_UP, "failed", f"the {what} failed with exit code {exit_code}: see the lines above", "")


def main() -> int:
    """Decide, write the decision down, print it, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--stage")
    parser.add_argument("--summary", type=Path)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--exit-code", type=int, required=True)
    parser.add_argument("--signal", default="none")
    parser.add_argument("--not-begun", action="store_true", help="srun could not start the process")
    parser.add_argument("--max-requeues", type=int, default=0)
    args = parser.parse_args()
    job_id, restarts = os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if "SLURM_ARRAY_TASK_ID" in os.environ:  # an element goes by this name in the queue
        job_id = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    run = RunDirectory(args.run or args.table or args.summary / "summary")
    what = "summary" if args.summary else "table" if args.table else None
    try:
        if what:
            decision = decide_summary(args.exit_code, restarts, args.max_requeues, what)
        else:
            state = job_state(job_id) if job_id and job_id.replace("_", "").isdigit() else None
            end = End(args.exit_code, args.signal, state, job_id, restarts, not args.not_begun)
            decision = decide(run, args.stage, end, args.max_requeues)
        line = {"stage": args.stage or what, "job_id": job_id, "restarts": restarts, "time": time.time()}
        job_log(run).append({**line, "exit_code": args.exit_code, **asdict(decision)})
    except (IsotoneError, OSError) as error:
        print(f"ERROR: {error}")
        return GIVE_UP
    print(decision.reason)
    return decision.code


if __name__ == "__main__":
    sys.exit(main())
