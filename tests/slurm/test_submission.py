"""What a one-node Slurm cannot be made to do is played by scripts in its place: refuse an account, fail half-way."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from isotone.config_io import load_experiment
from isotone.errors import UsageError
from isotone.slurm.chain import submitted_jobs
from isotone.slurm.submission import submit_experiment

Command = Callable[[str, str], None]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Return a function that puts a command of Slurm in place, given as the lines of a shell script."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))  # no profile of whoever runs the tests

    def put(name: str, lines: str) -> None:
        (folder / name).write_text(f"#!/bin/bash\n{lines}\n")
        (folder / name).chmod(0o755)

    put("squeue", "exit 0")
    put("sinfo", "echo 'n1 infinite normal*'")
    return put


def submit(out: Path) -> None:
    submit_experiment(load_experiment("pocket-quick"), None, [42], out, lambda line: None)


def test_a_missing_account_is_told_with_the_key_and_nothing_is_submitted(command: Command, tmp_path: Path) -> None:
    said = "sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified"
    command("sbatch", f"[ $1 = --test-only ] && {{ echo '{said}' >&2; exit 1; }}\ntouch {tmp_path}/submitted")
    with pytest.raises(UsageError) as refused:
        submit(tmp_path / "runs")
    first, *_, last = str(refused.value).splitlines()
    assert "Invalid account or account/partition combination specified; set cluster.account" in first
    assert last == "nothing was submitted"
    assert not (tmp_path / "submitted").exists()


def test_what_was_submitted_before_a_refusal_is_named(command: Command, tmp_path: Path) -> None:
    count = tmp_path / "count"
    command(
        "sbatch",
        f"[ $1 = --test-only ] && exit 0\necho x >>{count}; n=$(wc -l <{count})\n"
        "[ $n -lt 3 ] || { echo 'sbatch: error: Batch job submission failed: Job violates policy' >&2; exit 1; }\n"
        "echo $((100 + n))",
    )
    with pytest.raises(
        UsageError, match=r"Job violates policy; submitted before: 101, 102; take them back with --cancel"
    ):
        submit(tmp_path / "runs")
    log = submitted_jobs(tmp_path / "runs/pocket-quick/seed-42/jobs")
    assert [line["job_id"] for line in log.read()] == ["101", "102"]


def test_a_folder_that_other_nodes_do_not_see_is_refused(command: Command, tmp_path: Path) -> None:
    command("sinfo", "printf 'n1 infinite normal*\\nn2 infinite normal*\\n'")
    command("sbatch", "exit 1")
    with pytest.raises(UsageError, match=r"--out .* belongs to this node alone.*shared file system"):
        submit(Path("/tmp") / tmp_path.name / "runs")


def test_a_queue_that_does_not_answer_is_told(command: Command, tmp_path: Path) -> None:
    command("sbatch", "[ $1 = --test-only ] && exit 0; echo 7")
    submit(tmp_path / "runs")
    command("squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(UsageError, match=r"squeue refused: .*Unable to contact"):
        submit(tmp_path / "runs")


def test_what_the_plan_holds_unsafe_is_named_before_anything_is_submitted(command: Command, tmp_path: Path) -> None:
    command("sbatch", "[ $1 = --test-only ] && exit 0; echo 7")
    lines: list[str] = []
    experiment = load_experiment("pythia-1.4b")
    submit_experiment(experiment, "founding", [42], tmp_path / "runs", lines.append)
    first_job = next(i for i, line in enumerate(lines) if line.endswith(": job 7"))
    named = [i for i, line in enumerate(lines) if line.startswith("UNSAFE train_monotonic, time limit: 32 h")]
    assert named
    assert named[0] < first_job
