"""Renders the script of one job: a pure function of the stage, the experiment and what the cluster's profile says."""

import re
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from isotone.cluster import LIGHT_STAGES, Cluster, Resources, duration_s
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
        trains: False for an arm's stage in which nothing is trained: it asks for what stage 1 asks for.
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
    trains: bool = True

    @property
    def asks_as(self) -> str:
        """Return the stage whose resources the job asks for."""
        return self.stage if self.trains or not self.stage.startswith("train_") else "constrain"

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
    title = TITLES.get(job.stage) or f"Stage {job.number}: trains the arm {job.stage.removeprefix('train_')}"
    if job.stage == "summary":
        run = ["summarize", str(job.runs / job.name), "--seeds", *map(str, job.seeds)]
        command = shlex.join(["-m", "isotone", *run])
        outcome = shlex.join(["--summary", str(job.runs / job.name)])
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
        launch="srun --kill-on-bad-exit=1"
        if num_processes(job.asks_as, cluster.resources(job.asks_as)) > 1
        else "srun",
        command=f'"$PYTHON" {command}',
        outcome=outcome,
    )


def sbatch_options(job: JobScript, cluster: Cluster) -> list[str]:
    """Return the options of sbatch, in a fixed order, as they stand behind ``#SBATCH``."""
    asked = cluster.resources(job.asks_as)
    processes = num_processes(job.asks_as, asked)
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


def num_processes(stage: str, asked: Resources) -> int:
    """Return the processes on each node: one for each GPU in training, else one."""
    if not stage.startswith("train_"):
        return 1
    count = re.fullmatch(r"gpu(?::[^:,]+)?:(\d+)", asked.gres or "")
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
