"""A run's folder is found under whatever name a user gives it."""

from pathlib import Path

import pytest

from isotone.pipeline.run_directory import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run beside its setup."""
    folder = tmp_path / "runs/name/seed-42"
    (folder / "records").mkdir(parents=True)
    (folder / "config.yaml").touch()
    (folder.parent / "setup").mkdir()
    return folder


@pytest.mark.parametrize(("inside", "given"), [(".", "."), (".", "../seed-42"), ("records", ".."), ("..", ".")])
def test_a_run_is_found_from_within(run: Path, inside: str, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run / inside)
    assert RunDirectory.find(Path(given)).setup.resolve() == run.parent / "setup"


def test_a_run_is_found_through_a_link_to_it(run: Path, tmp_path: Path) -> None:
    (tmp_path / "the run").symlink_to(run)
    assert RunDirectory.find(tmp_path / "the run").setup == run.parent / "setup"


def test_a_run_whose_bulk_lies_elsewhere_keeps_its_setup(run: Path, tmp_path: Path) -> None:
    """The seed's folder was moved to another disk and linked to."""
    (tmp_path / "scratch").mkdir()
    elsewhere = run.rename(tmp_path / "scratch/seed-42")
    run.symlink_to(elsewhere)
    assert RunDirectory.find(run).setup == run.parent / "setup"
