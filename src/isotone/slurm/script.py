"""Renders the script of one job: a pure function of the stage, the experiment and what the cluster's profile says."""

import re
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from isotone.cluster import LIGHT_STAGES, Cluster, Resources, duration_s, one_device
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
    experiment = job.file.parent / "experiment.yaml"
    title = TITLES.get(job.stage) or f"Stage {job.number}: makes the arm {job.stage.removeprefix('train_')}"
    if job.stage == "summary":
        run = ["summarize", str(job.runs / job.name), "--seeds", *map(str, job.seeds)]
        command = shlex.join(["-m", "isotone", *run])
        outcome = shlex.join(["--summary", str(job.runs / job.name), "--max-requeues", str(cluster.max_requeues)])
    else:
        run = ["run", str(experiment), "--out", str(job.runs), "--only", job.stage]
        command = shlex.join(["-m", "isotone", *run]) + ' --seed "$EXPERIMENT_SEED"'
        run_folder = shlex.quote(str(job.runs / job.name)) + '/"seed-$EXPERIMENT_SEED"'
        outcome = f"--run {run_folder} --stage {job.stage} --max-requeues {cluster.max_requeues}"
    return _template().render(
        title=title,
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
        command=f'"$PYTHON" {command}',
        outcome=outcome,
    )


def sbatch_options(job: JobScript, cluster: Cluster) -> list[str]:
    """Return the options of sbatch, in a fixed order, as they stand behind ``#SBATCH``."""
    asked = asked_for(job, cluster)
    processes = num_processes(job, asked)
    given = {
        "job-name": job.job_name,
        "output": f'"{job.log_folder}/%x-%j.out"',
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
    if job.is_shared or not job.stage.startswith("train_"):
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
