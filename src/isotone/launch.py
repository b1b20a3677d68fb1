"""Which of several processes this one is: as torchrun, accelerate or srun say it in the environment.

Imports nothing heavy.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from isotone.errors import UsageError

_FIRST_PORT, _NUM_PORTS = 15_000, 15_000  # below the ports that systems hand out by themselves


@dataclass(frozen=True)
class World:
    """The processes that were started together, and which of them this one is.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
        local_rank: number of this process on its host: which of the host's devices is its own.
        address: host of process 0.
        port: where process 0 listens.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    address: str = "127.0.0.1"
    port: int = _FIRST_PORT


def world_of(environment: Mapping[str, str] = os.environ) -> World:
    """Return the world that the launcher describes; a world of one where there is none.

    torchrun and ``accelerate launch`` set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Under plain
    ``srun`` the step's variables say the same; a batch script that runs python without srun has no
    SLURM_STEP_NUM_TASKS, so the tasks that its job could have started do not count.

    Raises:
        UsageError: a variable is missing or no number; names it.
    """
    if "WORLD_SIZE" in environment and "RANK" in environment:
        size = _number(environment, "WORLD_SIZE")
        if size == 1:
            return World()
        local = _number(environment, "LOCAL_RANK")
        address = _required(environment, "MASTER_ADDR")
        return World(_number(environment, "RANK"), size, local, address, _number(environment, "MASTER_PORT"))
    if "SLURM_STEP_NUM_TASKS" in environment and _number(environment, "SLURM_STEP_NUM_TASKS") > 1:
        return World(
            _number(environment, "SLURM_PROCID"),
            _number(environment, "SLURM_STEP_NUM_TASKS"),
            _number(environment, "SLURM_LOCALID"),
            environment.get("MASTER_ADDR") or _first_host(environment),
            _number(environment, "MASTER_PORT") if environment.get("MASTER_PORT") else _port(environment),
        )
    return World()


def _first_host(environment: Mapping[str, str]) -> str:
    """Return the host of a step's process 0: the first of ``node[003-007,9],other``."""
    if environment.get("SLURM_STEP_NUM_NODES") == "1":
        return "127.0.0.1"
    hosts = environment.get("SLURM_STEP_NODELIST") or _required(environment, "SLURM_JOB_NODELIST")
    return re.sub(r"\[(\w+)[^]]*]", r"\1", hosts).split(",")[0]


def _port(environment: Mapping[str, str]) -> int:
    """Return a port that differs between the steps of a job and, most likely, between jobs that share a host."""
    job, step = _number(environment, "SLURM_JOB_ID"), int(environment.get("SLURM_STEP_ID", "0"))
    return _FIRST_PORT + (7 * job + step) % _NUM_PORTS


def _number(environment: Mapping[str, str], name: str) -> int:
    text = _required(environment, name)
    if not text.isdigit():
        raise UsageError(f"{name} is {text!r} in the environment, not a number; start with torchrun or srun")
    return int(text)


def _required(environment: Mapping[str, str], name: str) -> str:
    if not environment.get(name):
        raise UsageError(f"{name} is not in the environment, but several processes were started; use torchrun or srun")
    return environment[name]
