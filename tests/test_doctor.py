"""Doctor says yes on a sound machine, and no, with exit code 3, for each promise that is broken."""

import contextlib
import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest

from isotone import doctor, records
from isotone.errors import CheckFailedError


@pytest.fixture
def rows() -> list[str]:
    return []


@pytest.mark.integration
def test_a_sound_machine_passes_every_check(tmp_path: Path, rows: list[str]) -> None:
    findings = doctor.run_doctor(tmp_path / "runs", rows.append)
    assert [finding.check for finding in findings] == list(doctor.CHECKS)
    assert rows[-1] == "everything holds"
    assert list(tmp_path.iterdir()) == []


def test_one_failed_check_is_named_and_the_others_are_still_made(
    tmp_path: Path, rows: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(scratch: Path) -> str:
        raise OSError("the disk\nis tired")

    monkeypatch.setattr(doctor, "CHECKS", {"first": broken, "second": lambda scratch: "fine"})
    with pytest.raises(CheckFailedError, match=r"^doctor: first:") as caught:
        doctor.run_doctor(tmp_path, rows.append)
    assert caught.value.exit_code == 3
    assert rows[1].startswith("FAIL  first           OSError: the disk is tired")
    assert rows[2].startswith("ok    second          fine")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named() -> None:
    with pytest.raises(CheckFailedError, match="/dev/null cannot be written"):
        doctor.run_doctor(Path("/dev/null/runs"), print)


@pytest.mark.parametrize("check", [doctor.check_platform, doctor.check_configuration, doctor.check_file_system])
def test_a_check_passes_here(check: object, tmp_path: Path) -> None:
    finding = doctor.examine("it", check, tmp_path)  # type: ignore[arg-type]
    assert finding.holds, finding.text


def _text_of_failure(check: object, folder: Path) -> str:
    finding = doctor.examine("it", check, folder)  # type: ignore[arg-type]
    assert not finding.holds
    return finding.text


def test_another_system_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "win32")
    assert "Linux and macOS" in _text_of_failure(doctor.check_platform, tmp_path)


def test_too_little_memory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.environment, "memory_bytes", lambda: 2**30)
    assert "1.0 GiB of memory" in _text_of_failure(doctor.check_platform, tmp_path)


def test_a_seed_in_the_environment_that_is_none_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERIMENT_SEED", "many")
    assert "EXPERIMENT_SEED" in _text_of_failure(doctor.check_configuration, tmp_path)


def test_a_missing_package_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.environment, "versions", lambda: {"torch": "absent", "transformers": "5"})
    monkeypatch.setattr(doctor.pkgutil, "walk_packages", lambda *_: [])
    assert "not installed: torch" in _text_of_failure(doctor.check_imports, tmp_path)


def test_blind_verification_of_folders_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "verify_directory", lambda path: None)
    assert "truncated file" in _text_of_failure(doctor.check_file_system, tmp_path)


def test_a_full_disk_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.environment, "free_disk_bytes", lambda folder: 10**9)
    assert "1.0 GB free" in _text_of_failure(doctor.check_file_system, tmp_path)


@pytest.mark.integration
def test_a_lease_that_holds_nobody_off_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isotone.pipeline.lease.lease", lambda path, what: contextlib.nullcontext())
    assert "two processes held" in _text_of_failure(doctor.check_lease, tmp_path)


def test_trainings_that_differ_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = itertools.count()
    monkeypatch.setattr("isotone.rehearsal.rehearse", lambda folder, device: str(next(digests)))
    assert "with the same seed differ" in _text_of_failure(doctor.check_determinism, tmp_path)


@pytest.mark.integration
def test_a_checkpoint_that_loses_a_moment_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from isotone.training import loop

    restore = loop.load_optimizer_tensors

    def forgetful(optimizer: object, trainable: object, tensors: dict, *rest: object) -> object:
        return restore(optimizer, trainable, {k: v * ("exp_avg_sq" not in k) for k, v in tensors.items()}, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "load_optimizer_tensors", forgetful)
    assert "differs from an uninterrupted one" in _text_of_failure(doctor.check_resume, tmp_path)


def test_a_certificate_that_overlooks_a_sign_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isotone.constraint.certify", lambda model: SimpleNamespace(verdict="strict"))
    assert "wrong sign was certified strict" in _text_of_failure(doctor.check_monotonicity, tmp_path)


def test_monotonicity_is_kept_and_certified_here(tmp_path: Path) -> None:
    finding = doctor.examine("it", doctor.check_monotonicity, tmp_path)
    assert finding.holds, finding.text
