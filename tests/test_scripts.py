"""The scripts say in an ERROR line what is missing, install once, and pass on arguments and exit codes."""

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ("run_all.sh", "run_tests.sh", "scripts/activate.sh", "scripts/install_test_packages.sh", ".ci/run")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the scripts need, with a stand-in for Python that notes how it is called."""
    for name in (*SCRIPTS, "pyproject.toml", "constraints.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    _program(tmp_path / "python", _PYTHON)
    return tmp_path


_PYTHON = r"""
echo "$*" >>"$CALLS"
case "$*" in
*sys.version_info*) exit "${OLD:-0}" ;;
*"import venv"*) exit "${NO_VENV:-0}" ;;
*"-m venv"*) mkdir -p "${*: -1}/bin" && cp "$0" "${*: -1}/bin/python" && cp "$0" "${*: -1}/bin/isotone" ;;
*"-m pip --version"*) exit 0 ;;
*"-m pip install"*) exit "${NO_INDEX:-0}" ;;
run*) exit "${RUN_ENDS_WITH:-0}" ;;
esac
"""


def _program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/bash\n{text}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def _run(checkout: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("ISOTONE_VENV", "PYTHON")}
    given = {"CALLS": str(checkout / "calls"), "PYTHON": str(checkout / "python"), **environment}
    return subprocess.run(
        ["bash", *command], cwd=checkout, env={**kept, **given}, capture_output=True, text=True, check=False
    )


def _calls(checkout: Path, containing: str) -> list[str]:
    return [line for line in (checkout / "calls").read_text().splitlines() if containing in line]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_valid_bash(name: str) -> None:
    subprocess.run(["bash", "-n", ROOT / name], check=True)


def test_the_first_start_installs_the_pinned_packages_and_the_second_does_not(checkout: Path) -> None:
    assert _run(checkout, "run_all.sh").returncode == 0
    (install,) = _calls(checkout, "pip install")
    assert f"--constraint {checkout}/constraints.txt" in install
    assert install.endswith(f"--editable {checkout}[pocket,gguf]")
    assert _run(checkout, "run_all.sh").returncode == 0
    assert len(_calls(checkout, "pip install")) == 1


def test_an_environment_with_the_test_tools_will_do_for_a_run(checkout: Path) -> None:
    _run(checkout, "run_tests.sh", "quick")
    _run(checkout, "run_all.sh")
    (install,) = _calls(checkout, "pip install")
    assert install.endswith("[pocket,gguf,dev]")


def test_changed_pins_are_installed(checkout: Path) -> None:
    _run(checkout, "run_all.sh")
    with open(checkout / "constraints.txt", "a") as file:
        file.write("colour==0.1.5\n")
    _run(checkout, "run_all.sh")
    assert len(_calls(checkout, "pip install")) == 2


def test_an_installation_that_failed_is_tried_again(checkout: Path) -> None:
    failed = _run(checkout, "run_all.sh", NO_INDEX="1")
    assert failed.returncode == 1
    assert "ERROR: the installation failed" in failed.stderr
    assert not _calls(checkout, "run pocket")
    assert _run(checkout, "run_all.sh").returncode == 0
    assert _calls(checkout, "run pocket")


@pytest.mark.parametrize(
    ("arguments", "called"),
    [
        ([], "run pocket"),
        (["--seed", "3"], "run pocket --seed 3"),
        (["gpt2", "--set", "a=b c"], "run gpt2 --set a=b c"),
        (["my.yaml"], "run my.yaml"),
    ],
)
def test_the_preset_is_pocket_unless_named(checkout: Path, arguments: list[str], called: str) -> None:
    _run(checkout, "run_all.sh", *arguments)
    assert _calls(checkout, "run ")[-1] == called


def test_the_exit_code_of_the_run_is_passed_on(checkout: Path) -> None:
    assert _run(checkout, "run_all.sh", RUN_ENDS_WITH="75").returncode == 75


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"OLD": "1"}, "older than Python 3.11"),
        ({"NO_VENV": "1"}, "cannot make virtual environments"),
        ({"PYTHON": "/nowhere/python3"}, "is not a command"),
    ],
)
@pytest.mark.parametrize("script", ["run_all.sh", "run_tests.sh"])
def test_a_python_that_will_not_do_is_named(
    checkout: Path, script: str, environment: dict[str, str], message: str
) -> None:
    result = _run(checkout, script, **environment)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("ERROR: ")
    assert message in line


def test_an_unknown_kind_of_test_is_answered_with_the_known_ones(checkout: Path) -> None:
    result = _run(checkout, "run_tests.sh", "fast")
    assert result.returncode == 2
    assert result.stderr == "ERROR: unknown mode fast; allowed: quick, unit, integration, coverage, all\n"


@pytest.mark.parametrize("given", [["pocket", "--slurm", "--seeds", "1", "2"], ["--slurm", "--seeds", "1", "2"]])
def test_with_slurm_an_experiment_is_submitted_and_not_run(checkout: Path, given: list[str]) -> None:
    assert _run(checkout, "run_all.sh", *given).returncode == 0
    assert _calls(checkout, "submit") == ["submit pocket --seeds 1 2"]
    assert not _calls(checkout, "run pocket")


def test_every_dependency_is_pinned() -> None:
    import re
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + extras["pocket"] + extras["gguf"] + extras["dev"]
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    names = {re.split(r"[<>=\[; ]", text)[0].lower().replace("_", "-") for text in wanted}
    assert names <= pinned
