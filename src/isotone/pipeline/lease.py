"""One writer a node: who works on it says so in a lease, renews it, and gives it back.

A lease left by a kill is taken over when its holder is known to be gone: on this host, when the process is gone (or its
number belongs to a later process, or the host has booted since); elsewhere, when the same job was restarted, or when
the heartbeat was *observed* not to change for 90 seconds (clocks of two hosts are never compared).
"""

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock

from isotone import records
from isotone.errors import BlockedError, IsotoneError

HEARTBEAT_S = 15.0
SILENCE_S = 90.0


@contextmanager
def lease(path: Path, what: str) -> Iterator[None]:
    """Hold a node while its work is done.

    Raises:
        BlockedError: another process holds it; says which.
    """
    mine = _identity()
    _acquire(path, what, mine)
    ended = threading.Event()
    beat = threading.Thread(target=_beat, args=(path, mine, ended), daemon=True)
    beat.start()
    try:
        yield
    finally:
        ended.set()
        beat.join()
        with suppress(FileNotFoundError, records.CorruptError):
            if _same_holder(records.read_json(path), mine):
                path.unlink()


def holder(path: Path) -> dict[str, Any] | None:
    """Return who holds a node now, or None; a holder on this host that is gone does not count."""
    try:
        found = records.read_json(path)
    except (FileNotFoundError, records.CorruptError):
        return None
    return None if _known_to_be_gone(found, _identity()) else found


def _acquire(path: Path, what: str, mine: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(".lock")):
        try:
            found = records.read_json(path)
        except FileNotFoundError:
            found = None
        except records.CorruptError:
            found = {}
        if found is not None:
            if found and not _known_to_be_gone(found, mine) and not _silent(path, found):
                since = f", job {found['job_id']}" if found.get("job_id") else ""
                raise BlockedError(
                    f"{what} is being worked on by process {found['pid']} on {found['host']}{since}; "
                    f"wait for it, or stop it (if it is gone, its lease {path} ends by itself)"
                )
            path.unlink(missing_ok=True)
        _create(path, what, mine)


def _create(path: Path, what: str, mine: dict[str, Any]) -> None:
    """Create the lease so that of two hosts, whose locks may not see each other, one wins: link(2) is atomic on NFS."""
    aside = path.with_name(f".{path.name}.{mine['host']}.{mine['pid']}")
    records.write_json(aside, mine)
    try:
        os.link(aside, path)
    except FileExistsError as error:
        raise BlockedError(f"{what} was taken by another process a moment ago; run again when it has ended") from error
    finally:
        aside.unlink()


def _beat(path: Path, mine: dict[str, Any], ended: threading.Event) -> None:
    count = 0
    while not ended.wait(HEARTBEAT_S):
        count += 1
        with suppress(OSError, IsotoneError):  # a missed beat is made up for by the next
            if not _same_holder(records.read_json(path), mine):
                return
            records.write_json(path, {**mine, "heartbeat": count})


def _identity() -> dict[str, Any]:
    boot = Path("/proc/sys/kernel/random/boot_id")
    return {
        "host": socket.gethostname(),
        "boot_id": boot.read_text().strip() if boot.exists() else str(int(psutil.boot_time())),
        "pid": os.getpid(),
        "process_started": psutil.Process().create_time(),
        "job_id": os.environ.get("SLURM_JOB_ID"),
        "restart_count": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        "heartbeat": 0,
    }


def _same_holder(found: dict[str, Any], mine: dict[str, Any]) -> bool:
    return all(found.get(key) == mine[key] for key in ("host", "boot_id", "pid", "process_started"))


def _known_to_be_gone(found: dict[str, Any], mine: dict[str, Any]) -> bool:
    if found.get("job_id") and found["job_id"] == mine["job_id"] and found["restart_count"] < mine["restart_count"]:
        return True
    if found.get("host") != mine["host"]:
        return False
    if found.get("boot_id") != mine["boot_id"]:
        return True
    try:
        process = psutil.Process(found["pid"])
        return process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - found["process_started"]) > 1
    except psutil.NoSuchProcess:
        return True


def _silent(path: Path, found: dict[str, Any]) -> bool:
    """Watch a holder on another host; its lease is void when its heartbeat stands still."""
    if found.get("host") == socket.gethostname():
        return False
    deadline = time.monotonic() + SILENCE_S
    while time.monotonic() < deadline:
        time.sleep(1)
        with suppress(FileNotFoundError, records.CorruptError):
            if records.read_json(path).get("heartbeat") != found.get("heartbeat"):
                return False
    return True
