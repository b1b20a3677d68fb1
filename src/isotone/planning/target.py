"""The machine that a plan is for: this one, or the one that a site profile describes; without asking torch."""

import platform
import re
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from isotone.cluster import Cluster, Resources
from isotone.config import Experiment
from isotone.config_io import load_experiment
from isotone.environment import cpu_cores
from isotone.pipeline.run_directory import RunDirectory
from isotone.planning import rates as rates_module
from isotone.planning.memory import Machine
from isotone.planning.rates import REFERENCE, Rates
from isotone.planning.shape import ModelShape

CUDA_BASELINE = 3_000_000_000
"""Host memory of a process that has imported torch with CUDA and opened a device: assumed, not measured."""


@dataclass(frozen=True)
class Target:
    """What is known of the machine.

    Attributes:
        here: it is this one, so what is measured and free here counts.
        device: cpu, cuda or mps.
        precision: of training.
        threads: CPU threads of torch.
        rates: what is known of its speed; processor's work from ``REFERENCE`` where it was not measured.
        assumed: names of the rates that come from there.
        rate_origin: where the operations a second come from; None where nobody knows them.
        bounded: evaluation and attacks are counted at the training's rate, for nobody stated the one in fp32.
    """

    here: bool
    device: str
    precision: str
    threads: int
    rates: Rates
    assumed: frozenset[str]
    rate_origin: str | None
    bounded: bool

    @property
    def host_measured(self) -> bool:
        """Whether this machine was measured."""
        return "start_s" not in self.assumed

    def machine(self, experiment: Experiment) -> Machine:
        """Return what memory depends on."""
        assumed = CUDA_BASELINE if self.device == "cuda" else REFERENCE.baseline
        baseline = self.rates.baseline if self.host_measured and self.rates.baseline else assumed
        return Machine(self.device, self.precision, experiment.model.attention, float(baseline or 0))


def find_target(experiment: Experiment, shape: ModelShape, cluster: Cluster, here: bool, run: RunDirectory) -> Target:
    """Return the machine that a plan is for.

    Args:
        experiment: what is planned.
        shape: sizes of its model.
        cluster: what jobs ask for.
        here: whether the jobs run on this machine, or on ones that share its disks.
        run: the run, whose ``config.yaml`` says what was decided when it began.
    """
    device: str
    precision: str
    if here and run.config.is_file():
        begun = load_experiment(run.experiment_file)
        device, threads, precision = begun.runtime.device, begun.runtime.threads, begun.training.precision
    else:
        device = planned_device(experiment, cluster)
        threads = experiment.runtime.threads or cluster.cpus
        precision = planned_precision(experiment.training.precision, device)
    threads = threads or cpu_cores()
    key = rates_module.rates_key(experiment, shape, device, precision, threads)
    measured = rates_module.measured(key) if here else None
    stated = rates_module.stated(cluster.device)
    if measured is not None:
        return Target(here, device, precision, threads, *_filled(measured), "measured here", False)
    bounded = stated.train is not None and stated.attack is None
    if bounded:
        stated = replace(stated, evaluate=stated.train, attack=stated.train)
    origin = f"stated: {cluster.device.name or 'the device'}" if stated.train else None
    return Target(here, device, precision, threads, *_filled(stated), origin, bounded)


def planned_device(experiment: Experiment, cluster: Cluster) -> str:
    """Return the kind of device that training will use, as far as configuration and drivers tell."""
    if experiment.runtime.device != "auto":
        return experiment.runtime.device
    asked = cluster.resources("train_baseline")
    if num_devices(asked) or cluster.device.memory or cluster.device.peak_tflops:
        return "cuda"
    if Path("/proc/driver/nvidia/version").is_file() or shutil.which("nvidia-smi"):
        return "cuda"
    return "mps" if platform.system() == "Darwin" and platform.machine() == "arm64" else "cpu"


def planned_precision(precision: str, device: str) -> str:
    """Return the precision of training: what was asked for, or what ``auto`` becomes on the device (determinism.py)."""
    if precision != "auto":
        return precision
    if device == "cpu":
        flags = Path("/proc/cpuinfo")
        found = set(re.findall(r"\b(?:avx512_bf16|amx_bf16)\b", flags.read_text())) if flags.is_file() else set()
        return "bf16" if found else "fp32"
    return "bf16" if device == "cuda" else "fp32"


def num_devices(resources: Resources) -> int:
    """Return the GPUs that a job asks for on all of its nodes; 0 where it asks for none."""
    count = resources.gpus or 0
    if resources.gres and (match := re.fullmatch(r"gpu(?::[^:,]*[A-Za-z][^:,]*)?(?::(\d+))?", resources.gres)):
        count = int(match[1] or 1)
    return count * (resources.nodes or 1)


def _filled(rates: Rates) -> tuple[Rates, frozenset[str]]:
    """Return rates with the processor's work taken from ``REFERENCE`` where it is not known, and the names of those."""
    known = asdict(REFERENCE).items()
    missing = {name: value for name, value in known if value is not None and getattr(rates, name) is None}
    return replace(rates, **missing), frozenset(missing)
