"""What a one-node Slurm cannot be made to do is played by scripts in its place: refuse an account, fail half-way."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from isotone.cluster import Cluster
from isotone.config_io import load_experiment
from isotone.errors import UsageError
from isotone.slurm.chain import build_chain, submitted_jobs
from isotone.slurm.submission import cancel_experiment, submit_experiment

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


def queue_of(command: Command, tmp_path: Path) -> Path:
    """Play a queue: what is submitted stays in it, until a line is taken out of the file that is returned."""
    queued = tmp_path / "queued"
    queued.touch()
    command(
        "sbatch",
        f"[ $1 = --test-only ] && exit 0\nn=$((100 + $(wc -l <{tmp_path}/count 2>/dev/null || echo 0)))\n"
        f"echo x >>{tmp_path}/count\nname=$(sed -n 's/^#SBATCH --job-name=//p' ${{@: -1}})\n"
        f'echo "$n|PENDING|$name|Dependency" >>{queued}\necho $n',
    )
    command("squeue", f"cat {queued}")
    command("scancel", f'for id in "$@"; do sed -i "/^$id|/d" {queued}; done')
    return queued


def jobs_in(queued: Path) -> dict[str, str]:
    return {line.split("|")[2]: line.split("|")[0] for line in queued.read_text().splitlines()}


def test_what_waits_for_a_job_that_is_gone_is_submitted_again(command: Command, tmp_path: Path) -> None:
    """A job that waits for one that failed can never start: it must not count as being in the queue."""
    queued = queue_of(command, tmp_path)
    submit(tmp_path / "runs")
    before = jobs_in(queued)
    gone = before["pocket-quick-s42-2-train_baseline"]
    queued.write_text("".join(line for line in queued.read_text().splitlines(True) if not line.startswith(gone)))
    submit(tmp_path / "runs")
    after = jobs_in(queued)
    assert after.keys() == before.keys()
    same = {name for name in after if after[name] == before[name]}
    assert same == {f"pocket-quick-s42-{rest}" for rest in ("0-setup", "1-constrain", "3-train_monotonic")}


def test_a_summary_over_fewer_seeds_makes_way_for_one_over_all(command: Command, tmp_path: Path) -> None:
    queued = queue_of(command, tmp_path)
    for seeds in ([1, 2], [1, 2, 3]):
        experiment = load_experiment("pocket-quick", ["seeds=[1, 2, 3]"])
        submit_experiment(experiment, None, seeds, tmp_path / "runs", lambda line: None)
    jobs = jobs_in(queued)
    assert len(jobs) == len(queued.read_text().splitlines()) == 3 * 8 + 1
    script = (tmp_path / "runs/pocket-quick/summary/jobs/job_8_summary.sh").read_text()
    assert "--seeds 1 2 3" in script


def test_other_values_are_refused_while_jobs_are_about_to_read_the_experiment(command: Command, tmp_path: Path) -> None:
    queue_of(command, tmp_path)
    submit(tmp_path / "runs")
    other = load_experiment("pocket-quick", ["training.lr=1e-3"])
    with pytest.raises(UsageError, match=r"experiment.yaml: job 100 is in the queue with other values.*--cancel"):
        submit_experiment(other, None, [42], tmp_path / "runs", lambda line: None)


def test_cancelling_needs_neither_the_seeds_nor_the_values_of_the_submission(command: Command, tmp_path: Path) -> None:
    queued = queue_of(command, tmp_path)
    experiment = load_experiment("pocket-quick", ["training.lr=1e-3"])
    submit_experiment(experiment, None, [1, 2], tmp_path / "runs", lambda line: None)
    with queued.open("a") as file:
        file.write("7|RUNNING|somebody-else|None\n")
    cancel_experiment("pocket-quick", [], tmp_path / "runs", lambda line: None)
    assert jobs_in(queued) == {"somebody-else": "7"}


def test_setups_of_several_seeds_come_one_after_the_other(tmp_path: Path) -> None:
    """All write to the folder that they share, one at a time."""
    links = build_chain(load_experiment("pocket-quick"), Cluster(), [1, 2, 3], tmp_path)
    needs = {link.job.seed: link.needs for link in links if link.job.stage == "setup"}
    assert needs == {1: (), 2: ((1, "setup"),), 3: ((2, "setup"),)}
