"""`isotone run` as torchrun, accelerate and srun start it: several processes train an arm, and leave one run."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from isotone import records

from .conftest import SHORT, run

pytestmark = pytest.mark.integration
RUN = Path("pocket-quick/seed-42")
EPOCHS = ["--set", "training.epochs=0.02"]


def command(out: Path, stage: str) -> list[str]:
    return ["-m", "isotone", "run", "pocket-quick", "--out", str(out), *SHORT, *EPOCHS, "--only", stage]


def tasks(out: Path, stage: str) -> list["subprocess.Popen[str]"]:
    """Start what `srun -n 2` starts."""
    step = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1"}
    return [
        subprocess.Popen(
            [sys.executable, *command(out, stage)],
            env={**os.environ, **step, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def test_two_tasks_stop_together_and_torchrun_continues_what_they_began(tmp_path: Path) -> None:
    assert run(tmp_path, "--until", "setup").returncode == 0
    first, second = tasks(tmp_path, "train_baseline")
    assert first.stderr is not None
    while "starts" not in first.stderr.readline():
        assert first.poll() is None
    second.send_signal(signal.SIGUSR1)
    said = [process.communicate(timeout=180) for process in (first, second)]
    assert [process.returncode for process in (first, second)] == [75, 75], said
    assert "PARTIAL: train.baseline stopped safely" in said[0][1]
    assert said[1] == ("", "")  # one of them speaks
    assert not (tmp_path / RUN / "records/train.baseline.json").exists()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, *command(tmp_path, "train_baseline")], capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"train_baseline: complete, of {tmp_path / RUN}\n"  # one speaks, of its part
    record = records.read_json(tmp_path / RUN / "records/train.baseline.json")
    assert record["provenance"]["processes"] == 2
    assert run(tmp_path, *EPOCHS, "--only", "train_baseline").returncode == 0  # complete for one process, too
    assert records.read_json(tmp_path / RUN / "records/train.baseline.json") == record


def test_several_processes_do_nothing_but_train(tmp_path: Path) -> None:
    done = run(
        tmp_path, "--only", "evaluate", RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="a", MASTER_PORT="1"
    )
    assert done.returncode == 2
    assert done.stderr.startswith("ERROR: 2 processes were started, but only training is shared by several")
    assert not (tmp_path / RUN).exists()
