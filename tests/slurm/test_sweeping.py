"""A sweep becomes a setup, an array with one element a point, and a table; what is queued or ended is left alone."""

import re
import subprocess
from pathlib import Path

import pytest

from isotone import records
from isotone.cluster import POINTS
from isotone.config import Experiment
from isotone.config_io import dump_yaml, experiment_from_dict, load_experiment
from isotone.errors import UsageError
from isotone.pipeline.graph import Graph
from isotone.slurm import sweeping
from isotone.slurm.outcome import COMPLETE, GIVE_UP, REQUEUE, End, decide
from isotone.slurm.sweeping import cancel_sweep, show_sweep, submit_sweep
from isotone.slurm.watch import status_with_jobs
from isotone.sweep.points import SweepDirectory, build_points, seed_of_points, with_seed_of_points
from isotone.sweep.standing import PointStanding

from .test_submission import Command, command

__all__ = ["command"]

TREE = {
    "name": "swept",
    "arms": {"baseline": {}, "monotonic": {"constraint": {"parametrization": "projection", "initialization": "relu"}}},
    "sweep": {
        "arms": {"monotonic": {"constraint.parametrization": ["projection", "softplus"], "training.lr": [1e-4, 1e-3]}}
    },
}


def experiment(**changed: object) -> Experiment:
    return experiment_from_dict({**TREE, **changed})


@pytest.fixture
def queued(command: Command, tmp_path: Path) -> Path:
    """Play a queue that knows arrays: each element is a line, until it is taken out of the file that is returned."""
    file = tmp_path / "queued"
    file.touch()
    command(
        "sbatch",
        f"[ $1 = --test-only ] && exit 0\nn=$((100 + $(wc -l <{tmp_path}/calls 2>/dev/null || echo 0)))\n"
        f'echo "$*" >>{tmp_path}/calls\nname=$(sed -n "s/^#SBATCH --job-name=//p" "${{@: -1}}")\n'
        f'array=$(sed -n "s/^#SBATCH --array=//p" "${{@: -1}}" | tr , " ")\n'
        f"for i in ${{array:-none}}; do id=$n; [ $i = none ] || id=${{n}}_$i\n"
        f'echo "$id|PENDING|$name|Dependency" >>{file}; done\necho $n',
    )
    command("squeue", f"cat {file}")
    command("scancel", f'for id in "$@"; do sed -i "/^$id|/d" {file}; done')
    return file


def submit(out: Path, found: Experiment | None = None) -> list[str]:
    lines: list[str] = []
    submit_sweep(found or experiment(), 42, None, out, lines.append)
    return lines


def test_every_point_that_can_begin_is_an_element_and_the_table_comes_last(queued: Path, tmp_path: Path) -> None:
    lines = submit(tmp_path / "runs")
    setup, points, table = (tmp_path / "calls").read_text().splitlines()
    assert "--dependency" not in setup
    assert "--dependency=afterok:100 " in points
    assert "--dependency=afterany:100:101 " in table
    ids = [line.split("|")[0] for line in queued.read_text().splitlines()]
    assert ids == ["100", "101_0", "101_1", "101_2", "101_3", "102"]
    runnable = [point.id for point in build_points(experiment(), 42) if point.experiment]
    assert lines[2:] == [f"{point}: job 101_{i}" for i, point in enumerate(runnable)]
    rows = status_with_jobs(tmp_path / "runs/swept/sweep")
    assert {row["node"]: row["job"]["id"] for row in rows if "job" in row}[runnable[1]] == "101_1"
    assert status_with_jobs(tmp_path / "runs/swept") == rows


def test_submitting_again_submits_only_what_has_left_the_queue(queued: Path, tmp_path: Path) -> None:
    submit(tmp_path / "runs")
    queued.write_text("".join(line for line in queued.read_text().splitlines(True) if not line.startswith("101_2")))
    submit(tmp_path / "runs")
    ids = [line.split("|")[0] for line in queued.read_text().splitlines()]
    assert ids == ["100", "101_0", "101_1", "101_3", "103_2", "104"]
    assert "--dependency=afterany:100:101:103 " in (tmp_path / "calls").read_text().splitlines()[-1]


def test_other_axes_are_refused_while_jobs_are_queued_until_they_are_cancelled(queued: Path, tmp_path: Path) -> None:
    submit(tmp_path / "runs")
    other = experiment(sweep={"arms": {"monotonic": {"training.lr": [1e-4, 1e-3, 1e-2]}}})
    with pytest.raises(UsageError, match=r"job 10\d.* is in the queue with other values .* --cancel first"):
        submit(tmp_path / "runs", other)
    cancel_sweep("swept", tmp_path / "runs", lambda line: None)
    assert not queued.read_text()
    submit(tmp_path / "runs", other)
    assert "104_5" in queued.read_text()


def test_the_table_that_waits_is_kept_where_slurm_refuses_what_would_replace_it(
    queued: Path, command: Command, tmp_path: Path
) -> None:
    submit(tmp_path / "runs")
    queued.write_text("".join(line for line in queued.read_text().splitlines(True) if not line.startswith("101_2")))
    command("sbatch", "[ $1 = --test-only ] && exit 0; echo QOSMaxSubmitJobPerUserLimit >&2; exit 1")
    with pytest.raises(UsageError, match="QOSMaxSubmitJobPerUserLimit"):
        submit(tmp_path / "runs")
    assert [line.split("|")[0] for line in queued.read_text().splitlines()][-1] == "102"


def test_a_sweep_on_this_machine_changes_nothing_that_queued_elements_read(queued: Path, tmp_path: Path) -> None:
    submit(tmp_path / "runs")
    jobs = tmp_path / "runs/swept/sweep/jobs"
    before = load_experiment(jobs / "experiment.yaml")
    other = experiment(sweep={"arms": {"monotonic": {"training.lr": [1e-2]}}})
    directory = SweepDirectory.of(tmp_path / "runs", "swept")
    directory.keep(with_seed_of_points(other, 42))  # as run_sweep does
    script = (jobs / "job_1_points.sh").read_text()
    assert load_experiment(re.findall(r"isotone sweep (\S+)", script)[0]) == before
    assert [point.id for point in build_points(before, 42) if point.experiment] == re.findall(
        r"^    (\S+)$", script[script.index("POINTS=(") : script.index("POINT=$")], re.MULTILINE
    )


def test_seeds_of_the_experiment_reach_the_jobs(queued: Path, tmp_path: Path) -> None:
    submit(tmp_path / "runs", experiment(seeds=[1, 2, 3]))
    read = load_experiment(tmp_path / "runs/swept/sweep/jobs/experiment.yaml")
    assert (read.seeds, seed_of_points(read)) == ((1, 2, 3), 42)


def test_no_arm_has_the_stage_of_points(tmp_path: Path) -> None:
    arms = {"baseline": {}, "points": {"constraint": {"parametrization": "projection", "initialization": "relu"}}}
    graph = Graph(experiment(arms=arms, sweep=None))
    assert "train_points" in graph.stages
    assert POINTS not in graph.stages


def test_points_ask_for_what_training_does_on_one_device(command: Command, tmp_path: Path) -> None:
    command("sbatch", "exit 0")
    lines: list[str] = []
    stages = {"train": {"time": "9:00:00", "nodes": 2}, "points": {"cpus": 3}}
    show_sweep(experiment(cluster={"gpus": 4, "stages": stages}), 42, None, tmp_path / "runs", lines.append)
    script = next(text for text in lines if "#SBATCH --array" in text)
    for option in ("time=9:00:00", "nodes=1", "cpus-per-task=3", "gpus-per-node=1"):
        assert f"#SBATCH --{option}\n" in script


@pytest.mark.parametrize(("state", "again"), [("diverged", False), ("refused", False), ("failed", True)])
def test_what_may_have_failed_by_its_node_is_submitted_again_and_what_has_ended_is_not(
    queued: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, again: bool
) -> None:
    monkeypatch.setattr(sweeping, "standing_of", lambda directory, point, seed: PointStanding(state))
    submit(tmp_path / "runs")
    assert ("_0|" in queued.read_text()) is again


def test_a_refusal_of_slurm_submits_nothing(command: Command, tmp_path: Path) -> None:
    said = "sbatch: error: Invalid job array specification"
    command("sbatch", f"[ $1 = --test-only ] && {{ grep -q array= && echo '{said}' >&2 && exit 1; exit 0; }}; exit 9")
    with pytest.raises(UsageError, match=r"points: sbatch refuses: Invalid job array specification"):
        submit(tmp_path / "runs")
    assert not (tmp_path / "runs/swept/sweep/jobs").exists()


def test_scripts_are_shown_without_writing_anything_and_bash_takes_them(command: Command, tmp_path: Path) -> None:
    command("sbatch", "exit 0")
    lines: list[str] = []
    show_sweep(experiment(), 42, None, tmp_path / "runs", lines.append)
    scripts = [text for text in lines if "#!/bin/bash" in text]
    assert len(scripts) == 3
    assert not (tmp_path / "runs").exists()
    _, points, table = scripts
    assert '--only "$POINT"' in points
    assert 'scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"' in points
    assert "#SBATCH --array=0,1,2,3\n" in points
    assert re.search(r'--output="[^"]*/%x-%A_%a\.out"', points)
    assert "SLURM_ARRAY" not in table
    for script in scripts:
        text = script[script.index("#!/bin/bash") :]
        assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


def test_a_point_that_is_refused_when_it_begins_has_ended_and_one_that_was_killed_has_not(tmp_path: Path) -> None:
    point = next(p for p in build_points(experiment(), 42) if p.experiment)
    assert point.experiment is not None
    run = SweepDirectory.of(tmp_path, "swept").run(point, 42)

    def decide_on(exit_code: int) -> int:
        return decide(run, POINTS, End(exit_code), 50).code

    records.write_text(run.config, dump_yaml(point.experiment))
    assert decide_on(0) == REQUEUE
    records.JsonLines(run.attempts).append({"node": "train.baseline", "outcome": "failed", "reason": "no"})
    assert decide_on(0) == COMPLETE
    assert decide_on(2) == GIVE_UP
