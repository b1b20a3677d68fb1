"""What records and logs say about the machine is JSON; systems that cannot keep the promises are refused."""

import json
from pathlib import Path

import pytest
import torch

from isotone import environment
from isotone.errors import UsageError


def test_provenance_is_json_and_names_what_decides_figures(tmp_path: Path) -> None:
    found = json.loads(json.dumps(environment.provenance(tmp_path)))
    assert found["packages"]["torch"] == torch.__version__
    assert found["packages"]["isotone"] != "absent"
    assert found["threads"] == torch.get_num_threads()
    assert found["free_disk_bytes"] > 0


def test_a_package_that_is_not_installed_is_said_to_be_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "PACKAGES", ("no-such-package",))
    assert environment.versions()["no-such-package"] == "absent"


def test_without_a_gpu_the_line_says_what_is_used_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert environment.gpu_line().startswith("no GPU: running on the CPU (")
    assert "\n" not in environment.gpu_line()


def test_a_gpu_is_named_with_memory_and_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name, total_memory = "NVIDIA A100-SXM4-40GB", 40 * 2**30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: Properties)
    assert environment.gpu_line().startswith("GPU 0: NVIDIA A100-SXM4-40GB, 40 GiB, driver ")


def test_free_space_is_told_for_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    assert environment.free_disk_bytes(tmp_path / "a" / "b") > 0


def test_cores_are_those_that_this_process_may_use() -> None:
    import os

    assert 1 <= environment.cpu_cores() <= (os.cpu_count() or 1)


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_linux_and_macos_are_served(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", platform)
    environment.require_platform()


def test_other_systems_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "win32")
    with pytest.raises(UsageError, match="Linux and macOS"):
        environment.require_platform()
