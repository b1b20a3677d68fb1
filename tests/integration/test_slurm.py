"""What `isotone submit` promises, on a real Slurm of one node: nothing is lost, waits for ever, or loops."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from isotone import records

from .conftest import SHORT, isotone
from .slurm_cluster import SlurmCluster, wait_for

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from kill_campaign import differences

pytestmark = pytest.mark.integration

SITE = """\
partition: normal
time: "2:00"
lead_time: "0:30"
cpus: 1
python: {python}
setup: ["export OMP_NUM_THREADS=1"]
"""
RUN = Path("pocket-quick/seed-42")
LONG = ["--set", "training.save_every_steps=20", "--set", "training.validate_every_steps=1000"]
CHAIN_S = 900.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    if os.geteuid() != 0 or not shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin"):
        pytest.skip("needs root and Debian's slurm-wlm: bash scripts/install_test_packages.sh")
    found = SlurmCluster(tmp_path_factory.mktemp("slurm"))
    try:
        found.start()
        yield found
    finally:
        found.stop()


@pytest.fixture
def site(tmp_path: Path) -> Path:
    path = tmp_path / "site.yaml"
    path.write_text(SITE.format(python=sys.executable))
    return path


def submit(cluster: SlurmCluster, out: Path, site: Path, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """Submit the shortened pocket-quick experiment."""
    options = ("pocket-quick", "--out", out, "--site", site, *SHORT, *arguments)
    return isotone("submit", *options, **cluster.environment)


def job_ids(done: "subprocess.CompletedProcess[str]") -> dict[str, str]:
    """Return the job ids that submit printed, by stage."""
    assert done.returncode == 0, done.stderr
    return dict(re.findall(r"-\d-(\w+): job (\d+)$", done.stdout, re.MULTILINE))


def wait_for_end(cluster: SlurmCluster, ids: dict[str, str]) -> None:
    wait_for(lambda: not set(ids.values()) & set(cluster.jobs()), CHAIN_S, f"the end of {ids}: {cluster.jobs()}")


def outcomes(out: Path, stage: str) -> list[dict[str, object]]:
    lines = records.JsonLines(out / RUN / "logs/jobs.jsonl").read()
    return [line for line in lines if line["stage"] == stage]


def log_of(out: Path, stage: str) -> str:
    return "\n".join(path.read_text() for path in (out / RUN / "logs").glob(f"*-{stage}-*.out"))


def epochs_of(seconds: float, tmp_path: Path) -> str:
    """Return the epochs that take this machine so many seconds of one processor: no fewer, however busy it is."""

    def spent(epochs: float) -> float:
        out = tmp_path / f"epochs-{epochs}"
        change = ("--set", f"arms.baseline.training.epochs={epochs}")
        assert isotone("run", "pocket-quick", "--out", out, *SHORT, *change, "--only", "setup").returncode == 0
        before = _processor_seconds_of_children()
        assert isotone("run", "pocket-quick", "--out", out, *SHORT, *change, "--only", "train_baseline").returncode == 0
        return _processor_seconds_of_children() - before

    short, longer = 0.01, 0.06
    return f"{(longer - short) * seconds / (spent(longer) - spent(short)):.2f}"


def _processor_seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_a_chain_outlives_its_time_limits_and_equals_a_run_on_one_machine(
    cluster: SlurmCluster, site: Path, tmp_path: Path
) -> None:
    """Training takes longer than the limit of two minutes; nobody touches anything until the queue is empty."""
    out, whole = tmp_path / "cluster", tmp_path / "whole"
    long = [*LONG, "--set", f"arms.baseline.training.epochs={epochs_of(220, tmp_path)}"]
    ids = job_ids(submit(cluster, out, site, *long))
    assert len(ids) == 8
    direct = subprocess.Popen(
        [sys.executable, "-m", "isotone", "run", "pocket-quick", "--out", str(whole), *SHORT, *long],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for(lambda: len(outcomes(out, "train_baseline")) >= 2, CHAIN_S, "two requeues of the training")
    waiting = cluster.jobs()
    assert waiting[ids["evaluate"]][1:] == ("PENDING", "Dependency")
    assert waiting[ids["aggregate"]][1:] == ("PENDING", "Dependency")
    wait_for_end(cluster, ids)
    assert cluster.jobs() == {}
    assert len(re.findall(rf"Requeuing JobId={ids['train_baseline']}$", cluster.log(), re.MULTILINE)) >= 2
    assert {line["cause"] for line in outcomes(out, "train_baseline")} == {"time limit", "complete"}
    assert direct.wait(CHAIN_S) == 0
    assert differences(whole, out) == []
    rows = json.loads(isotone("status", out / RUN, "--json", **cluster.environment).stdout)
    assert {row["state"] for row in rows} == {"complete"}
    text = log_of(out, "evaluate")
    assert re.search(r"^no GPU on \S+: running on the CPU|^GPU \(name, memory, driver\)", text, re.MULTILINE)
    assert re.search(r"^=====.*: COMPLETED =====$", text, re.MULTILINE)
    assert "PARTIAL (will continue)" in log_of(out, "train_baseline")


def test_a_kill_a_preemption_and_a_lost_node_cost_nothing(cluster: SlurmCluster, site: Path, tmp_path: Path) -> None:
    out, whole = tmp_path / "cluster", tmp_path / "whole"
    more = ["--set", "arms.baseline.training.epochs=0.5", "--set", "training.save_every_steps=4"]
    ids = job_ids(submit(cluster, out, site, *more))
    train = ids["train_baseline"]
    steps = _after_new_checkpoint(out, 0)
    _python_of(train).send_signal(signal.SIGKILL)
    wait_for(lambda: len(outcomes(out, "train_baseline")) == 1, 60, "the requeue after the kill")
    steps = _after_new_checkpoint(out, steps)
    urgent = tmp_path / "urgent.sh"
    urgent.write_text("#!/bin/bash\nsleep 5\n")
    cluster.run("sbatch", "--partition=urgent", "--cpus-per-task=4", "--output=/dev/null", urgent, check=True)
    wait_for(lambda: "preemption" in [o["cause"] for o in outcomes(out, "train_baseline")], 90, "the preemption")
    steps = _after_new_checkpoint(out, steps)  # saved when it was preempted, if not before
    _after_new_checkpoint(out, steps)
    cluster.kill_daemon("slurmd")  # the node is lost: Slurm itself requeues what ran there
    wait_for(lambda: cluster.jobs()[train][1] == "PENDING", 120, "the loss of the node to be noticed")
    cluster.start_daemon("slurmd")
    wait_for_end(cluster, ids)
    assert [o["cause"] for o in outcomes(out, "train_baseline")][:2] == ["killed", "preemption"]
    assert isotone("run", "pocket-quick", "--out", whole, *SHORT, *more).returncode == 0
    assert differences(whole, out) == []


def _after_new_checkpoint(out: Path, steps: int) -> int:
    """Wait until training has saved something beyond so many steps, and return where it stands."""

    def newest() -> int:
        found = (out / RUN / "checkpoints/baseline").glob("step-????????")
        return max((int(path.name.removeprefix("step-")) for path in found), default=0)

    wait_for(lambda: newest() > steps, 180, f"a checkpoint beyond step {steps}")
    return newest()


def _python_of(job_id: str) -> psutil.Process:
    """Return the process of a job that does the work."""
    for process in psutil.process_iter(["cmdline", "environ"]):
        command, environment = process.info["cmdline"] or [], process.info["environ"] or {}
        if environment.get("SLURM_JOB_ID") == job_id and command[1:4] == ["-m", "isotone", "run"]:
            return process
    raise AssertionError(f"job {job_id} has no process")


def test_a_stage_that_fails_for_good_cancels_what_waits_and_why_names_it(
    cluster: SlurmCluster, site: Path, tmp_path: Path
) -> None:
    ids = job_ids(submit(cluster, tmp_path, site, "--set", "arms.baseline.training.lr=1e30"))
    wait_for_end(cluster, ids)
    assert not (tmp_path / RUN / "records/evaluate.baseline.json").exists()
    assert "FAILED: exit code 1" in log_of(tmp_path, "train_baseline")
    told = isotone("why", tmp_path / RUN, **cluster.environment).stdout
    assert "train.baseline is failed: step" in told
    assert f"job {ids['train_baseline']}" in told
    assert "evaluate.baseline" in told
    again = job_ids(submit(cluster, tmp_path, site, "--set", "arms.baseline.training.lr=1e30"))
    assert set(again) == {"train_baseline", "evaluate", "triggers", "hotflip", "aggregate"}  # the rest is complete
    isotone("submit", "pocket-quick", "--out", tmp_path, "--site", site, *SHORT, "--cancel", **cluster.environment)
    wait_for(lambda: not cluster.jobs(), 60, "an empty queue")


def test_a_job_that_is_killed_again_and_again_gives_up(cluster: SlurmCluster, site: Path, tmp_path: Path) -> None:
    """An interpreter that dies at once stands for whatever kills a job before it can do anything."""
    dies = tmp_path / "dies.sh"
    dies.write_text(f'#!/bin/bash\n[[ " $* " == *" run "* ]] && kill -KILL $$\nexec {sys.executable} "$@"\n')
    dies.chmod(0o755)
    site.write_text(site.read_text().replace(sys.executable, str(dies)))
    out = tmp_path / "out"
    wait_for_end(cluster, job_ids(submit(cluster, out, site)))
    causes = [(o["cause"], o["code"]) for o in outcomes(out, "setup")]
    assert causes == [("killed", 75), ("killed", 1)]
    assert "nothing was done between two requeues" in isotone("why", out / RUN, **cluster.environment).stdout


def test_several_seeds_share_one_setup_and_end_in_a_summary(cluster: SlurmCluster, site: Path, tmp_path: Path) -> None:
    first = submit(cluster, tmp_path, site, "--seeds", 42, 7)
    assert first.returncode == 0, first.stderr
    ids = set(re.findall(r": job (\d+)$", first.stdout, re.MULTILINE))
    assert len(ids) == 17
    again = submit(cluster, tmp_path, site, "--seeds", 42, 7)
    assert set(re.findall(r": job (\d+)$", again.stdout, re.MULTILINE)) <= ids  # nothing is submitted twice
    shown = isotone("status", tmp_path / "pocket-quick", **cluster.environment).stdout
    assert "PENDING" in shown
    wait_for(lambda: not cluster.jobs(), CHAIN_S, "an empty queue")
    assert (tmp_path / "pocket-quick/summary/final_results.json").is_file()
    setups = [records.read_json(tmp_path / f"pocket-quick/seed-{s}/records/setup.json")["outputs"] for s in (42, 7)]
    assert setups[0] == setups[1]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("cluster.partition=nowhere", "cluster.partition"),
        ("cluster.time=48:00:00", "cluster.time"),
        ("cluster.time=1:00", "cluster.lead_time"),
        ("cluster.memory=900G", "cluster.memory"),
        ("cluster.gpus=3", "cluster.gpus"),
    ],
)
def test_what_slurm_refuses_is_told_with_what_to_change_and_nothing_is_submitted(
    cluster: SlurmCluster, site: Path, tmp_path: Path, change: str, told: str
) -> None:
    done = submit(cluster, tmp_path, site, "--set", change)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert all(line.startswith("ERROR: ") for line in lines)
    assert told in lines[0]
    assert lines[-1] == "ERROR: nothing was submitted"
    assert cluster.jobs() == {}


def test_a_dry_run_shows_graph_scripts_and_answers_and_writes_nothing(
    cluster: SlurmCluster, site: Path, tmp_path: Path
) -> None:
    done = submit(cluster, tmp_path / "out", site, "--dry-run")
    assert done.returncode == 0
    assert re.search(r"s42-3-train_monotonic +after pocket-quick-s42-1-constrain$", done.stdout, re.MULTILINE)
    assert done.stdout.count("sbatch --test-only: would be accepted") == 8
    assert "#SBATCH --signal=B:USR1@30" in done.stdout
    assert not (tmp_path / "out").exists()
    assert cluster.jobs() == {}


def test_what_was_submitted_can_be_taken_back(cluster: SlurmCluster, site: Path, tmp_path: Path) -> None:
    ids = job_ids(submit(cluster, tmp_path, site))
    done = submit(cluster, tmp_path, site, "--cancel")
    assert set(re.findall(r"\d+", done.stdout)) == set(ids.values())
    wait_for(lambda: not cluster.jobs(), 60, "an empty queue")
    time.sleep(1)
    assert not (tmp_path / RUN / "records/train.baseline.json").exists()


def test_without_slurm_submit_says_so_in_one_line(site: Path, tmp_path: Path) -> None:
    done = isotone("submit", "pocket-quick", "--out", tmp_path, "--site", site, *SHORT, PATH="/nowhere")
    assert done.returncode == 2
    assert done.stderr.startswith("ERROR: sbatch is not on the PATH")
    assert len(done.stderr.strip().splitlines()) == 1
