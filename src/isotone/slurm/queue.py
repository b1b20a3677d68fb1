"""Talks to Slurm through its own commands; what they say is passed on in one line."""

import os
import re
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from isotone.errors import UsageError

_TIMEOUT_S = 60


@dataclass(frozen=True)
class JobState:
    """What ``scontrol show job`` says of a job.

    Attributes:
        state: RUNNING, COMPLETING, …; a job that was cancelled or ran out of time is COMPLETING while it is ended.
        reason: such as TimeLimit or Dependency.
        is_preempted: Slurm has chosen the job to make room, and ends it after the grace time.
        name: the job's.
        restarts: how often the job was put back into the queue.
    """

    state: str
    reason: str
    is_preempted: bool = False
    name: str = ""
    restarts: int = 0

    @property
    def is_running(self) -> bool:
        """Whether it runs, and nobody has ended it."""
        return self.state == "RUNNING"

    @property
    def is_out_of_time(self) -> bool:
        """Whether its limit has come."""
        return self.reason == "TimeLimit" or self.state == "TIMEOUT"


def job_state(job_id: str) -> JobState | None:
    """Return the state of a job; None where Slurm does not know it, or does not answer."""
    try:
        shown = call("scontrol", "show", "job", job_id).stdout
    except UsageError:
        return None
    fields = dict(re.findall(r"(\w+)=(\S*)", shown))
    if "JobState" not in fields:
        return None
    preempted = fields.get("PreemptTime", "None") not in ("None", "Unknown", "N/A")
    return JobState(fields["JobState"], fields.get("Reason", ""), preempted, restarts=int(fields.get("Restarts", "0")))


def states(job_ids: Iterable[str]) -> dict[str, JobState]:
    """Return the jobs that are in the queue (pending, running, ending), of those asked for.

    Raises:
        UsageError: squeue is not there or does not answer.
    """
    wanted = set(job_ids)
    if not wanted:
        return {}
    found = {}
    # all of the user's, and not --jobs: an id that Slurm has forgotten makes squeue fail for all
    for line in _checked("squeue", "--noheader", "--me", "--array", "--format=%i|%T|%j|%r").splitlines():
        job_id, *rest = line.split("|", 3)
        if job_id in wanted and len(rest) == 3:
            found[job_id] = JobState(rest[0], rest[2], name=rest[1])
    return found


def submit(script: Path, after: Iterable[str], environment: Mapping[str, str], *, however: bool = False) -> str:
    """Submit a script that starts when other jobs have ended well (or ``however`` they end), and return its job id.

    Raises:
        UsageError: what Slurm said against it.
    """
    needed = ":".join(after)
    kind = "afterany" if however else "afterok"
    dependency = [f"--dependency={kind}:{needed}", "--kill-on-invalid-dep=yes"] if needed else []
    answer = _checked("sbatch", "--parsable", *dependency, str(script), environment=environment)
    return answer.strip().split(";")[0]


def refusal(script: str, environment: Mapping[str, str]) -> str | None:
    """Return what Slurm says against the text of a script, or None where it would take it; nothing is submitted.

    Raises:
        UsageError: sbatch is not there.
    """
    answer = call("sbatch", "--test-only", environment=environment, stdin=script)
    if answer.returncode == 0:
        return None
    lines = [line.removeprefix("sbatch: error: ") for line in answer.stderr.splitlines() if line.strip()]
    return "; ".join(dict.fromkeys(line.removeprefix("allocation failure: ") for line in lines)) or "no reason given"


def cancel(job_ids: Iterable[str]) -> None:
    """Take jobs out of the queue, whatever they are doing."""
    _checked("scancel", *job_ids)


def num_nodes(partition: str | None) -> int | None:
    """Return how many nodes a partition has (all, where none is named); None where sinfo does not answer."""
    return len({node for node, _ in _nodes_and_limits(partition)}) or None


def longest_time(partition: str | None) -> str | None:
    """Return the longest limit that a partition (the default one, where none is named) allows; None where unknown.

    sbatch takes a longer one without a word where the cluster does not enforce limits, and the job waits for ever.
    """
    limits = {limit for _, limit in _nodes_and_limits(partition, default=True)}
    return limits.pop() if len(limits) == 1 and not limits & {"infinite", "n/a"} else None


def _nodes_and_limits(partition: str | None, default: bool = False) -> list[tuple[str, str]]:
    """Return name and longest limit of every node of a partition; nothing where sinfo does not answer."""
    asked = [f"--partition={partition}"] if partition else []
    try:
        answer = call("sinfo", "--noheader", "--Node", "--format=%N %l %P", *asked)
    except UsageError:
        return []
    rows = [line.split() for line in answer.stdout.splitlines() if line.strip()]
    if default and not partition:
        rows = [row for row in rows if row[2].endswith("*")]
    return [(node, limit) for node, limit, _ in rows] if answer.returncode == 0 else []


def call(
    *command: str, environment: Mapping[str, str] | None = None, stdin: str | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run a command of Slurm, and return what it says.

    Raises:
        UsageError: it is not there, or does not answer within a minute.
    """
    if environment is None:  # what the user has set for their own squeue must hide nothing here
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("SQUEUE_", "SINFO_"))}
    try:
        return subprocess.run(
            command, input=stdin, capture_output=True, text=True, timeout=_TIMEOUT_S, env=environment, check=False
        )
    except FileNotFoundError as error:
        raise UsageError(
            f"{command[0]} is not on the PATH: this is no login node of a Slurm cluster; log in to one, or run "
            f"on this machine with isotone run"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise UsageError(f"{command[0]} did not answer within {_TIMEOUT_S} s; try again when Slurm answers") from error


def _checked(*command: str, environment: Mapping[str, str] | None = None) -> str:
    answer = call(*command, environment=environment)
    if answer.returncode != 0:
        said = " ".join(answer.stderr.split()) or f"exit code {answer.returncode}"
        raise UsageError(f"{command[0]} refused: {said}")
    return answer.stdout
