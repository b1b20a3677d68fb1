import re
import shutil
import subprocess
from pathlib import Path

import pytest

from isotone.cluster import FURTHER_STAGES, Cluster, Resources
from isotone.config_io import load_experiment
from isotone.errors import UsageError
from isotone.slurm.chain import build_chain, script_file
from isotone.slurm.script import JobScript, render, sbatch_options

from .golden_scripts import PROFILES, golden, rendered

FOUNDING_FILES = [
    "job_0_setup.sh",
    "job_1_monotonicity.sh",
    "job_2_baseline.sh",
    "job_3_monotonic.sh",
    "job_4_evaluate.sh",
    "job_5_uat.sh",
    "job_6_hotflip.sh",
    "job_7_aggregate.sh",
]


def job(tmp_path: Path, stage: str = "evaluate") -> JobScript:
    file = tmp_path / "runs/x/seed-7/jobs/job_4_evaluate.sh"
    return JobScript(
        "x", 7, stage, 4, file, file.parent.parent / "logs", tmp_path / "runs", tmp_path, "/usr/bin/python3"
    )


@pytest.mark.parametrize("profile", PROFILES)
def test_scripts_are_what_they_were(profile: str) -> None:
    """python tests/slurm/golden_scripts.py writes them anew; look at the difference before you commit it."""
    scripts = rendered(profile)
    assert {name: path.read_text() for name, path in golden(profile).items()} == {
        name: scripts[name] for name in golden(profile)
    }


@pytest.mark.parametrize("profile", PROFILES)
def test_every_stage_has_a_script_that_bash_and_shellcheck_accept(profile: str, tmp_path: Path) -> None:
    scripts = rendered(profile)
    assert sorted(scripts) == FOUNDING_FILES
    for name, text in scripts.items():
        (tmp_path / name).write_text(text)
    files = [str(tmp_path / name) for name in scripts]
    for file in files:
        subprocess.run(["bash", "-n", file], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    # the lines of a site profile are the site's own
    checked = subprocess.run(["shellcheck", "--exclude=SC1090,SC1091", *files], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_a_script_asks_for_nothing_that_nobody_gave(tmp_path: Path) -> None:
    given = {option.split("=")[0] for option in sbatch_options(job(tmp_path), Cluster())}
    ours = {"--job-name", "--output", "--open-mode", "--nodes", "--ntasks-per-node", "--signal", "--requeue"}
    assert given == ours


def test_a_stage_asks_for_its_own_values_over_those_of_all() -> None:
    cluster = Cluster(
        time="24:00:00", gpus=4, memory="80G", stages={"train": Resources(memory="100G"), "evaluate": Resources(gpus=2)}
    )
    assert cluster.resources("train_baseline").memory == "100G"
    assert cluster.resources("train_baseline").gpus == 4
    assert cluster.resources("evaluate").gpus == 2
    assert cluster.resources("hotflip").gpus == 1  # only training shares work between devices
    assert cluster.resources("setup").gpus is None
    assert cluster.resources("aggregate").time == "24:00:00"


def test_lines_of_the_site_come_verbatim_and_a_failing_one_ends_the_job(tmp_path: Path) -> None:
    line = 'source "$HOME/no such folder/activate"'
    text = render(job(tmp_path), Cluster(setup=("set -o pipefail", line)))
    assert f"\n{line}\n" in text
    (tmp_path / "job.sh").write_text(text)
    done = subprocess.run(["bash", tmp_path / "job.sh"], capture_output=True, text=True)
    assert done.returncode == 1
    assert re.search(r"^ERROR: cluster.setup: this line failed: source", done.stdout, re.MULTILINE)


def test_a_folder_that_the_node_does_not_see_ends_the_job_with_an_error_line(tmp_path: Path) -> None:
    (tmp_path / "job.sh").write_text(render(job(tmp_path), Cluster()))
    done = subprocess.run(["bash", tmp_path / "job.sh"], capture_output=True, text=True)
    assert done.returncode == 1
    assert re.search(r"^ERROR: .*runs is not there on ", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("name", ["EXPERIMENT_SEED", "SCRATCH", "PROJECT", "HF_HOME", "HF_DATASETS_CACHE"])
def test_a_variable_that_is_set_is_respected(tmp_path: Path, name: str) -> None:
    text = render(job(tmp_path), Cluster()).partition("\ncd ")[0] + f'echo "{name} is ${name}"\n'
    (tmp_path / "job.sh").write_text(text)
    for value, expected in (("mine", "mine"), (None, None)):
        environment = {"PATH": "/usr/bin:/bin", **({name: value} if value else {})}
        done = subprocess.run(["bash", tmp_path / "job.sh"], capture_output=True, text=True, env=environment)
        found = re.search(rf"^{name} is (.+)$", done.stdout, re.MULTILINE)
        assert found
        assert expected is None or found[1] == expected


def test_a_path_that_sbatch_cannot_take_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="rename it"):
        render(job(tmp_path / "50%"), Cluster())


@pytest.mark.parametrize("stage", FURTHER_STAGES)
def test_a_further_attack_has_a_script_of_number_6(stage: str, tmp_path: Path) -> None:
    assert script_file(stage) == f"job_6_{stage}.sh"
    text = render(job(tmp_path, stage), Cluster(stages={stage: Resources(memory="8G")}))
    assert f"--only {stage} " in text
    assert "Stage 6: " in text
    assert "#SBATCH --mem=8G" in text


def test_an_arm_that_is_not_trained_asks_for_one_device(tmp_path: Path) -> None:
    """Several processes share training only; a shifted twin, or a control at matched loss, is one process's work."""
    twin = "{start: baseline, train: false, constraint: {parametrization: projection, initialization: shift}}"
    experiment = load_experiment("pocket-quick", [f"arms.shifted_twin={twin}"])
    links = {link.job.stage: link.job for link in build_chain(experiment, Cluster(gpus=4), [42], tmp_path)}
    asked = {stage: sbatch_options(job, Cluster(gpus=4)) for stage, job in links.items()}
    assert {"--gpus-per-node=4", "--ntasks-per-node=4"} <= set(asked["train_baseline"])
    assert {"--gpus-per-node=1", "--ntasks-per-node=1"} <= set(asked["train_shifted_twin"])
