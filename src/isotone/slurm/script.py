"""Renders the script of one job: a pure function of the stage, the experiment and what the cluster's profile says."""

import re
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from isotone.cluster import LIGHT_STAGES, POINTS, Cluster, Resources, duration_s, one_device
from isotone.errors import UsageError

TITLES = {
    "setup": "Stage 0: gets model and data, packs the data",
    "constrain": "Stage 1: makes feed-forward weights non-negative",
    "evaluate": "Stage 4: perplexity on held-out text",
    "triggers": "Stage 5: universal adversarial triggers",
    "hotflip": "Stage 6: HotFlip",
    "gcg": "Stage 6: greedy coordinate gradient",
    "coordinate": "Stage 6: gradient-free coordinate search",
    "pgd": "Stage 6: projected gradient ascent on embeddings, an upper bound",
    "frequency": "Stage 6: random edits with tokens as frequent as in text",
    "probe": "Stage 6: how much gradients tell of what edits do",
    "transfer": "Stage 6: every arm's edits and triggers on every other arm",
    "aggregate": "Stage 7: results, conclusions, report",
    "summary": "Summary over all seeds",
}


@dataclass(frozen=True)
class JobScript:
    """What one job's script is made from.

    Attributes:
        name: the experiment's.
        seed: the run's; for a summary the first of all.
        stage: as ``isotone run --only`` takes it, or ``summary``.
        number: the stage's founding number; 8 for a summary.
        file: where the script will lie.
        log_folder: where Slurm writes what the job prints.
        runs: the folder that holds all runs, absolute.
        project: where ``isotone submit`` was called, absolute.
        python: the interpreter that runs isotone.
        seeds: of a summary.
        is_shared: False where one process does the work, also in an arm's stage: nothing is trained in it, or a
            training is repeated for a control.
    """

    name: str
    seed: int
    stage: str
    number: int
    file: Path
    log_folder: Path
    runs: Path
    project: Path
    python: str
    seeds: tuple[int, ...] = ()
    is_shared: bool = True

    @property
    def job_name(self) -> str:
        """Return the name that the queue shows."""
        seed = "" if self.stage == "summary" else f"-s{self.seed}"
        return f"{self.name}{seed}-{self.number}-{self.stage}"

    @property
    def output(self) -> str:
        """Return the name of the file that Slurm writes what the job prints to."""
        return "%x-%j.out"

    @property
    def queue_id(self) -> str:
        """Return how the running job finds its own id."""
        return "$SLURM_JOB_ID"

    @property
    def title(self) -> str:
        """Return what the job does."""
        return TITLES.get(self.stage) or f"Stage {self.number}: makes the arm {self.stage.removeprefix('train_')}"

    def command(self) -> str:
        """Return what python is to run, as shell words."""
        if self.stage == "summary":
            run = ["summarize", str(self.runs / self.name), "--seeds", *map(str, self.seeds)]
            return shlex.join(["-m", "isotone", *run])
        run = ["run", str(self.file.parent / "experiment.yaml"), "--out", str(self.runs), "--only", self.stage]
        return shlex.join(["-m", "isotone", *run]) + ' --seed "$EXPERIMENT_SEED"'

    def outcome(self) -> str:
        """Return what ``isotone.slurm.outcome`` is asked, as shell words."""
        if self.stage == "summary":
            return shlex.join(["--summary", str(self.runs / self.name)])
        run_folder = shlex.quote(str(self.runs / self.name)) + '/"seed-$EXPERIMENT_SEED"'
        return f"--run {run_folder} --stage {self.stage}"


@dataclass(frozen=True)
class SweepJob(JobScript):
    """A job of a sweep: its stage is ``setup``, ``points`` (an array, one element a point) or ``aggregate``.

    Attributes:
        points: the ids of all points that can begin, of which each element of the array runs one.
        due: the places in ``points`` of those that are to be run.
    """

    points: tuple[str, ...] = ()
    due: tuple[int, ...] = ()

    @property
    def is_array(self) -> bool:
        """Return whether it has elements."""
        return self.stage == POINTS

    @property
    def part(self) -> str:
        """Return what ``isotone sweep --only`` calls it, but for a single point."""
        return "table" if self.stage == "aggregate" else self.stage

    @property
    def job_name(self) -> str:
        """Return the name that the queue shows."""
        return f"{self.name}-sweep-s{self.seed}-{self.part}"

    @property
    def output(self) -> str:
        """Return the name of the file that Slurm writes what the job prints to."""
        return "%x-%A_%a.out" if self.is_array else "%x-%j.out"

    @property
    def queue_id(self) -> str:
        """Return how the running job finds its own id: an element is requeued by its number in the array."""
        return "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if self.is_array else "$SLURM_JOB_ID"

    @property
    def title(self) -> str:
        """Return what the job does."""
        return {"points": "Sweep: one point an element", "table": "Sweep: table and best.yaml"}.get(
            self.part, "Sweep: gets model and data, packs the data"
        )

    def command(self) -> str:
        """Return what python is to run, as shell words."""
        experiment = str(self.file.parent / "experiment.yaml")
        run = ["sweep", experiment, "--out", str(self.runs), "--seed", str(self.seed), "--only"]
        return shlex.join(["-m", "isotone", *run]) + (' "$POINT"' if self.is_array else f" {self.part}")

    def outcome(self) -> str:
        """Return what ``isotone.slurm.outcome`` is asked, as shell words."""
        folder = shlex.quote(str(self.file.parent.parent))
        if self.part == "table":
            return f"--table {folder}"
        point = "$POINT" if self.is_array else self.points[0]
        return f'--run {folder}/"{point}-seed-{self.seed}" --stage {self.stage}'


def render(job: JobScript, cluster: Cluster) -> str:
    """Return the text of a job's script.

    Raises:
        UsageError: a path has characters that sbatch cannot take.
    """
    for path in (job.file, job.log_folder, job.runs, job.project):
        if re.search(r"[\"'\\\n$`%]", str(path)):
            raise UsageError(
                f"{path}: sbatch cannot take quotes, $, %, backslashes or line breaks in a path; rename it"
            )
    return _template().render(
        title=job.title,
        name=job.name,
        seed=job.seed,
        file=shlex.quote(str(job.file)),
        job_name=job.job_name,
        options=sbatch_options(job, cluster),
        project=job.project,
        runs=job.runs,
        python=job.python,
        setup=cluster.setup,
        may_use_gpu=job.stage not in LIGHT_STAGES,
        command=f'"$PYTHON" {job.command()}',
        outcome=f"{job.outcome()} --max-requeues {cluster.max_requeues}",
        job_id=job.queue_id,
        points=job.points if isinstance(job, SweepJob) and job.is_array else (),
    )


def sbatch_options(job: JobScript, cluster: Cluster) -> list[str]:
    """Return the options of sbatch, in a fixed order, as they stand behind ``#SBATCH``."""
    asked = asked_for(job, cluster)
    processes = num_processes(job, asked)
    given = {
        "job-name": job.job_name,
        "output": f'"{job.log_folder}/{job.output}"',
        "array": ",".join(map(str, job.due)) if isinstance(job, SweepJob) and job.is_array else None,
        "open-mode": "append",
        "account": cluster.account,
        "partition": asked.partition,
        "qos": asked.qos,
        "constraint": asked.constraint,
        "time": asked.time,
        "nodes": asked.nodes or 1,
        "ntasks-per-node": processes,
        "cpus-per-task": asked.cpus,
        "mem": asked.memory,
        "gres": asked.gres,
        "gpus-per-node": None if asked.gres else asked.gpus or None,
        "signal": f"B:USR1@{duration_s(cluster.lead_time)}",
        "mail-user": cluster.mail_user,
        "mail-type": cluster.mail_type or ("END,FAIL" if cluster.mail_user else None),
    }
    return [f"--{key}={value}" for key, value in given.items() if value is not None] + ["--requeue", *cluster.extra]


def asked_for(job: JobScript, cluster: Cluster) -> Resources:
    """Return what a job asks for: what its stage does, and no more than one device and node for one process."""
    asked = cluster.resources(job.stage)
    if job.is_shared or not (job.stage.startswith("train_") or job.stage == POINTS):
        return asked
    return asked.model_copy(update={"nodes": None, "gpus": asked.gpus and 1, "gres": one_device(asked.gres)})


def num_processes(job: JobScript, asked: Resources) -> int:
    """Return the processes on each node: one for each GPU in training, else one."""
    if not job.is_shared or not job.stage.startswith("train_"):
        return 1
    count = re.search(r"(?:^|,)gpu(?::[^:,]+)?:(\d+)", asked.gres or "")
    return int(count[1]) if count else max(1, asked.gpus or 1)


@cache
def _template() -> Template:

    environment = Environment(
        loader=PackageLoader("isotone.slurm"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # a shell script: what goes in is validated by the schema, and quoted
    )
    environment.filters["quoted"] = lambda value: shlex.quote(str(value))
    return environment.get_template("job.sh.j2")
