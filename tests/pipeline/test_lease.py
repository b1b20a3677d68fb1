import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from isotone.errors import BlockedError
from isotone.pipeline import lease as lease_module
from isotone.pipeline.lease import holder, lease

HOLDER = """
import sys, time
from pathlib import Path
from isotone.pipeline.lease import lease
with lease(Path(sys.argv[1]), "node"):
    print("held", flush=True)
    time.sleep(60)
"""


def _start_holder(path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.integration
def test_a_second_process_is_told_who_holds_the_node(tmp_path: Path) -> None:
    path = tmp_path / "leases" / "node.json"
    process = _start_holder(path)
    try:
        with pytest.raises(BlockedError, match=f"process {process.pid} on "), lease(path, "node"):
            pass
        assert (holder(path) or {})["pid"] == process.pid
    finally:
        process.kill()
        process.wait()


@pytest.mark.integration
def test_a_killed_holder_strands_nobody(tmp_path: Path) -> None:
    path = tmp_path / "node.json"
    process = _start_holder(path)
    process.kill()
    process.wait()
    assert holder(path) is None
    with lease(path, "node"):
        assert (holder(path) or {})["pid"] == os.getpid()
    assert not path.exists()


def test_a_torn_lease_strands_nobody(tmp_path: Path) -> None:
    path = tmp_path / "node.json"
    path.write_bytes(b'{"host": "a')
    with lease(path, "node"):
        pass


def _write_foreign(path: Path, **changes: object) -> None:
    foreign = {"host": "elsewhere", "boot_id": "b", "pid": 1, "process_started": 0.0, "job_id": "7", "restart_count": 0}
    path.write_text(json.dumps({**foreign, "heartbeat": 3, **changes}))


def test_the_same_job_restarted_elsewhere_takes_its_lease_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "node.json"
    _write_foreign(path)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with lease(path, "node"):
        pass


def test_a_silent_holder_elsewhere_is_waited_for_before_it_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "node.json"
    _write_foreign(path)
    monkeypatch.setattr(lease_module, "SILENCE_S", 1.5)
    began = time.monotonic()
    with lease(path, "node"):
        pass
    assert time.monotonic() - began >= 1.5


def test_a_beating_holder_elsewhere_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "node.json"
    _write_foreign(path)
    monkeypatch.setattr(lease_module, "SILENCE_S", 10)
    monkeypatch.setattr(lease_module.time, "sleep", lambda _: _write_foreign(path, heartbeat=4))
    with pytest.raises(BlockedError, match="process 1 on elsewhere, job 7"), lease(path, "node"):
        pass


def _contend(path: Path, start: float, results: "multiprocessing.Queue[str]") -> None:
    time.sleep(max(0.0, start - time.time()))
    try:
        with lease(path, "node"):
            results.put("won")
            time.sleep(2)
    except BlockedError:
        results.put("blocked")


@pytest.mark.integration
def test_of_several_processes_exactly_one_wins(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for attempt in range(5):
        results: multiprocessing.Queue[str] = context.Queue()
        start = time.time() + 0.3
        processes = [
            context.Process(target=_contend, args=(tmp_path / f"{attempt}.json", start, results)) for _ in range(4)
        ]
        for process in processes:
            process.start()
        outcomes = sorted(results.get(timeout=30) for _ in processes)
        for process in processes:
            process.join()
        assert outcomes == ["blocked", "blocked", "blocked", "won"]
