"""Runs of the real command line on the bundled model, made as short as they can be while every stage does its work."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SHORT = [
    "--set", "training.epochs=0.01",
    "--set", "evaluation.num_documents=3",
    "--set", "attacks.num_documents=4",
    "--set", "attacks.num_search_documents=3",
    "--set", "attacks.triggers.iterations=2",
    "--set", "runtime.threads=1",
]  # fmt: skip

Isotone = Callable[..., "subprocess.CompletedProcess[str]"]


def isotone(*arguments: object, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run the command line as a user would, and return its exit code and output."""
    return subprocess.run(
        [sys.executable, "-m", "isotone", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=600,
    )


def run(out: Path, *arguments: object, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run the shortened pocket-quick experiment."""
    return isotone("run", "pocket-quick", "--out", out, *SHORT, *arguments, **environment)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output folder of one uninterrupted run."""
    out = tmp_path_factory.mktemp("finished")
    done = run(out)
    assert done.returncode == 0, done.stderr
    return out
