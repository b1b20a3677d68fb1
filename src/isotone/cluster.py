"""What jobs ask of a Slurm cluster: the ``cluster`` part of an experiment, and the form of a site profile.

A site profile (``~/.config/isotone/cluster.yaml``, a file, or one that comes with the package) holds what is the same
for all experiments of a cluster; an experiment's own ``cluster`` goes over it, value by value. Nothing is invented:
what neither gives is left to Slurm.
"""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from isotone.config_types import Count, Part, Positive, Share

FURTHER_STAGES = ("gcg", "coordinate", "pgd", "frequency", "probe", "transfer")
"""Stages of number 6 that an experiment may ask for beside HotFlip and triggers."""

POINTS = "points"
"""Stage of a job that runs a whole point of a sweep: it asks for what training does, on one device. Stages of arms are
named train_ARM, so none is called this."""

_CHAIN = ("setup", "constrain", "train", "evaluate", "triggers", "hotflip", *FURTHER_STAGES, "aggregate", "summary")
STAGES = (*_CHAIN, POINTS)
"""Names under ``cluster.stages``; single training stages are train_ARM."""

LIGHT_STAGES = ("setup", "aggregate", "summary")
"""Stages that need no device."""

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_DURATION = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


def duration_s(text: str) -> int:
    """Return a duration in seconds, from any of Slurm's forms: M, M:S, H:M:S, D-H, D-H:M and D-H:M:S.

    Raises:
        ValueError: the text is none of them.
    """
    match = _DURATION.fullmatch(text)
    if not match:
        raise ValueError(f"found {text!r}, allowed: a duration such as 24:00:00, 2-12:00:00 or 90 (minutes)")
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is not None:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
        return 86_400 * int(days) + 3_600 * hours + 60 * minutes + seconds
    if len(numbers) == 3:
        return 3_600 * numbers[0] + 60 * numbers[1] + numbers[2]
    return 60 * numbers[0] + (numbers[1] if len(numbers) == 2 else 0)


def size_bytes(text: str) -> int:
    """Return a size of memory in bytes, from Slurm's form: a number with K, M, G or T (powers of 1,024), else of MiB.

    Raises:
        ValueError: the text is not of that form.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)", text.upper().removesuffix("B"))
    if not match:
        raise ValueError(f"found {text!r}, allowed: a size such as 80G or 512M")
    return int(float(match[1]) * _UNITS[match[2] or "M"])


def one_device(gres: str | None) -> str | None:
    """Return a --gres with one GPU in the place of several."""
    return gres and re.sub(r"(^|,)(gpu(?::[^:,\d][^:,]*)?):\d+", r"\1\2:1", gres)


def _duration(text: str) -> str:
    duration_s(text)
    return text


def _size(text: str) -> str:
    size_bytes(text)
    return text


def _one_line(text: str) -> str:
    if not text or "\n" in text or "\r" in text:
        raise ValueError(f"found {text!r}, allowed: one line of text")
    return text


def _word(text: str) -> str:
    if not re.fullmatch(r"[\w.,:=/@+&|*()\[\]%-]+", text):
        raise ValueError(f"found {text!r}, allowed: a word without spaces or quotes, as sbatch takes it")
    return text


Duration = Annotated[str, AfterValidator(_duration)]
Size = Annotated[str, AfterValidator(_size)]
Line = Annotated[str, AfterValidator(_one_line)]
Word = Annotated[str, AfterValidator(_word)]


class Resources(Part):
    """What the jobs of one stage ask for, where it differs from the other stages."""

    partition: Word | None = None
    """--partition"""
    qos: Word | None = None
    """--qos"""
    constraint: Word | None = None
    """--constraint: features that a node must have."""
    time: Duration | None = None
    """--time: the limit of one job; a stage that needs longer continues under the same id."""
    memory: Size | None = None
    """--mem: host memory of a node."""
    cpus: Count | None = None
    """--cpus-per-task"""
    gpus: Annotated[int, Field(ge=0)] | None = None
    """--gpus-per-node; training uses one process for each. Only stages that compute get those given for all."""
    gres: Word | None = None
    """--gres, for sites where GPUs are asked for that way: gpu:a100:1. It goes before gpus."""
    nodes: Count | None = None
    """--nodes; more than one is for training only."""
    expected_time: Duration | None = None
    """What plan takes as the stage's time, where you have measured it; else it is computed."""
    expected_memory: Size | None = None
    """What plan takes as the stage's peak of host memory, where you have measured it; else it is computed."""


class Device(Part):
    """What ``isotone plan`` counts with. Rates are for the precision that training uses."""

    name: Line | None = None
    """Name, for the table."""
    memory: Size | None = None
    """Memory of one device; without it none is checked."""
    peak_tflops: Positive | None = None
    """10¹² floating-point operations a second at best, as the maker states."""
    peak_tflops_fp32: Positive | None = None
    """The same in fp32 without TF32, for evaluation and attacks; without it their times are lower bounds."""
    utilization: Share | None = None
    """Share of the peak that is reached (model FLOPs utilization); .4 unless given."""


class Cluster(Part):
    """What jobs ask for. Every value is optional, and goes into the job scripts as it is."""

    account: Word | None = None
    """--account"""
    partition: Word | None = None
    """--partition"""
    qos: Word | None = None
    """--qos"""
    constraint: Word | None = None
    """--constraint: features that a node must have."""
    time: Duration | None = None
    """--time of every stage, unless it has its own."""
    memory: Size | None = None
    """--mem of every stage, unless it has its own."""
    cpus: Count | None = None
    """--cpus-per-task of every stage, unless it has its own."""
    gpus: Annotated[int, Field(ge=0)] | None = None
    """--gpus-per-node of training; the other stages that compute (all but setup, aggregate, summary) get one."""
    gres: Word | None = None
    """--gres of the stages that compute, where GPUs are asked for that way."""
    nodes: Count | None = None
    """--nodes of training stages."""
    mail_user: Word | None = None
    """--mail-user; no mail without it."""
    mail_type: Word | None = None
    """--mail-type, such as END,FAIL."""
    setup: tuple[Line, ...] = ()
    """Shell lines that run before isotone starts, verbatim: module load …, source …/bin/activate."""
    extra: tuple[Line, ...] = ()
    """Options of sbatch, one a line without #SBATCH, verbatim: --exclude=node7."""
    python: Line | None = None
    """The interpreter that jobs start; the one that runs ``isotone submit`` unless given."""
    lead_time: Duration = "2:00"
    """How long before its limit a job is asked to save and to requeue itself."""
    max_requeues: Annotated[int, Field(ge=0)] = 50
    """How often a job may put itself back into the queue."""
    stages: dict[str, Resources] = {}
    """By stage (setup, constrain, train, train_ARM, evaluate, triggers, hotflip, aggregate, summary; points of sweeps):
    what differs."""
    max_time: Duration | None = None
    """The longest limit that the partition allows, for ``plan``; asked of sinfo where not given."""
    free_disk: Size | None = None
    """Room for the runs, for ``plan``: a quota; the free space of the folder where not given."""
    device: Device = Device()
    """What ``plan`` counts with."""

    @model_validator(mode="after")
    def _stages_are_stages(self) -> "Cluster":
        for name in self.stages:
            if name not in STAGES and not name.startswith("train_"):
                raise ValueError(f"stages.{name}: there is no such stage; allowed: {', '.join(STAGES)}, train_ARM")
            nodes = self.stages[name].nodes or 1
            if nodes > 1 and not name.startswith("train"):
                raise ValueError(f"stages.{name}.nodes: found {nodes}, allowed: 1; only training is shared")
        return self

    def resources(self, stage: str) -> Resources:
        """Return what the jobs of a stage ask for: its own values over those of all stages."""
        shared: dict[str, Any] = {key: getattr(self, key) for key in ("partition", "qos", "constraint", "time")}
        shared |= {"memory": self.memory, "cpus": self.cpus}
        if stage.startswith("train_"):
            shared |= {"gpus": self.gpus, "gres": self.gres, "nodes": self.nodes}
        elif stage not in LIGHT_STAGES:  # one process, one device
            shared |= {"gpus": self.gpus and 1, "gres": one_device(self.gres)}
        kinds = ("train", stage) if stage.startswith("train_") or stage == POINTS else (stage,)
        for kind in kinds:
            own = self.stages.get(kind, Resources()).model_dump(exclude_none=True)
            if "gpus" in own:
                shared["gres"] = None  # a stage that says how many GPUs it wants is not given those of all stages
            shared |= own
        return Resources(**shared)
